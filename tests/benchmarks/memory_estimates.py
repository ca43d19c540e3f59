"""
What the phases, scoring, best of n, PPO and GRPO take in memory, estimated from configurations alone: no weight is loaded.

A decoder with a gated MLP is assumed, such as those of Qwen, Llama and Mistral. Left out: the interpreter, CUDA's context,
fragmentation, and the buckets of communication. `tests/benchmarks/memory.py` puts the estimates beside measurements;
recipes/SCALE.md has those of the recipes.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dmoerm_trl.modeling.configuration_dmoerm import DMoERMConfig
from dmoerm_trl.modeling.experts import lora_layers
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.modeling.multi_lora import GROUP_TOKENS
from dmoerm_trl.training.embedding_cache import CHUNK

FROZEN_BYTES = {"fp32": 4.0, "autocast": 4.0, "bf16": 2.0, "8bit": 1.0, "4bit": 0.5}
"""Precision -> bytes of a weight of a frozen base's layers."""

HOST_FACTOR = 1.5
"""By which DeepSpeed's estimators raise what is offloaded, for buffers."""


@dataclass(frozen=True)
class Run:
    """
    How something is run.

    Attributes:
        tokens (`int`): packed tokens of a step or a batch on each device: a prompt that several responses share counts once.
        precision (`str`): `"fp32"`; `"autocast"`, which is what `bf16: true` means without DeepSpeed; `"bf16"`, what it means
            with DeepSpeed, and scoring with `--dtype bfloat16`; `"8bit"` and `"4bit"`, a frozen base whose layers are
            quantised, the rest as `"bf16"`.
        checkpointing (`bool`): gradient checkpointing, layer by layer.
        zero (`int`): DeepSpeed's ZeRO stage; 0 is plain data parallelism.
        ranks (`int`), machines (`int`): devices in all, and the machines in which they stand.
        offload_optimizer, offload_parameters (`bool`): to the machines' memory.
        device (`str`): `"cuda"` or `"cpu"`: on a CPU experts take turns in a layer, and masks of dropout are fp32.

    Raises:
        ValueError: for a combination that DeepSpeed does not have.
    """

    tokens: int
    precision: Literal["fp32", "autocast", "bf16", "8bit", "4bit"] = "autocast"
    checkpointing: bool = False
    zero: Literal[0, 1, 2, 3] = 0
    ranks: int = 1
    machines: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self):
        if self.zero and self.precision in ("fp32", "autocast"):
            raise ValueError(
                f"got precision={self.precision!r} with ZeRO, need 'bf16', because DeepSpeed's weights are bf16 beside an "
                "fp32 copy in the optimizer: set precision='bf16', or zero=0."
            )
        if (self.offload_optimizer and not self.zero) or (
            self.offload_parameters and not (self.zero == 3 and self.offload_optimizer)
        ):
            raise ValueError(
                f"got offloading with zero={self.zero}, need a ZeRO stage for the optimizer, and stage 3 with the optimizer "
                "offloaded for parameters, because DeepSpeed offloads nothing else: change `zero`."
            )

    @property
    def product_bytes(self) -> int:
        """Bytes of a number that goes into a matrix product."""
        return 4 if self.precision == "fp32" else 2

    @property
    def residual_bytes(self) -> int:
        """Bytes of a number between two layers."""
        return 4 if self.precision in ("fp32", "autocast") else 2


class Memory(NamedTuple):
    """
    Bytes on each device, and `host` bytes in each machine's memory, for what is offloaded.

    `optimizer` is Adam's moments, the buckets of data parallelism, and under ZeRO also gradients and the fp32 weights.
    """

    weights: float
    optimizer: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """The peak of a device. In the backward pass activations go as gradients come: the larger of the two counts."""
        return self.weights + self.optimizer + max(self.gradients, self.activations)


class Shape(NamedTuple):
    """
    What the estimates hang on: numbers of parameters (the base's, those of its layers alone, those of its largest module,
    all LoRA's, all heads', the aggregator's, a policy's of the same kind), and sizes: k, layers, layers with LoRA, hidden
    (h), intermediate (i), queries of all heads (q), keys of all heads (kv), inputs of a layer's modules with LoRA, whether
    queries and keys are normalised, vocabulary.
    """

    base: int
    in_layers: int
    largest: int
    lora: int
    heads: int
    aggregator: int
    policy: int
    experts: int
    layers: int
    lora_layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    lora_inputs: int
    qk_norm: bool
    vocabulary: int

    @property
    def without_experts(self) -> "Shape":
        """The same after phase 1."""
        return self._replace(lora=0, heads=self.hidden + 1, aggregator=0, experts=0)


