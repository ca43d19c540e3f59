"""TRL's preference formats, in which the prompt may be a part of `chosen` and `rejected`."""

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import regex

from .chat_text import format_of
from .preference_row import RowError, is_blank, short, turns_of

IN_ONE_TEXT, BY_WORDS, BY_CHARACTERS = "chats in one text", "words in common", "characters in common"
"""How a prompt was found in texts. The last two are guesses: the common beginning of both texts counts as the prompt."""


@dataclass(frozen=True)
class Pair:
    """Prompt with a better and a worse response."""

    prompt: list[dict]
    responses: list[str]
    found: str | None = None
    """How the prompt was found in texts. None if the prompt was given, or if both sides are turns."""


def pair_of(raw: dict[str, Any]) -> Pair:
    """
    Return the pair of a row with `chosen`, `rejected` and possibly `prompt`.

    - Turns: the prompt consists of `prompt` and the turns that both sides begin with. If the sides are complete chats, a
      `prompt` must be among their common turns.
    - Chats in one text, in a format of [`chat_text`]: they are read as turns.
    - Text with a `prompt`: it is used unchanged.
    - Text without a `prompt`: the common beginning of both sides is the prompt. It ends before the first word that differs,
      as in TRL, or before the first such character in scripts without spaces between words.

    Raises:
        [`RowError`]: If no prompt can be found, or if it is not followed by exactly one response.
    """
    chosen, rejected, prompt = raw["chosen"], raw["rejected"], raw.get("prompt")
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise RowError(
            "bad responses",
            f"fields `chosen` and `rejected`: got {short(chosen)} and {short(rejected)}, "
            "need both as text or both as turns.",
        )
    if isinstance(chosen, list):
        given = [] if prompt is None else turns_of(prompt, "prompt")
        return _of_turns(given, turns_of(chosen, "chosen"), turns_of(rejected, "rejected"))
    if form := format_of(chosen[: _shared(chosen, rejected)]):
        given = [] if prompt is None else turns_of(prompt, "prompt")
        if isinstance(prompt, str) and form.roles(prompt):
            given = [turn for turn in form.turns(prompt) if turn["content"]]
        return _of_turns(given, form.turns(chosen), form.turns(rejected), found=IN_ONE_TEXT)
    if prompt is not None:
        return Pair(turns_of(prompt, "prompt"), [chosen, rejected])
    return _of_text(chosen, rejected)


def _of_turns(given: list[dict], chosen: list[dict], rejected: list[dict], found: str | None = None) -> Pair:
    whole = not given or any(side and side[0]["role"] != "assistant" for side in (chosen, rejected))
    if not whole:
        chosen, rejected = given + chosen, given + rejected
    shared = _shared(chosen, rejected)
    if shared == len(chosen) == len(rejected):  # both chats are the same: the last turn is the response
        shared -= 1
    prompt = chosen[: max(shared, 0)]
    if not prompt:
        raise _no_beginning()
    if given and whole and not _contains(prompt, given):
        raise RowError(
            "prompt that is not in the chats",
            f"field `prompt`: got {short(given[-1]['content'])}, which is no turn that `chosen` and `rejected` begin with "
            f"({[turn['role'] for turn in prompt]}), need the prompt of both: fix it, or remove `prompt` or the turns.",
        )
    sides = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    return Pair(prompt, [response_of(turns, name) for name, turns in sides.items()], found)


def response_of(completion: Any, name: str) -> str:
    """
    Return the text of a response, which is a string or a list with one turn of the assistant.

    Args:
        name (`str`): Name of the field in error messages.

    Raises:
        [`RowError`]: If the response is neither.
    """
    if isinstance(completion, str):
        return completion
    turns = turns_of(completion, name)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise RowError(
            "bad responses",
            f"field `{name}`: got turns of {[turn['role'] for turn in turns]} after the prompt, "
            "need one turn of the assistant: move the turns before it into `prompt`.",
        )
    return turns[0]["content"]


def _contains(turns: list[dict], given: list[dict]) -> bool:
    """Return whether `given` is a part of `turns`, apart from case and the amount of white space."""

    def key(turn: dict) -> tuple[str, str]:
        return turn["role"], " ".join(turn["content"].split()).casefold()

    all_keys, keys = [*map(key, turns)], [*map(key, given)]
    return any(all_keys[start : start + len(keys)] == keys for start in range(len(all_keys) - len(keys) + 1))


def _shared(first: Any, second: Any) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _no_beginning() -> RowError:
    return RowError(
        "empty prompt",
        "field `chosen`: got no beginning in common with `rejected`, need one because it is the prompt if there is no field "
        "`prompt`: add `prompt`.",
    )


# ------------------------------------------------------------------------------------------ texts without a format

_UNSPACED = regex.compile(  # scripts without spaces between words, and their punctuation
    r"[\p{scx=Hani}\p{scx=Hira}\p{scx=Kana}\p{Bopomofo}\p{Yi}\p{lb=SA}\p{Tibetan}"
    r"\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65].*",
    regex.DOTALL,
)
_OPENS_A_SYLLABLE = regex.compile(
    r"\p{Logical_Order_Exception}.*", regex.DOTALL
)  # Thai and Lao vowels before consonants
_SENTENCE_END = regex.compile(r"[。！？!?…\n]|\r\n")


def _of_text(chosen: str, rejected: str) -> Pair:
    if chosen == rejected:
        raise RowError(
            "empty prompt",
            "fields `chosen` and `rejected`: got the same text, need a prompt and two responses because "
            "the prompt is found by their difference: add `prompt` or drop the row.",
        )
    sides = regex.findall(r"\X", chosen), regex.findall(r"\X", rejected)  # grapheme clusters
    first = sides[0]
    shared = at = _shared(*sides)

    def unspaced(character: str) -> bool:
        return _UNSPACED.fullmatch(character) is not None

    def parts(at: int) -> bool:
        """Return whether a word ends before the character at this index."""
        before = first[at - 1]
        after = [first[at]] if at < shared else [side[at] for side in sides if at < len(side)]
        return before.isspace() or (
            (unspaced(before) or all(map(unspaced, after))) and not _OPENS_A_SYLLABLE.fullmatch(before)
        )

    while at and not parts(at):
        at -= 1
    by_characters = at > 0 and (unspaced(first[at - 1]) or (at < len(first) and unspaced(first[at])))
    if by_characters:  # one side may be the beginning of the other
        while at and any(is_blank("".join(side[at:])) for side in sides):
            at -= 1
            while at and not _SENTENCE_END.fullmatch(first[at - 1]):
                at -= 1
    elif at:
        at -= first[at - 1] == " "  # the space belongs to the responses, as in TRL
    if not at:
        raise _no_beginning()
    texts = ["".join(side[at:]) for side in sides]
    return Pair(turns_of("".join(first[:at]), "prompt"), texts, BY_CHARACTERS if by_characters else BY_WORDS)
