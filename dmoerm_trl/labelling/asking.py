"""Asks a judge: many questions at once, each once, within a budget, and with a way to stop at which no answer is lost."""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import NamedTuple, TypeVar

from tqdm.auto import tqdm

from ..data.preference_row import short
from ..messages import quoted
from .answers import AnswerStore
from .budget import Budget
from .judges import Answer, Judge, JudgeError, Question, RefusesAll
from .report import Tally

LINGER = 0.01
"""Seconds to wait for more questions where there are too few for a batch; while more come, as long again."""


Result = TypeVar("Result")


class Stopped(Exception):
    """There is no answer because asking has stopped."""


class _Waiting(NamedTuple):
    number: int
    key: bytes
    question: Question
    answer: asyncio.Future


class Asking:
    """
    Gives a judge as many questions at once as it takes, and stores each answer as it comes.

    ```
    async with Asking(judge, answers, budget) as asking:
        answer = await asking.answer(question)
    ```

    Args:
        judge ([`~dmoerm_trl.labelling.judges.Judge`]): who is asked.
        answers ([`~dmoerm_trl.labelling.answers.AnswerStore`]): what it answered before, and answers now.
        budget ([`~dmoerm_trl.labelling.budget.Budget`]): where it ends. It stops asking.
        on_answer (`Callable[[], None]`, *optional*): called when new answers are stored, once for each.

    Attributes:
        stopped (`str`, *optional*): why asking has stopped.
    """

    def __init__(
        self, judge: Judge, answers: AnswerStore, budget: Budget, on_answer: Callable[[], None] | None = None
    ):
        self.judge, self.answers, self.budget, self.on_answer = judge, answers, budget, on_answer or (lambda: None)
        self.stopped: str | None = None
        self.under_way = 0  # questions that the judge has
        self._failure: Exception | None = None
        self._given_up = False
        self._known: dict[bytes, asyncio.Future] = {}  # of questions that wait or are under way
        self._queue: asyncio.PriorityQueue[_Waiting] = asyncio.PriorityQueue()  # what is put back keeps its place
        self._numbers = count()
        self._settled = asyncio.Event()

    async def __aenter__(self) -> "Asking":
        self.answers.reserve()
        self.judge.answered = self.answers.has_choices
        self._workers = [asyncio.create_task(self._work()) for _ in range(self.judge.concurrency)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """By now nobody waits for an answer. Raises the first error of [`fail`]."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        if self._given_up:  # what was under way belongs to it
            self.answers.give_up()
        if self._failure is not None:
            raise self._failure

    async def answer(self, question: Question) -> Answer:
        """
        The answer to a question, from the store if it is there.

        Raises:
            Stopped: if it is not, and asking stops before it comes.
        """
        key = self.answers.key(question)
        if (stored := self.answers.get(key)) is not None:
            return stored
        if self.stopped is not None:
            raise Stopped
        if key not in self._known:
            self._known[key] = asyncio.get_running_loop().create_future()
            self._queue.put_nowait(_Waiting(next(self._numbers), key, question, self._known[key]))
        return await self._known[key]

    def stop(self, reason: str) -> None:
        """Asks no more: what waits is given up, what is under way is waited for. The first reason stays."""
        if self.stopped is None:
            self.stopped = quoted(reason).rstrip(".")
        self._settled.set()

    def stop_if_worthless(self, seen: Tally) -> None:
        """
        Stops if the answers that were seen are surely worth nothing, and says what the judge said and what was wanted. What
        could not be read is asked again by the next run, because the fault may be the server's.
        """
        if self.stopped is not None or not (fault := seen.early_fault()):
            return
        unreadable = seen.is_unreadable()
        said = [f"{short(text)} ({times} times)" for text, times in self.answers.said(unreadable=unreadable)]
        wanted, again = getattr(self.judge, "wanted", "a choice"), ""
        if unreadable:
            self._give_up_unreadable()
            again = "the same command asks again what could not be read; "
        self.stop(
            f"{fault}. It said {', '.join(said)}; wanted: {wanted}. Mend the judge, its server or its template, or take another "
            f"one: {again}`stop_early: false` goes on with it"
        )

    def fail(self, error: Exception) -> None:
        """As [`stop`]; the error is raised when all has come to rest."""
        self._failure = self._failure or error
        self.stop(f"{type(error).__name__}: {error}")

    def _give_up_unreadable(self) -> None:
        self._given_up = True
        self.answers.give_up()  # in case that this process does not come to its end

    def _give_up(self, waiting: _Waiting) -> None:
        del self._known[waiting.key]
        waiting.answer.set_exception(Stopped())

    async def _work(self) -> None:
        while True:
            batch = [await self._queue.get()]
            before = -1
            while before < self._queue.qsize() < self.judge.batch_size - 1:
                before = self._queue.qsize()
                await asyncio.sleep(LINGER)
            while len(batch) < self.judge.batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                await self._ask(batch)
            except JudgeError as error:
                if isinstance(error, RefusesAll):
                    self._give_up_unreadable()
                self.stop(str(error))
            except Exception as error:  # a fault of the judge's code, or of the disk
                self.fail(error)
            for waiting in batch:
                if not waiting.answer.done():
                    self._give_up(waiting)

    async def _ask(self, batch: list[_Waiting]) -> None:
        """Asks what of a batch the budget allows; the rest goes back into the queue."""
        tokens = await self._reserve([waiting.question for waiting in batch])
        if self.stopped is not None:
            return
        for waiting in batch[len(tokens) :]:
            batch.remove(waiting)
            self._queue.put_nowait(waiting)
        self.under_way += len(batch)
        try:
            answers = await self.judge.ask([waiting.question for waiting in batch])
            for waiting, answer in zip(batch, answers, strict=True):
                self.answers.add(waiting.key, answer)
                self.budget.spend(1, answer.prompt_tokens, answer.completion_tokens)
                waiting.answer.set_result(answer)
                del self._known[waiting.key]
            if self.answers.full is not None:
                self.stop(self.answers.full)
            for _ in batch:
                self.on_answer()
        finally:
            self.under_way -= len(batch)
            for reserved in tokens:
                self.budget.spend(-1, *(-number for number in reserved))
            self._settled.set()

    async def _reserve(self, questions: Sequence[Question]) -> list[tuple[int, int]]:
        """
        The tokens that were set aside for the first of the questions, as many as the budget allows. It waits where it allows
        none, but answers under way may turn out to be cheaper than what was set aside for them.
        """
        estimates = [
            self.judge.estimate_tokens(question) if self.budget.counts_tokens else (0, 0) for question in questions
        ]
        while self.stopped is None:
            reason = None
            for place, tokens in enumerate(estimates):
                if reason := self.budget.reserve(*tokens):
                    if place:
                        return estimates[:place]
                    break
            if reason is None:
                return estimates
            if not self.under_way:
                self.stop(reason)
            else:
                self._settled.clear()
                await self._settled.wait()
        return []


async def together(calls: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of calls that run at once. If some fail, an error is raised when all have ended, [`Stopped`] the last."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, Stopped))
    return results


@contextmanager
def interrupts(asking: Asking) -> Iterator[None]:
    """
    The first Ctrl-C, or SIGTERM, stops asking and waits for the answers under way; the second ends the process at once,
    whatever it does: the answers that came are stored.
    """
    loop, before = asyncio.get_running_loop(), {}

    def interrupted(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        loop.call_soon_threadsafe(stop)

    def stop() -> None:
        if asking.under_way:
            tqdm.write(f"waiting for {asking.under_way} answers under way; Ctrl-C again leaves them", file=sys.stderr)
        asking.stop("interrupted")

    with suppress(ValueError):  # outside the main thread there are no handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, interrupted)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
