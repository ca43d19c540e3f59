"""The speed benchmark: its counts on numbers worked out by hand, and a whole run on a tiny model."""

from dataclasses import replace

import pytest
import speed
import torch
from speed_measure import Case, counter, measure
from speed_scoring import relative, scoring_case, unshared
from speed_setting import OURS, QUICK, Group, Setting, groups, least_flops, pairs
from speed_training import gradient_error

TINY = replace(
    QUICK,
    hidden_size=24,
    intermediate_size=32,
    vocab_size=64,
    experts=2,
    lora_rank=2,
    prompt=10,
    response=4,
    sizes={**QUICK.sizes, "scoring_1024": (1, 65), "inner_moe": (4, 2), "inner_moe_k4": (4, 4)},
)


# Counting.


def test_the_least_flops_of_a_single_model_are_those_of_its_products():
    """One layer of width 2, one head, an MLP of 3, a prompt of 1 token with responses of 1 and 2: the last layer."""
    setting = Setting(hidden_size=2, intermediate_size=3, layers=1, heads=1, kv_heads=1)
    keys_and_values = 4 * 2 * (2 * 2 * 2)  # 4 tokens
    scored = 2 * (2 * (2 * 2 * 2) + 3 * 2 * 2 * 3)  # 2 tokens: query and output, and the MLP's three products
    attention = 4 * 2 * (2 + 3)  # 5 pairs of a query and a key, two products each
    tree = [Group(1, [1, 2])]
    assert least_flops(setting, tree, lora_layers=None) == keys_and_values + scored + attention
    full = least_flops(setting, tree, lora_layers=None, training="full")
    assert full == 3 * (keys_and_values + scored + attention)


def test_the_least_flops_of_experts_share_the_trunk_and_the_first_inputs():
    setting = Setting(hidden_size=2, intermediate_size=3, layers=2, heads=1, kv_heads=1, experts=5, lora_rank=1)
    tree = [Group(1, [1, 2])]
    trunk = 4 * (4 * 8 + 36) + 8 * (1 + 1 + 1 + 2 + 3 - 2 + 2)  # 4 tokens that see 1, 2, 2 and 3
    inputs, rest, attention = 2 * 8 + 4 * 16, 2 * (8 + 36), 8 * 5
    lora = (2 + 4) * 2 * (2 + 2)  # queries of 2 tokens, values of 4
    assert least_flops(setting, tree, lora_layers="top half") == trunk + inputs + 5 * (rest + attention + lora)
    trained = trunk + inputs + 5 * (2 * rest + 3 * attention + 3 * lora)  # no gradient of the first inputs
    assert least_flops(setting, tree, lora_layers="top half", training="lora") == trained


@pytest.mark.parametrize(("causal", "visible"), [(False, 36), (True, 21)])
def test_the_counter_counts_attention_on_the_cpu(causal, visible):
    query = torch.randn(1, 2, 6, 4)
    with counter() as count:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=causal)
    assert count.get_total_flops() == 2 * 2 * visible * 4 * 2


# Measuring.


def test_a_case_is_measured_in_units_of_single_and_scaled():
    calls = []
    variants = {name: lambda name=name: calls.append(name) or torch.ones(2, 2) @ torch.ones(2, 2) for name in "abc"}
    case = Case(
        {"single": variants["a"], "b": variants["b"], "slow": variants["c"]},
        limits={"b": 8.0},
        exactness=lambda results: {"b": float((results["b"] - 2).abs().max())},
        factors={"b": 1e9},
        once={"slow"},
    )
    measured = measure(case, 3)
    assert "".join(calls) == "abc" + "abc" + "ab" + "ab"  # counted, then interleaved
    assert measured["ratio"]["single"] == 1.0 and measured["ratio"]["b"] > 1e6
    assert {name: len(seconds) for name, seconds in measured["seconds"].items()} == {"single": 3, "b": 3, "slow": 1}
    assert measured["flops"]["b"] == {"counted": 16e9, "limit": 8.0, "ratio": 2e9}
    assert measured["flops"]["slow"] == {"counted": 16, "limit": None, "ratio": None}
    assert measured["exactness"] == {"b": 0.0}


def test_texts_that_share_nothing_have_the_same_lengths():
    texts = TINY.encodings(TINY.rows(1, 16))
    others = unshared(texts)
    assert len({text.input_ids[0] for text in others}) == 16
    assert [len(text.input_ids) for text in others] == [len(text.input_ids) for text in texts]


def test_groups_and_pairs_hold_every_response():
    rows = TINY.rows(2, 4)
    assert len(pairs(rows, TINY)) == 2 * 6
    assert sum(sum(group.responses) for group in groups(TINY, rows)) == sum(
        len(response.split()) + 1 for row in rows for response in row.responses
    )


# The truth.


def test_an_expert_that_differs_shows_in_the_exactness():
    case = scoring_case(replace(TINY), "scoring")  # with models of its own
    results = {name: variant() for name, variant in case.variants.items()}
    assert max(case.exactness(results).values()) < 1e-5
    model = case.variants["ours_half"].args[0]
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name).add_(0.1)
    assert case.exactness(results)["ours_half"] > 1e-4


def test_an_error_that_is_not_a_number_is_not_lost():
    assert relative(torch.tensor([1.0, torch.nan]), torch.ones(2)).max().isnan()


def test_gradients_of_a_group_are_those_of_one_text_at_a_time():
    for layers in OURS.values():
        assert gradient_error(TINY, layers, TINY.rows(2, 3)) < 1e-4


# The whole.


@pytest.mark.slow
def test_a_run_fills_the_table():
    cases = ["scoring_16", "scoring_1024", "phase2_k2", "inner_moe"]
    *_, result = speed.run(TINY, 1, cases)
    for name in ("scoring_16", "phase2_k2", "inner_moe"):
        assert {"single", *OURS} <= result[name].keys()
        assert result[name]["single"] == 1.0
    assert {"reference", "peft_loop", "peft_mixed"} <= result["scoring_16"].keys()
    assert result["exactness"].keys() == OURS.keys()
    assert all(0 <= error < 1e-4 for error in result["exactness"].values())
    assert len(result["steps"]) == 5
    assert "| inner_moe | 1.00 |" in speed.ratio_table(result, cases)


def test_real_sizes_are_measured_on_any_device():
    sizes = {"small": {"hidden_size": 24, "intermediate_size": 32, "layers": 2, "heads": 3, "kv_heads": 1}}
    result = speed.real_sizes("cpu", 1, sizes, vocab_size=64, prompt=10, response=4, experts=2)
    assert result["small"].keys() == {"single", "ours_all", "ours_third"}
    assert all(entry["tokens_per_second"] > 0 for entry in result["small"].values())
