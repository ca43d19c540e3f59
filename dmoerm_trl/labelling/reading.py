"""Reading a judge's answer, strictly: what does not have the form asked for is unreadable."""

import json
import re
from typing import Literal

WANTED = "1 or 2 alone, or on the last line after `Answer:`"
"""What [`read_choice`] reads, in words."""
WANTED_STRUCTURED = '{"choice": 1} or {"choice": 2}'

_NUMBER = r"(?:【([12１２])】|([12１２]))[.。]?"
_ALONE = re.compile(_NUMBER)
_LABELLED = re.compile(rf"(?:answer|答案)\s*[:：]\s*{_NUMBER}", re.IGNORECASE)
_TAG = r"(?:seed:)?(?:think|thinking|thought|reasoning)"
_THOUGHT = re.compile(rf"\A.*(?:</{_TAG}>|\[/THINK\])", re.DOTALL)
_THINKING_STILL = re.compile(rf"\s*(?:<{_TAG}>|\[THINK\])")


def read_choice(text: str, *, structured: bool = False) -> Literal[1, 2] | None:
    """
    The response that an answer names, or None.

    An answer is readable in three forms:

    - The number alone: `1`, `2`, full-width or as `【1】`, with or without a full stop.
    - The number on the last line, after `Answer:` or `答案:`.
    - With `structured`, the JSON object `{"choice": 1}` or `{"choice": 2}`, and no other form.

    Markdown's asterisks and white space around the answer do not matter. All before the last `</think>` is thinking and does
    not matter either, whether the tag that opens it was sent or not; thinking that was opened and does not end is no answer.
    The tags of other models are known too: `thinking`, `thought`, `reasoning`, `seed:think`, and `[THINK]`.
    """
    text = _THOUGHT.sub("", text)
    if _THINKING_STILL.match(text):
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
