"""What all cases of `speed.py` share: the models' sizes, the texts, the models, and the least FLOPs that a case needs."""

import copy
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen2Config

from dmoerm_trl.data.formatting import Encoding, Formatter
from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.modeling.configuration_dmoerm import DMoERMConfig
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification

TASK = "task"
OURS = {"ours_all": "all", "ours_half": "top half", "ours_third": "top third"}
"""Variant -> its `lora_layers`."""
BATCH = 16
"""Texts of a padded batch."""
LONGEST = 4
"""How many times the median a length may be."""
DIVISORS = {"all": 1, "top half": 2, "top third": 3}


@dataclass(frozen=True, eq=False)
class Setting:
    """
    A Qwen2 with k experts, and texts whose lengths are log-normal: `prompt` and `response` are the mean numbers of tokens,
    `spread` is the standard deviation of the length's logarithm. Lengths stand at the distribution's quantiles, in random
    order, so that few texts have its mean and its spread too.
    """

    hidden_size: int = 384
    intermediate_size: int = 1024
    layers: int = 12
    heads: int = 6
    kv_heads: int = 2
    vocab_size: int = 8192
    experts: int = 6
    lora_rank: int = 32
    prompt: int = 180
    response: int = 60
    spread: float = 0.9
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    sizes: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {
            "scoring": (32, 1),
            "scoring_4": (8, 4),
            "scoring_16": (2, 16),
            "scoring_64": (1, 64),
            "scoring_1024": (1, 1024),
            "phase2_k2": (8, 2),
            "phase2_k4": (4, 4),
            "inner_moe": (12, 2),
            "inner_moe_k4": (10, 4),
        }
    )
    """Case -> its prompts, and the responses to each."""

    @property
    def points(self) -> list[str]:
        return [f"point {number}" for number in range(self.experts)]

    @cached_property
    def backbone_config(self) -> Qwen2Config:
        return Qwen2Config(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab_size,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word, `w3` being id 3."""
        words = ["<pad>", "<eos>", *(f"w{number}" for number in range(2, self.vocab_size))]
        backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")

    @cached_property
    def formatter(self) -> Formatter:
        return Formatter(self.tokenizer, max_length=LONGEST * (self.prompt + self.response))

    def rows(self, prompts: int, responses: int) -> list[PreferenceRow]:
        """Random words with random labels, on all capability points."""
        draw = random.Random(self.seed)

        def lengths(mean: int, count: int) -> list[int]:
            quantiles = [NormalDist(0, self.spread).inv_cdf((place + 0.5) / count) for place in range(count)]
            drawn = [min(math.exp(quantile), LONGEST) for quantile in quantiles]
            drawn = [max(1, round(mean * length * count / sum(drawn))) for length in drawn]
            return draw.sample(drawn, count)

        def words(length: int) -> str:
            return " ".join(f"w{draw.randrange(2, self.vocab_size)}" for _ in range(length))

        def ranks() -> list[int]:
            return draw.sample(range(1, responses + 1), responses)

        prompt_lengths = lengths(self.prompt, prompts)
        response_lengths = iter(lengths(self.response, prompts * responses))
        return [
            PreferenceRow(
                prompt=[{"role": "user", "content": words(length)}],
                responses=[words(next(response_lengths)) for _ in range(responses)],
                ranks=ranks() if responses > 1 else [1],
                task=TASK,
                capability_ranks={point: ranks() for point in self.points},
            )
            for length in prompt_lengths
        ]

    def encodings(self, rows: Sequence[PreferenceRow]) -> list[Encoding]:
        return [encoding for row in self.formatter.encode_rows(rows)[0] for encoding in row]

    def padded(self, encodings: Sequence[Encoding], batch_size: int = BATCH) -> Iterator[dict[str, Tensor]]:
        """Batches in the order given, padded on the right: `input_ids` and `attention_mask`, shape (B, T)."""
        for start in range(0, len(encodings), batch_size):
            rows = [torch.tensor(encoding.input_ids) for encoding in encodings[start : start + batch_size]]
            pad = torch.nn.utils.rnn.pad_sequence
            yield {
                "input_ids": pad(rows, batch_first=True).to(self.device),
                "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True).to(self.device),
            }

    @cached_property
    def _folder(self) -> TemporaryDirectory:
        folder = TemporaryDirectory()
        torch.manual_seed(self.seed)
        AutoModel.from_config(self.backbone_config).save_pretrained(folder.name)
        return folder

    @property
    def base(self) -> str:
        """A pretrained backbone on disk, from which trainings start."""
        return self._folder.name

    def single(self) -> AutoModelForSequenceClassification:
        torch.manual_seed(self.seed)
        config = copy.deepcopy(self.backbone_config)
        config.num_labels = 1
        with torch.device(self.device):
            model = AutoModelForSequenceClassification.from_config(config)
        return model.to(getattr(torch, self.dtype)).eval()

    def ours(self, lora_layers: str) -> DMoERMForSequenceClassification:
        """A complete inner model whose experts and rewards differ, without dropout."""
        torch.manual_seed(self.seed)
        arguments = {**self.model_arguments(lora_layers), "lora_dropout": 0.0}
        config = DMoERMConfig(self.backbone_config, {TASK: self.points}, **arguments)
        with torch.device(self.device):
            model = DMoERMForSequenceClassification(config)
        for name, weight in model.named_parameters():
            if "lora_B" in name or "aggregator.output.weight" in name:
                torch.nn.init.normal_(weight, std=0.02 if "lora_B" in name else 0.2)
        return model.to(getattr(torch, self.dtype)).eval()

    def model_arguments(self, lora_layers: str) -> dict:
        return {"lora_layers": lora_layers, "lora_rank": self.lora_rank, "lora_alpha": self.lora_rank}

    def lora_depth(self, lora_layers: str) -> int:
        """The number of layers with LoRA."""
        return -(-self.layers // DIVISORS[lora_layers])

    def lora_config(self, lora_layers: str, **arguments) -> LoraConfig:
        """An ordinary PEFT configuration, which names the layers' modules one by one."""
        layers = range(self.layers - self.lora_depth(lora_layers), self.layers)
        targets = [f"layers.{layer}.self_attn.{name}" for layer in layers for name in ("q_proj", "v_proj")]
        return LoraConfig(r=self.lora_rank, lora_alpha=self.lora_rank, target_modules=targets, **arguments)

    def peft(self, model: DMoERMForSequenceClassification) -> PeftModel:
        """The backbone of `model` with its experts as an ordinary PEFT model of its own."""
        config = self.lora_config(model.config.lora_layers)
        weights = model.model.backbones[TASK].state_dict()
        adapters = list(dict.fromkeys(key.rsplit(".", 2)[1] for key in weights if ".lora_A." in key))
        peft_model = get_peft_model(AutoModel.from_config(self.backbone_config), config, adapter_name=adapters[0])
        for adapter in adapters[1:]:
            peft_model.add_adapter(adapter, config)
        peft_model.base_model.model.load_state_dict(weights)  # strict: the same layers have LoRA
        return peft_model.to(self.device, getattr(torch, self.dtype)).eval()


QUICK = Setting(
    hidden_size=96,
    intermediate_size=256,
    layers=3,
    heads=3,
    kv_heads=1,
    vocab_size=512,
    experts=3,
    lora_rank=8,
    prompt=45,
    response=15,
    sizes={
        **Setting().sizes,
        "scoring_1024": (1, 128),
        "phase2_k2": (4, 2),
        "phase2_k4": (2, 4),
        "inner_moe": (10, 2),
        "inner_moe_k4": (10, 4),
    },
)


# The least work.


class Group(NamedTuple):
    """A prompt with its responses: numbers of tokens."""

    prompt: int
    responses: list[int]


def groups(setting: Setting, rows: Sequence[PreferenceRow]) -> list[Group]:
    encoded, _ = setting.formatter.encode_rows(rows)
    return [Group(row[0].prompt_length, [len(e.input_ids) - e.prompt_length for e in row]) for row in encoded]


def least_flops(
    setting: Setting,
    groups: Sequence[Group],
    *,
    lora_layers: str | None,
    training: Literal["none", "full", "lora"] = "none",
) -> float:
    """
    FLOPs of the matrix products without which the result cannot be had: every prompt once, no padding, the layers below
    the first LoRA once for all experts, the last layer's queries and MLP for scored tokens alone, causal attention at half
    price. Embeddings, norms, heads, and merging LoRA are not counted.

    Args:
        groups (`Sequence[Group]`): the trees.
        lora_layers (`str`, *optional*): layers with LoRA; None for a single reward model.
        training: `"full"` adds the backward pass of all weights, `"lora"` that of LoRA alone (without recomputation).
    """
    width, kv = setting.hidden_size, setting.hidden_size * setting.kv_heads // setting.heads
    first = setting.layers if lora_layers is None else setting.layers - setting.lora_depth(lora_layers)
    delta = [2 * setting.lora_rank * (width + out) for out in (width, kv)]  # LoRA of a token's query, of its value
    total = 0.0
    for prompt, responses in groups:
        tokens = prompt + sum(responses)
        for layer in range(setting.layers):
            last = layer == setting.layers - 1
            queries = len(responses) if last else tokens
            if last:
                pairs = sum(prompt + length for length in responses)
            else:
                pairs = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in responses)
            inputs = queries * 2 * width * width + tokens * 2 * (2 * width * kv)  # the query; key and value
            rest = queries * (2 * width * width + 6 * width * setting.intermediate_size)
            attention, lora = 4 * width * pairs, queries * delta[0] + tokens * delta[1]
            if layer < first:
                total += (inputs + rest + attention) * (3 if training == "full" else 1)
                continue
            separate = training == "lora" or layer == first  # LoRA beside the weights; else merged into them
            total += (1 if layer == first else setting.experts) * inputs
            total += setting.experts * (rest + attention + separate * lora)
            if training == "lora":  # gradients of all inputs that lead to a LoRA, and LoRA's own
                total += setting.experts * (rest + 2 * attention + 2 * lora + (layer > first) * inputs)
    return total


def pairs(rows: Sequence[PreferenceRow], setting: Setting) -> list[dict[str, list[int]]]:
    """All pairs of all rows, tokenised as TRL's `RewardTrainer` takes them."""
    return [
        {"chosen_ids": encoded[better].input_ids, "rejected_ids": encoded[worse].input_ids}
        for row, encoded in zip(rows, setting.formatter.encode_rows(rows)[0], strict=True)
        for better, worse in row.pairs_of()
    ]
