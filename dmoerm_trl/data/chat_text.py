"""Parser of chats that are written as one text in a known format."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_ROLES = {
    "human": "user",
    "instruction": "user",
    "input": "user",
    "inst": "user",
    "用户": "user",
    "人类": "user",
    "问": "user",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "response": "assistant",
    "/inst": "assistant",
    "助手": "assistant",
    "答": "assistant",
    "observation": "tool",
    "ipython": "tool",
    "系统": "system",
}
"""Name of a role in some format -> role. Other names are kept in lower case."""

_BEGINNING = re.compile(
    r"(?:<s>|<bos>|\[BOS\]|\[gMASK\]|<sop>|<\|begin_of_text\|>|<\|begin▁of▁sentence\|>|<｜begin▁of▁sentence｜>"
    r"|<BOS_TOKEN>|<\|endoftext\|>)"
)
_LLAMA2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)


@dataclass(frozen=True)
class TranscriptFormat:
    """
    Format in which a chat is written as one text.

    Args:
        opener (`re.Pattern`): Pattern that opens a turn. Its group `role` names the role.
        end (`re.Pattern`, *optional*): Pattern that may end a turn.
    """

    opener: re.Pattern[str]
    end: re.Pattern[str] | None = None

    def roles(self, text: str) -> list[str]:
        """Return the role of each turn, one per opener."""
        return [role for role, _, _ in self._openers(text)]

    def turns(self, text: str) -> list[dict[str, str]]:
        """
        Return the turns, without white space at either end.

        Successive turns of the same role are joined. Text before the first opener is a system turn.
        """
        openers = [*self._openers(text), ("", len(text), len(text))]
        parts = [("system", _BEGINNING.sub("", text[: openers[0][1]]))]
        for (role, _, start), (_, stop, _) in zip(openers, openers[1:], strict=False):
            said = text[start:stop]
            if role == "user" and (system := _LLAMA2_SYSTEM.match(said)):
                parts.append(("system", system[1]))
                said = said[system.end() :]
            parts.append((role, said if self.end is None else self.end.sub("", said)))
        turns: list[dict[str, str]] = []
        for position, (role, said) in enumerate(parts):
            if position == 0 and not said.strip():
                continue
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += f"\n\n{said.strip()}"
            else:
                turns.append({"role": role, "content": said.strip()})
        return turns

    def _openers(self, text: str) -> Iterator[tuple[str, int, int]]:
        """Yield (role, start of the opener, end of the opener) for each turn."""
        for found in self.opener.finditer(text):
            name = found["role"].lower()
            yield _ROLES.get(name, name), found.start(), found.end()


def _format(opener: str, end: str | None = None) -> TranscriptFormat:
    return TranscriptFormat(re.compile(opener), end and re.compile(rf"(?:\s*(?:{end}))+\s*\Z"))


HH = _format(r"(?:\A|\n\n)(?P<role>Human|Assistant):")
"""Anthropic's HH: each turn is a paragraph `Human: ...` or `Assistant: ...`."""

FORMATS = (
    _format(r"<\|im_start\|>(?P<role>[\w-]+)(?:\n|<\|im_sep\|>)", r"<\|im_end\|>"),  # ChatML: Qwen, SmolLM2; Phi-4
    _format(
        r"<\|(?:start_header_id|header_start)\|>(?P<role>\w+)<\|(?:end_header_id|header_end)\|>",
        r"<\|(?:eot_id|eot|eom_id)\|>",
    ),  # Llama 3 and 4
    _format(r"<start_of_turn>(?P<role>\w+)\n", r"<end_of_turn>"),  # Gemma
    _format(
        r"<\|start\|>(?P<role>\w+)(?:<\|channel\|>\w+)?<\|message\|>", r"<\|(?:end|return)\|>"
    ),  # gpt-oss, only the final channel
    _format(r"<\|start_of_role\|>(?P<role>\w+)<\|end_of_role\|>", r"<\|end_of_text\|>"),  # Granite
    _format(
        r"<\|START_OF_TURN_TOKEN\|><\|(?P<role>USER|CHATBOT|SYSTEM)_TOKEN\|>", r"<\|END_OF_TURN_TOKEN\|>"
    ),  # Cohere
    _format(r"<｜(?P<role>User|Assistant)｜>", r"<｜end▁of▁sentence｜>"),  # DeepSeek
    _format(
        r"<\|(?P<role>system|user|assistant|observation)\|>\n?", r"</s>|<\|end\|>|<\|endoftext\|>"
    ),  # Zephyr, Phi-3, GLM
    _format(r"\[(?P<role>/?INST)\]", r"</s>(?:\s*<s>)?"),  # Llama 2, Mistral
    _format(r"GPT4 (?:Correct )?(?P<role>User|Assistant):", r"<\|end_of_turn\|>"),  # OpenChat
    _format(r"(?:\A|\n)### ?(?P<role>Instruction|Input|Response|Human|User|Assistant|System):"),  # Alpaca
    HH,
    _format(
        r"(?:\A|\n)[ \t]*(?P<role>Human|User|USER|Assistant|ASSISTANT|AI|用户|人类|助手|问|答)[ \t]*[:：]"
    ),  # one line per turn
    _format(r"(?:\A|\s|</s>)(?P<role>USER|ASSISTANT):", r"</s>"),  # Vicuna
)
"""The known formats, in the order in which they are tried. Formats with special tokens come first."""


def format_of(text: str) -> TranscriptFormat | None:
    """Return the first format in which a turn of the assistant follows one of the user, or None."""
    for form in FORMATS:
        roles = form.roles(text)
        if "user" in roles and "assistant" in roles[roles.index("user") :]:
            return form
    return None
