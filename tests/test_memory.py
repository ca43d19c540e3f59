"""The estimates of memory: counts by hand, DeepSpeed's own estimators, and what the phases really keep."""

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from hypothesis import given
from hypothesis import strategies as st
from memory_estimates import (
    Run,
    activation_bytes,
    grpo_memory,
    inference_bytes,
    model_states,
    phase1_memory,
    phase2_memory,
    phase3_memory,
    ppo_memory,
    sampling_memory,
    scoring_memory,
    shape_of,
)
from models import bert_config, make_tokenizer
from transformers import Qwen2Config

from dmoerm_trl.modeling.configuration_dmoerm import DMoERMConfig
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification

QWEN = Qwen2Config(
    vocab_size=50,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)
CONFIG = DMoERMConfig(QWEN, {"chitchat": ["logic", "empathy"]}, lora_rank=2)
SHAPE = shape_of(CONFIG)


def test_parameters_are_counted_as_they_are():
    """A layer: q and o 8x8, k and v 8x4, three 8x12 of the MLP, biases of q, k, v, two norms."""
    layer = 2 * 64 + 2 * 32 + 3 * 96 + 8 + 4 + 4 + 2 * 8
    assert (SHAPE.in_layers, SHAPE.base) == (3 * layer + 8, 3 * layer + 8 + 50 * 8)
    assert SHAPE.largest == 50 * 8 and SHAPE.policy == SHAPE.base + 50 * 8
    assert SHAPE.lora == 2 * 3 * (2 * (8 + 8) + 2 * (8 + 4))
    assert SHAPE.heads == 3 * 9 and SHAPE.aggregator == (2 * 8 * 8 + 8) + 1 + (8 + 1)
    assert (SHAPE.experts, SHAPE.query, SHAPE.key_value, SHAPE.lora_inputs, SHAPE.qk_norm) == (2, 8, 4, 16, False)


def test_what_is_trained_in_fp32_takes_16_bytes_and_its_buckets_4():
    states = model_states(10, 4, Run(1, "fp32"))
    assert (states.weights, states.optimizer, states.gradients, states.host) == (40, 80, 40, 0)
    assert model_states(10, 4, Run(1, "fp32", ranks=2)).total == 200


@given(
    st.integers(1, 10**11), st.integers(1, 10**9), st.integers(1, 16), st.integers(1, 4), st.sampled_from([0, 1, 2])
)
def test_model_states_are_those_of_deepspeeds_estimators(trained, largest, gpus, machines, offloaded):
    how = {"precision": "bf16", "ranks": gpus * machines, "machines": machines, "offload_optimizer": offloaded > 0}
    options = {"num_gpus_per_node": gpus, "num_nodes": machines, "cpu_offload": offloaded > 0}
    two = model_states(trained, largest, Run(1, zero=2, **how))
    host, device = estimate_zero2_model_states_mem_needs(trained, **options)
    assert two.total == pytest.approx(device, abs=2) and (not offloaded or two.host == pytest.approx(host, abs=2))
    three = model_states(trained, largest, Run(1, zero=3, offload_parameters=offloaded == 2, **how))
    host, device, _ = estimate_zero3_model_states_mem_needs(
        trained, largest, cpu_offload_params=offloaded == 2, **options
    )
    assert three.total == pytest.approx(device, abs=2) and (not offloaded or three.host == pytest.approx(host, abs=2))


def test_stage_1_keeps_weights_and_gradients_whole():
    assert model_states(10, 4, Run(1, "bf16", zero=1, ranks=4)).total == 4 * 10 + 16 * 10 / 4


@pytest.mark.parametrize("experts", [0, 2])
def test_activations_are_what_autograd_keeps(experts):
    """Of one text, in fp32 on a CPU; the counts of a layer's tensors are exact, so the rest is what has no token's width."""
    config = Qwen2Config(**{**QWEN.to_dict(), "hidden_size": 64, "intermediate_size": 160})
    config = DMoERMConfig(config, {"chitchat": ["logic", "empathy"][:experts]}, lora_rank=1)
    torch.manual_seed(0)
    model = DMoERMForSequenceClassification(config).train()
    if experts:
        for name, weight in model.named_parameters():
            weight.requires_grad_(".lora_" in name or "head" in name)
    ids = torch.randint(1, 50, (1, 600))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    model.model.embed("chitchat", model.model.find_spans(ids, torch.ones_like(ids)))  # finds its way once
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        z = model.model.embed("chitchat", model.model.find_spans(ids, torch.ones_like(ids)))
    total = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)
    shape, run = shape_of(config), Run(600, "fp32", device="cpu")
    backward = 600 * 4 * (2 * 160 + 64) * max(experts, 1) + (0 if experts else shape.in_layers)
    estimate = activation_bytes(shape, run, trained=not experts) - backward
    assert z.requires_grad and estimate == pytest.approx(total, rel=0.1)


def test_experts_share_the_base_and_not_the_activations():
    one = shape_of(DMoERMConfig(QWEN, {"chitchat": ["logic"]}, lora_rank=2))
    run = Run(1000, "fp32")
    assert activation_bytes(SHAPE, run, trained=False) == 2 * activation_bytes(one, run, trained=False)
    states = [phase2_memory(shape, run).weights for shape in (one, SHAPE)]
    assert states[1] - states[0] == 4 * (SHAPE.lora - one.lora + 9)


