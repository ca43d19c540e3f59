"""Preference rows, each with one prompt and two or more ranked responses, and the checks of their values."""

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import regex

from ..tasks import OTHERS, TaskTable


@dataclass(frozen=True)
class PreferenceRow:
    """
    One prompt with its ranked responses.

    Args:
        prompt (`list[dict]`):
            Turns with `role` and `content`, oldest first. The last turn is that of the user or of a tool.
        responses (`list[str]`):
            K >= 2 answers to the last turn.
        ranks (`list[int]`):
            One rank per response. 1 is the best, and ties are allowed. If all ranks are the same, the row has no overall
            preference and can train only the experts.
        task (`str`, *optional*):
            Name of the task, `"others"`, or `None` if the task is unknown.
        capability_ranks (`dict[str, list[int]]`):
            Capability point -> one rank per response. A row has no labels for a point that is neither here nor below.
        capability_pairs (`dict[str, list[list[int]]]`):
            Capability point -> pairs `[better, worse]` that a judge decided, as indices of responses from 0. They need not
            cover all pairs, and may contain cycles because judges are not transitive.

    Example:

    ```python
    from dmoerm_trl import PreferenceRow

    prompt = [{"role": "user", "content": "I feel a bit lonely."}]
    row = PreferenceRow(prompt, ["That sounds hard.", "So what?"], ranks=[1, 2], task="chitchat")
    assert row.pairs_of() == [(0, 1)]
    ```
    """

    prompt: list[dict]
    responses: list[str]
    ranks: list[int]
    task: str | None = None
    capability_ranks: dict[str, list[int]] = field(default_factory=dict)
    capability_pairs: dict[str, list[list[int]]] = field(default_factory=dict)

    @property
    def prompt_id(self) -> str:
        """Stable id of the prompt, which ignores case and the amount of white space."""
        turns = [[turn["role"], " ".join(turn["content"].split()).casefold()] for turn in self.prompt]
        return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:16]

    @property
    def labelled_points(self) -> list[str]:
        """Capability points that have labels, as ranks or as pairs."""
        return [*self.capability_ranks, *self.capability_pairs]

    def pairs_of(self, point: str | None = None) -> list[tuple[int, int]]:
        """
        Return the labels of a capability point as sorted pairs (better, worse) of indices of responses.

        Without a point, the labels are those of `ranks`. Ranks give a pair for every two responses whose ranks differ. Two
        responses with the same text form no pair, whatever their labels. The list is empty if there are no labels, or if
        all responses are tied.
        """
        return [pair for pair in self._labels_of(point) if not self._is_identical(pair)]

    @property
    def identical_pairs(self) -> list[tuple[int, int]]:
        """Pairs of responses with the same text but different labels, each listed once."""
        labels = (pair for point in (None, *self.labelled_points) for pair in self._labels_of(point))
        return sorted({(min(pair), max(pair)) for pair in labels if self._is_identical(pair)})

    def merged(self, keys: Sequence[Hashable]) -> "PreferenceRow":
        """Return the row in which all responses with the same key (such as their tokens) have the text of the first one."""
        first: dict[Hashable, str] = {}
        texts = [first.setdefault(key, text) for key, text in zip(keys, self.responses, strict=True)]
        return self if texts == self.responses else replace(self, responses=texts)

    def _labels_of(self, point: str | None) -> list[tuple[int, int]]:
        if point in self.capability_pairs:
            return sorted((better, worse) for better, worse in self.capability_pairs[point])
        ranks = self.ranks if point is None else self.capability_ranks.get(point, [])
        return [(i, j) for i, j in permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]

    def _is_identical(self, pair: tuple[int, int]) -> bool:
        return self.responses[pair[0]] == self.responses[pair[1]]


class RowError(ValueError):
    """Error in a row. Skipped rows are counted by its `reason`, which names the kind of error."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def turns_of(prompt: Any, name: str) -> list[dict]:
    """
    Convert a prompt to turns with the `role` and the text of the `content`.

    A string becomes one turn of the user. The parts of a turn's content are joined. A turn that calls a tool may have no
    content.

    Args:
        name (`str`): Name of the field in error messages.

    Raises:
        [`RowError`]: If the prompt is neither text nor turns, or a part of it is not text.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise RowError("bad prompt", f"field `{name}`: got {short(prompt)}, need text or a list of turns.")
    return [{"role": _role(turn, name), "content": turn_text(turn, name)} for turn in prompt]


