"""Assemble a DMoERM from the results of the training phases, and take it apart again."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..tasks import slug
from .experts import adapter_name, lora_config
from .modeling_dmoerm import DMoERMForSequenceClassification
from .pretrained import check_finite
from .quantization import check_full_precision
from .router import Router

SCALE = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "fan_in_fan_out")
"""The settings of a PEFT adapter that determine how its weights change the base."""


def with_experts(base: DMoERMForSequenceClassification, points: Sequence[str]) -> DMoERMForSequenceClassification:
    """
    Build a task's inner model with untrained experts, for phase 2.

    The experts' LoRA does not change the output, and their heads are copies of the base's head. The aggregator is
    untrained too.

    Args:
        base (`DMoERMForSequenceClassification`): A model with one task and no capability points; its backbone is
            reused, not copied.

    Raises:
        ValueError: If a LoRA target names no linear module of the base.
    """
    (task,) = base.config.tasks
    config = copy.deepcopy(base.config)
    config.tasks = {task: list(points)}
    model = DMoERMForSequenceClassification(config, dict(base.model.backbones))
    head = base.model.inner_models[
        slug(task)
    ].base_head.state_dict()  # without its normalisation, which does not fit the aggregator
    inner = model.model.inner_models[slug(task)]
    for copied in (inner.base_head, *inner.expert_heads.values()):
        copied.load_state_dict(head)
    return model.eval()


def add_experts_to(
    base: DMoERMForSequenceClassification, adapters: Mapping[str, str | Path]
) -> DMoERMForSequenceClassification:
    """
    Build a task's inner model from its base and its trained experts, with an untrained aggregator, for phase 3.

    Args:
        base (`DMoERMForSequenceClassification`): A model with one task and no capability points; its backbone is
            reused, not copied.
        adapters (`dict`): Capability point -> folder of its expert, an ordinary PEFT adapter of `base`.

    Raises:
        ValueError: If a folder does not contain exactly the weights of such an expert, as finite floating-point
            numbers.
    """
    (task,) = base.config.tasks
    model = with_experts(base, list(adapters))
    for point, folder in adapters.items():
        names = expert_names(model, task, point)
        weights = load_peft_weights(str(folder), device="cpu")
        saved = PeftConfig.from_pretrained(str(folder))
        settings = lora_config(model.config, model.model.backbones[model.model.backbone_key(task)])
        odd = [name for name in SCALE if getattr(saved, name, None) != getattr(settings, name)]
        shapes = {name: model.get_parameter(own).shape for own, name in names.items()}
        odd += sorted(
            name
            for name in weights.keys() | shapes
            if name not in weights or weights[name].shape != shapes.get(name) or not weights[name].is_floating_point()
        )
        if odd:
            raise ValueError(
                f"{folder}: got an adapter whose weights are not those of the expert {point!r} of {task!r} (such as "
                f"{odd[0]!r}), need one trained on this base with the same LoRA settings: train phase 2 again."
            )
        model.load_state_dict({own: weights[name] for own, name in names.items()}, strict=False)
    check_finite(model)
    return model.eval()


def assemble(
    inner_models: Mapping[str, DMoERMForSequenceClassification], router: Router
) -> DMoERMForSequenceClassification:
    """
    Assemble the complete model from its parts, whose backbones are reused, not copied.

    Args:
        inner_models (`dict`): Task -> a model with only that task. With `share_base` all of them have the same base.
        router (`Router`): A router trained on the same tasks; its order of the tasks is kept.

    Raises:
        ValueError: If the router's tasks are not those of `inner_models`, or a base is quantised.

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, Router, assemble, inner_model

    model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    parts = {task: inner_model(model, task) for task in model.config.tasks}
    again = assemble(parts, Router.from_pretrained("runs/demo/router"))
    ```
    """
    tasks = list(router.config.tasks)
    if set(tasks) != set(inner_models):
        raise ValueError(f"got a router over {tasks} and inner models of {list(inner_models)}, need the same tasks.")
    for part in inner_models.values():
        check_full_precision(part, "put into a model")
    config = copy.deepcopy(inner_models[tasks[0]].config)
    config.tasks = {task: inner_models[task].config.tasks[task] for task in tasks}
    config.router_config = router.config.router_config
    backbones, state = {}, {f"model.router.{key}": value for key, value in router.state_dict().items()}
    for task in tasks:
        backbones = {**inner_models[task].model.backbones, **backbones}
        state |= inner_models[task].state_dict()
    model = DMoERMForSequenceClassification(config, backbones)
    model.load_state_dict(state)
    return model.eval()


def inner_model(model: DMoERMForSequenceClassification, task: str) -> DMoERMForSequenceClassification:
    """
    Copy one task's inner model into a model of its own.

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, inner_model

    model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    inner_model(model, "chitchat").save_pretrained("chitchat")
    ```
    """
    return _part(model, task, model.config.tasks[_checked_task(model, task)])


def base_reward_model(model: DMoERMForSequenceClassification, task: str) -> DMoERMForSequenceClassification:
    """
    Copy one task's base, as phase 1 trained it, into a model of its own.

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, base_reward_model

    model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    base = base_reward_model(model, "chitchat")
    assert base.config.tasks == {"chitchat": []}
    ```
    """
    return _part(model, _checked_task(model, task), [])


def export_expert(model: DMoERMForSequenceClassification, task: str, point: str, folder: str | Path) -> None:
    """
    Save one expert as an ordinary PEFT adapter of [`base_reward_model`], for `PeftModel.from_pretrained`.

    The rewards of that PEFT model are the expert's capability scores.

    Raises:
        ValueError: If the model does not have the task, or the task does not have the point.

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, export_expert

    model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    export_expert(model, "chitchat", "empathy ability", "runs/expert")
    ```
    """
    if point not in model.config.tasks[_checked_task(model, task)]:
        raise ValueError(f"got capability point {point!r}, need one of {model.config.tasks[task]} of task {task!r}.")
    config = lora_config(model.config, model.model.backbones[model.model.backbone_key(task)])
    config.modules_to_save, config.inference_mode = ["base_head"], True
    state = state_of_task(model, task)
    weights = {name: state[own].detach().cpu().clone() for own, name in expert_names(model, task, point).items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def with_task(base: DMoERMForSequenceClassification, task: str) -> DMoERMForSequenceClassification:
    """Rename the task of a base model, whose backbone is reused; with `share_base` all tasks start from one base."""
    (before,) = base.config.tasks
    if before == task:
        return base
    config = copy.deepcopy(base.config)
    config.tasks = {task: []}
    model = DMoERMForSequenceClassification(
        config, {base.model.backbone_key(task): base.model.backbones[base.model.backbone_key(before)]}
    )
    model.model.inner_models[slug(task)].load_state_dict(base.model.inner_models[slug(before)].state_dict())
    return model.eval()


def expert_names(model: PreTrainedModel, task: str, point: str) -> dict[str, str]:
    """Map the names of an expert's weights in a DMoERM to their names in an ordinary PEFT adapter of the base."""
    adapter, inner = adapter_name(task, point), f"model.inner_models.{slug(task)}."
    head = f"{inner}expert_heads.{slug(point)}."
    names = {}
    for name in state_of_task(model, task):
        if re.search(rf"\.lora_[AB]\.{adapter}\.", name):
            names[name] = "base_model.model." + name.replace(f".{adapter}.", ".")
        elif name.startswith(head):
            names[name] = f"base_model.model.{inner}base_head.{name.removeprefix(head)}"
    return names


