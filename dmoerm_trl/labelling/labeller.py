"""
Capability labels from a judge (section 4.3). The judge compares pairs of responses at each capability point, in both orders,
and a label is kept if both answers agree.

Labelling takes three independent passes over the rows, which stream one row at a time: [`Labeller.estimate`] counts the open
questions, [`Labeller.ask`] asks them and stores the answers, and [`Labeller.write`] writes labelled rows and a report from the
stored answers only. Whatever interrupts the asking, the answers received so far are kept, and the next run continues from them.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from ..data.preference_row import PreferenceRow
from ..data.rows import write_rows
from .answer_store import AnswerStore
from .budget import Budget, Prices
from .comparisons import Pair, Plan, agreed, both_orders, distinct_responses
from .judges import Judge, Question
from .question_queue import QuestionQueue, Stopped, gather_answers, stop_on_interrupt
from .report import Report, Tally

Choices = tuple[int | None, int | None]
"""The two verdicts on a pair: in the pair's order, and with the positions swapped."""


@dataclass
class CostEstimate:
    """
    Estimate of the open questions. The number of calls is exact with `order: all` and an upper bound with `order: sort`; the
    number of completion tokens is an upper bound.
    """

    rows: int = 0
    questions: int = 0
    """Distinct questions of all rows, answered or not."""
    calls: int = 0
    """Distinct questions without an answer."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    labelled: int = 0
    """Number of combinations of row and point that have labels already."""

    def to_text(self, prices: Prices | None = None) -> str:
        """Describe the estimate in one line, with the cost if there are prices."""
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
    Labels rows by asking a judge.

    Args:
        rows (`Callable[[], Iterable[PreferenceRow]]`):
            Function that reads the rows from the start on each call; they need not fit into memory.
        plan ([`~dmoerm_trl.labelling.comparisons.Plan`]):
            Selection of the questions.
        judge ([`~dmoerm_trl.labelling.judges.Judge`]):
            The judge to ask.
        answers ([`~dmoerm_trl.labelling.answer_store.AnswerStore`]):
            Store of the judge's answers.
        budget ([`~dmoerm_trl.labelling.budget.Budget`], *optional*):
            Limits on what the answers may cost, to which the cost of earlier runs is added.
        stop_early (`bool`, *optional*, defaults to `True`):
            Whether to stop as soon as it is statistically certain that the answers are worthless, because nearly all of them
            name the same position or cannot be read.
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
        if stop_early:
            answers.forget_given_up()
        self.budget.spend(*answers.spent)

    # Estimate

    def estimate(
        self, rows: Callable[[], Iterable[PreferenceRow]] | None = None, *, tokens: bool = True
    ) -> CostEstimate:
        """
        Count the open questions without asking any.

        Args:
            rows (`Callable`, *optional*, defaults to `self.rows`): Function that reads the rows, such as one that also reports
                on them.
            tokens (`bool`, *optional*, defaults to `True`): Whether to estimate tokens too, which takes longer.
        """
        estimate = CostEstimate()
        read = tqdm((rows or self.rows)(), desc="counting questions", unit=" rows", delay=3)
        for row, points in self._planned(read):
            estimate.rows += 1
            estimate.labelled += len(self.plan.wanted_points(row)) - len(points)
            for point, taken in points.items():
                for question, may_be_asked in self._questions(row, point, taken):
                    known = question is not None
                    if known and self.answers.count(key := self.answers.key(question)):
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

    def _planned(self, rows: Iterable[PreferenceRow]) -> Iterator[tuple[PreferenceRow, dict[str, int]]]:
        """
        Yield each row with the points to ask about, and for each point the number of the prompt's `max_pairs` that earlier rows
        use. Only one pass may run at a time, because the counts are kept in the store; so prompts need not fit into memory.
        """
        self.answers.start_counting()
        for row in rows:
            taken = dict.fromkeys(self.plan.points_of(row), 0)
            if self.plan.max_pairs is not None:
                pairs = self.plan.most_comparisons(row)
                taken = {point: self.answers.count(f"{row.prompt_id} {point}".encode(), pairs) for point in taken}
            yield row, taken

    def _questions(self, row: PreferenceRow, point: str, taken: int) -> Iterator[tuple[Question | None, Question]]:
        """
        Yield the questions of a row at a point that the stored answers determine, then `None` for each question that may
        follow. Each comes with the question from which to estimate its tokens.
        """
        made, complete = 0, True
        for pair, choices in self._replay(row, point, taken):
            made, complete = made + 1, complete and choices is not None
            yield from ((question, question) for question in both_orders(row, pair, point))
        if not complete:
            longest = sorted(distinct_responses(row), key=lambda index: len(row.responses[index]))[-2:]
            for _ in range(self.plan.most_comparisons(row, taken) - made):
                yield from ((None, question) for question in both_orders(row, tuple(longest), point))

    def _replay(self, row: PreferenceRow, point: str, taken: int) -> Iterator[tuple[Pair, Choices | None]]:
        """Yield the comparisons that follow from the stored answers; the last ones have no verdicts unless all are answered."""
        comparisons, verdicts = self.plan.comparisons(row, point, taken), None
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
        return None if None in answers else tuple(answer.verdict for answer in answers)

    # Asking

    def ask(self, calls: int | None = None, on_answer: Callable[[], None] | None = None) -> str | None:
        """
        Ask the open questions, until all are answered, the budget is spent, the judge is unreachable or worthless, or Ctrl-C.

        Args:
            calls (`int`, *optional*): Number of calls to show in the progress bar; counted if absent.
            on_answer (`Callable[[], None]`, *optional*): Called after every new answer.

        Returns:
            Why asking stopped, or `None` if all questions are answered. The answers received are stored in any case.
        """
        calls = self.estimate(tokens=False).calls if calls is None else calls
        # smoothing=0 estimates the remaining time from the mean speed of this run, which includes retries and pauses.
        with tqdm(total=calls, desc="asking", unit=" answers", smoothing=0, disable=not calls) as bar:
            return asyncio.run(self._ask(bar, on_answer or (lambda: None)))

    async def _ask(self, bar: tqdm, on_answer: Callable[[], None]) -> str | None:
        def answered() -> None:
            on_answer()
            bar.update()
            if self.budget.prices is not None:
                bar.set_postfix_str(f"cost {self.budget.cost:,.2f}", refresh=False)

        seen = Tally()

        def count_verdicts(pair: Pair, choices: Choices) -> None:
            seen.add(pair, choices)
            if self.stop_early:
                queue.stop_if_worthless(seen)

        async def ask_pair(row: PreferenceRow, pair: Pair, point: str) -> None:
            answers = await gather_answers(map(queue.answer, both_orders(row, pair, point)))
            count_verdicts(pair, tuple(answer.verdict for answer in answers))

        async def ask_point(row: PreferenceRow, point: str, taken: int) -> None:
            steps = list(self._replay(row, point, taken))
            stored = [step for step in steps if step[1] is not None]
            for step in stored:
                count_verdicts(*step)
            while missing := [pair for pair, choices in steps if choices is None]:
                await gather_answers(ask_pair(row, pair, point) for pair in missing)
                steps = list(self._replay(row, point, taken))
            if len(stored) < len(steps):  # sorting may need fewer comparisons than were counted
                bar.total -= 2 * (self.plan.most_comparisons(row, taken) - len(steps))

        async def ask_row(row: PreferenceRow, points: dict[str, int]) -> None:
            try:
                await gather_answers(ask_point(row, point, taken) for point, taken in points.items())
            except Stopped:
                pass
            except Exception as error:
                queue.fail(error)
            finally:
                window.release()

        async def ask_rows() -> None:
            rows = set()
            try:
                for row, points in self._planned(self.rows()):
                    await window.acquire()
                    if queue.stopped is not None:
                        break
                    task = asyncio.create_task(ask_row(row, points))
                    rows.add(task)
                    task.add_done_callback(rows.discard)
                    await asyncio.sleep(0)  # lets a row whose answers are all stored finish at once
            except Exception as error:  # such as a file that has changed
                queue.fail(error)
            await asyncio.gather(*rows)

        window = asyncio.Semaphore(max(2, self.judge.concurrency * self.judge.batch_size))
        queue = QuestionQueue(self.judge, self.answers, self.budget, answered)
        with stop_on_interrupt(queue):
            try:
                async with queue:
                    await ask_rows()
            finally:
                await self.judge.close()
        return queue.stopped

    # Labels

    def write(self, path: str | os.PathLike) -> Report:
        """Write the [`labelled`] rows and return a report on them. The file is written atomically."""
        report = Report(spent=self.answers.spent, cost=None if self.budget.prices is None else self.budget.cost)
        write_rows(tqdm(self.labelled(report), desc="writing", unit=" rows", delay=3), path)
        return report

    def labelled(self, report: Report) -> Iterator[PreferenceRow]:
        """
        Yield the rows whose questions are all answered. Their `capability_pairs` get the labels on which both answers agree; no
        label is inferred from others. All answered pairs, also those of incomplete rows, are counted in `report`.
        """
        for row, points in self._planned(self.rows()):
            ranked, labels, complete = set(row.pairs_of()), {}, True
            for point, taken in points.items():
                tally = report.points[row.task or "none", point]
                for pair, choices in self._replay(row, point, taken):
                    if choices is None:
                        complete = False
                    elif (better := tally.add(pair, choices, ranked)) is not None:
                        labels.setdefault(point, []).append([better, sum(pair) - better])
            if complete:
                report.rows += 1
                yield replace(row, capability_pairs={**row.capability_pairs, **labels})
            else:
                report.incomplete += 1
