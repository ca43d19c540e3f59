"""A judge without a model, and rows for it, for the tests of the labeller."""

import asyncio
import zlib
from collections.abc import Callable, Sequence

from dmoerm_trl.data.preference_row import PreferenceRow
from dmoerm_trl.labelling.judges import Answer, Question
from dmoerm_trl.tasks import TaskTable

TASKS = TaskTable(
    {"chitchat": ("empathy ability", "logic"), "maths": ("correctness",)}, overall=("logic", "readability")
)


def row(*responses: str, task: str | None = "maths", prompt: str = "How much?", **more: object) -> PreferenceRow:
    """A row whose first response is the best, the second the next, and so on."""
    return PreferenceRow(
        [{"role": "user", "content": prompt}], [*responses], [*range(1, len(responses) + 1)], task, **more
    )


def longer(question: Question) -> int | None:
    """Prefers the longer response, and none of equal lengths."""
    first, second = len(question.first), len(question.second)
    return None if first == second else 1 if first > second else 2


def noisy(question: Question) -> int | None:
    """Any answer, always the same to the same question."""
    return (1, 2, 1, 2, None)[zlib.crc32(repr(vars(question)).encode()) % 5]


class ScriptedJudge:
    """
    Answers by a function; `asked` are the questions in their order. An answer may be an exception, which is raised.

    A question takes one token a word of its responses, and `completion_tokens` of an answer; `estimate_tokens` says twice that.
    """

    identity = {"kind": "scripted"}
    samples = False

    def __init__(
        self,
        choose: Callable[[Question], int | None | Exception] = longer,
        *,
        batch_size: int = 1,
        concurrency: int = 4,
        completion_tokens: int = 1,
        seconds: float = 0.0,
    ):
        self.choose, self.batch_size, self.concurrency, self.seconds = choose, batch_size, concurrency, seconds
        self.completion_tokens = completion_tokens
        self.asked: list[Question] = []
        self.batches: list[int] = []
        self.most_at_once = self._at_once = 0

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += questions
        self.batches.append(len(questions))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(self.seconds)
        self._at_once -= 1
        choices = [self.choose(question) for question in questions]
        for choice in choices:
            if isinstance(choice, Exception):
                raise choice
        return [
            Answer(choice, f"{choice}", self.tokens(question), self.completion_tokens)
            for question, choice in zip(questions, choices, strict=True)
        ]

    def tokens(self, question: Question) -> int:
        return len(f"{question.first} {question.second}".split())

    def estimate_tokens(self, question: Question) -> tuple[int, int]:
        return 2 * self.tokens(question), 2 * self.completion_tokens

    async def close(self) -> None:
        pass
