"""
Buys capability labels (section 4.3): a judge compares responses at each capability point, twice with the positions swapped,
and a label is kept where both answers agree.

Three passes over the rows, one row at a time, each of which can be made alone: [`Labeller.estimate`] counts what is still to
be asked, [`Labeller.ask`] asks it and stores the answers, and [`Labeller.write`] makes labelled rows and a report of what is
stored, and of that alone. So whatever ends the asking, the answers that came are there, and the next run goes on from them.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from ..data.preference_row import PreferenceRow
from ..data.rows import write_rows
from .answers import AnswerStore
from .asking import Asking, Stopped, interrupts, together
from .budget import Budget, Prices
from .judges import Judge, Question
from .plan import Pair, Plan, agreed, both_orders, distinct_responses
from .report import Report, Tally

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
        if stop_early:
            answers.forget_given_up()
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
        The rows; beside each the points at which it is asked about, and how many of the `max_pairs` of its prompt the rows
        before it take there. One pass at a time: the store counts, so that prompts need not fit into memory.
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
        The questions of a row at a point, as far as the answers determine them; then for each that may follow `None`. Beside
        each stands the question by which its tokens are estimated.
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
        """The comparisons that the stored answers lead to. The last ones lack answers, unless all is answered."""
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
        Asks what is not answered, until it is, or the budget is spent, or the judge is gone or worth nothing, or Ctrl-C.

        Args:
            calls (`int`, *optional*): how many calls it will take, for the progress bar; counted if absent.
            on_answer (`Callable[[], None]`, *optional*): called after every new answer.

        Returns:
            Why it stopped, or `None`. All answers that came are stored, whether it stopped or raises.
        """
        calls = self.estimate(tokens=False).calls if calls is None else calls
        # Without smoothing, the time that remains is told at this run's mean speed: retries and pauses are part of it.
        with tqdm(total=calls, desc="asking", unit=" answers", smoothing=0, disable=not calls) as bar:
            return asyncio.run(self._ask(bar, on_answer or (lambda: None)))

    async def _ask(self, bar: tqdm, on_answer: Callable[[], None]) -> str | None:
        def answered() -> None:
            on_answer()
            bar.update()
            if self.budget.prices is not None:
                bar.set_postfix_str(f"cost {self.budget.cost:,.2f}", refresh=False)

        seen = Tally()

        def look_at(pair: Pair, choices: Choices) -> None:
            seen.add(pair, choices)
            if self.stop_early:
                asking.stop_if_worthless(seen)

        async def ask_pair(row: PreferenceRow, pair: Pair, point: str) -> None:
            answers = await together(map(asking.answer, both_orders(row, pair, point)))
            look_at(pair, tuple(answer.verdict for answer in answers))

        async def ask_point(row: PreferenceRow, point: str, taken: int) -> None:
            steps = list(self._replay(row, point, taken))
            stored = [step for step in steps if step[1] is not None]
            for step in stored:
                look_at(*step)
            while missing := [pair for pair, choices in steps if choices is None]:
                await together(ask_pair(row, pair, point) for pair in missing)
                steps = list(self._replay(row, point, taken))
            if len(stored) < len(steps):  # a sort may need fewer than were counted
                bar.total -= 2 * (self.plan.most_comparisons(row, taken) - len(steps))

        async def ask_row(row: PreferenceRow, points: dict[str, int]) -> None:
            try:
                await together(ask_point(row, point, taken) for point, taken in points.items())
            except Stopped:
                pass
            except Exception as error:
                asking.fail(error)
            finally:
                window.release()

        async def ask_rows() -> None:
            rows = set()
            try:
                for row, points in self._planned(self.rows()):
                    await window.acquire()
                    if asking.stopped is not None:
                        break
                    task = asyncio.create_task(ask_row(row, points))
                    rows.add(task)
                    task.add_done_callback(rows.discard)
                    await asyncio.sleep(0)  # rows whose answers are all stored wait for nothing
            except Exception as error:  # of a file that has changed
                asking.fail(error)
            await asyncio.gather(*rows)

        window = asyncio.Semaphore(max(2, self.judge.concurrency * self.judge.batch_size))
        asking = Asking(self.judge, self.answers, self.budget, answered)
        with interrupts(asking):
            try:
                async with asking:
                    await ask_rows()
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
        inferred from others. What was answered is added to `report`, that of the rows left out too, and how many these are.
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
