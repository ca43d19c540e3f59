"""Which of a DMoERM's tasks the prompts of a run need; the others' inner models are not kept in memory."""

import copy
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..data.formatting import Formatter
from ..evaluation.scoring import route_encodings
from ..modeling.assembly import base_reward_model
from ..modeling.modeling import DMoERMForSequenceClassification
from ..modeling.placing import PlacedBases


def routed_tasks(
    model: DMoERMForSequenceClassification, prompts: Sequence[list[dict]], formatter: Formatter
) -> dict[str, int]:
    """
    Task -> how many of the prompts the router sends there, the most frequent first. Tasks without any are absent.

    It runs where the router is, which may be moved to a device by itself, and needs no base.
    """
    encodings = [formatter.encode(prompt, "") for prompt in prompts]
    routes = route_encodings(model, encodings, pad_token_id=formatter.tokenizer.pad_token_id).argmax(1)
    names = list(model.config.tasks)
    return {names[index]: count for index, count in Counter(routes.tolist()).most_common()}


def keep_tasks(model: DMoERMForSequenceClassification, tasks: Sequence[str]) -> None:
    """
    Frees the bases and experts of all other tasks. The router stays as it is, so a text of a kept task has the reward it
    had, and one that is sent to another task raises a ValueError. With a shared base nothing is freed.

    Of a model that was loaded with `resident_tasks`, the kept bases are read now, and the others never. The model can no
    longer be saved.
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


def _left_out(kept: list[str], key: str, device: torch.device) -> PreTrainedModel:
    """To ask for a base that was freed is an error that says why it is not there."""
    raise ValueError(
        f"got a prompt that the router sends to the task {key!r}, which was left out to save memory, need one of "
        f"{kept}: give all prompts to `routed_tasks` before `keep_tasks`, or keep this task too."
    )


def value_model_of(model: DMoERMForSequenceClassification, task: str) -> PreTrainedModel:
    """
    A value model for PPO that starts from a task's base, as it left phase 1, with copies of the weights, in fp32.

    Its head is zero, so that all values start at 0, the mean of normalised rewards.
    """
    base = base_reward_model(model, task)
    backbone = base.model.backbones[base.model.backbone_key(task)]
    config = copy.deepcopy(backbone.config)
    config.num_labels = 1
    value_model = AutoModelForSequenceClassification.from_config(config)
    getattr(value_model, value_model.base_model_prefix).load_state_dict(backbone.state_dict())
    nn.init.zeros_(value_model.score.weight)
    return value_model.float()
