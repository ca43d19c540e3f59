"""
Normalise the opening of a response: the tokens between the response marker and the response itself, such as the
thoughts of a reasoning model, an empty block of thoughts, or the name of a channel.

A chat template may write different openings in its generation prompt and in a complete chat, and a policy may write
its thoughts there. This module converts all of them to the form of a complete chat, so that a response has the same
reward however it was rendered.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

Ids = list[int]


@dataclass(frozen=True)
class ResponseOpening:
    """
    The tokens that a chat template writes between the response marker and the response.

    Args:
        written (`list[int]`): Opening of a response without thoughts in a complete chat.
        others (`list[list[int]]`): Other possible openings, such as the end of the generation prompt.
        thinking (`list[list[int]]`): The tokens that open thoughts and those that close them; empty if the template
            has no thoughts.
        scored (`list[list[int]]`): The tokens before and after thoughts in a complete chat, if thoughts are scored
            with the response; empty if they are removed.
        blanks (`list[int]`): The tokens that consist of white space.
    """

    written: Ids
    others: list[Ids] = field(default_factory=list)
    thinking: list[Ids] = field(default_factory=list)
    scored: list[Ids] = field(default_factory=list)
    blanks: Ids = field(default_factory=list)

    def read(self, ids: Ids, ends: Collection[int]) -> tuple[Ids, Ids]:
        """
        Split the tokens after a response marker into the opening and the response.

        Args:
            ids (`list[int]`): The tokens after the marker.
            ends (`Collection[int]`): Tokens that end a turn.

        Returns:
            The normalised opening, and the response with everything after it. Thoughts end at the last closing tokens
            before the end of the turn; thoughts that are never closed belong to the response.
        """
        thoughts: Ids = []
        if self.thinking:
            _, close = self.thinking
            places = [i for i in range(len(ids) - len(close) + 1) if ids[i : i + len(close)] == close]
            within = {i for place in places for i in range(place, place + len(close))}
            end = next((i for i, token in enumerate(ids) if token in ends and i not in within), len(ids))
            if before := [place for place in places if place < end]:
                thoughts, ids = ids[: before[-1]], ids[before[-1] + len(close) :]
        response, thoughts = self._without_opening(ids), self._without_opening(thoughts)
        while thoughts and thoughts[-1] in self.blanks:
            thoughts.pop()
        if not (self.scored and thoughts):
            return list(self.written), response
        before_thoughts, after_thoughts = self.scored
        return [*before_thoughts, *thoughts, *after_thoughts], response

    def _without_opening(self, ids: Ids) -> Ids:
        """Return the tokens without the openings and white space at their beginning."""
        openings = sorted([*self.thinking[:1], *self.others], key=len, reverse=True)
        start = 0
        while start < len(ids):
            if ids[start] in self.blanks:
                start += 1
            elif length := next((len(o) for o in openings if o and ids[start : start + len(o)] == o), 0):
                start += length
            else:
                break
        return ids[start:]

    def first_marker(self, ids: Sequence[int], end: int, marker: Sequence[int]) -> int:
        """
        Find the end of the marker that opened the turn, because thoughts may be closed by a second marker (gpt-oss).

        Args:
            ids (`Sequence[int]`): Tokens of a text.
            end (`int`): Index after the last marker of the text.
            marker (`Sequence[int]`): The response marker.
        """
        if not self.thinking:
            return end
        ids, marker, (opened, close) = list(ids), list(marker), self.thinking
        while ids[:end][-len(close) :] == close and close[-len(marker) :] == marker:
            closing = end - len(close)
            markers = [i for i in range(len(marker), closing + 1) if ids[i - len(marker) : i] == marker]
            if not markers or ids[markers[-1] : markers[-1] + len(opened)] != opened:
                break
            end = markers[-1]
        return end