def test_what_saves_memory_saves_memory():
    run = Run(1000, "autocast")
    assert phase1_memory(SHAPE, Run(1000, checkpointing=True)).total < phase1_memory(SHAPE, run).total
    half = shape_of(DMoERMConfig(QWEN, CONFIG.tasks, lora_rank=2, lora_layers=1))
    assert phase2_memory(half, run).total < phase2_memory(SHAPE, run).total
    sizes = [phase2_memory(SHAPE, Run(1, precision)).weights for precision in ("autocast", "bf16", "8bit", "4bit")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    parted = [phase2_memory(SHAPE, Run(1000, "bf16", zero=3, ranks=ranks)).weights for ranks in (2, 4)]
    assert parted[0] - parted[1] == 2 * SHAPE.base / 4


def test_scoring_holds_the_tasks_that_are_resident_and_phase_3_one():
    run = Run(10, "fp32")
    one, five = scoring_memory(SHAPE, run), scoring_memory(SHAPE, run, tasks=5, router=7)
    assert one.weights == 4 * (SHAPE.base + SHAPE.lora + SHAPE.heads + SHAPE.aggregator)
    assert five.weights == 5 * one.weights + 28 and five.activations == one.activations == inference_bytes(SHAPE, run)
    third = phase3_memory(SHAPE, run)
    assert third.weights == one.weights and third.activations >= 12 * SHAPE.aggregator


def test_ppo_holds_four_models_and_the_rollouts_logits_twice():
    memory = ppo_memory(SHAPE, Run(10, "fp32"), rollout=100, response_length=30)
    assert memory.weights == 4 * (2 * SHAPE.policy + SHAPE.base) + scoring_memory(SHAPE, Run(10, "fp32")).weights
    assert memory.activations == 2 * 100 * 30 * 50 * 4


def test_a_stage_under_zero_ends_with_whole_weights_on_each_device():
    options = {"offload_optimizer": True, "offload_parameters": True}
    for stage, more in ((2, {}), (3, {}), (3, options)):
        run = Run(1, "bf16", checkpointing=True, zero=stage, ranks=1000, **more)
        memory = phase1_memory(SHAPE, run, eval_tokens=5)
        passes = inference_bytes(SHAPE._replace(experts=1), Run(5, "fp32"))
        assert memory.total == 4 * (SHAPE.base + 9) + passes and bool(memory.host) == bool(more)
    run = Run(1, "bf16", checkpointing=True, zero=3, ranks=1000)
    assert phase2_memory(SHAPE, run).total == 2 * SHAPE.base + 4 * (SHAPE.lora + SHAPE.heads)


def test_ppo_holds_the_bases_of_all_tasks_and_divides_them_under_zero_3():
    options = {"rollout": 1, "response_length": 1}
    for zero, ranks in ((2, 1), (3, 4)):
        run = Run(10, "bf16", zero=zero, ranks=4)
        one, five = (ppo_memory(SHAPE, run, **options, tasks=tasks, router=7 * (tasks > 1)) for tasks in (1, 5))
        small = 4 * (SHAPE.heads + SHAPE.aggregator) + 2 * SHAPE.lora
        assert five.weights - one.weights == 4 * (2 * SHAPE.base / ranks + small) + 4 * 7 / ranks


def test_grpo_holds_the_policy_three_times_while_its_monitor_measures():
    run = Run(10, "bf16", checkpointing=True, zero=2, ranks=4)
    memory = grpo_memory(SHAPE, run, responses=100, length=30, tasks=5, router=7, eval_tokens=1)
    cache = 100 * 30 * 2 * 2 * 3 * 4
    states = model_states(SHAPE.policy, 0, run).total
    reward = scoring_memory(SHAPE, run, tasks=5, router=7).weights
    assert memory.total == states + 2 * 2 * SHAPE.policy + reward + cache
    writing = sampling_memory(SHAPE, run, responses=100, length=30)
    assert writing.total == 2 * SHAPE.policy + cache
    with pytest.raises(ValueError, match="zero=3, need 0 to 2"):
        grpo_memory(SHAPE, Run(10, "bf16", zero=3), responses=1, length=1)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"zero": 2}, "precision='autocast' with ZeRO"),
        ({"offload_optimizer": True}, "offloading with zero=0"),
        ({"precision": "bf16", "zero": 2, "offload_optimizer": True, "offload_parameters": True}, "zero=2"),
    ],
)
def test_what_deepspeed_does_not_have_is_an_error(options, says):
    with pytest.raises(ValueError, match=says):
        Run(1, **options)


def test_models_that_are_not_estimated_are_errors():
    with pytest.raises(ValueError, match="need one, because each task"):
        shape_of(DMoERMConfig(QWEN, {"a": ["x"], "b": ["y"]}, router_config=QWEN))
    with pytest.raises(ValueError, match="BertModel, need a decoder with a gated MLP"):
        shape_of(DMoERMConfig(bert_config(make_tokenizer()), {"a": []}))
