"""Run `dmoerm eval`."""

from collections.abc import Mapping
from typing import Any

from ..data.rows import load_rows, merge_same_tokens
from ..evaluation.methods import method_scores
from ..evaluation.table import Table, consistency_table
from ..labelling.budget import Budget
from ..labelling.generative import check_rounds, generative_verdicts
from ..labelling.judges import JudgeError, judge_from_config
from ..tasks import check_name, slug
from ..training.pipeline import Pipeline


def evaluate(
    run: Pipeline,
    rows: str | None = None,
    resamples: int = 1000,
    *,
    judges: Mapping[str, Mapping[str, Any]] | None = None,
    max_rounds: int = 1,
    max_calls: int | None = None,
    stop_early: bool = True,
) -> Table:
    """
    Compute the consistency table of a finished run, and save it as `consistency.md` and `consistency.json` in its folder.

    Args:
        rows (`str`, *optional*): Rows to evaluate on; the run's test rows by default.
        judges (`Mapping`, *optional*): Name of a row of the table -> settings of a judge, for the generative baseline of
            appendix B.3.3; see [`~dmoerm_trl.labelling.generative.generative_verdicts`]. Its answers are kept in `judges/`,
            and no question is asked twice.
        max_rounds (`int`), max_calls (`int`, *optional*), stop_early (`bool`): Limits of each judge.

    Raises:
        FileNotFoundError: If the training is not finished.
        JudgeError: If a judge did not answer all questions. The table without it is printed and saved before, and its answers
            are kept for the next run.
        ValueError: If a judge has the name of a method, or unknown settings.
    """
    if not run.finished:
        raise FileNotFoundError(
            f"{run.root}: the training is not finished, need its models: run `dmoerm train` first."
        )
    asked = {name: judge_from_config(settings) for name, settings in (judges or {}).items()}
    Budget(max_calls)  # so that a mistake is found before the methods are scored
    for name, judge in asked.items():
        check_name(name, "a judge")
        check_rounds(judge, max_rounds)
    if rows is None:
        evaluated = run.rows("test")
    else:
        evaluated, report = load_rows(rows, tasks=run.tasks, on_error=run.recipe.on_error)
        print(report)
        evaluated, same = merge_same_tokens(evaluated, run.formatter.encode_rows(evaluated)[0])
        if same:
            print(f"{same} labelled pairs left out: their responses are the same tokens")
    ranked = [row for row in evaluated if row.pairs_of()]
    if len(ranked) < len(evaluated):
        print(f"{len(evaluated) - len(ranked)} of {len(evaluated)} rows left out: without an overall preference")
        evaluated = ranked
    if not evaluated:
        raise ValueError(
            f"{rows or run.root / 'data'}: got no row with an overall preference, need one to compare with."
        )
    scores = method_scores(run, evaluated)

    def saved() -> Table:
        table = consistency_table(scores, evaluated, list(run.tasks.tasks), resamples=resamples)
        table.save(run.root / "consistency")
        return table

    table = saved()
    if taken := [name for name in asked if name in scores]:
        raise ValueError(f"`judges`: got the names {taken}, which are methods of the table, need other names.")
    for name, judge in asked.items():
        print(f"before asking {name}:\n{table.to_markdown()}")  # all that there is if it fails
        answers = run.root / "judges" / f"{slug(name)}.sqlite"
        answers.parent.mkdir(exist_ok=True)
        try:
            verdicts = generative_verdicts(
                judge,
                evaluated,
                max_rounds=max_rounds,
                answers=answers,
                budget=Budget(max_calls),
                stop_early=stop_early,
            )
        except JudgeError as error:
            raise JudgeError(f"{name}: {error}") from error
        print(f"{name}: {verdicts}")
        scores[name] = verdicts.scores
        table = saved()
    return table
