"""Which of a DMoERM's tasks the prompts of a run need; the others' inner models are not kept in memory."""

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..data.formatting import Formatter
from ..evaluation.scoring import map_encodings
from ..modeling.assembly import base_reward_model
from ..modeling.modeling import DMoERMForSequenceClassification


def routed_tasks(
    model: DMoERMForSequenceClassification, prompts: Sequence[list[dict]], formatter: Formatter
) -> dict[str, int]:
    """
    Task -> how many of the prompts the router sends there, the most frequent first. Tasks without any are absent.

    It runs where the router is, which may be moved to a device by itself.
    """

    def route(input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
        return model.model.route(model.model.find_spans(input_ids, attention_mask, prompt_lengths)).argmax(-1)

    encodings = [formatter.encode(prompt, "") for prompt in prompts]
    pad_token_id = formatter.tokenizer.pad_token_id
    model.eval()
    device = model.device if model.model.router is None else model.model.router.device
    routes = map_encodings(route, encodings, pad_token_id=pad_token_id, device=device, description="routing prompts")
    names = list(model.config.tasks)
    return {names[index]: count for index, count in Counter(routes.tolist()).most_common()}


def keep_tasks(model: DMoERMForSequenceClassification, tasks: Sequence[str]) -> None:
    """
    Frees the bases and experts of all other tasks. The router stays as it is, so a text of a kept task has the reward it
    had, and one that is sent to another task raises a ValueError. With a shared base nothing is freed.

    The model can no longer be saved.
    """
    if unknown := [task for task in tasks if task not in model.config.tasks]:
        raise ValueError(f"got the tasks {unknown}, need some of {list(model.config.tasks)}.")
    if model.config.share_base:
        return
    keys = [model.model.backbone_key(task) for task in tasks]
    model.model.backbones = _KeptBases({key: model.model.backbones[key] for key in keys})


class _KeptBases(nn.ModuleDict):
    """The bases of some tasks; to ask for another is an error that says why it is not there."""

    def __getitem__(self, key: str) -> nn.Module:
        if key not in self:
            raise ValueError(
                f"got a prompt that the router sends to the task {key!r}, which was left out to save memory, need one of "
                f"{list(self)}: give all prompts to `routed_tasks` before `keep_tasks`, or keep this task too."
            )
        return super().__getitem__(key)


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
