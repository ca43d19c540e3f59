"""Every recipe of PPO and GRPO parses with its script, and runs with tiny models in the place of its own."""

import shutil

import pytest
import yaml
from models import make_policy, make_tokenizer
from rl_runs import QUIET, ROOT, example, write_recipe, write_run
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, TrlParser

from dmoerm_trl.rl.arguments import GRPOArguments, PPOArguments
from dmoerm_trl.rl.monitor import read_monitor
from dmoerm_trl.rl.ppo import check_arguments, ppo_config


def name_of(recipe) -> str:
    return recipe.parent.name


PPO = sorted((ROOT / "recipes").rglob("ppo.yaml"))
GRPO = sorted((ROOT / "recipes").rglob("grpo.yaml"))

MODELS = {path.parent.name for path in (ROOT / "recipes").glob("qwen*/train.yaml")}
KEYS = {"step", "proxy", "k1", "k2", "k3", "length", "repetition", "without_end"}


def test_there_are_recipes():
    assert {name_of(path) for path in PPO} == {name_of(path) for path in GRPO} == {"demo", *MODELS}


@pytest.mark.requires_ppo
@pytest.mark.parametrize("recipe", PPO, ids=name_of)
def test_a_ppo_recipe_is_read_by_its_script_and_by_trl(recipe):
    parser = TrlParser((PPOArguments, ppo_config()))
    arguments, args = parser.parse_args_and_config(
        ["--config", str(recipe), "--use_cpu", "true"], fail_with_unknown_args=True
    )
    check_arguments(args)
    assert arguments.reward_model.startswith("runs/") and args.total_episodes % 32 == 0


@pytest.mark.requires_ppo
def test_the_papers_recipe_has_the_papers_numbers():
    parser = TrlParser((PPOArguments, ppo_config()))
    arguments, args = parser.parse_args_and_config(
        ["--config", str(ROOT / "recipes/qwen1.5-1.8b-chat/ppo.yaml"), "--use_cpu", "true"]
    )
    batch = 8 * args.per_device_train_batch_size * args.gradient_accumulation_steps  # eight GPUs
    assert (args.learning_rate, args.lr_scheduler_kwargs["min_lr"]) == (1.41e-5, 1e-7)
    assert (batch, args.total_episodes) == (32, 3000 * 32)
    assert (args.kl_coef, args.cliprange, args.cliprange_value, args.gamma, args.lam) == (0.1, 0.2, 0.2, 1.0, 0.95)
    assert (arguments.max_prompt_length, args.response_length) == (1024, 1024)
    assert (arguments.top_p, args.temperature) == (0.8, 1.0)


@pytest.mark.trl_contract
@pytest.mark.parametrize("config", [GRPOConfig, RLOOConfig])
@pytest.mark.parametrize("recipe", GRPO, ids=name_of)
def test_a_grpo_recipe_is_read_by_its_script_and_by_trl(recipe, config):
    parser = TrlParser((GRPOArguments, config))
    parser.parse_args_and_config(
        ["--config", str(recipe), "--use_cpu", "true", "--bf16", "false"], fail_with_unknown_args=True
    )


def tiny(recipe, folder, **settings) -> list[str]:
    """The arguments that run a recipe with tiny models, on few prompts."""
    small = {
        "eval_prompts": None, "max_prompt_length": 60, "monitor_every": 1, "monitor_prompts": 2, "gold": "rl_runs:letters_of",
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "output_dir": str(folder / "run"),
        "gradient_checkpointing": False, "save_steps": 1,
    }  # fmt: skip
    own = yaml.safe_load(recipe.read_text())
    return write_recipe(folder / "tiny.yaml", own | small | write_run(folder) | QUIET | settings)


@pytest.mark.requires_ppo
@pytest.mark.parametrize("recipe", PPO, ids=name_of)
def test_a_ppo_recipe_runs(recipe, tmp_path):
    arguments = tiny(recipe, tmp_path, response_length=6, total_episodes=8, local_rollout_forward_batch_size=2)
    example("ppo").main(arguments)
    lines = read_monitor(tmp_path / "run" / "monitor.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2] and all(KEYS | {"gold"} <= line.keys() for line in lines)
    assert lines[0]["k3"] == 0 and lines[2]["k3"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


GROUPS = {
    "max_steps": 2,
    "num_generations": 2,
    "max_completion_length": 6,
    "save_total_limit": 2,
    "learning_rate": 1e-3,
}


@pytest.mark.trl_contract
@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
@pytest.mark.parametrize("recipe", GRPO, ids=name_of)
def test_a_grpo_recipe_runs(recipe, trainer, tmp_path):
    example("grpo").main([*tiny(recipe, tmp_path, **GROUPS), "--trainer", trainer])
    lines = read_monitor(tmp_path / "run" / "monitor.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2] and all(KEYS | {"gold"} <= line.keys() for line in lines)
    assert lines[0]["k3"] == 0 and lines[2]["k3"] > 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.trl_contract
def test_capability_points_are_rewards_of_their_own(monkeypatch, tmp_path):
    weights = {"empathy ability": 2.0, "correctness": 0.5}
    trainers = []
    settings = {**GROUPS, "capability_weights": weights, "gold": None}

    def kept(**arguments):
        trainers.append(GRPOTrainer(**arguments))
        return trainers[0]

    monkeypatch.setattr("dmoerm_trl.rl.grpo.GRPOTrainer", kept)
    example("grpo").main(tiny(GRPO[0], tmp_path, **settings))
    entries = [entry for entry in trainers[0].state.log_history if "reward" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["reward"] == pytest.approx(0.5 * entry["rewards/correctness/mean"], abs=1e-5)
        empathy = entry["rewards/empathy ability/mean"]  # the prompts' task does not have it
        assert empathy is None or empathy != empathy


@pytest.mark.trl_contract
def test_grpo_goes_on_from_its_last_checkpoint(tmp_path):
    grpo = example("grpo")
    arguments = tiny(GRPO[0], tmp_path, **GROUPS)
    grpo.main(arguments)
    whole = read_monitor(tmp_path / "run" / "monitor.jsonl")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    grpo.main(arguments)
    again = read_monitor(tmp_path / "run" / "monitor.jsonl")
    assert [line["step"] for line in again] == [0, 1, 2] and again[:2] == whole[:2]
    grpo.main(arguments)  # nothing is left to do
    assert read_monitor(tmp_path / "run" / "monitor.jsonl") == again


@pytest.mark.trl_contract
@pytest.mark.parametrize(
    "settings, says",
    [
        ({"kl_coef": 0.1}, "kl_coef"),
        ({"trainer": "ppo"}, "got trainer 'ppo', need one of"),
        ({"reward_weights": [1.0]}, "need capability_weights"),
        ({"capability_weights": {"logik": 1.0}}, "logik"),
    ],
)
def test_a_grpo_recipe_with_a_mistake_is_an_error_that_names_it(settings, says, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        example("grpo").main(tiny(GRPO[0], tmp_path, **{**GROUPS, **settings}))
    assert says in f"{error.value} {capsys.readouterr().err}"


@pytest.mark.trl_contract
def test_a_policy_without_a_chat_template_is_an_error(tmp_path):
    arguments = tiny(GRPO[0], tmp_path, **GROUPS)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    shutil.rmtree(tmp_path / "policy")
    make_policy(tokenizer).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="without a chat template, need one"):
        example("grpo").main(arguments)
