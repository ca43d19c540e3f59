"""Bases in 8 and 4 bits: what is quantised, what the rewards are then, phase 2 on such a base, and what is refused."""

import json
import logging
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from models import PROMPTS, RESPONSES, TASKS, chat, make_dmoerm, make_single, make_tokenizer, padded
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from dmoerm_trl.cli import main
from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.data.rows import PreferenceRow
from dmoerm_trl.modeling import quantization as quantised
from dmoerm_trl.modeling.assembly import add_experts_to, assemble, export_expert, inner_model
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.modeling.quantization import quantization
from dmoerm_trl.training.phases import phase1, phase2
from dmoerm_trl.training.pipeline import Pipeline
from dmoerm_trl.training.ranked_config import RankedRewardConfig
from dmoerm_trl.training.recipe import Recipe

ZERO2 = str(Path(__file__).parents[2] / "recipes" / "deepspeed" / "zero2.json")
POINTS = TASKS["chitchat"]
FOUR, EIGHT = {"load_in_4bit": True, "load_in_8bit": False}, {"load_in_4bit": False, "load_in_8bit": True}
BITS = pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4bit", "8bit"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`dmoerm`, a model of three tasks, and `base`, what phase 1 leaves of the task "chitchat", with their tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("quantised"), make_tokenizer()
    for name, make in {"dmoerm": make_dmoerm, "base": make_single}.items():
        make(tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def batch(tokenizer) -> dict[str, Tensor]:
    texts = [
        chat(tokenizer, prompt, response)[1].rstrip() for response, prompt in product(RESPONSES, PROMPTS.values())
    ]
    ids, mask = padded([tokenizer(text).input_ids for text in texts], tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def rows() -> list[PreferenceRow]:
    prompt = [{"role": "user", "content": PROMPTS["chitchat"]}]
    labels = dict(zip(POINTS, ([1, 3, 2], [3, 1, 2], [2, 1, 3]), strict=True))
    return [PreferenceRow(prompt, RESPONSES, [2, 1, 3], "chitchat", labels)]


def load(folder: Path, bits: dict[str, bool] | None = None, **options) -> DMoERMForSequenceClassification:
    options["quantization_config"] = None if bits is None else quantization(**bits)
    return DMoERMForSequenceClassification.from_pretrained(str(folder), **options).eval()


def rewards(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[:, 0]


def rounded(folder: Path) -> DMoERMForSequenceClassification:
    """The model in full precision, with the weights that its 4-bit base stands for."""
    model, in_4_bits = load(folder), load(folder, FOUR)
    for name, module in in_4_bits.named_modules():
        if isinstance(module, Linear4bit):
            weight = model.get_submodule(name).weight
            weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return model


def settings(folder: Path, **changes) -> RankedRewardConfig:
    few = {"max_steps": 3, "eval_steps": 1, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True}
    return RankedRewardConfig(str(folder), **{**few, **changes})


def small_recipe(folder: Path, **changes) -> Recipe:
    return Recipe(output_dir=str(folder), base_model="base", train_data="rows.jsonl", **changes)


# Scoring.


@BITS
def test_the_linear_layers_of_the_bases_are_quantised_and_nothing_else(folder, bits):
    full, model = load(folder / "dmoerm"), load(folder / "dmoerm", bits)
    layers = Linear4bit if bits is FOUR else Linear8bitLt
    of_a_base = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, layers) == (".backbones." in name and ".lora_" not in name), name
            if isinstance(module, layers):
                of_a_base.add(f"{name}.weight")
    assert len(of_a_base) == 3 * 2 * 7  # three bases of two layers
    weights = model.state_dict()
    for name, weight in full.state_dict().items():
        assert name in of_a_base or torch.equal(weights[name], weight), name


def test_rewards_in_4_bits_are_those_of_the_rounded_weights(folder, batch):
    found = rewards(load(folder / "dmoerm", FOUR), batch)
    assert not torch.allclose(found, rewards(load(folder / "dmoerm"), batch), atol=1e-3)
    torch.testing.assert_close(found, rewards(rounded(folder / "dmoerm"), batch), atol=1e-4, rtol=1e-4)


def test_rewards_in_8_bits_are_near_those_in_full_precision(folder, batch):
    full, found = rewards(load(folder / "dmoerm"), batch), rewards(load(folder / "dmoerm", EIGHT), batch)
    assert (full - found).abs().max() < 0.1 * full.std()


def test_in_4_bits_a_reward_does_not_depend_on_a_texts_neighbours(folder, batch):
    model = load(folder / "dmoerm", FOUR)
    each = [{name: rows[i : i + 1] for name, rows in batch.items()} for i in range(len(batch["input_ids"]))]
    alone = [rewards(model, one) for one in each]
    torch.testing.assert_close(torch.cat(alone), rewards(model, batch), atol=1e-5, rtol=1e-5)


@BITS
def test_all_experts_go_through_a_quantised_base_in_one_pass(folder, batch, bits, caplog):
    model = load(folder / "dmoerm", bits)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")  # such as the one for backbones that packed texts do not fit
        rewards(model, batch)
    assert not caplog.records  # such as bitsandbytes' at each product


@BITS
def test_bases_that_wait_are_quantised_when_they_are_read(folder, batch, bits):
    model = load(folder / "dmoerm", bits, resident_tasks=1)
    torch.testing.assert_close(rewards(model, batch), rewards(load(folder / "dmoerm", bits), batch), atol=1e-5, rtol=0)
    (base,) = model.model.backbones.values()
    assert quantised.is_quantised(base)


def test_score_quantises(folder, batch, capsys):
    arguments = ["--model", str(folder / "dmoerm"), "--prompt", PROMPTS["chitchat"], "--response", RESPONSES[0]]
    assert main(["score", *arguments, "--load_in_4bit"]) == 0
    found = json.loads(capsys.readouterr().out)["reward"]
    assert found == pytest.approx(float(rewards(load(folder / "dmoerm", FOUR), batch)[1]), abs=1e-5)


# Phase 2.


def test_phase_2_on_a_4_bit_base_is_that_on_the_rounded_weights(folder, rows, tokenizer, tmp_path):
    """With evaluations between the steps, after which bitsandbytes would pack the weights anew on some CPUs."""
    trained = {}
    for name, base in {"4bit": load(folder / "base", FOUR), "rounded": rounded(folder / "base")}.items():
        before = {key: value.clone() for key, value in base.model.backbones.state_dict().items()}
        model, _ = phase2(base, POINTS, rows, rows, Formatter(tokenizer, 256), settings(tmp_path / f"{name}-work"))
        after = {key.replace(".base_layer.", "."): value for key, value in model.model.backbones.state_dict().items()}
        assert all(torch.equal(after[key], value) for key, value in before.items())
        for point in POINTS:
            export_expert(model, "chitchat", point, tmp_path / name / point)
        trained[name] = [load_file(tmp_path / name / point / "adapter_model.safetensors") for point in POINTS]
    for found, expected in zip(trained["4bit"], trained["rounded"], strict=True):
        assert any(weight.abs().max() > 1e-3 for name, weight in found.items() if "lora_B" in name)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    whole = add_experts_to(load(folder / "base"), {point: tmp_path / "4bit" / point for point in POINTS})
    assert not quantised.is_quantised(whole)


def test_phase_2_trains_experts_on_an_8_bit_base(folder, rows, tokenizer, tmp_path):
    options = settings(tmp_path, gradient_checkpointing=True)
    model, _ = phase2(load(folder / "base", EIGHT), POINTS, rows, rows, Formatter(tokenizer, 256), options)
    ups = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert ups and all(weight.dtype == torch.float32 and weight.abs().max() > 1e-3 for weight in ups)


@BITS
def test_a_recipe_has_phase_2_quantise_its_base(folder, rows, tmp_path, monkeypatch, bits):
    bases = []
    monkeypatch.setattr(Pipeline, "rows", lambda *_, **__: rows)
    monkeypatch.setattr(Pipeline, "formatter", None)
    monkeypatch.setattr("dmoerm_trl.training.recipe_stages.phase2", lambda base, *_: bases.append(base) or (base, {}))
    (tmp_path / "chitchat").mkdir()
    (tmp_path / "chitchat" / "phase1").symlink_to(folder / "base")
    run = Pipeline(small_recipe(tmp_path, phase2={"use_cpu": True}, **bits))
    run.stages["chitchat/experts"].run(tmp_path / "experts")
    layers = Linear4bit if bits is FOUR else Linear8bitLt
    assert sum(isinstance(module, layers) for module in bases[0].modules()) == 2 * 7
    assert not quantised.is_quantised(run.load("chitchat/phase1"))


# What is refused.


def test_both_are_refused():
    with pytest.raises(ValueError, match="load_in_4bit and load_in_8bit are both True"):
        quantization(load_in_4bit=True, load_in_8bit=True)


def test_without_bitsandbytes_it_is_named_before_any_training(folder, tmp_path, monkeypatch):
    config = quantization(**FOUR)
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    message = r"no bitsandbytes, need the package: pip install 'dmoerm-trl\[quantised\]'"
    with pytest.raises(ValueError, match=message):
        small_recipe(tmp_path, load_in_4bit=True)
    with pytest.raises(ValueError, match=message):
        DMoERMForSequenceClassification.from_pretrained(str(folder / "dmoerm"), quantization_config=config)
    assert quantization(load_in_4bit=False, load_in_8bit=False) is None


def test_another_method_is_refused(folder):
    config = TorchAoConfig.__new__(TorchAoConfig)  # its constructor needs torchao
    with pytest.raises(
        ValueError, match="quantization_config of type TorchAoConfig, need transformers' BitsAndBytesConfig"
    ):
        DMoERMForSequenceClassification.from_pretrained(str(folder / "dmoerm"), quantization_config=config)


def test_phase_1_on_a_quantised_base_is_refused(backbone, rows, tokenizer, tmp_path):
    backbone.save_pretrained(tmp_path / "backbone")
    config = BitsAndBytesConfig(load_in_8bit=True)
    args = (str(tmp_path / "backbone"), "chitchat", rows, rows, Formatter(tokenizer, 256), settings(tmp_path))
    with pytest.raises(ValueError, match="got a quantised base to train as a whole, need full precision"):
        phase1(*args, quantization_config=config)
    with pytest.raises(ValueError, match="`phase1` of the recipe: .*'load_in_4bit'.*keys of the whole recipe"):
        small_recipe(tmp_path, phase1={"load_in_4bit": True})


def test_a_quantised_base_under_deepspeed_is_refused(folder, rows, tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match="`phase2` of the recipe: got deepspeed=.* and a quantised base, need one of them"
    ):
        small_recipe(tmp_path, load_in_4bit=True, phase2={"deepspeed": ZERO2})
    args = settings(tmp_path, deepspeed=ZERO2)
    with pytest.raises(
        ValueError, match="got a quantised base to train experts on under DeepSpeed, need full precision"
    ):
        phase2(load(folder / "base", FOUR), POINTS, rows, rows, Formatter(tokenizer, 256), args)


@BITS
def test_a_quantised_model_is_neither_saved_nor_taken_apart(folder, bits, tmp_path):
    model = load(folder / "dmoerm", bits)
    with pytest.raises(ValueError, match="got a quantised base to save, need full precision"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="got a quantised base to take out of a model"):
        inner_model(model, "chitchat")
    with pytest.raises(ValueError, match="got a quantised base to put into a model"):
        assemble({task: load(folder / "dmoerm", bits) for task in TASKS}, model.model.router)
