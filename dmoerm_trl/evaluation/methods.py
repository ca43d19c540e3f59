"""Scores of the test rows by each method of a finished run: the rows of the paper's table 3."""

from collections.abc import Sequence

import torch

from ..data.rows import PreferenceRow
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..scoring.aggregation import mean_reward, uncertainty_weighted_reward, worst_case_reward
from ..scoring.batch import route_encodings, score_encodings
from ..tasks import OVERALL
from ..training.pipeline import Pipeline
from .table import LENGTH_ONLY, length_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def method_scores(run: Pipeline, rows: Sequence[PreferenceRow]) -> dict[str, list[list[float]]]:
    """
    Score rows by all methods of a finished run.

    Args:
        run (`Pipeline`): The run. The rewards of its ensemble members are normalised to zero mean and unit variance.
        rows (`Sequence[PreferenceRow]`): R rows, such as `run.rows("test")`.

    Returns:
        `dict`: Method -> R lists of rewards, for single, mean, WCO and UWO (equations 8 to 10), DMoERM-w/o-Outer, DMoERM and
        the length-only baseline. Methods that the recipe did not train are absent.
    """
    encodings, report = run.formatter.encode_rows(rows)
    if report.cut_rows:
        print(report)
    flat = [encoding for row in encodings for encoding in row]

    def score(model: DMoERMForSequenceClassification, name: str) -> torch.Tensor:
        pad_token_id = run.formatter.tokenizer.pad_token_id
        return score_encodings(model.to(DEVICE), flat, pad_token_id=pad_token_id, description=f"scoring by {name}")

    rewards = {}
    size = run.recipe.ensemble_size
    if size:
        members = torch.stack([score(run.load(f"ensemble/{member}"), f"member {member}") for member in range(size)])
        rewards["single"] = members[0]
        if size > 1:
            rewards["mean"] = mean_reward(members)
            rewards["WCO"] = worst_case_reward(members)
            rewards["UWO"] = uncertainty_weighted_reward(members)
    if run.recipe.without_outer:
        rewards["DMoERM-w/o-Outer"] = score(run.load(f"{OVERALL}/phase3"), "DMoERM-w/o-Outer")
    rewards["DMoERM"] = score(run.load("model"), "DMoERM")
    scores = {}
    for method, values in rewards.items():
        values = iter(values.tolist())
        scores[method] = [[next(values) for _ in row.responses] for row in rows]
    return scores | {LENGTH_ONLY: length_scores(rows)}


def router_accuracy(run: Pipeline, rows: Sequence[PreferenceRow]) -> float:
    """
    Compute the share of rows whose prompt the router sends to the row's task, ignoring rows of tasks unknown to the DMoERM.
    """
    model = run.load("model").to(DEVICE)
    tasks = list(model.config.tasks)
    rows = [row for row in rows if row.task in tasks]
    encodings = [run.formatter.encode(row.prompt, row.responses[0]) for row in rows]
    routes = route_encodings(model, encodings, pad_token_id=run.formatter.tokenizer.pad_token_id).argmax(1)
    return sum(tasks[route] == row.task for route, row in zip(routes.tolist(), rows, strict=True)) / len(rows)
