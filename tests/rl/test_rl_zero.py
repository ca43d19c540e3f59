"""PPO and GRPO under DeepSpeed, by real processes on the CPU: rewards and monitor of one process, going on, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import PROMPTS, make_dmoerm, make_tokenizer
from rl_runs import QUIET, ROOT, example, write_prompts, write_recipe, write_run
from safetensors.torch import load_file
from test_zero import LIMIT, launched, launches, said_by, zero
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dmoerm_trl.rl.monitor import PolicyMonitor, read_monitor, read_responses
from dmoerm_trl.rl.ppo import ppo_config
from dmoerm_trl.scoring.ensemble import load_reward_model
from dmoerm_trl.scoring.reward_functions import TextRewards

RECORDED = """
import json, os, runpy
from dmoerm_trl.scoring.ensemble import RewardEnsemble
from trl.experimental.ppo import ppo_trainer

get_reward = ppo_trainer.get_reward

def recorded(model, texts, pad_token_id, context_length):
    output = get_reward(model, texts, pad_token_id, context_length)
    if isinstance(model, RewardEnsemble):
        with open(f"{os.environ['REWARDS']}/{os.environ['RANK']}.jsonl", "a") as file:
            file.write(json.dumps([texts.tolist(), context_length, output[1].tolist()]) + "\\n")
    return output

ppo_trainer.get_reward = recorded
runpy.run_path(os.environ["EXAMPLE"], run_name="__main__")
"""

SMALL = {
    **QUIET,
    "gradient_checkpointing": False,
    "max_prompt_length": 60,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 1,
    "monitor_every": 1,
    "monitor_prompts": 3,
    "temperature": 1.0,
    "top_p": 0.8,
}

PPO = {"num_ppo_epochs": 1, "response_length": 6, "num_sample_generations": 0, "per_device_train_batch_size": 2}
PPO |= {"total_episodes": 12, "local_rollout_forward_batch_size": 1}

GRPO = {
    "max_completion_length": 6,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_steps": 2,
    "beta": 0.1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict:
    """A policy, two reward models and prompts, which the router sends to two tasks in turn."""
    folder = tmp_path_factory.mktemp("rl_zero")
    run = write_run(folder)
    tokenizer = make_tokenizer()
    make_dmoerm(tokenizer, seed=1).save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    prompts = [f"{number} {PROMPTS[task]}" for number in range(6) for task in ("chitchat", "maths")]
    write_prompts(folder / "prompts.jsonl", prompts)
    return run | {"folder": folder, "ensemble": {"WCO": [run["reward_model"], str(folder / "other")]}}


def settings(run: dict, output: Path, **changes) -> dict:
    """A recipe under ZeRO-3."""
    own = {key: run[key] for key in ("policy", "prompts", "reward_model")}
    config = zero(3)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return {**SMALL, **own, "output_dir": str(output), "deepspeed": config, **changes}


def launch(script: str, arguments: list[str], processes: int = 2) -> str:
    process = launched(script, *arguments, processes=processes)
    said = said_by(process)
    assert process.returncode == 0, said[-5000:]
    return said


def same_as_alone(run: dict, reward_model: str | dict, output: Path, batch_size: int) -> None:
    """The monitor's lines are those that one process measures with the policies that were saved."""
    model, formatter = load_reward_model(reward_model, max_length=72)
    lines = read_monitor(output / "monitor.jsonl")
    for line in lines:
        folder = output / f"checkpoint-{line['step']}" if line["step"] else run["policy"]
        prompts, _ = read_responses(output / "responses" / f"{line['step']}.jsonl")
        monitor = PolicyMonitor(
            "unused",
            prompts,
            formatter,
            AutoModelForCausalLM.from_pretrained(run["policy"], dtype="float32"),
            steps=[],
            proxy=TextRewards(model, formatter),
            max_new_tokens=6,
            top_p=0.8,
            batch_size=batch_size,
        )
        found = {key: value for key, value in line.items() if key != "step"}
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        assert found == pytest.approx(monitor.measure(policy), abs=1e-5)


