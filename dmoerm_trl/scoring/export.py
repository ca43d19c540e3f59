"""Export a task's base as a `<Arch>ForSequenceClassification`, or an expert as a PEFT adapter of it."""

import copy
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat_template import fix_date
from ..modeling.assembly import base_reward_model, expert_names, state_of_task
from ..modeling.experts import lora_config
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..tasks import slug

HEAD = "score"
"""The linear layer of transformers' decoders with a classification head; it reads the last token that is no padding."""


def sequence_classifier(model: DMoERMForSequenceClassification, task: str) -> PreTrainedModel:
    """
    Copy a task's base, as phase 1 left it, into the class that `AutoModelForSequenceClassification` has for its architecture.

    Its one logit is `w z` of the base's head `w z + b`: the class has no bias, and neither `b`, the sigma of equation 4, nor
    the normalisation change the order of responses. With `activation="none"` the model's reward is `(logit + b - mean) / std`,
    with `"sigmoid"` it is `(sigmoid(logit + b) - mean) / std`; see [`logit_shift`].

    Args:
        model (`DMoERMForSequenceClassification`): A DMoERM, a phase-1 model or a baseline.
        task (`str`): One of its tasks.

    Raises:
        ValueError: If the architecture has no such class whose head is one linear layer on the last token, as encoders'.

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, sequence_classifier

    model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    classifier = sequence_classifier(model, "chitchat")
    assert type(classifier).__name__ == "Qwen2ForSequenceClassification"
    ```
    """
    base = base_reward_model(model, task)
    backbone = base.model.backbones[base.model.backbone_key(task)]
    config = type(backbone.config).from_dict(backbone.config.to_dict())
    config.num_labels, config.pad_token_id = 1, model.config.pad_token_id
    try:
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=backbone.dtype)
        head = getattr(classifier, HEAD)
    except (ValueError, AttributeError):
        head = None
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"got a base of the architecture {config.model_type!r}, need a decoder whose sequence classification model has a linear "
            f"`{HEAD}` on the last token, because nothing else computes the same reward: use the DMoERM itself."
        )
    getattr(classifier, classifier.base_model_prefix).load_state_dict(backbone.state_dict())
    with torch.no_grad():
        head.weight.copy_(base.model.inner_models[slug(task)].base_head.weight)
    return classifier.eval()


def logit_shift(model: DMoERMForSequenceClassification, task: str, point: str | None = None) -> float:
    """Return the bias `b` of the base's head, or of a capability point's, that an exported model leaves out of its logit."""
    inner = model.model.inner_models[slug(task)]
    head = inner.base_head if point is None else inner.expert_heads[slug(point)]
    return head.bias.item()


def export_reward_model(
    model: DMoERMForSequenceClassification, task: str, folder: str | Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """
    Save [`sequence_classifier`] with its tokenizer: a folder that vLLM, TEI and RewardBench take without this package.

    Raises:
        ValueError: If the padding token can end a turn, or the chat template writes something after the last turn, because the
            class would read another token than the model; see [`sequence_classifier`].

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, export_reward_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    export_reward_model(model, "chitchat", "exported", AutoTokenizer.from_pretrained("runs/demo/model"))
    AutoModelForSequenceClassification.from_pretrained("exported")
    ```
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in model.config.end_of_turn:
        raise ValueError(
            f"got the padding token {tokenizer.pad_token!r}, which ends a turn too, need one of its own, because an ordinary "
            "sequence classification model reads the last token that is no padding: set `tokenizer.pad_token` to another token."
        )
    classifier = sequence_classifier(model, task)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    classifier.save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    fix_date(tokenizer)
    _end_with_the_turn(tokenizer, model.config.end_of_turn)
    tokenizer.save_pretrained(folder)


def _end_with_the_turn(tokenizer: PreTrainedTokenizerBase, end_of_turn: list[int]) -> None:
    """
    Let the chat template leave out the white space after the token that ends the last turn, in place: the class reads the last
    token of a chat, and the model was trained to read that one.

    Raises:
        ValueError: If something else follows the last turn.
    """
    if not tokenizer.chat_template or not end_of_turn:
        return
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    after = min((text.rpartition(end)[2] for end in tokenizer.convert_ids_to_tokens(end_of_turn)), key=len)
    if after.strip():
        raise ValueError(
            f"got a chat template that writes {after!r} after the last turn, need nothing but white space there, because an ordinary "
            "sequence classification model reads the last token of a chat: use the DMoERM itself."
        )
    if after:
        template = tokenizer.chat_template.removesuffix("\n")  # as Jinja does at the end of a template
        shown = "{{ chat if add_generation_prompt else chat.rstrip() }}"
        tokenizer.chat_template = "{% set chat %}\n" + template + "{%+ endset %}" + shown


def export_adapter(
    model: DMoERMForSequenceClassification, task: str, point: str, folder: str | Path, base: str | Path
) -> None:
    """
    Save an expert as a PEFT adapter of the model that [`export_reward_model`] leaves for its task. The adapter holds the
    expert's head too, so that the logit of the adapted model orders responses as the expert's capability scores do.

    Args:
        point (`str`): The expert's capability point.
        folder (`str` or `Path`): Folder of the adapter.
        base (`str` or `Path`): Folder of the task's exported model, which the adapter's configuration names.

    Raises:
        ValueError: If the model does not have the task, or the task not the point.

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, export_adapter, export_reward_model
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    export_reward_model(model, "chitchat", "exported", AutoTokenizer.from_pretrained("runs/demo/model"))
    export_adapter(model, "chitchat", "empathy ability", "exported/empathy", base="exported")
    PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("exported"), "exported/empathy")
    ```
    """
    if point not in model.config.tasks.get(task, ()):
        raise ValueError(f"got the capability point {point!r} of the task {task!r}, need one of {model.config.tasks}.")
    key = model.model.backbone_key(task)
    config = lora_config(model.config, model.model.backbones[key])
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", [HEAD], True
    config.base_model_name_or_path = str(base)
    inside = f"base_model.model.model.backbones.{key}."
    state, weights = state_of_task(model, task), {}
    for own, name in expert_names(model, task, point).items():
        if name.startswith(inside):
            name = f"base_model.model.model.{name.removeprefix(inside)}"
        elif name.endswith(".weight"):
            name = f"base_model.model.{HEAD}.weight"
        else:  # the bias, for which the class has no place
            continue
        weights[name] = state[own].detach().cpu().clone()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