def _part(model: DMoERMForSequenceClassification, task: str, points: list[str]) -> DMoERMForSequenceClassification:
    """Copy one task with some of its capability points into a model of its own."""
    check_full_precision(model.model.backbones[model.model.backbone_key(task)], "take out of a model")
    config = copy.deepcopy(model.config)
    config.tasks, config.router_config = {task: list(points)}, None
    with torch.device("cpu"):
        part = DMoERMForSequenceClassification(config)
    state, wanted = state_of_task(model, task), part.state_dict()
    if not points:  # the base's weights are inside PEFT's layers
        inside = f"model.backbones.{model.model.backbone_key(task)}."
        state = {
            inside + name.removeprefix(inside).replace("base_layer.", "") if name.startswith(inside) else name: value
            for name, value in state.items()
        }
        # the aggregator's normalisation does not fit the base's head
        state |= {name: wanted[name] for name in wanted if name.endswith(("reward_mean", "reward_std"))}
    copies = {name: state[name].detach().cpu().clone() for name in wanted}
    part.load_state_dict(copies, assign=True)  # keeps each dtype: the heads are fp32 in a bf16 model too
    return part.eval()


def state_of_task(model: DMoERMForSequenceClassification, task: str) -> dict[str, Tensor]:
    """Collect the weights of one task under their names in the complete model, loading its base if necessary."""
    state: dict[str, Tensor] = {}
    key = model.model.backbone_key(task)
    model.model.backbones[key].state_dict(destination=state, prefix=f"model.backbones.{key}.")
    model.model.inner_models[slug(task)].state_dict(destination=state, prefix=f"model.inner_models.{slug(task)}.")
    return state


def _checked_task(model: DMoERMForSequenceClassification, task: str) -> str:
    """Return the task after checking that the model has it."""
    if task not in model.config.tasks:
        raise ValueError(f"got task {task!r}, need one of {list(model.config.tasks)}.")
    return task