def shape_of(config: DMoERMConfig) -> Shape:
    """
    Builds a one-task model and a policy without memory and looks at them.

    Raises:
        ValueError: if the configuration has several tasks, or a backbone whose MLP is not gated.
    """
    if len(config.tasks) != 1:
        raise ValueError(f"got the tasks {list(config.tasks)}, need one, because each task has a model of its own.")
    own = config.backbone_config.get_text_config()
    with torch.device("meta"):
        model = DMoERMForSequenceClassification(config)
        policy = AutoModelForCausalLM.from_config(own)
    (backbone,), (inner,) = model.model.backbones.values(), model.model.inner_models.values()
    names = {name.rsplit(".", 1)[-1] for name, _ in backbone.named_modules()}
    if not {"gate_proj", "q_proj", "k_proj"} <= names:
        raise ValueError(
            f"got a {type(backbone).__name__}, need a decoder with a gated MLP (q_proj, k_proj, gate_proj), because the "
            "estimates are made for its layers: measure another one."
        )
    lora = sum(weight.numel() for name, weight in backbone.named_parameters() if ".lora_" in name)
    aggregator = 0 if inner.aggregator is None else _size(inner.aggregator)
    width = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    depth = own.num_hidden_layers if config.layers_with_lora is None else len(config.layers_with_lora)
    return Shape(
        base=_size(backbone) - lora,
        in_layers=_size(backbone) - lora - _size(backbone.get_input_embeddings()),
        largest=max(sum(w.numel() for w in module.parameters(recurse=False)) for module in backbone.modules()),
        lora=lora,
        heads=_size(inner) - aggregator,
        aggregator=aggregator,
        policy=_size(policy),
        experts=len(inner.points),
        layers=own.num_hidden_layers,
        lora_layers=depth,
        hidden=own.hidden_size,
        intermediate=own.intermediate_size,
        query=own.num_attention_heads * width,
        key_value=own.num_key_value_heads * width,
        lora_inputs=sum(layer.in_features for layer in lora_layers(backbone)) // depth,
        qk_norm="q_norm" in names,
        vocabulary=own.vocab_size,
    )


# What is run.


def phase1_memory(shape: Shape, run: Run, *, eval_tokens: int = 0) -> Memory:
    """
    Full fine-tuning of a base. With ZeRO each device has all of it at the end, in fp32, and normalises the rewards so.

    Args:
        eval_tokens (`int`): tokens of a batch while the rewards are normalised.
    """
    training = model_states(shape.base + shape.heads, shape.largest, run)._replace(
        activations=activation_bytes(shape, run, trained=True)
    )
    if not run.zero:
        return training
    end = scoring_memory(shape.without_experts, Run(eval_tokens, "fp32", device=run.device))
    return max(training, end._replace(host=training.host), key=lambda memory: memory.total)


def phase2_memory(shape: Shape, run: Run) -> Memory:
    """
    LoRA and heads of k experts at once. The frozen base is there once; from the first layer with LoRA on, the step's tokens
    are there k times. At the end of ZeRO-3 each device has the base whole, in bf16.
    """
    states = model_states(shape.lora + shape.heads, 0, run)
    base, host = _frozen(shape.base, shape, run)
    training = states._replace(
        weights=states.weights + base,
        activations=activation_bytes(shape, run, trained=False),
        host=states.host + host,
    )
    whole = 2 * shape.base + 4 * (shape.lora + shape.heads) if run.zero == 3 else 0
    return max(training, Memory(whole, host=training.host), key=lambda memory: memory.total)


def phase3_memory(shape: Shape, run: Run) -> Memory:
    """The aggregator, in fp32, on embeddings computed once: the inner model that computed them stays on the device."""
    inner = scoring_memory(shape, run)
    states = model_states(shape.aggregator, 0, Run(run.tokens, "fp32", ranks=run.ranks))
    # while the aggregator starts from the experts' heads: its new weights in the making, and embeddings
    start = 2 * 4 * shape.aggregator + 4 * CHUNK * shape.experts * shape.hidden
    training = states.optimizer + states.gradients
    return inner._replace(activations=max(inner.activations, start, training))


def scoring_memory(shape: Shape, run: Run, *, tasks: int = 1, router: int = 0) -> Memory:
    """
    Rewards of texts, without gradients.

    Args:
        tasks (`int`): inner models of this shape on the device.
        router (`int`): parameters of the router.
    """
    base, host = _frozen(shape.base, shape, run)
    small = 4 * (shape.heads + shape.aggregator) + run.residual_bytes * shape.lora
    return Memory(
        weights=tasks * (base + small) + run.residual_bytes * router,
        activations=inference_bytes(shape, run),
        host=tasks * host,
    )


