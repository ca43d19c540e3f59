"""Every recipe of every size is read by its script, and runs with tiny models in the place of its own; the launchers' files too."""

import json
import os
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin
from deepspeed.runtime.config import DeepSpeedConfig
from models import PROMPTS, RESPONSES, make_backbone, make_dmoerm, make_policy, make_tokenizer
from rl_runs import ROOT, example, write_recipe
from trl import TrlParser

from dmoerm_trl.evaluation.best_of_n_arguments import BestOfNArguments
from dmoerm_trl.modeling.modeling_dmoerm import DMoERMForSequenceClassification
from dmoerm_trl.scripts.train import main as train
from dmoerm_trl.training.recipe import DEFAULTS, Recipe

RECIPES = ROOT / "recipes"
TRAIN = sorted(RECIPES.glob("qwen*/train.yaml"))
BON = sorted(RECIPES.rglob("bon.yaml"))
DEEPSPEED = sorted(RECIPES.glob("deepspeed/*.json"))
ACCELERATE = sorted(RECIPES.glob("accelerate/*.yaml"))
RATES = {
    "qwen1.5-1.8b-chat": (1e-7, 5e-5, 1e-6),
    "qwen1.5-7b-chat": (5e-8, 2.5e-5, 5e-7),
    "qwen1.5-14b-chat": (3e-8, 1.5e-5, 3e-7),
    "qwen3-1.7b": (1e-7, 5e-5, 1e-6),
    "qwen3-8b": (5e-8, 2.5e-5, 5e-7),
    "qwen3-14b": (3e-8, 1.5e-5, 3e-7),
}


def name_of(path: Path) -> str:
    return path.parent.name


def settings_of(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


# What stands in them.


@pytest.mark.parametrize("name", RATES)
def test_a_model_has_all_its_recipes_with_a_header(name):
    files = {path.name: path for path in (RECIPES / name).glob("*.yaml")}
    assert files.keys() == {"train.yaml", "ppo.yaml", "grpo.yaml", "bon.yaml"}
    for path in files.values():
        header = path.read_text().partition("\n\n")[0]
        assert f"--config recipes/{name}/{path.name}" in header and "GPU" in header and "hours" in header.lower(), path


@pytest.mark.parametrize("kind", ["train", "ppo", "grpo", "bon"])
def test_recipes_of_one_kind_differ_where_models_do(kind):
    """So that a change of one is a change of all."""
    own = {
        "train": {"output_dir", "base_model", "router_model", "phase1", "phase2", "phase3", "baselines"},
        "ppo": {"policy", "reward_model", "prompts", "eval_prompts", "output_dir", "gradient_accumulation_steps"}
        | {"local_rollout_forward_batch_size"},
        "grpo": {"policy", "reward_model", "prompts", "eval_prompts", "output_dir"},
        "bon": {"output_dir", "policy", "prompts", "reward_models", "gold", "batch_size"},
    }[kind]
    first, *others = [settings_of(RECIPES / name / f"{kind}.yaml") for name in RATES]
    for settings in others:
        assert settings.keys() == first.keys()
        assert {key for key in first if settings[key] != first[key]} <= own


@pytest.mark.parametrize("path", TRAIN, ids=name_of)
def test_a_training_recipe_has_the_learning_rates_of_its_size(path):
    (recipe,) = TrlParser((Recipe,)).parse_args_and_config(_without_deepspeed(path), fail_with_unknown_args=True)
    rates = [recipe.phase(stage, "folder").learning_rate for stage in ("phase1", "phase2", "phase3", "baselines")]
    first, second, third = RATES[name_of(path)]
    assert rates == [first, second, third, first]
    assert recipe.output_dir == f"runs/{name_of(path)}"


def _without_deepspeed(path: Path) -> list[str]:
    """The recipe's arguments; what it says of DeepSpeed, which takes a launcher, is checked for itself."""
    arguments = ["--config", str(path)]
    for stage, settings in settings_of(path).items():
        if stage in DEFAULTS and (file := settings.pop("deepspeed", None)):
            assert ROOT / file in DEEPSPEED
            arguments += [f"--{stage}", json.dumps(settings)]
    return arguments


@pytest.mark.parametrize("path", BON, ids=name_of)
def test_a_best_of_n_recipe_is_read_by_its_script(path):
    parser = TrlParser((BestOfNArguments,))
    (arguments,) = parser.parse_args_and_config(["--config", str(path)], fail_with_unknown_args=True)
    assert arguments.n == 60_000 and set(arguments.reward_models) >= {"DMoERM", "single", "mean", "WCO", "UWO"}


# That they run.


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A base, rows of two tasks, a policy and two reward models."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = make_tokenizer()
    models = {"base": make_backbone, "policy": make_policy, "reward": make_dmoerm}
    for name, make in models.items():
        make(tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "tasks.yaml").write_text("tasks:\n  maths: [logic]\n  chitchat: [empathy]\noverall: [logic]\n")
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for number in range(40):
            task, point = [("maths", "logic"), ("chitchat", "empathy")][number % 2]
            labels = {point: [1, 2, 3], "logic": [2, 1, 3]}
            row = {"prompt": f"{PROMPTS[task]} {number}", "responses": RESPONSES, "ranks": [1, 3, 2], "task": task}
            file.write(json.dumps({**row, "capability_ranks": labels}) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", TRAIN, ids=name_of)
def test_a_training_recipe_runs(path, material, tmp_path):
    settings = settings_of(path)
    settings |= {"output_dir": str(tmp_path / "run"), "train_data": str(material / "rows.jsonl")}
    settings |= {"base_model": str(material / "base"), "router_model": str(material / "base")}
    settings |= {
        "tasks": str(material / "tasks.yaml"),
        "max_length": 64,
        "lora_rank": 2,
        "ensemble_size": 1,
        "without_outer": False,
    }
    for stage in DEFAULTS:
        few = {"max_steps": 1, "eval_steps": 1, "use_cpu": True, "disable_tqdm": True, "deepspeed": None}
        settings[stage] = settings.get(stage, {}) | few
    train(write_recipe(tmp_path / "tiny.yaml", settings))
    model = DMoERMForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.tasks == {"maths": ["logic"], "chitchat": ["empathy"]}
    assert model.config.lora_target_modules == ["q_proj", "v_proj"] and model.config.activation == "sigmoid"


@pytest.mark.parametrize("path", BON, ids=name_of)
def test_a_best_of_n_recipe_runs(path, material, tmp_path):
    settings, reward = settings_of(path), str(material / "reward")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPTS["chitchat"]}) + "\n")
    models = dict.fromkeys(settings["reward_models"], reward)
    models |= {name: {name: [reward, reward]} for name in ("mean", "WCO", "UWO")} | {"length only": "length"}
    settings |= {"output_dir": str(tmp_path / "bon"), "policy": str(material / "policy"), "reward_models": models}
    settings |= {"prompts": str(tmp_path / "prompts.jsonl"), "gold": "length", "n": 8, "max_new_tokens": 2}
    settings |= {"num_prompts": 1, "task": None, "shard_size": 8, "show": [1, 8]}
    example("bon_eval").main(write_recipe(tmp_path / "tiny.yaml", settings))
    assert "DMoERM" in (tmp_path / "bon" / "best_of_n.md").read_text()


