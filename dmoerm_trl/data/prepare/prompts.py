"""The ways in which sets write a prompt, as turns."""

import re

from ..preference_row import RowError, short


def transcript(text: str) -> list[dict[str, str]]:
    """HH's transcripts, a paragraph `Human: ...` or `Assistant: ...` a turn; turns of one speaker in a row are one turn."""
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if before.strip() or not parts:
        raise RowError(
            "no transcript", f"got the transcript {short(text)}, need one that begins with 'Human:' or 'Assistant:'."
        )
    turns: list[dict[str, str]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = {"Human": "user", "Assistant": "assistant"}[speaker], said.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        else:
            turns.append({"role": role, "content": content})
    return turns


def helpsteer2_prompt(text: str) -> list[dict[str, str]]:
    """HelpSteer 2's prompts: the user's first turn, then `<extra_id_1>` and the speaker's name on a line before each turn."""
    first, *parts = re.split(r"\n*<extra_id_1>(User|Assistant)\n", text)
    turns = [{"role": "user", "content": first}]
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": speaker.lower(), "content": said})
    return turns