def sampling_memory(shape: Shape, run: Run, *, responses: int, length: int) -> Memory:
    """
    A frozen policy that writes with transformers: its weights, and keys and values of all tokens. Logits, of a token at a
    time, are left out.

    Args:
        responses (`int`): written at a time.
        length (`int`): tokens of a prompt and its response.
    """
    cache = 2 * run.product_bytes * shape.layers * shape.key_value * length
    return Memory(FROZEN_BYTES[run.precision] * shape.policy, activations=responses * cache)


def ppo_memory(
    shape: Shape, run: Run, *, rollout: int, response_length: int, tasks: int = 1, router: int = 0
) -> Memory:
    """
    TRL's PPO with policy and value model (both trained), reference and reward model (both frozen), all of one shape.

    Logits are fp32. Those of a rollout are there twice, because TRL puts its parts together; those of an update three times,
    with their softmax and their gradient. Under ZeRO-3 policy and value model are whole during a rollout, policy and
    reference while the monitor samples, and one base while its task is scored, which is less.

    Args:
        run ([`Run`]): `tokens` are those of an update's micro-batch.
        rollout (`int`): responses that a device writes between two updates.
        response_length (`int`): tokens of each.
        tasks (`int`): tasks of the prompts: the bases of others are freed.
        router (`int`): parameters of the router, which stays in fp32.
    """
    states = model_states(shape.policy + shape.base, shape.largest, run)
    reference, host = _frozen(shape.policy, shape, run)
    reward = scoring_memory(shape, run, tasks=tasks)
    row = 4 * shape.vocabulary
    update = 2 * activation_bytes(shape, run, trained=True) + 3 * run.tokens * row
    whole, gathered = (2 * 2 * shape.policy, 2 * shape.largest) if run.zero == 3 else (0, 0)
    gate = 4 * router / (run.ranks if run.zero == 3 else 1)
    return states._replace(
        weights=states.weights + reference + reward.weights - (tasks - 1) * gathered + gate,
        activations=max(update, whole + 2 * rollout * response_length * row),
        host=states.host + host + reward.host,
    )


def grpo_memory(
    shape: Shape, run: Run, *, responses: int, length: int, tasks: int = 1, router: int = 0, eval_tokens: int = 0
) -> Memory:
    """
    TRL's GRPO or RLOO with a policy (trained) and its reference under ZeRO-1 or 2, and the reward model whole on each device.
    While the monitor measures, its own reference is there too.

    Args:
        run ([`Run`]): `tokens` are those of an update's micro-batch.
        responses (`int`): that a device writes at a time.
        length (`int`): tokens of a prompt and its response.
        tasks (`int`), router (`int`): as of [`ppo_memory`]; the router is in the precision of the bases.
        eval_tokens (`int`): tokens of a batch while the reward model scores.

    Raises:
        ValueError: under ZeRO-3, which would divide the policy and not the rest.
    """
    if run.zero == 3:
        raise ValueError("got zero=3, need 0 to 2, because what is whole for how long under ZeRO-3 is not estimated.")
    reference = FROZEN_BYTES[run.precision] * shape.policy
    reward = scoring_memory(shape, replace(run, tokens=eval_tokens), tasks=tasks, router=router)
    writing = sampling_memory(shape, run, responses=responses, length=length).activations
    update = activation_bytes(shape, run, trained=True) + 3 * 4 * run.tokens * shape.vocabulary
    states = model_states(shape.policy, shape.largest, run)
    return states._replace(
        weights=states.weights + reference + reward.weights,
        activations=max(update, reference + max(writing, reward.activations)),
    )


# What it is made of.


def model_states(trained: int, largest: int, run: Run) -> Memory:
    """
    Weights, gradients and Adam's states of P trained parameters on each of N devices, in bytes:

    | ZeRO | a device | a machine, what is offloaded |
    | --- | --- | --- |
    | 0 | `4P + 8P` and gradients `4P`, once more in buckets if N > 1 | |
    | 1 | `2P + 2P + 16P/N` | |
    | 2 | `2P + 18P/N` | |
    | 1, 2, optimizer offloaded | `2P`, in stage 1 `4P` | `1.5 P max(4N, 16)` |
    | 3 | `18P/N + 4 largest` | |
    | 3, optimizer offloaded | `2P/N + 4 largest` | `1.5 * 16P / machines` |
    | 3, parameters too | `4 largest` | `1.5 * 18P / machines` |

    Those of stages 2 and 3 are DeepSpeed's own (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_...`).

    Args:
        trained (`int`): P.
        largest (`int`): parameters of the largest module, which stage 3 gathers.
    """
    if run.zero == 0:
        return Memory(4 * trained, optimizer=(8 if run.ranks == 1 else 12) * trained, gradients=4 * trained)
    whole = {1: 4, 2: 2, 3: 0}[run.zero]
    parted = {1: 16, 2: 18, 3: 18}[run.zero]
    weights, host = whole * trained + (4 * largest if run.zero == 3 else 0), 0.0
    if run.zero == 3 and run.offload_optimizer:
        moved = 18 if run.offload_parameters else 16
        parted, host = 18 - moved, HOST_FACTOR * moved * trained / run.machines
    elif run.offload_optimizer:
        parted, host = 0, HOST_FACTOR * max(4 * run.ranks, 16) * trained
    return Memory(weights, optimizer=parted * trained / run.ranks, host=host)


