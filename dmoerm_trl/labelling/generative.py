"""The generative baseline (appendix B.3.3): a judge that compares whole responses, as a row of the consistency table."""

import asyncio
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from tqdm.auto import tqdm

from ..data.preference_row import PreferenceRow
from .answers import AnswerStore
from .asking import Asking, Stopped, interrupts, together
from .budget import Budget
from .judges import Judge, JudgeError, Question
from .plan import agreed, distinct_responses
from .report import Tally, failed_requests


@dataclass(frozen=True)
class Verdicts:
    """What a judge made of rows."""

    scores: list[list[float]]
    """Row by row, the pairs that each response won; an undecided pair is half a win for both. What
    [`~dmoerm_trl.evaluation.table.consistency_table`] takes as one method."""
    pairs: int
    """Pairs of responses that were compared; of a text that a row has twice, one."""
    undecided: int
    """Those on which the judge did not agree with itself in any round."""
    answers: int
    """Answers from which they come, of all rounds; those of earlier calls too."""
    unreadable: int
    """Those of them that could not be read, or were none."""
    fault: str | None = None
    """What makes the answers worthless, if something surely does."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Kind -> requests of this call that failed and were made again."""

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
    Has a judge compare all pairs of each row's responses: overall, twice with the positions swapped, and anew until both
    answers agree, as the paper does, but `max_rounds` times at most. Then the pair is undecided, a tie.

    With two responses a row the table's consistency is exactly that of the judge's decisions. With K > 2 the table sees the
    order by pairs won: where the judge is not transitive, a pair may then count against its own decision, and two responses
    with as many wins count as a tie. All pairs are asked, those too that the labels leave tied: without them the numbers of
    wins would tell the labels.

    Zero-shot is a judge without an `example`, one-shot one with it. `dict(scores, **{"one-shot judge": verdicts.scores})` adds
    the row to those of [`~dmoerm_trl.evaluation.methods.method_scores`].

    Args:
        judge ([`~dmoerm_trl.labelling.judges.Judge`]): with a temperature above 0, if `max_rounds` is above 1.
        rows (`Sequence[PreferenceRow]`): test rows.
        max_rounds (`int`): how often a pair is asked about, two questions each time.
        answers (`str`): a file for the answers, from which another call goes on without asking anything again.
        budget ([`~dmoerm_trl.labelling.budget.Budget`], *optional*): of what the answers may cost.
        stop_early (`bool`): whether asking stops when it is sure that the answers are worth nothing, because nearly all of
            them name the same position or cannot be read.

    Raises:
        JudgeError: if asking stopped before the end, by Ctrl-C too; what came is in `answers`.
        ValueError: if another round would get the same answers again.
    """
    check_rounds(judge, max_rounds)
    return asyncio.run(_judge_rows(judge, rows, max_rounds, answers, budget or Budget(), stop_early))


def check_rounds(judge: Judge, max_rounds: int) -> None:
    """
    Checks how often a judge may be asked about a pair.

    Raises:
        ValueError: if another round would get the same answers again.
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
    seen = Tally()  # of the first round: those that follow are of the pairs that are hard to tell
    choices: Counter[int | None] = Counter()

    async def judge_pair(row: PreferenceRow, pair: tuple[int, int]) -> int | None:
        """The index of the response that is better whatever its position, or None."""
        first, second = (row.responses[index] for index in pair)
        for round in range(max_rounds):
            forth = Question(row.prompt, first, second, None, row.task, round)
            back = replace(forth, first=second, second=first)
            given = tuple(answer.verdict for answer in await together(map(asking.answer, (forth, back))))
            choices.update(given)
            if round == 0:
                seen.add(pair, given)
                if stop_early:
                    asking.stop_if_worthless(seen)
            winner = agreed(pair, *given)
            if winner is not None:
                return winner
        return None

    async def judge_row(row: PreferenceRow) -> list[int | None]:
        winners = await together(judge_pair(row, pair) for pair in combinations(distinct_responses(row), 2))
        bar.update()
        return winners

    with AnswerStore(path, judge.identity) as answers, tqdm(total=len(rows), desc="judging", unit=" rows") as bar:
        budget.spend(*answers.spent)
        if stop_early:
            answers.forget_given_up()
        asking = Asking(judge, answers, budget)
        with interrupts(asking):
            try:
                async with asking:
                    winners = await together(map(judge_row, rows))
            except Stopped:
                raise JudgeError(f"{asking.stopped}. {bar.n} of {len(rows)} rows are judged.") from None
            finally:
                await judge.close()
    decided = [winner for of_row in winners for winner in of_row]
    scores = [_wins(row, of_row) for row, of_row in zip(rows, winners, strict=True)]
    failures = dict(getattr(judge, "failures", {}))
    return Verdicts(scores, len(decided), decided.count(None), choices.total(), choices[None], seen.fault(), failures)


def _wins(row: PreferenceRow, winners: list[int | None]) -> list[float]:
    wins: Counter[str] = Counter()
    for pair, winner in zip(combinations(distinct_responses(row), 2), winners, strict=True):
        for index in pair:
            wins[row.responses[index]] += 0.5 if winner is None else float(index == winner)
    return [float(wins[text]) for text in row.responses]
