"""What `dmoerm train --config recipe.yaml` reads: the paper's defaults, YAML, and errors that name the key."""

from pathlib import Path

import pytest
from trl import TrlParser

from dmoerm_trl.tasks import TaskTable
from dmoerm_trl.training.recipe import DEFAULTS, Recipe

NEEDED = {"output_dir": "runs/x", "base_model": "base", "train_data": "rows.jsonl"}


def recipe(**settings) -> Recipe:
    return Recipe(**{**NEEDED, **settings})


def parsed(tmp_path: Path, text: str, *arguments: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in NEEDED.items()) + text, encoding="utf-8")
    parser = TrlParser((Recipe,))
    return parser.parse_args_and_config(["--config", str(path), *arguments], fail_with_unknown_args=True)[0]


# The defaults.


def test_the_phases_have_the_learning_rates_of_table_4():
    rates = {stage: recipe().phase(stage, "folder").learning_rate for stage in DEFAULTS}
    assert rates["phase1"] == rates["baselines"] == 1e-7  # the baselines are trained as phase 1 is
    assert rates["phase2"] == 5e-5
    assert rates["phase3"] == 1e-6


def test_phases_1_and_2_take_60_percent_of_the_data():
    assert recipe().phase1_share == 0.6


def test_the_experts_are_those_of_table_5():
    assert recipe().model_settings == {
        "lora_rank": 32,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_layers": "all",
        "aggregator_input": "embeddings",
        "aggregator_hidden_size": None,
        "aggregator_members": 1,
        "activation": "sigmoid",
        "share_base": False,
    }


@pytest.mark.parametrize("stage", DEFAULTS)
def test_every_stage_is_evaluated_every_100_steps_with_a_patience_of_20(stage):
    """Appendix B.1."""
    args = recipe(seed=7, report_to="none").phase(stage, "folder")
    assert (args.eval_strategy, args.eval_steps, args.patience) == ("steps", 100, 20)
    assert args.load_best_model_at_end and args.metric_for_best_model == "eval_accuracy"
    assert (args.output_dir, args.seed, args.report_to) == ("folder", 7, [])
    assert args.per_device_train_batch_size == (16 if stage == "router" else 1)


def test_the_tasks_are_those_of_table_12_and_the_ensemble_has_five_members():
    assert recipe().task_table == TaskTable.paper("en")
    assert recipe(tasks="paper-zh").task_table == TaskTable.paper("zh")
    assert recipe().ensemble_size == 5 and recipe().without_outer
    assert recipe().joint_experts


# What a recipe sets.


def test_a_recipe_overrides_the_defaults_of_a_stage():
    args = recipe(phase2={"eval_steps": 7, "patience": 0}).phase("phase2", "folder", seed=3, disable_tqdm=True)
    assert (args.eval_steps, args.patience, args.seed, args.learning_rate) == (7, 0, 3, 5e-5)
    assert args.disable_tqdm


def test_yaml_and_the_command_line(tmp_path):
    read = parsed(
        tmp_path,
        "phase1:\n  learning_rate: 1e-7\n  weight_decay: '0.1'\n  num_train_epochs: 2\nlora_target_modules: [query]\n",
        "--seed=4",
        "--workers=2",
    )
    args = read.phase("phase1", "folder")
    assert (args.learning_rate, args.weight_decay, args.num_train_epochs) == (1e-7, 0.1, 2)  # YAML reads 1e-7 as text
    assert read.lora_target_modules == ["query"]
    assert (read.seed, read.workers, read.output_dir) == (4, 2, "runs/x")


@pytest.mark.parametrize("where", ["yaml", "command line"])
@pytest.mark.parametrize("given, expected", [("2", 2), ("top half", "top half"), ("all", "all")])
def test_layers_with_lora_are_a_number_or_a_name(where, given, expected, tmp_path):
    text, arguments = (f"lora_layers: {given}\n", ()) if where == "yaml" else ("", (f"--lora_layers={given}",))
    read = parsed(tmp_path, text, *arguments)
    assert read.model_settings["lora_layers"] == expected and type(read.lora_layers) is type(expected)


@pytest.mark.parametrize("given, expected", [("false", False), ("true", True)])
def test_experts_one_by_one_on_request(given, expected, tmp_path):
    assert parsed(tmp_path, f"joint_experts: {given}\n").joint_experts is expected
    assert parsed(tmp_path, "", f"--joint_experts={given}").joint_experts is expected


