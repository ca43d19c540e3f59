"""Scoring with k experts in all ways: `speed.py` runs them side by side."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from peft import PeftModel
from speed_measure import Case
from speed_setting import BATCH, OURS, TASK, Setting, groups, least_flops
from torch import Tensor
from transformers import PreTrainedModel

from dmoerm_trl.data.formatting import Encoding
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.scoring.batch import score_encodings


def scoring_case(setting: Setting, name: str) -> Case:
    """
    The rewards of n responses to each of several prompts.

    PEFT's ways are measured on the first batch and the reference on the first texts, scaled by their tokens; of 1,024
    responses the padded reward model too. PEFT's ways and the reference do not share prompts, so they run for 1 and for 16 responses alone. For 16
    there is `ours_unshared` too: texts of the same lengths, but of different prompts. Of 1,024 only the cheapest is run.
    """
    prompts, responses = setting.sizes[name]
    rows = setting.rows(prompts, responses)
    texts = setting.encodings(rows)
    models, peft_models = experts_of(setting)
    trees = groups(setting, rows)
    limits = {variant: least_flops(setting, trees, lora_layers=layers) for variant, layers in OURS.items()}
    limits["single"] = least_flops(setting, trees, lora_layers=None)

    part, few = texts[:BATCH], texts[: BATCH // 4]
    unit = texts[: 4 * BATCH]
    variants: dict[str, Callable[[], Tensor]] = {"single": partial(single, setting.single(), setting, unit)}
    factors = {"single": tokens(texts) / tokens(unit)}
    slow = {"reference": (reference, few), "peft_loop": (peft_loop, part), "peft_mixed": (peft_mixed, part)}
    if responses in (1, 16):
        for variant, (way, of) in slow.items():
            variants[variant] = partial(rewards_of, models["ours_all"], way, peft_models["ours_all"], setting, of)
            factors[variant] = tokens(texts) / tokens(of)
    if responses == 16:
        variants["ours_unshared"] = partial(ours, models["ours_all"], setting, unshared(texts))
    shown = models if responses <= 64 else ["ours_third"]
    variants |= {variant: partial(ours, models[variant], setting, texts) for variant in shown}

    @torch.no_grad()
    def exactness(results: dict[str, Tensor]) -> dict[str, float]:
        """Rewards of the timed run, and the experts' embeddings, against one text and one expert at a time with PEFT."""
        errors = {}
        for variant in results.keys() - {"single", "ours_unshared"}:
            of = variant if variant in models else "ours_all"
            sample = range(0, len(results[variant]), -(-len(results[variant]) // 4))
            z = reference(peft_models[of], setting, [texts[index] for index in sample])
            rewards = models[of].model.inner_models[TASK].reward(z)[:, 0]
            compared = [(results[variant][list(sample)], rewards.cpu())]
            if variant in models:
                batch = next(setting.padded([texts[index] for index in sample]))
                lengths = torch.tensor([texts[index].prompt_length for index in sample], device=setting.device)
                mine = models[of].model.embed(TASK, models[of].model.find_spans(**batch, prompt_lengths=lengths))
                compared += zip(mine.unbind(1), z.unbind(1), strict=True)
            errors[variant] = float(torch.cat([relative(value, truth) for value, truth in compared]).max())
        return errors

    once = {*slow, "ours_unshared"} & variants.keys() if responses <= 64 else variants.keys()
    return Case(variants, limits, exactness, factors, once)


@cache
def experts_of(setting: Setting) -> tuple[dict[str, DMoERMForSequenceClassification], dict[str, PeftModel]]:
    """Each variant of ours, and the same weights as a PEFT model."""
    models = {variant: setting.ours(layers) for variant, layers in OURS.items()}
    return models, {variant: setting.peft(model) for variant, model in models.items()}


def tokens(texts: Sequence[Encoding]) -> int:
    return sum(len(text.input_ids) for text in texts)


def relative(value: Tensor, truth: Tensor) -> Tensor:
    """The relative differences of the rows of two tensors of shape (N,) or (N, H): shape (N,)."""
    value, truth = value.double().view(len(value), -1), truth.double().view(len(truth), -1)
    return (value - truth).norm(dim=1) / truth.norm(dim=1)


def unshared(texts: Sequence[Encoding]) -> list[Encoding]:
    """The same texts, each with another first token, so that no two have a common beginning."""
    return [text._replace(input_ids=[2 + number, *text.input_ids[1:]]) for number, text in enumerate(texts)]


# The variants. Each takes N texts in the order given; ours sorts them itself.


@torch.no_grad()
def single(model: PreTrainedModel, setting: Setting, texts: Sequence[Encoding]) -> Tensor:
    """An ordinary reward model, padded: shape (N,)."""
    return torch.cat([model(**batch).logits[:, 0] for batch in setting.padded(texts)])


def ours(model: DMoERMForSequenceClassification, setting: Setting, texts: Sequence[Encoding]) -> Tensor:
    return score_encodings(model, texts, pad_token_id=setting.tokenizer.pad_token_id)


@torch.no_grad()
def rewards_of(
    model: DMoERMForSequenceClassification,
    way: Callable[[PeftModel, Setting, Sequence[Encoding]], Tensor],
    *arguments: PeftModel | Setting | Sequence[Encoding],
) -> Tensor:
    """The rewards, shape (N,), of the embeddings that `way` computes of the experts of `model`."""
    return model.model.inner_models[TASK].reward(way(*arguments))[:, 0].cpu()


@torch.no_grad()
def reference(peft_model: PeftModel, setting: Setting, texts: Sequence[Encoding]) -> Tensor:
    """
    What the published implementation does, written anew from its description: a batch is one text, the adapters are
    switched one after the other, nothing is kept. It is also the plain truth: no padding, no sharing.

    Returns:
        `Tensor` of shape (N, k, H).
    """
    z = []
    for text in texts:
        ids = torch.tensor([text.input_ids], device=setting.device)
        for adapter in peft_model.peft_config:
            peft_model.set_adapter(adapter)
            z.append(peft_model(input_ids=ids).last_hidden_state[0, -1])
    return torch.stack(z).unflatten(0, (len(texts), -1))


@torch.no_grad()
def peft_loop(peft_model: PeftModel, setting: Setting, texts: Sequence[Encoding]) -> Tensor:
    """Padded batches, the adapters switched one after the other: shape (N, k, H)."""
    z = []
    for batch in setting.padded(texts):
        of_batch = []
        for adapter in peft_model.peft_config:
            peft_model.set_adapter(adapter)
            of_batch.append(last_tokens(peft_model(**batch).last_hidden_state, batch["attention_mask"]))
        z.append(torch.stack(of_batch, 1))
    return torch.cat(z)


@torch.no_grad()
def peft_mixed(peft_model: PeftModel, setting: Setting, texts: Sequence[Encoding]) -> Tensor:
    """Padded batches in which each text stands once for each adapter: shape (N, k, H)."""
    z, adapters = [], list(peft_model.peft_config)
    for batch in setting.padded(texts):
        mask = batch["attention_mask"].repeat_interleave(len(adapters), 0)
        ids = batch["input_ids"].repeat_interleave(len(adapters), 0)
        names = adapters * len(batch["input_ids"])
        hidden = peft_model(input_ids=ids, attention_mask=mask, adapter_names=names).last_hidden_state
        z.append(last_tokens(hidden, mask).unflatten(0, (-1, len(adapters))))
    return torch.cat(z)


def last_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
