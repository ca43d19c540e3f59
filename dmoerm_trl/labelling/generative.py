"""The generative baseline (appendix B.3.3): a judge that compares responses overall, as a row of the consistency table."""

import asyncio
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from tqdm.auto import tqdm

from ..data.preference_row import PreferenceRow
from .answer_store import AnswerStore
from .budget import Budget
from .comparisons import agreed, distinct_responses
from .judges import Judge, JudgeError, Question
from .question_queue import QuestionQueue, Stopped, gather_answers, stop_on_interrupt
from .report import Tally, failed_requests


@dataclass(frozen=True)
class Verdicts:
    """Verdicts of a judge on a set of rows."""

    scores: list[list[float]]
    """Number of pairs that each response won, row by row; an undecided pair is half a win for both. In the format of one
    method of [`~dmoerm_trl.evaluation.table.consistency_table`]."""
    pairs: int
    """Number of pairs of responses compared; a duplicate of a text in a row is not compared."""
    undecided: int
    """Number of pairs on which the two answers disagreed in every round."""
    answers: int
    """Number of answers used, in all rounds, including those stored by earlier calls."""
    unreadable: int
    """Number of these answers that could not be read or made no choice."""
    fault: str | None = None
    """Why the answers are worthless, if that is statistically certain."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Kind of failure -> number of requests of this call that failed and were retried."""

    def __str__(self) -> str:
        counts = f"{self.pairs} pairs, {self.undecided} of them undecided; {self.answers} answers, {self.unreadable} unreadable"
        parts = [counts, *([failed_requests(self.failures)] if self.failures else [])]
        return ". ".join([*parts, *([f"Warning: {self.fault}"] if self.fault else [])])


def generative_verdicts(
    judge: Judge,
    rows: Sequence[PreferenceRow],
    *,
    max_rounds: int = 1,
    answers: str | os.PathLike = ":memory:",
    budget: Budget | None = None,
    stop_early: bool = True,
) -> Verdicts:
    """
    Let a judge compare all pairs of each row's responses overall, in both orders. As in the paper, a pair is asked again until
    both answers agree, but at most `max_rounds` times; after that it is undecided and counts as a tie.

    With two responses per row, the consistency in the table is exactly that of the judge's decisions. With K > 2 responses, the
    table uses their order by pairs won: if the judge is not transitive, a pair may count against the judge's own decision on
    it, and two responses with equally many wins count as a tie. Pairs that are tied in the labels are asked too, because
    otherwise the numbers of wins would leak the labels.

    A judge without an `example` is zero-shot, one with an example is one-shot. `dict(scores, **{"one-shot judge":
    verdicts.scores})` adds the judge to the scores of [`~dmoerm_trl.evaluation.methods.method_scores`].

    Args:
        judge ([`~dmoerm_trl.labelling.judges.Judge`]): The judge; its temperature must be above 0 if `max_rounds` is above 1.
        rows (`Sequence[PreferenceRow]`): Test rows.
        max_rounds (`int`, *optional*, defaults to 1): Maximum number of rounds per pair, with two questions each.
        answers (`str`, *optional*, defaults to `":memory:"`): File of the answers; a later call resumes from it.
        budget ([`~dmoerm_trl.labelling.budget.Budget`], *optional*): Limits on what the answers may cost.
        stop_early (`bool`, *optional*, defaults to `True`): Whether to stop as soon as it is statistically certain that the
            answers are worthless, because nearly all of them name the same position or cannot be read.

    Raises:
        JudgeError: If asking stopped before the end, also by Ctrl-C; the answers received so far are in `answers`.
        ValueError: If further rounds would only repeat the same answers.
    """
    check_rounds(judge, max_rounds)
    return asyncio.run(_judge_rows(judge, rows, max_rounds, answers, budget or Budget(), stop_early))


def check_rounds(judge: Judge, max_rounds: int) -> None:
    """
    Check that a judge can be asked about a pair for so many rounds.

    Raises:
        ValueError: If further rounds would only repeat the same answers.
    """
    if max_rounds < 1 or (max_rounds > 1 and not judge.samples):
        raise ValueError(
            f"got max_rounds={max_rounds}, need 1, or more with a judge that samples, because any other gives the same answers "
            "again: set a temperature, such as 0.7."
        )


async def _judge_rows(
    judge: Judge,
    rows: Sequence[PreferenceRow],
    max_rounds: int,
    path: str | os.PathLike,
    budget: Budget,
    stop_early: bool,
) -> Verdicts:
    seen = Tally()  # first round only: later rounds contain just the hard pairs
    choices: Counter[int | None] = Counter()

    async def judge_pair(row: PreferenceRow, pair: tuple[int, int]) -> int | None:
        """Index of the response that is preferred in both positions, or None."""
        first, second = (row.responses[index] for index in pair)
        for round in range(max_rounds):
            forth = Question(row.prompt, first, second, None, row.task, round)
            back = replace(forth, first=second, second=first)
            given = tuple(answer.verdict for answer in await gather_answers(map(queue.answer, (forth, back))))
            choices.update(given)
            if round == 0:
                seen.add(pair, given)
                if stop_early:
                    queue.stop_if_worthless(seen)
            winner = agreed(pair, *given)
            if winner is not None:
                return winner
        return None

    async def judge_row(row: PreferenceRow) -> list[int | None]:
        winners = await gather_answers(judge_pair(row, pair) for pair in combinations(distinct_responses(row), 2))
        bar.update()
        return winners

    with AnswerStore(path, judge.identity) as answers, tqdm(total=len(rows), desc="judging", unit=" rows") as bar:
        budget.spend(*answers.spent)
        if stop_early:
            answers.forget_given_up()
        queue = QuestionQueue(judge, answers, budget)
        with stop_on_interrupt(queue):
            try:
                async with queue:
                    winners = await gather_answers(map(judge_row, rows))
            except Stopped:
                raise JudgeError(f"{queue.stopped}. {bar.n} of {len(rows)} rows are judged.") from None
            finally:
                await judge.close()
    decided = [winner for row_winners in winners for winner in row_winners]
    scores = [_wins(row, row_winners) for row, row_winners in zip(rows, winners, strict=True)]
    failures = dict(getattr(judge, "failures", {}))
    return Verdicts(scores, len(decided), decided.count(None), choices.total(), choices[None], seen.fault(), failures)


def _wins(row: PreferenceRow, winners: list[int | None]) -> list[float]:
    wins: Counter[str] = Counter()
    for pair, winner in zip(combinations(distinct_responses(row), 2), winners, strict=True):
        for index in pair:
            wins[row.responses[index]] += 0.5 if winner is None else float(index == winner)
    return [float(wins[text]) for text in row.responses]