def activation_bytes(shape: Shape, run: Run, *, trained: bool) -> float:
    """
    What autograd keeps of a step's `T` tokens for the backward pass, and that pass's own at its start.

    Bytes of a token in a layer, with b bytes of a number in a product and r between layers (h, i, q, kv: see [`Shape`]):

    - two norms: `4h` each, and `r h` each where their weights are trained;
    - queries, keys, values and attention's output: `b (2q + 2kv)`; where they are normalised `(4 + b) (q + kv)` more, or
      `4 (q + kv)` frozen;
    - inputs of trained linear layers: `b h` for queries, keys and values, `b q`, `b h` for the MLP, `b i`; under autocast
      each linear layer has a copy of its own;
    - the MLP: `3 b i`;
    - each input of LoRA: a copy `b h` after its dropout, and the mask: 1 byte a number, 4 on a CPU.

    That is for all layers that are trained, or have LoRA, but the last, which goes on with the texts' last tokens alone and
    keeps its first norm, keys and values. With experts `T` is k times the tokens. The backward pass of a layer adds
    `2 b i + r h`, and has the gradients of the last layer beside it. With gradient checkpointing it is `r h` for each layer,
    and either the last one or another, run again (on a CPU for the experts whose turn it is). Under autocast the bf16 copies
    of the weights are kept, `2` bytes each, with checkpointing those of one layer.
    """
    b, r, h = run.product_bytes, run.residual_bytes, shape.hidden
    norm = 4 * h + r * h * trained
    normed = (shape.query + shape.key_value) * (4 + b * trained) * shape.qk_norm
    inputs = (5 if run.precision == "autocast" else 2) * h * trained
    lora = 0 if trained else shape.lora_inputs * (b + (4 if run.device == "cpu" else 1))
    layer = 2 * norm + normed + lora + b * (inputs + 2 * shape.query + 2 * shape.key_value)
    layer += b * (shape.query * trained + (4 if trained else 3) * shape.intermediate)
    last = norm + lora + b * (h * trained + 2 * shape.key_value)
    backward = 2 * b * shape.intermediate + r * h
    layers = shape.layers if trained else shape.lora_layers
    experts = 1 if trained else shape.experts
    at_once = _experts_at_once(experts, run)
    casts = 2 * shape.in_layers * (run.precision == "autocast")
    if run.checkpointing:
        kept = experts * layers * r * h + max(experts * last, at_once * (layer + backward))
        casts /= shape.layers
    else:
        kept = experts * ((layers - 1) * layer + last) + at_once * backward
    gradients = 4 * shape.in_layers / shape.layers if trained and not run.zero else 0
    return run.tokens * kept + casts + gradients


def inference_bytes(shape: Shape, run: Run) -> float:
    """
    What a pass without gradients holds at its peak, in an MLP: its `3 b i + b h` a token and the hidden states, for all k
    experts. On a CPU, where experts take turns, the hidden states of all are there three times: before the layer, after
    it, and put together; and the experts whose turn it is have merged weights.
    """
    b, r, h = run.product_bytes, run.residual_bytes, shape.hidden
    experts = max(shape.experts, 1)
    at_once = _experts_at_once(experts, run)
    inside = at_once * run.tokens * (b * (3 * shape.intermediate + h) + r * h)
    if at_once == experts:
        return inside + experts * run.tokens * r * h
    merged = at_once * 4 * shape.lora_inputs * (shape.query + shape.key_value) / 2
    return inside + 3 * experts * run.tokens * r * h + merged


def _experts_at_once(experts: int, run: Run) -> int:
    return experts if run.device == "cuda" else min(experts, max(1, GROUP_TOKENS // run.tokens))


def _frozen(weights: int, shape: Shape, run: Run) -> tuple[float, float]:
    """Bytes of a frozen model of the base's kind: on each device, and offloaded to each machine."""
    rest = max(weights - shape.in_layers, 0)
    size = FROZEN_BYTES[run.precision] * (weights - rest) + run.residual_bytes * rest
    if run.zero < 3:
        return size, 0.0
    gathered = 2 * shape.largest
    return (gathered, size / run.machines) if run.offload_parameters else (gathered + size / run.ranks, 0.0)


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
