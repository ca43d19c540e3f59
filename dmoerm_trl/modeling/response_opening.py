"""
What stands between the marker that opens an assistant's turn and the response itself: the thoughts of a model that reasons, an
empty block of thoughts, the name of a channel.

A chat template may write one thing there in its generation prompt and another in a whole chat, and a policy may write its thoughts
there. All of it is brought into the form of a whole chat here, so that one response has one reward whoever rendered it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

Ids = list[int]


@dataclass(frozen=True)
class ResponseOpening:
    """
    What a chat template writes between the response marker and the response, as token ids.

    Args:
        written (`list[int]`): what a whole chat has there when the response has no thoughts.
        others (`list[list[int]]`): what else may be there, such as the end of the generation prompt.
        thinking (`list[list[int]]`): the tokens that open thoughts and those that close them; empty where the template knows none.
        scored (`list[list[int]]`): what a whole chat has before and after thoughts, where they are scored with the response;
            empty where they are left out.
        blanks (`list[int]`): the tokens of white space.
    """

    written: Ids
    others: list[Ids] = field(default_factory=list)
    thinking: list[Ids] = field(default_factory=list)
    scored: list[Ids] = field(default_factory=list)
    blanks: Ids = field(default_factory=list)

    def read(self, ids: Ids, ends: Collection[int]) -> tuple[Ids, Ids]:
        """
        Splits what follows a response marker.

        Args:
            ids (`list[int]`): the tokens after the marker.
            ends (`Collection[int]`): tokens that end a turn.

        Returns:
            The opening in its one form, and the response with what follows it. Thoughts reach to the last place before the
            turn's end that closes them; thoughts that are never closed are read as the response.
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
        """Tokens without the openings and the white space that they begin with."""
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
        Where the marker ends that opened the turn, in which thoughts may be closed by another marker (gpt-oss).

        Args:
            ids (`Sequence[int]`): a text's tokens.
            end (`int`): where the text's last marker ends.
            marker (`Sequence[int]`): the response marker.
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
