"""A model put together from its parts, and taken apart again: each part gives what it gave in the whole."""

import json
from copy import deepcopy

import pytest
import torch
from models import PROMPTS, RESPONSES, TASKS, chat, make_dmoerm, padded, peft_expert, qwen2_config
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dmoerm_trl.modeling.assembly import (
    add_experts_to,
    assemble,
    base_reward_model,
    export_expert,
    inner_model,
    with_experts,
    with_task,
)

SLUGS = {task: task.replace(" ", "_") for task in TASKS}


@pytest.fixture
def batch(tokenizer) -> dict:
    """Nine texts: three responses to each task's prompt, task by task."""
    rows = [tokenizer(chat(tokenizer, p, r)[1]).input_ids for p in PROMPTS.values() for r in RESPONSES]
    ids, mask = padded(rows, tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def train_randomly(expert: PeftModel, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    for weight in expert.parameters():
        if weight.requires_grad:
            weight.data.normal_(0, 0.2)
    return expert.eval()


# Phase 2 and what it leaves behind.


def test_new_experts_score_as_their_base(single, batch):
    head = single.model.inner_models["chitchat"]
    expected = single(**batch).logits[:, 0] * head.reward_std + head.reward_mean  # an expert's score is not normalised
    before = {name: weight.clone() for name, weight in single.state_dict().items()}
    model = with_experts(single, TASKS["chitchat"])
    assert model.config.tasks == {"chitchat": TASKS["chitchat"]}
    for score in model(**batch).capability_scores.values():
        same(score, expected)
    after = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()}
    for name in before:
        assert "reward_" in name or torch.equal(after[name], before[name]), name


def test_experts_of_phase_2_become_an_inner_model_and_come_out_again(single, batch, tmp_path):
    points, scores = ["empathy ability", "logic", "情感"], {}
    for seed, point in enumerate(points):
        expert = train_randomly(peft_expert(deepcopy(single)), seed)
        scores[point] = expert(**batch).logits[:, 0]
        expert.save_pretrained(tmp_path / point)
    expected = single(**batch).logits

    head = single.model.inner_models[
        "chitchat"
    ]  # a base's scores stand on the base's scale, an expert's on the sigmoid's
    model = add_experts_to(single, {point: tmp_path / point for point in points})
    assert model.config.tasks == {"chitchat": points}
    found = model(**batch).capability_scores
    assert model.model.inner_models["chitchat"].reward_mean == 0  # normalised anew, after phase 3
    for point in points:
        same(found[point], scores[point] * head.reward_std + head.reward_mean)
    assert len({float(s[0].detach()) for s in found.values()}) == 3

    base = base_reward_model(model, "chitchat")
    mean, std = head.reward_mean, head.reward_std
    same(base(**batch).logits, expected * std + mean)

    again = {point: tmp_path / "again" / point for point in points}
    for point, folder in again.items():
        export_expert(model, "chitchat", point, folder)
        first, second = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / point, folder))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_more_experts_than_trained_layers_keep_apart(single, tmp_path):
    """The folder of one point does not reach another's adapter."""
    for seed, point in enumerate(("a", "b")):
        train_randomly(peft_expert(deepcopy(single)), seed).save_pretrained(tmp_path / point)
    one = add_experts_to(deepcopy(single), {"a": tmp_path / "a", "b": tmp_path / "b"}).state_dict()
    two = add_experts_to(deepcopy(single), {"a": tmp_path / "a", "b": tmp_path / "a"}).state_dict()
    names = [name for name in one if ".chitchat__b." in name or ".expert_heads.b." in name]
    assert len(names) == 10
    assert not any(torch.equal(one[name], two[name]) for name in names)
    assert all(torch.equal(one[name], two[name]) for name in one if name not in names and "aggregator" not in name)


# Parts of a whole model.


