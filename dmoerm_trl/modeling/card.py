"""Write the model card of a saved model."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .configuration_dmoerm import DMoERMConfig
from .modeling_dmoerm import DMoERMForSequenceClassification

TEXT = """
# {title}

{what} It was trained with [dmoerm-trl](https://pypi.org/project/dmoerm-trl).

```python
from dmoerm_trl import DMoERMForSequenceClassification, Formatter
from transformers import AutoTokenizer

model = DMoERMForSequenceClassification.from_pretrained("{name}")
formatter = Formatter.for_model(model.config, AutoTokenizer.from_pretrained("{name}"), max_length=2048)
output = model(**formatter.batch([prompt], [response]))
output.logits, output.route, output.capability_scores
```

| task | capability points | mean and standard deviation that normalise its reward |
| --- | --- | --- |
{tasks}

{thoughts}

Base: {base}. LoRA rank {rank}, alpha {alpha}, on {modules}. Activation of equations 4 and 6: {activation}.

The rewards order responses to one prompt; they are not calibrated across prompts or tasks beyond that normalisation.

Paper: Shanghaoran Quan, *DMoERM: Recipes of Mixture-of-Experts for Effective Reward Modeling*, Findings of ACL 2024.
"""


def write_model_card(model: DMoERMForSequenceClassification, folder: str | Path) -> None:
    """Write `README.md` into the folder of a saved model: its kind, its usage, its tasks and their normalisation."""
    config, inner_models = model.config, model.model.inner_models.values()
    points = any(config.tasks.values())
    rows = [
        f"| {_plain(task)} | {_plain(', '.join(names)) or 'none'} | {float(inner.reward_mean):.4g}, {float(inner.reward_std):.4g} |"
        for (task, names), inner in zip(config.tasks.items(), inner_models, strict=True)
    ]
    text = TEXT.format(
        title="DMoERM" if points else "Reward model",
        what="A double-layer mixture-of-experts reward model."
        if points
        else "A single reward model, without experts.",
        name=Path(folder).name,
        tasks="\n".join(rows),
        base=_plain(config.backbone_config.model_type),
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        modules=_plain(", ".join(config.lora_target_modules)),
        activation=config.activation,
        thoughts=_thoughts(config),
    )
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-classification", tags=["trl", "dmoerm", "reward-model"]
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(Path(folder) / "README.md")


def _plain(text: str) -> str:
    """Escape a text for Markdown, so that it is shown literally: one line, no markup, no HTML, no link."""
    visible = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\`*\[\]<>|&#~!$:@{}])", r"\\\1", " ".join(visible.split()))


def _thoughts(config: DMoERMConfig) -> str:
    """Describe whether the thoughts of a reasoning model are scored."""
    opening = config.response_opening
    if opening is None or not opening["thinking"]:
        return "The chat template knows no thoughts: what stands in a response is scored."
    if opening["scored"]:
        return "The thoughts before a response are scored with it."
    return "The thoughts before a response (`<think>...</think>` or the chat template's own form) are not scored."
