"""Describe texts by plain numbers: rewards, routes and capability scores."""

import warnings
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState

from ..data.formatting import Formatter
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from .batch import points_of, route_encodings, score_capabilities


def describe(
    model: DMoERMForSequenceClassification,
    formatter: Formatter,
    texts: Sequence[tuple[list[dict], str]],
    processes: PartialState | None = None,
) -> list[dict[str, Any]]:
    """
    Compute the reward, route, route probabilities and capability scores of prompts with responses, as plain numbers.

    Args:
        texts (`Sequence[tuple[list[dict], str]]`): Pairs of a prompt, a list of turns, and a response.
        processes (`PartialState`, *optional*): Processes that share the work; each gets all results.

    Returns:
        `list[dict]`: `reward`, `route`, `route_probabilities` and `capability_scores` of each text.

    Example:

    ```python
    from dmoerm_trl import describe, load_reward_model

    model, formatter = load_reward_model("runs/demo/model", max_length=512)
    (scores,) = describe(model, formatter, [([{"role": "user", "content": "I feel lonely."}], "That sounds hard.")])
    scores["reward"], scores["route"], scores["capability_scores"]
    ```
    """
    formatter.check_model(model.config)
    tasks = list(model.config.tasks)
    encodings = [formatter.encode(prompt, response) for prompt, response in texts]
    if cut := sum(encoding.cut_turns > 0 for encoding in encodings):
        warnings.warn(
            f"for {cut} of {len(encodings)} responses, the prompt lost its oldest part to fit into "
            f"max_length={formatter.max_length}.",
            stacklevel=2,
        )
    pad_token_id = formatter.tokenizer.pad_token_id
    probabilities = route_encodings(model, encodings, pad_token_id=pad_token_id)
    found = score_capabilities(
        model,
        encodings,
        pad_token_id=pad_token_id,
        responses=[response for _, response in texts],
        groups=probabilities.argmax(1).tolist(),
        processes=processes,
    )
    points = points_of(model)
    described = []
    for reward, route, of_points, of_tasks in zip(
        *(values.tolist() for values in (*found, probabilities)), strict=True
    ):
        task, scores = tasks[route], dict(zip(points, of_points, strict=True))
        described.append(
            {
                "reward": reward,
                "route": task,
                "route_probabilities": dict(zip(tasks, of_tasks, strict=True)),
                "capability_scores": {point: scores[point] for point in model.config.tasks[task]},
            }
        )
    return described