@pytest.mark.parametrize("share_base", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_an_inner_model_gives_its_tasks_rewards(tokenizer, batch, task, share_base, tmp_path):
    whole = make_dmoerm(tokenizer, share_base=share_base)
    expected = whole(**batch)
    model = inner_model(whole, task)
    assert model.config.tasks == {task: TASKS[task]} and model.model.router is None and not model.training
    rows = expected.route == list(TASKS).index(task)
    found = model(**batch)
    same(found.logits[rows], expected.logits[rows])
    for point in TASKS[task]:
        same(found.capability_scores[point][rows], expected.capability_scores[point][rows])

    model.save_pretrained(tmp_path)
    same(type(model).from_pretrained(tmp_path)(**batch).logits, found.logits)
    for weight in model.parameters():
        weight.data.zero_()
    same(whole(**batch).logits, expected.logits)  # copies: the whole is as it was


@pytest.mark.parametrize("share_base", [False, True])
@pytest.mark.parametrize("task, point", [(task, point) for task, points in TASKS.items() for point in points])
def test_an_exported_expert_is_a_peft_adapter_of_its_base(tokenizer, batch, task, point, share_base, tmp_path):
    whole = make_dmoerm(tokenizer, share_base=share_base)
    export_expert(whole, task, point, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt")]
    expert = PeftModel.from_pretrained(base_reward_model(whole, task), tmp_path).eval()
    same(expert(**batch).logits[:, 0], inner_model(whole, task)(**batch).capability_scores[point])


@pytest.mark.parametrize("share_base", [False, True])
def test_a_base_reward_model_is_the_backbone_without_experts(tokenizer, batch, share_base):
    whole = make_dmoerm(tokenizer, share_base=share_base)
    backbone = whole.model.backbones["shared" if share_base else "chitchat"]
    for layer in backbone.modules():
        if hasattr(layer, "lora_B"):
            for lora in layer.lora_B.values():
                lora.weight.data.zero_()
    head = whole.model.inner_models["chitchat"].base_head
    model = base_reward_model(whole, "chitchat")
    hidden = backbone(**batch).last_hidden_state
    spans = whole.model.find_spans(**batch)
    expected = head(hidden[range(9), spans.lengths - 1]).sigmoid()
    same(model(**batch).logits, expected)


@pytest.mark.parametrize("share_base", [False, True])
def test_assembling_the_parts_gives_the_whole(tokenizer, batch, share_base, tmp_path):
    whole = make_dmoerm(tokenizer, share_base=share_base)
    parts = {task: inner_model(whole, task) for task in reversed(TASKS)}  # the router's order counts, not this one
    again = assemble(parts, deepcopy(whole.model.router))
    weights, expected = again.state_dict(), whole.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert list(again.config.tasks) == list(TASKS)
    same(again(**batch).logits, whole(**batch).logits)
    assert not again.training and not any(weight.requires_grad for weight in again.model.router.parameters())
    again.save_pretrained(tmp_path)
    same(type(again).from_pretrained(tmp_path)(**batch).logits, whole(**batch).logits)


def test_parts_of_a_bf16_model_keep_its_precision(dmoerm, batch, tmp_path):
    dmoerm.save_pretrained(tmp_path)
    whole = type(dmoerm).from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected, rows = whole(**batch), slice(3, 6)
    model = inner_model(whole, "chitchat")
    weights = whole.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(weight.dtype == weights[name].dtype for name, weight in model.state_dict().items())
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(model(**batch).logits[rows], expected.logits[rows], atol=0.02, rtol=0)


@pytest.mark.parametrize("share_base", [False, True])
def test_a_base_serves_another_task_by_its_name(tokenizer, batch, share_base):
    base = make_dmoerm(tokenizer, {"chitchat": []}, share_base=share_base)
    expected = base(**batch).logits
    model = with_task(base, "maths")
    assert model.config.tasks == {"maths": []}
    same(model(**batch).logits, expected)


# Errors.


def test_unknown_names_are_errors(dmoerm, tmp_path):
    with pytest.raises(ValueError, match=r"got task 'poetry', need one of \['story writing', 'chitchat', 'maths'\]"):
        inner_model(dmoerm, "poetry")
    with pytest.raises(ValueError, match="got task 'poetry'"):
        base_reward_model(dmoerm, "poetry")
    with pytest.raises(ValueError, match="got task 'poetry'"):
        export_expert(dmoerm, "poetry", "logic", tmp_path)
    with pytest.raises(
        ValueError, match=r"got capability point 'logic', need one of \['correctness'\] of task 'maths'"
    ):
        export_expert(dmoerm, "maths", "logic", tmp_path)


def test_a_router_over_other_tasks_is_an_error(dmoerm):
    with pytest.raises(ValueError, match="need the same tasks"):
        assemble({"maths": inner_model(dmoerm, "maths")}, dmoerm.model.router)


@pytest.mark.parametrize("lost", ["base_head.weight", "layers.0.self_attn.q_proj.lora_A.weight"])
def test_an_adapter_that_lacks_a_weight_is_an_error(single, tmp_path, lost):
    peft_expert(deepcopy(single)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    (name,) = [name for name in weights if name.endswith(lost)]
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"not those of the expert 'logic' of 'chitchat' .such as '{name}'"):
        add_experts_to(single, {"logic": tmp_path})


def test_an_adapter_of_another_rank_is_an_error(single, tmp_path):
    other = deepcopy(single)
    other.config.lora_rank = 2
    peft_expert(other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="such as 'r'.*same LoRA settings"):
        add_experts_to(single, {"logic": tmp_path})


@pytest.mark.parametrize(
    "setting", [{"lora_alpha": 8}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}, {"fan_in_fan_out": True}]
)
def test_an_adapter_whose_settings_scale_it_otherwise_is_an_error(single, setting, tmp_path):
    peft_expert(deepcopy(single)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    with pytest.raises(ValueError, match=f"such as '{next(iter(setting))}'.*same LoRA settings"):
        add_experts_to(single, {"logic": tmp_path})


def test_an_adapter_of_integers_or_without_numbers_is_an_error(single, tmp_path):
    peft_expert(deepcopy(single)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    key = next(key for key in weights if "lora_A" in key)
    save_file({**weights, key: weights[key].to(torch.int8)}, path)
    with pytest.raises(ValueError, match=f"such as '{key}'"):
        add_experts_to(deepcopy(single), {"logic": tmp_path})
    save_file({**weights, key: weights[key] * torch.nan}, path)
    with pytest.raises(ValueError, match="that is not finite"):
        add_experts_to(single, {"logic": tmp_path})


def test_a_point_named_like_another_points_adapter_is_kept_apart(tokenizer, batch, tmp_path):
    model = make_dmoerm(tokenizer, {"a": ["b", "a__b"]})
    expected = model(**batch).capability_scores
    for point in model.config.tasks["a"]:
        export_expert(model, "a", point, tmp_path / point)
    folders = {point: tmp_path / point for point in model.config.tasks["a"]}
    found = add_experts_to(base_reward_model(model, "a"), folders)(**batch).capability_scores
    for point, scores in expected.items():
        same(found[point], scores)


def test_an_adapter_of_another_base_is_an_error(single, tokenizer, tmp_path):
    other = make_dmoerm(tokenizer, {"chitchat": []}, backbone_config=qwen2_config(tokenizer, hidden_size=16))
    peft_expert(other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="such as 'base_model.model.model.*need one trained on this base"):
        add_experts_to(single, {"logic": tmp_path})


def test_an_adapter_of_another_scale_is_an_error(single, tmp_path):
    """Nothing in the weights tells alpha, and with another one the expert's scores would be others."""
    other = deepcopy(single)
    other.config.lora_alpha = 64
    peft_expert(other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="such as 'lora_alpha'.*same LoRA settings"):
        add_experts_to(single, {"logic": tmp_path})


def test_lora_targets_that_the_base_lacks_are_an_error(single):
    single.config.lora_target_modules = ["c_attn"]
    with pytest.raises(ValueError, match=r"no linear module \['c_attn'\].*'k_proj', 'o_proj', 'q_proj'"):
        with_experts(single, ["logic"])
