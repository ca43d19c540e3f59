"""Build PPO's value model from a task's base."""

import copy

from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..modeling.assembly import base_reward_model
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification


def value_model_from(model: DMoERMForSequenceClassification, task: str) -> PreTrainedModel:
    """
    Build a value model for PPO from the base of a task as phase 1 left it, with a copy of the weights in fp32.

    Its head is zero, so that all values start at 0, the mean of the normalised rewards.

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, value_model_from

    model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    value_model = value_model_from(model, "chitchat")
    ```
    """
    base = base_reward_model(model, task)
    backbone = base.model.backbones[base.model.backbone_key(task)]
    config = copy.deepcopy(backbone.config)
    config.num_labels = 1
    value_model = AutoModelForSequenceClassification.from_config(config)
    getattr(value_model, value_model.base_model_prefix).load_state_dict(backbone.state_dict())
    nn.init.zeros_(value_model.score.weight)
    return value_model.float()
