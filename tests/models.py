"""Tiny models and tokenizers, built in memory, that the tests share; `conftest.py` gives a copy of each to a test."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from dmoerm_trl.data.formatting import Encoding, Formatter
from dmoerm_trl.modeling.configuration_dmoerm import DMoERMConfig
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification, DMoERMOutput

TASKS = {
    "story writing": ["logic", "expressiveness"],
    "chitchat": ["empathy ability", "logic", "情感"],
    "maths": ["correctness"],
}
"""Task -> capability points of the fixture `dmoerm`: 2, 3 and 1 experts, one name in two tasks, one not in English."""

PROMPTS = {
    "story writing": "Write a story about the sea.",
    "chitchat": "Hello there, how are you today?",
    "maths": "What is two and two?",
}
"""Task -> a prompt that the router of the fixture `dmoerm` sends to it."""

RESPONSES = ["All is well, thank you!", "It is four.", "The sea was calm and the ship went home."]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(pad_token: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer of a few hundred tokens with ChatML's template, whose eos is `<|im_end|>`.

    Id 0, with which PPO overwrites padding, is `<|im_start|>`: a model that read it there would be misled.
    """
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["user assistant system", *PROMPTS.values(), *RESPONSES] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token=pad_token, extra_special_tokens=special[:1]
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def qwen2_config(tokenizer: PreTrainedTokenizerFast, **kwargs) -> Qwen2Config:
    """Two layers of width 32, drawn so wide that different texts get clearly different embeddings."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **kwargs}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    return Qwen2Config(
        **sizes, intermediate_size=64, vocab_size=len(tokenizer), initializer_range=0.2, bos_token_id=None, **ids
    )


def bert_config(tokenizer: PreTrainedTokenizerFast) -> BertConfig:
    return BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_backbone(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModel.from_config(qwen2_config(tokenizer)).eval()


def make_policy(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **kwargs) -> PreTrainedModel:
    """A language model with the reward models' tokenizer."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(qwen2_config(tokenizer, **kwargs))


def make_value_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """An ordinary model with one label, for PPO's values."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(qwen2_config(tokenizer, num_labels=1))


def model_arguments(tokenizer: PreTrainedTokenizerFast) -> dict:
    """The arguments of [`DMoERMConfig`] that all tiny models share."""
    return {"lora_rank": 4, "lora_alpha": 4, **Formatter(tokenizer, 1).model_settings}


def make_dmoerm(
    tokenizer: PreTrainedTokenizerFast, tasks: dict[str, list[str]] = TASKS, seed: int = 0, **kwargs
) -> DMoERMForSequenceClassification:
    """
    A complete model as after training: all experts, heads, biases and normalisations differ clearly, and the router, if
    there are two tasks or more, sends the prompts of `PROMPTS` to their tasks.
    """
    torch.manual_seed(seed)
    kwargs.setdefault("backbone_config", qwen2_config(tokenizer))
    if len(tasks) > 1:
        kwargs.setdefault("router_config", qwen2_config(tokenizer))
    model = DMoERMForSequenceClassification(
        DMoERMConfig(tasks=tasks, **{**model_arguments(tokenizer), **kwargs})
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2)
            elif "head" in name or "aggregator" in name:
                weight.normal_(0, 0.2)
        for inner in model.model.inner_models.values():
            inner.reward_mean.normal_(0, 0.5)
            inner.reward_std.uniform_(0.5, 2)
        if model.model.router is not None and set(tasks) <= set(PROMPTS) and tokenizer.chat_template:
            _fit_router(model, tokenizer)
    return model


def make_inner(tokenizer: PreTrainedTokenizerFast) -> DMoERMForSequenceClassification:
    return make_dmoerm(tokenizer, {"chitchat": TASKS["chitchat"]})


def make_single(tokenizer: PreTrainedTokenizerFast) -> DMoERMForSequenceClassification:
    return make_dmoerm(tokenizer, {"chitchat": []})


def peft_expert(base: DMoERMForSequenceClassification) -> PeftModel:
    """An untrained expert on a base, made by PEFT alone: what an expert's folder is an adapter of."""
    config = base.config
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_target_modules),
        modules_to_save=["base_head"],
    )
    return get_peft_model(base, lora, autocast_adapter_dtype=False)


def _fit_router(model: DMoERMForSequenceClassification, tokenizer: PreTrainedTokenizerFast) -> None:
    """Solves for a head that gives the logit 4 to a prompt's task and 0 to the others."""
    z = []
    for task in model.config.tasks:
        spans = model.model.find_spans(tokenizer(chat(tokenizer, PROMPTS[task])[0], return_tensors="pt").input_ids)
        hidden = model.model.router.backbone(spans.input_ids[:, : spans.prompt_lengths[0]]).last_hidden_state
        z.append(hidden[0, -1])
    z = torch.cat([torch.stack(z), torch.ones(len(z), 1)], 1)
    solution = torch.linalg.pinv(z) @ (4 * torch.eye(len(z)))
    model.model.router.score.weight.copy_(solution[:-1].T)
    model.model.router.score.bias.copy_(solution[-1])


def chat(tokenizer: PreTrainedTokenizerFast, prompt: str | list[dict], response: str | None = None) -> tuple[str, str]:
    """The rendered prompt, ready for the assistant, and the whole chat, which ends in `<|im_end|>` and a line break."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    opened = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return opened, f"{opened}{response}<|im_end|>\n"


def padded(rows: list[list[int]], pad: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch: ids and attention mask, shape (B, T)."""
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + f if side == "right" else f + [1] * len(row) for row, f in zip(rows, fill, strict=True)]
    ids = [
        row + [pad] * len(f) if side == "right" else [pad] * len(f) + row for row, f in zip(rows, fill, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def score_one(model: DMoERMForSequenceClassification, encoding: Encoding) -> DMoERMOutput:
    """Run a model on one text."""
    return model.eval()(
        torch.tensor([encoding.input_ids], device=model.device),
        prompt_lengths=torch.tensor([encoding.prompt_length], device=model.device),
        attention_mask=torch.ones(1, len(encoding.input_ids), dtype=torch.long, device=model.device),
    )
