"""Strict parsing of a judge's answer: an answer that does not have the required form is unreadable."""

import json
import re
from typing import Literal

WANTED = "1 or 2 alone, or on the last line after `Answer:`"
"""Description of the forms that [`read_choice`] accepts."""
WANTED_STRUCTURED = '{"choice": 1} or {"choice": 2}'

_NUMBER = r"(?:【([12１２])】|([12１２]))[.。]?"
_ALONE = re.compile(_NUMBER)
_LABELLED = re.compile(rf"(?:answer|答案)\s*[:：]\s*{_NUMBER}", re.IGNORECASE)
_TAG = r"(?:seed:)?(?:think|thinking|thought|reasoning)"
_THINKING = re.compile(rf"\A.*(?:</{_TAG}>|\[/THINK\])", re.DOTALL)
_UNCLOSED_THINKING = re.compile(rf"\s*(?:<{_TAG}>|\[THINK\])")


def read_choice(text: str, *, structured: bool = False) -> Literal[1, 2] | None:
    """
    Read which response an answer names; None if it is unreadable.

    An answer is readable in one of these forms:

    - The number alone: `1`, `2`, full-width or as `【1】`, with or without a full stop.
    - The number on the last line, after `Answer:` or `答案:`.
    - With `structured`, only the JSON object `{"choice": 1}` or `{"choice": 2}`.

    Markdown asterisks and surrounding white space are ignored. Everything up to the last `</think>` is ignored as thinking,
    even if the opening tag is missing; a thinking block that is not closed is no answer. The tags of other models are
    recognised too: `thinking`, `thought`, `reasoning`, `seed:think`, and `[THINK]`.
    """
    text = _THINKING.sub("", text)
    if _UNCLOSED_THINKING.match(text):
        return None
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