_ROLE = regex.compile(r"[\w.-]+(?: [\w.-]+)*")


def _role(turn: Any, name: str) -> str:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise _bad_turn(turn, name)
    if not _ROLE.fullmatch(turn["role"]):
        raise RowError(
            "bad prompt",
            f"field `{name}`: got the role {short(turn['role'])}, need a word such as 'user', because a chat template writes "
            "it unchanged: fix the turn.",
        )
    return turn["role"]


def turn_text(turn: dict[str, Any], name: str) -> str:
    """
    Return the text of a turn. Its content may be a string or a list of text parts, or empty if the turn calls a tool.

    Errors call the field of the turn `name`.
    """
    content = turn.get("content")
    if isinstance(content, str):
        return content
    if turn.get("tool_calls") and content in (None, []):
        return ""
    if not isinstance(content, list) or not content:
        raise _bad_turn(turn, name)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            what = f"of type {short(part['type'])}" if isinstance(part, dict) and "type" in part else short(part)
            raise RowError(
                "content that is not text",
                f'field `{name}`: got a part of the content {what}, need {{"type": "text", "text": ...}} because nothing but '
                "text is read: drop the row.",
            )
        texts.append(text)
    return "".join(texts)


def _bad_turn(turn: Any, name: str) -> RowError:
    return RowError("bad prompt", f"field `{name}`: got the turn {short(turn)}, need `role` and `content` as text.")


def check_row(row: PreferenceRow, tasks: TaskTable | None = None) -> None:
    """
    Check the values of one row.

    Args:
        row (`PreferenceRow`): The row to check.
        tasks (`TaskTable`, *optional*): Tasks and capability points that the row may name. By default, all names are
            allowed.

    Raises:
        [`RowError`]: If the row cannot be used. The message names the field, its value, what is needed, and how to fix it.
    """
    check_prompt(row.prompt)
    if not isinstance(row.responses, list) or len(row.responses) < 2:
        raise RowError(
            "fewer than two responses",
            f"field `responses`: got {short(row.responses)}, need a list of two or more because a single one has no rank.",
        )
    for number, response in enumerate(row.responses, start=1):
        if not isinstance(response, str) or is_blank(response):
            raise RowError(
                "empty response",
                f"field `responses`: got {short(response)} as response {number}, need text because an empty response "
                "says nothing about quality: drop it together with its rank.",
            )
        check_characters(response, "responses")
    _check_ranks("ranks", row.ranks, len(row.responses))
    for point, ranks in row.capability_ranks.items():
        _check_ranks(f"capability_ranks.{point}", ranks, len(row.responses))
    for point, pairs in row.capability_pairs.items():
        _check_pairs(f"capability_pairs.{point}", pairs, len(row.responses))
    if not any(row._labels_of(point) for point in (None, *row.labelled_points)):
        raise RowError(
            "no two distinct ranks",
            f"field `ranks`: got {row.ranks}, need two distinct ranks because a row without a better and a worse "
            "response, overall or at a capability point, teaches nothing: rank the responses or drop the row.",
        )
    if both := [point for point in row.capability_pairs if point in row.capability_ranks]:
        raise RowError(
            "capability point with ranks and pairs",
            f"fields `capability_ranks` and `capability_pairs`: got the point {both[0]!r} in both, need it in one because a "
            "row has one set of labels per point: remove it from one of them.",
        )
    if not isinstance(row.task, str | None):
        raise RowError(
            "bad task", f"field `task`: got {short(row.task)}, need a name as text, or nothing: fix the row."
        )
    for name, text in [("task", row.task or ""), *(("capability_ranks", point) for point in row.labelled_points)]:
        check_characters(text, name)
    if tasks is not None:
        _check_names(row, tasks)


def check_prompt(prompt: list[dict]) -> None:
    """
    Check the turns of a prompt, see [`turns_of`].

    Raises:
        [`RowError`]: If the last turn is empty or not one that a response can answer, or a text cannot be encoded.
    """
    if not prompt or is_blank(prompt[-1]["content"]):
        raise RowError("empty prompt", "field `prompt`: got an empty one, need a question: write one or drop the row.")
    if prompt[-1]["role"] not in ASKING:
        raise RowError(
            "last turn not the user's",
            f"field `prompt`: got a last turn of {prompt[-1]['role']!r}, need one of 'user' or of a tool because the "
            "responses answer it: move a last turn of the assistant into `responses`.",
        )
    for turn in prompt:
        check_characters(turn["content"], "prompt")