@launches
@pytest.mark.slow
@pytest.mark.requires_ppo
@pytest.mark.timeout(3 * LIMIT)
def test_ppo_under_zero_3_has_the_rewards_of_one_process_and_goes_on(run, tmp_path, monkeypatch):
    """An ensemble, whose members' tasks are gathered by processes that have texts of other tasks."""
    output, rewards = tmp_path / "run", tmp_path / "rewards"
    rewards.mkdir()
    (tmp_path / "recorded.py").write_text(RECORDED)
    monkeypatch.setenv("EXAMPLE", str(ROOT / "examples" / "ppo.py"))
    monkeypatch.setenv("REWARDS", str(rewards))
    recipe = write_recipe(tmp_path / "ppo.yaml", settings(run, output, **PPO, reward_model=run["ensemble"]))
    launch(str(tmp_path / "recorded.py"), recipe)

    from trl.experimental.utils import get_reward

    model, formatter = load_reward_model(run["ensemble"], max_length=72)
    routes = []
    for rank in range(2):
        calls = [json.loads(line) for line in (rewards / f"{rank}.jsonl").read_text().splitlines()]
        assert len(calls) == 6  # three steps of two texts, one by one
        for texts, context_length, found in calls:
            texts = torch.tensor(texts)
            _, expected, _ = get_reward(model, texts, formatter.tokenizer.pad_token_id, context_length)
            assert found == pytest.approx(expected.tolist(), abs=1e-5)
            routes.append(model.members[0](texts, texts != formatter.tokenizer.pad_token_id).route.item())
    assert any(first != second for first, second in zip(routes[:6], routes[6:], strict=True))
    same_as_alone(run, run["ensemble"], output, PPO["per_device_train_batch_size"])
    AutoModelForSequenceClassification.from_pretrained(output / "checkpoint-3/value_model")
    unbroken = load_file(output / "model.safetensors")
    before = load_file(Path(run["policy"]) / "model.safetensors")
    assert unbroken.keys() == before.keys() and any(not torch.equal(unbroken[name], before[name]) for name in before)

    lines = read_monitor(output / "monitor.jsonl")
    for left in [output / "checkpoint-2", output / "checkpoint-3", output / "responses"]:
        shutil.rmtree(left)
    (output / "model.safetensors").unlink()
    launch(str(ROOT / "examples" / "ppo.py"), recipe)
    gone_on = load_file(output / "model.safetensors")
    assert all(torch.equal(gone_on[name], unbroken[name]) for name in unbroken | gone_on)
    assert read_monitor(output / "monitor.jsonl") == lines and [line["step"] for line in lines] == [0, 1, 2, 3]
    assert not (output / "responses" / "1.jsonl").exists()


@launches
@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT)
def test_grpo_under_zero_3_measures_what_one_process_does(run, tmp_path):
    """Each process has the whole reward model; policy and reference are divided."""
    output = tmp_path / "run"
    recipe = write_recipe(tmp_path / "grpo.yaml", settings(run, output, **GRPO))
    launch(str(ROOT / "examples" / "grpo.py"), recipe)
    same_as_alone(run, run["reward_model"], output, GRPO["per_device_train_batch_size"])
    saved, last = (load_file(folder / "model.safetensors") for folder in (output, output / "checkpoint-2"))
    before = load_file(Path(run["policy"]) / "model.safetensors")
    assert saved.keys() == before.keys() and any(not torch.equal(saved[name], before[name]) for name in before)
    assert all(torch.equal(saved[name], last[name]) for name in before)


@pytest.mark.requires_ppo
def test_ppo_clips_gradients_under_deepspeed_only_where_its_configuration_says_so(tmp_path):
    clipping = [
        ppo_config()(str(tmp_path), **QUIET, deepspeed=config).deepspeed_plugin.deepspeed_config["gradient_clipping"]
        for config in (zero(2), {**zero(2), "gradient_clipping": 0.5})
    ]
    assert clipping == [0.0, 0.5]


@pytest.mark.parametrize("name", [pytest.param("ppo", marks=pytest.mark.requires_ppo), "grpo"])
def test_deepspeed_without_a_launcher_is_an_error(run, tmp_path, monkeypatch, name):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    own = {"ppo": PPO, "grpo": GRPO}[name]
    recipe = write_recipe(tmp_path / "run.yaml", settings(run, tmp_path / "run", **own))
    with pytest.raises(ValueError, match="in a process that no launcher started.*torchrun"):
        example(name).main(recipe)


REFUSED = """
import sys
from rl_runs import example
for name, recipe in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        example(name).main(["--config", recipe])
    except ValueError as error:
        print(name, "says", error)
"""


@launches
@pytest.mark.slow
@pytest.mark.requires_ppo
def test_deepspeed_that_would_not_run_is_an_error(run, tmp_path, monkeypatch):
    """What `accelerate launch --cpu` sets."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "refused.py").write_text(REFUSED)
    command = []
    for name, own in {"ppo": PPO, "grpo": GRPO}.items():
        _, recipe = write_recipe(tmp_path / f"{name}.yaml", settings(run, tmp_path / name, **own))
        command += [name, recipe]
    said = said_by(launched(str(tmp_path / "refused.py"), *command, processes=1))
    for name in ("ppo", "grpo"):
        assert f"{name} says got a DeepSpeed configuration and a run without DeepSpeed" in said
