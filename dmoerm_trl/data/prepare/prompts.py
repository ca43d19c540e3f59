"""Parse the formats of prompts to turns."""

import re
from typing import Any

from ..chat_text import HH
from ..preference_row import RowError, short, typed


def transcript(text: Any, name: str = "transcript") -> list[dict[str, str]]:
    """
    Parse a transcript of HH, in which each turn is a paragraph `Human: ...` or `Assistant: ...`. Consecutive turns of one
    speaker are joined. Errors call the field `name`.
    """
    turns = HH.turns(typed(text, str, name))
    if not turns or turns[0]["role"] == "system":
        raise RowError(
            "no transcript", f"field `{name}`: got {short(text)}, need one that begins with 'Human:' or 'Assistant:'."
        )
    return turns


def helpsteer2_prompt(text: Any) -> list[dict[str, str]]:
    """
    Parse a prompt of HelpSteer 2: the user's first turn, then a line `<extra_id_1>` with the speaker's name before each turn.
    """
    first, *parts = re.split(r"\n*<extra_id_1>(User|Assistant)\n", typed(text, str, "prompt"))
    turns = [{"role": "user", "content": first}]
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": speaker.lower(), "content": said})
    return turns