ASKING = ("user", "tool", "function")
"""The roles that the last turn of a prompt may have."""

_BLANK = regex.compile(r"[\s\p{Cc}\p{Default_Ignorable_Code_Point}\u2800]*")


def is_blank(text: str) -> bool:
    """Return whether a text has no visible characters: only white space, control or zero-width characters, or nothing."""
    return _BLANK.fullmatch(text) is not None


def typed(value: Any, kind: type, name: str) -> Any:
    """
    Return the value of a field unchanged after a check of its type.

    Raises:
        [`RowError`]: If the value is not an instance of `kind`, which is `str`, `list` or `dict`.
    """
    if not isinstance(value, kind):
        needed = {str: "text", list: "a list", dict: "an object"}[kind]
        raise RowError("field of another kind", f"field `{name}`: got {short(value)}, need {needed}: fix the row.")
    return value


def check_characters(text: str, name: str) -> None:
    """
    Check that a text can be encoded.

    Raises:
        [`RowError`]: If the text of the field `name` contains half of a surrogate pair, which cannot be encoded.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "half a character",
            f"field `{name}`: got {text[error.start]!a} at place {error.start} of a text, half of a surrogate pair, need whole "
            "characters because half a pair cannot be encoded: fix the text.",
        ) from error


def _check_names(row: PreferenceRow, tasks: TaskTable) -> None:
    """Check that the table has the task and the capability points."""
    if row.task is not None and row.task != OTHERS and row.task not in tasks.tasks:
        raise RowError(
            "unknown task",
            f"field `task`: got {row.task!r}, need one of {[*tasks.tasks, OTHERS]}, or nothing if the task is "
            "unknown: rename it, or add it to the task table.",
        )
    if row.task is None:
        known = {point for points in tasks.tasks.values() for point in points} | set(tasks.overall)
    else:
        known = {*tasks.tasks.get(row.task, ()), *tasks.overall}
    for name, labels in (("capability_ranks", row.capability_ranks), ("capability_pairs", row.capability_pairs)):
        if unknown := [point for point in labels if point not in known]:
            raise RowError(
                "unknown capability point",
                f"field `{name}`: got the point {unknown[0]!r}, which task {row.task!r} does not have, need some of "
                f"{sorted(known)}: rename it, or add it to the task table.",
            )


def _check_ranks(name: str, ranks: Any, count: int) -> None:
    if not isinstance(ranks, list) or len(ranks) != count:
        got = f"{len(ranks)} ranks" if isinstance(ranks, list) else short(ranks)
        raise RowError(
            "ranks and responses of different lengths",
            f"field `{name}`: got {got} for {count} responses, need one rank per response: add or remove some.",
        )
    if not all(type(rank) is int and abs(rank) < 2**53 for rank in ranks):
        raise RowError(
            "ranks that are not integers",
            f"field `{name}`: got {short(ranks)}, need integers below 2**53, 1 for the best: convert scores to ranks.",
        )


def _check_pairs(name: str, pairs: Any, count: int) -> None:
    """Check pairs of responses. Cycles of three or more are allowed, because judges are not transitive."""
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(type(index) is int for index in pair) for pair in pairs
    ):
        raise RowError(
            "pairs that are not two integers",
            f"field `{name}`: got {short(pairs)}, need a list of pairs of integers, the index of the better response and "
            "that of the worse: write each pair as [better, worse].",
        )
    seen = set()
    for better, worse in pairs:
        if better == worse or not (0 <= better < count and 0 <= worse < count):
            raise RowError(
                "pairs that are not of two responses",
                f"field `{name}`: got the pair {[better, worse]} for {count} responses, need two different indices from 0 "
                f"to {count - 1}: count the responses from 0.",
            )
        if seen & {(better, worse), (worse, better)}:
            what = "twice" if (better, worse) in seen else f"and {[worse, better]}"
            raise RowError(
                "pairs given twice or both ways round",
                f"field `{name}`: got the pair {[better, worse]} {what}, need at most one pair of the same two responses: "
                "keep one, or none where the judge contradicts itself.",
            )
        seen.add((better, worse))


def short(value: Any) -> str:
    """Return a value as a short text for messages."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
