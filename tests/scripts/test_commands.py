"""The commands of policies and of export, as a user runs them on tiny models."""

import json

import pytest
from models import make_single
from peft import PeftModel
from rl_runs import QUIET, write_recipe, write_run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dmoerm_trl import DMoERMForSequenceClassification
from dmoerm_trl.cli import main
from dmoerm_trl.rl.monitor import read_monitor


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)


@pytest.mark.requires_ppo
def test_ppo(run, tmp_path):
    settings = {
        **QUIET, **run, "output_dir": str(tmp_path / "run"), "max_prompt_length": 60, "response_length": 6, "total_episodes": 8,
        "per_device_train_batch_size": 4, "num_sample_generations": 0, "gradient_checkpointing": False, "save_strategy": "no",
        "monitor_every": 1, "monitor_prompts": 2,
    }  # fmt: skip
    main(["ppo", *write_recipe(tmp_path / "ppo.yaml", settings)])
    assert [line["step"] for line in read_monitor(tmp_path / "run" / "monitor.jsonl")] == [0, 1, 2]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_grpo_and_rloo(trainer, run, tmp_path):
    settings = {
        **QUIET, **run, "output_dir": str(tmp_path / "run"), "max_prompt_length": 60, "max_completion_length": 6, "max_steps": 1,
        "per_device_train_batch_size": 2, "num_generations": 2, "save_strategy": "no", "monitor_every": 1, "monitor_prompts": 2,
    }  # fmt: skip
    main(["grpo", *write_recipe(tmp_path / "grpo.yaml", settings), "--trainer", trainer])
    assert [line["step"] for line in read_monitor(tmp_path / "run" / "monitor.jsonl")] == [0, 1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_best_of_n(run, tmp_path, capsys):
    settings = {
        "policy": run["policy"], "prompts": run["prompts"], "num_prompts": 2, "n": 4, "max_new_tokens": 4, "gold": "length",
        "reward_models": {"DMoERM": run["reward_model"]}, "output_dir": str(tmp_path / "bon"),
    }  # fmt: skip
    main(["best-of-n", *write_recipe(tmp_path / "bon.yaml", settings)])
    assert (tmp_path / "bon" / "best_of_n.md").is_file() and "table: " in capsys.readouterr().out


def test_what_is_exported_is_loaded_without_this_package(run, tmp_path, capsys):
    out = str(tmp_path / "out")
    main(["export", "--model", run["reward_model"], "--what", "experts", "--task", "chitchat", "--output", out])
    assert capsys.readouterr().out.count("expert in ") == 3
    base = AutoModelForSequenceClassification.from_pretrained(out)
    PeftModel.from_pretrained(base, tmp_path / "out" / "empathy_ability")
    assert (
        json.loads((tmp_path / "out" / "logic" / "adapter_config.json").read_text())["base_model_name_or_path"] == out
    )


def test_an_inner_model_is_exported_with_its_card(run, tmp_path):
    out = tmp_path / "out"
    main(["export", "--model", run["reward_model"], "--what", "inner_model", "--task", "maths", "--output", str(out)])
    assert DMoERMForSequenceClassification.from_pretrained(out).config.tasks == {"maths": ["correctness"]}
    assert AutoTokenizer.from_pretrained(out).chat_template and (out / "README.md").is_file()


WRONG = {
    "a task that is not named": (["--what", "experts"], "got --task None, need one of"),
    "an unknown task": (["--what", "experts", "--task", "law"], "got --task law, need one of"),
    "an unknown point": (["--what", "experts", "--task", "maths", "--point", "wit"], "got --point 'wit', need one of"),
    "a point of no expert": (
        ["--what", "inner_model", "--task", "maths", "--point", "logic"],
        "need --what experts with it",
    ),
    "a token": (
        ["--what", "reward_model", "--task", "maths", "--pad_token", "<nil>"],
        "need a token that the tokenizer has",
    ),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_exported_is_named(arguments, says, run, tmp_path):
    with pytest.raises(ValueError, match=says):
        main(["export", "--model", run["reward_model"], "--output", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_and_a_model_without_experts_has_none(run, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="got a file, or a folder that is not empty, need a new or empty folder"):
        main(["export", "--model", run["reward_model"], "--what", "experts", "--output", run["policy"]])
    make_single(tokenizer).save_pretrained(tmp_path / "single")
    tokenizer.save_pretrained(tmp_path / "single")
    with pytest.raises(ValueError, match="a model without experts, need a DMoERM"):
        main(["export", "--model", str(tmp_path / "single"), "--what", "experts", "--output", str(tmp_path / "out")])
