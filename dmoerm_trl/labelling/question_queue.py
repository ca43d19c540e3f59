"""Queue of questions to a judge: concurrent, without duplicates, within a budget, and stopping without losing an answer."""

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
from .answer_store import AnswerStore
from .budget import Budget
from .judges import Answer, Judge, JudgeError, Question, RefusesAll
from .report import Tally

LINGER = 0.01
"""Seconds to wait for more questions if a batch is not full; the wait is repeated as long as more arrive."""


Result = TypeVar("Result")


class Stopped(Exception):
    """Raised in place of an answer once asking has stopped."""


class _Waiting(NamedTuple):
    number: int
    key: bytes
    question: Question
    answer: asyncio.Future


class QuestionQueue:
    """
    Queue that asks a judge as many questions concurrently as it accepts, and stores each answer as soon as it arrives.

    ```
    async with QuestionQueue(judge, answers, budget) as queue:
        answer = await queue.answer(question)
    ```

    Args:
        judge ([`~dmoerm_trl.labelling.judges.Judge`]): The judge to ask.
        answers ([`~dmoerm_trl.labelling.answer_store.AnswerStore`]): Store of the judge's answers.
        budget ([`~dmoerm_trl.labelling.budget.Budget`]): Limits on the cost; asking stops when one is reached.
        on_answer (`Callable[[], None]`, *optional*): Called once for each new answer, after it is stored.

    Attributes:
        stopped (`str`, *optional*): Why asking has stopped.
    """

    def __init__(
        self, judge: Judge, answers: AnswerStore, budget: Budget, on_answer: Callable[[], None] | None = None
    ):
        self.judge, self.answers, self.budget, self.on_answer = judge, answers, budget, on_answer or (lambda: None)
        self.stopped: str | None = None
        self.under_way = 0  # questions that the judge is answering
        self._failure: Exception | None = None
        self._given_up = False
        self._known: dict[bytes, asyncio.Future] = {}  # queued questions and those under way
        self._queue: asyncio.PriorityQueue[_Waiting] = asyncio.PriorityQueue()  # in the order of arrival
        self._numbers = count()
        self._settled = asyncio.Event()

    async def __aenter__(self) -> "QuestionQueue":
        self.answers.reserve()
        self.judge.answered = self.answers.has_choices
        self._workers = [asyncio.create_task(self._work()) for _ in range(self.judge.concurrency)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the workers and raise the first error of [`fail`]. No caller may still be waiting for an answer."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        if self._given_up:  # include answers that arrived afterwards
            self.answers.give_up()
        if self._failure is not None:
            raise self._failure

    async def answer(self, question: Question) -> Answer:
        """
        Return the answer to a question, from the store or else from the judge.

        Raises:
            Stopped: If the answer is not stored, and asking stops before it arrives.
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
        """Stop asking: drop the queued questions and wait for those under way. The first reason is kept."""
        if self.stopped is None:
            self.stopped = quoted(reason).rstrip(".")
        self._settled.set()

    def stop_if_worthless(self, seen: Tally) -> None:
        """
        Stop if it is statistically certain that the answers are worthless, with a reason that quotes the judge and the required
        form. The next run asks the unreadable answers again, because the server may be at fault.
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
            f"{fault}. It said {', '.join(said)}; wanted: {wanted}. Fix the judge, its server or its template, or take another "
            f"one: {again}`stop_early: false` goes on with it"
        )

    def fail(self, error: Exception) -> None:
        """Stop asking because of an error, which is raised after the questions under way are answered."""
        self._failure = self._failure or error
        self.stop(f"{type(error).__name__}: {error}")

    def _give_up_unreadable(self) -> None:
        self._given_up = True
        self.answers.give_up()  # already now, in case this process is killed

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
            except Exception as error:  # an error in the judge's code or of the disk
                self.fail(error)
            for waiting in batch:
                if not waiting.answer.done():
                    self._give_up(waiting)

    async def _ask(self, batch: list[_Waiting]) -> None:
        """Ask the questions of a batch that the budget allows, and put the others back into the queue."""
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
        Reserve budget for as many of the questions as possible, from the first on, and return their estimated tokens. If the
        budget allows none, wait for answers under way, which may cost less than was reserved for them.
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


async def gather_answers(calls: Iterable[Awaitable[Result]]) -> list[Result]:
    """
    Run calls concurrently and return their results. After all have ended, raise the first error, preferably not [`Stopped`].
    """
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, Stopped))
    return results


@contextmanager
def stop_on_interrupt(queue: QuestionQueue) -> Iterator[None]:
    """
    Context manager in which the first Ctrl-C or SIGTERM stops asking and waits for the answers under way, and the second ends
    the process immediately. The answers received so far are stored in both cases.
    """
    loop, before = asyncio.get_running_loop(), {}

    def interrupted(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        loop.call_soon_threadsafe(stop)

    def stop() -> None:
        if queue.under_way:
            tqdm.write(f"waiting for {queue.under_way} answers under way; Ctrl-C again leaves them", file=sys.stderr)
        queue.stop("interrupted")

    with suppress(ValueError):  # signal handlers can be set only in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, interrupted)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