def test_budgets_of_tokens(tmp_path):
    args = parsed(tmp_path, "phase1:\n  train_tokens_per_batch: 4096\n").phase("phase1", "folder")
    assert (args.train_tokens_per_batch, args.eval_tokens_per_batch) == (4096, 16384)
    with pytest.raises(ValueError, match="train_tokens_per_batch=0, need a number of tokens"):
        recipe(phase2={"train_tokens_per_batch": 0})


def test_the_fingerprint_is_what_the_result_depends_on():
    first = recipe()
    assert recipe(output_dir="runs/y", workers=4, report_to="all").fingerprint() == first.fingerprint()
    changes = {"base_model": "b", "train_data": "r", "seed": 1, "phase3": {"learning_rate": 1.0}, "lora_rank": 8}
    changes |= {"joint_experts": False, "lora_layers": "top half"}
    for name, value in changes.items():
        assert recipe(**{name: value}).fingerprint() != first.fingerprint(), name


# Errors.


def test_an_unknown_key_at_the_top_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="--ensemble_sise"):
        parsed(tmp_path, "ensemble_sise: 3\n")


@pytest.mark.parametrize("stage", DEFAULTS)
def test_an_unknown_key_of_a_stage_is_an_error_that_names_stage_and_key(stage, tmp_path):
    with pytest.raises(ValueError, match=f"`{stage}` of the recipe: got the unknown keys .'learning_rat'.") as error:
        parsed(tmp_path, f"{stage}:\n  learning_rat: 1.0e-3\n")
    assert "learning_rate" in str(error.value)


@pytest.mark.parametrize("key", ["output_dir", "seed", "report_to", "max_length"])
def test_a_stage_cannot_have_a_key_of_the_whole_recipe(key):
    with pytest.raises(ValueError, match=f"'{key}'.*keys of the whole recipe"):
        recipe(phase1={key: "x"})


def test_a_number_that_is_none_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="`phase1` of the recipe: got learning_rate='high', need a number"):
        recipe(phase1={"learning_rate": "high"})


def test_values_that_a_stage_cannot_have_are_found_when_the_recipe_is_read():
    with pytest.raises(ValueError, match="sometimes"):
        recipe(phase3={"eval_strategy": "sometimes"})


@pytest.mark.parametrize("settings", [{"ensemble_size": -1}, {"workers": 0}])
def test_counts_that_make_no_sense_are_errors(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        recipe(**settings)


def test_a_missing_key_is_an_error():
    with pytest.raises(SystemExit):
        TrlParser((Recipe,)).parse_args_and_config(["--output_dir=x"])


BAD = {
    "lora_rank": [0, -4, 4.5, True, "many"],
    "lora_alpha": [0, -1],
    "lora_dropout": [1.0, -0.1, float("nan"), "much"],
    "lora_target_modules": [[], [3, None]],
    "aggregator_hidden_size": [0, -3],
    "aggregator_members": [0, -1, 1.5],
    "router_layers": [0, -1],
    "router_balance": [5, -1],
    "max_length": [0, -1, 2.5],
    "on_error": ["maybe", None],
    "test_share": [1.0, 2, -0.1],
    "phase3_rows": ["none", None],
    "phase1_share": [0, 1],
    "validation_share": [0, 1],
    "seed": [-1, 2**70],
    "unit_variance": ["yes", 1],
    "share_base": ["no"],
    "phase3": ["zzz", ["a"], 3],
    "pad_token": [["a"]],
    "task_base_models": ["zzz", ["a"]],
    "output_dir": [None, ["a"]],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in BAD.items() for value in values], ids=str)
def test_a_value_that_a_key_cannot_have_is_an_error_that_names_key_and_value(key, value):
    with pytest.raises(ValueError, match=f"`{key}` of the recipe: got ") as error:
        recipe(**{key: value})
    assert repr(value)[:20] in str(error.value) or str(value) in str(error.value)


def test_a_shared_base_is_that_of_all_tasks():
    with pytest.raises(ValueError, match="`task_base_models` of the recipe: .*share_base=True, need one of them"):
        recipe(task_base_models={"chitchat": "b"}, share_base=True)


@pytest.mark.parametrize("name", ["chat_template_path", "eos_token", "pad_token"])
def test_a_stage_has_no_tokenizer_of_its_own(name):
    with pytest.raises(
        ValueError, match=rf"`phase2` of the recipe: got \['{name}'\], need one tokenizer for all stages"
    ):
        Recipe(output_dir="run", base_model="base", train_data="rows.jsonl", phase2={name: "a"})
