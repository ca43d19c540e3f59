"""Find the tasks that the prompts of a run need, and free the inner models of the others."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from ..data.formatting import Formatter
from ..modeling.base_placement import PlacedBases
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..scoring.batch import route_encodings
from ..scoring.ensemble import RewardEnsemble


def routed_tasks(
    model: DMoERMForSequenceClassification, prompts: Sequence[list[dict]], formatter: Formatter
) -> dict[str, int]:
    """
    Count the prompts that the router sends to each task, the most frequent task first. Tasks without prompts are absent.

    Only the router runs, on the device where it is.

    Example:

    ```python
    from dmoerm_trl import load_reward_model, routed_tasks

    model, formatter = load_reward_model("runs/demo/model", max_length=512)
    routed_tasks(model, [[{"role": "user", "content": "Hello?"}]], formatter)
    ```
    """
    encodings = [formatter.encode(prompt, "") for prompt in prompts]
    routes = route_encodings(model, encodings, pad_token_id=formatter.tokenizer.pad_token_id).argmax(1)
    names = list(model.config.tasks)
    return {names[index]: count for index, count in Counter(routes.tolist()).most_common()}


def keep_tasks(model: DMoERMForSequenceClassification, tasks: Sequence[str]) -> None:
    """
    Free the bases and experts of all tasks except `tasks`. The router is unchanged: texts of a kept task have the same rewards
    as before, and a text that is routed to another task raises a ValueError. With a shared base nothing is freed.

    If the model was loaded with `resident_tasks`, the kept bases are loaded now and the others never. The model can no longer
    be saved.

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, keep_tasks

    model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    keep_tasks(model, ["chitchat"])
    ```
    """
    if unknown := [task for task in tasks if task not in model.config.tasks]:
        raise ValueError(f"got the tasks {unknown}, need some of {list(model.config.tasks)}.")
    if model.config.share_base:
        return
    keys = [model.model.backbone_key(task) for task in tasks]
    before = model.model.backbones
    bases = {key: before[key] for key in keys}
    devices = before.devices if isinstance(before, PlacedBases) else None
    model.model.backbones = PlacedBases(
        list(model.model.inner_models), partial(_left_out, keys), bases=bases, devices=devices
    )


def keep_needed_tasks(
    reward_model: DMoERMForSequenceClassification | RewardEnsemble,
    prompts: Sequence[list[dict]],
    formatter: Formatter,
    device: torch.device | str = "cpu",
) -> dict[str, int]:
    """
    Free the bases and experts of all tasks that none of the prompts is routed to; see [`keep_tasks`].

    Args:
        device (`torch.device`): Device to which the router is moved, because it reads all prompts.

    Returns:
        `dict[str, int]`: The result of [`routed_tasks`]; for an ensemble, that of the last member.

    Example:

    ```python
    from dmoerm_trl import keep_needed_tasks, load_reward_model

    reward_model, formatter = load_reward_model("runs/demo/model", max_length=512)
    tasks = keep_needed_tasks(reward_model, [[{"role": "user", "content": "Hello?"}]], formatter)
    ```
    """
    routed: dict[str, int] = {}
    for member in getattr(reward_model, "members", [reward_model]):
        if member.model.router is not None:
            member.model.router.to(device)
        routed = routed_tasks(member, prompts, formatter)
        keep_tasks(member, list(routed))
    return routed


def _left_out(kept: list[str], key: str, device: torch.device) -> PreTrainedModel:
    """Raise the error for a text that needs a freed base."""
    raise ValueError(
        f"got a prompt that the router sends to the task {key!r}, which was left out to save memory, need one of "
        f"{kept}: give all prompts to `routed_tasks` before `keep_tasks`, or keep this task too."
    )
