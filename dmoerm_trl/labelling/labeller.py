"""
Buys capability labels (section 4.3): a judge compares responses at each capability point, twice with the positions swapped,
and a label is kept where both answers agree.

Three passes over the rows, one row at a time, each of which can be made alone: [`Labeller.estimate`] counts what is still to
be asked, [`Labeller.ask`] asks it and stores the answers, and [`Labeller.write`] makes labelled rows and a report of what is
stored, and of that alone. So whatever ends the asking, the answers that came are there, and the next run goes on from them.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from tqdm.auto import tqdm

from ..data.preference_row import PreferenceRow
from ..data.rows import write_rows
from .answers import AnswerStore
from .asking import Asking, Stopped
from .budget import Budget, Prices
from .judges import Judge, Question
from .plan import Pair, Plan, agreed, both_orders, distinct_responses
from .report import EARLY, Report, Tally

Result = TypeVar("Result")
Choices = tuple[int | None, int | None]
"""What a judge said of a pair: in the pair's order, and with the positions swapped."""


@dataclass
class Estimate:
    """
    What is still to be asked. With `order: all` the calls are exact, with `order: sort` they are the most there can be; tokens
    of answers are the most there can be.
    """

    rows: int = 0
    questions: int = 0
    """Those of all rows, answered or not; questions that are the same count once."""
    calls: int = 0
    """Those without an answer."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    labelled: int = 0
    """How often a row has labels of a point already."""

    def to_text(self, prices: Prices | None = None) -> str:
        parts = [f"{self.rows:,} rows, {self.questions:,} questions, {self.calls:,} of them still to be asked"]
        if self.prompt_tokens:
            parts.append(
                f"{self.prompt_tokens:,} tokens of questions and at most {self.completion_tokens:,} of answers"
            )
            if prices is not None:
                parts.append(f"at most {prices.cost(self.prompt_tokens, self.completion_tokens):,.2f} to pay")
        if self.labelled:
            parts.append(f"{self.labelled:,} times a row has labels of a point already and is not asked about it")
        return "; ".join(parts)


class Labeller:
    """
    Labels rows.

    Args:
        rows (`Callable[[], Iterable[PreferenceRow]]`):
            Reads the rows, anew with each call; they need not fit into memory.
        plan ([`~dmoerm_trl.labelling.plan.Plan`]):
            Which questions a row needs.
        judge ([`~dmoerm_trl.labelling.judges.Judge`]):
            Who is asked.
        answers ([`~dmoerm_trl.labelling.answers.AnswerStore`]):
            The judge's.
        budget ([`~dmoerm_trl.labelling.budget.Budget`], *optional*):
            What the answers may cost; what those of earlier runs cost is added to it.
        stop_early (`bool`, *optional*, defaults to `True`):
            Whether asking stops when it is sure that the answers are worth nothing, because nearly all of them name the same
            position or cannot be read.
    """

    def __init__(
        self,
        rows: Callable[[], Iterable[PreferenceRow]],
        plan: Plan,
        judge: Judge,
        answers: AnswerStore,
        budget: Budget | None = None,
        *,
        stop_early: bool = True,
    ):
        self.rows, self.plan, self.judge, self.answers = rows, plan, judge, answers
        self.budget, self.stop_early = budget or Budget(), stop_early
        self.budget.spend(*answers.spent)

    # What is to be asked

    def estimate(self, rows: Callable[[], Iterable[PreferenceRow]] | None = None, *, tokens: bool = True) -> Estimate:
        """
        Counts what is still to be asked, and asks nothing.

        Args:
            rows (`Callable`, *optional*): reads the rows in the place of `self.rows`, for one that reports what it reads.
            tokens (`bool`): whether to count tokens too, which takes longer.
        """
        estimate = Estimate()
        self.answers.start_counting()
        for row in tqdm((rows or self.rows)(), desc="counting questions", unit=" rows", delay=3):
            estimate.rows += 1
            points = self.plan.points_of(row)
            estimate.labelled += len(self.plan.wanted_points(row)) - len(points)
            for point in points:
                for question, may_be_asked in self._questions(row, point):
                    known = question is not None
                    if known and not self.answers.count_once(key := self.answers.key(question)):
                        continue
                    estimate.questions += 1
                    if known and self.answers.get(key) is not None:
                        continue
                    estimate.calls += 1
                    if tokens:
                        question_tokens, answer_tokens = self.judge.estimate_tokens(may_be_asked)
                        estimate.prompt_tokens += question_tokens
                        estimate.completion_tokens += answer_tokens
        return estimate

    def _questions(self, row: PreferenceRow, point: str) -> Iterator[tuple[Question | None, Question]]:
        """
        The questions of a row at a point, as far as the answers determine them; then for each that may follow `None`. Beside
        each stands the question by which its tokens are estimated.
        """
        made, complete = 0, True
        for pair, choices in self._replay(row, point):
            made, complete = made + 1, complete and choices is not None
            yield from ((question, question) for question in both_orders(row, pair, point))
        if not complete:
            longest = sorted(distinct_responses(row), key=lambda index: len(row.responses[index]))[-2:]
            for _ in range(self.plan.most_comparisons(row) - made):
                yield from ((None, question) for question in both_orders(row, tuple(longest), point))

    def _replay(self, row: PreferenceRow, point: str) -> Iterator[tuple[Pair, Choices | None]]:
        """The comparisons that the stored answers lead to. The last ones lack answers, unless all is answered."""
        comparisons, verdicts = self.plan.comparisons(row, point), None
        with suppress(StopIteration):
            while True:
                pairs = comparisons.send(verdicts)
                choices = [self._stored(row, pair, point) for pair in pairs]
                yield from zip(pairs, choices, strict=True)
                if None in choices:
                    break
                verdicts = [agreed(pair, *answered) for pair, answered in zip(pairs, choices, strict=True)]

    def _stored(self, row: PreferenceRow, pair: Pair, point: str) -> Choices | None:
        answers = [self.answers.get(self.answers.key(question)) for question in both_orders(row, pair, point)]
        return None if None in answers else tuple(answer.choice for answer in answers)

    # Asking

    def ask(self, calls: int | None = None) -> str | None:
        """
        Asks what is not answered, until it is, or the budget is spent, or the judge is gone or worth nothing, or Ctrl-C.

        Args:
            calls (`int`, *optional*): how many calls it will take, for the progress bar; counted if absent.

        Returns:
            Why it stopped, or `None`. All answers that came are stored, whether it stopped or raises.
        """
        calls = self.estimate(tokens=False).calls if calls is None else calls
        # Without smoothing, the time that remains is told at this run's mean speed: retries and pauses are part of it.
        with tqdm(total=calls, desc="asking", unit=" answers", smoothing=0, disable=not calls) as bar:
            return asyncio.run(self._ask(bar))

    async def _ask(self, bar: tqdm) -> str | None:
        def answered() -> None:
            bar.update()
            if self.budget.prices is not None:
                bar.set_postfix_str(f"cost {self.budget.cost:,.2f}", refresh=False)

        seen = Tally()

        def look_at(steps: Iterable[tuple[Pair, Choices]]) -> None:
            for pair, choices in steps:
                seen.add(pair, choices)
            if self.stop_early and 2 * seen.pairs >= EARLY and (fault := seen.fault()):
                asking.stop(f"{fault}: mend its template or take another one; `stop_early: false` goes on with it")

        async def ask_point(row: PreferenceRow, point: str) -> None:
            steps = list(self._replay(row, point))
            stored = [step for step in steps if step[1] is not None]
            look_at(stored)
            while missing := [pair for pair, choices in steps if choices is None]:
                questions = [question for pair in missing for question in both_orders(row, pair, point)]
                answers = await together(asking.answer(question) for question in questions)
                choices = [answer.choice for answer in answers]
                look_at(zip(missing, zip(choices[::2], choices[1::2], strict=True), strict=True))
                steps = list(self._replay(row, point))
            if len(stored) < len(steps):  # a sort may need fewer than were counted
                bar.total -= 2 * (self.plan.most_comparisons(row) - len(steps))

        async def ask_row(row: PreferenceRow) -> None:
            try:
                await together(ask_point(row, point) for point in self.plan.points_of(row))
            except Stopped:
                pass
            except Exception as error:
                asking.fail(error)
            finally:
                window.release()

        window = asyncio.Semaphore(max(2, self.judge.concurrency * self.judge.batch_size))
        try:
            async with Asking(self.judge, self.answers, self.budget, answered) as asking:
                with interrupts(asking):
                    rows = set()
                    for row in self.rows():
                        await window.acquire()
                        if asking.stopped is not None:
                            break
                        task = asyncio.create_task(ask_row(row))
                        rows.add(task)
                        task.add_done_callback(rows.discard)
                        await asyncio.sleep(0)  # rows whose answers are all stored wait for nothing
                    await asyncio.gather(*rows)
        finally:
            await self.judge.close()
        return asking.stopped

    # Labels

    def write(self, path: str | os.PathLike) -> Report:
        """Writes the [`labelled`] rows, and reports on them. The file appears whole or not at all."""
        report = Report(spent=self.answers.spent, cost=None if self.budget.prices is None else self.budget.cost)
        write_rows(tqdm(self.labelled(report), desc="writing", unit=" rows", delay=3), path)
        return report

    def labelled(self, report: Report) -> Iterator[PreferenceRow]:
        """
        The rows whose questions are all answered, with the labels on which both answers agree as `capability_pairs`; none is
        inferred from others. What they come to is added to `report`, and the rows that are left out.
        """
        for row in self.rows():
            steps = {point: list(self._replay(row, point)) for point in self.plan.points_of(row)}
            if any(choices is None for of_point in steps.values() for _, choices in of_point):
                report.incomplete += 1
                continue
            report.rows += 1
            ranked, labels = set(row.pairs_of()), {}
            for point, of_point in steps.items():
                tally = report.points[row.task or "none", point]
                decided = [(pair, tally.add(pair, choices, ranked)) for pair, choices in of_point]
                labels[point] = [[better, sum(pair) - better] for pair, better in decided if better is not None]
            labels = {point: pairs for point, pairs in labels.items() if pairs}
            yield replace(row, capability_pairs={**row.capability_pairs, **labels})


async def together(calls: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of calls that run at once. If some fail, an error is raised when all have ended, [`Stopped`] the last."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, Stopped))
    return results


@contextmanager
def interrupts(asking: Asking) -> Iterator[None]:
    """The first Ctrl-C, or SIGTERM, stops asking and waits for the answers under way; the second does not wait."""
    loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

    def interrupted() -> None:
        for number in signals:
            loop.remove_signal_handler(number)
        if asking.under_way:
            tqdm.write(f"waiting for {asking.under_way} answers under way; Ctrl-C again leaves them", file=sys.stderr)
        asking.stop("interrupted")

    with suppress(
        NotImplementedError, ValueError, RuntimeError
    ):  # no handlers on Windows, nor outside the main thread
        for number in signals:
            loop.add_signal_handler(number, interrupted)
    try:
        yield
    finally:
        with suppress(NotImplementedError, ValueError, RuntimeError):
            for number in signals:
                loop.remove_signal_handler(number)