# The launchers.


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_a_deepspeed_configuration_is_read_by_deepspeed_and_by_accelerate(path):
    plugin = DeepSpeedPlugin(hf_ds_config=str(path))
    assert f"zero{plugin.zero_stage}" in path.stem
    assert (plugin.offload_optimizer_device == "cpu") == ("offload" in path.stem)
    configuration = json.loads(path.read_text()) | {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
    configuration |= {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "bf16": {"enabled": True}}
    read = DeepSpeedConfig(configuration)
    zero = read.zero_config
    assert zero.stage == plugin.zero_stage and (zero.offload_param is not None) == (path.stem == "zero3_offload")
    known = {name for key, field in type(zero).model_fields.items() for name in (key, field.alias)}
    assert configuration["zero_optimization"].keys() <= known
    assert "optimizer" not in configuration  # phase 2 has weights of its own for each expert


def test_no_two_deepspeed_configurations_say_the_same():
    assert len({path.read_text() for path in DEEPSPEED}) == len(DEEPSPEED) == 5


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_an_accelerate_configuration_is_read_by_accelerate(path):
    read = load_config_from_file(str(path))
    assert read.mixed_precision == "bf16" and read.num_processes == 8
    assert (
        read.distributed_type.value == {"multi_gpu": "MULTI_GPU", "deepspeed": "DEEPSPEED", "fsdp": "FSDP"}[path.stem]
    )
    if file := read.deepspeed_config.get("deepspeed_config_file"):
        assert ROOT / file in DEEPSPEED


def test_what_the_page_names_is_there():
    text = (RECIPES / "SCALE.md").read_text()
    for path in [*DEEPSPEED, *ACCELERATE]:
        assert os.path.relpath(path, RECIPES) in text, path
