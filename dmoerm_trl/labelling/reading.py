"""Reading a judge's answer, strictly: what does not have the form asked for is unreadable."""

import json
import re
from typing import Literal

_NUMBER = r"(?:【([12１２])】|([12１２]))[.。]?"
_ALONE = re.compile(_NUMBER)
_LABELLED = re.compile(rf"(?:answer|答案)\s*[:：]\s*{_NUMBER}", re.IGNORECASE)
_REASONING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


def read_choice(text: str, *, structured: bool = False) -> Literal[1, 2] | None:
    """
    The response that an answer names, or None.

    An answer is readable in three forms:

    - The number alone: `1`, `2`, full-width or as `【1】`, with or without a full stop.
    - The number on the last line, after `Answer:` or `答案:`.
    - With `structured`, the JSON object `{"choice": 1}` or `{"choice": 2}`, and no other form.

    Markdown's asterisks, white space around the answer and a block `<think>...</think>` before it do not matter.
    """
    text = _REASONING.sub("", text)
    if structured:
        try:
            pairs = json.loads(text, object_pairs_hook=tuple)
        except (ValueError, RecursionError):
            return None
        if isinstance(pairs, tuple) and len(pairs) == 1:
            ((name, value),) = pairs
            return value if name == "choice" and type(value) is int and value in (1, 2) else None
        return None
    text = text.replace("*", "").strip()
    last = text.splitlines()[-1].strip() if text else ""
    found = _ALONE.fullmatch(text) or _LABELLED.fullmatch(last)
    return int(found[1] or found[2]) if found else None
