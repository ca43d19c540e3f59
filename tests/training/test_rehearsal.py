"""Settings that a stage's trainer cannot take are found before any training, whichever they are; what it can take passes."""

import json

import pytest
from models import make_tokenizer

from dmoerm_trl.data.formatting import Formatter
from dmoerm_trl.training.recipe import DEFAULTS, Recipe
from dmoerm_trl.training.rehearsal import rehearse

NEEDED = {"output_dir": "runs/x", "base_model": "base", "train_data": "rows.jsonl"}


def recipe(step: str = "phase3", **settings) -> Recipe:
    return Recipe(**NEEDED, **{step: {"use_cpu": True, **settings}})


@pytest.fixture(scope="module")
def formatter() -> Formatter:
    return Formatter(make_tokenizer(), 256)


@pytest.mark.parametrize("step", DEFAULTS)
def test_the_defaults_pass_and_leave_nothing(step, formatter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rehearse(recipe(step), formatter, [step])
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())


NOT_AS_VALUES: dict[str, dict] = {
    "a number of another kind": {"max_steps": "ten"},
    "a part of a step": {"per_device_train_batch_size": 1.5},
    "text for a switch": {"bf16": "yes"},
    "a step of nothing": {"gradient_accumulation_steps": 0},
    "no prompt": {"per_device_train_batch_size": 0},
    "no evaluation": {"eval_strategy": "no"},
    "evaluations without end": {"eval_steps": 0},
    "no rate": {"learning_rate": float("nan")},
    "a negative rate": {"learning_rate": -1.0},
    "a clipping that turns round": {"max_grad_norm": -1.0},
    "no epoch": {"num_train_epochs": 0},
    "no logging": {"logging_steps": 0},
    "a decay past zero": {"learning_rate": 0.1, "weight_decay": 10.0},
    "patience": {"patience": -1},
    "processes": {"dataloader_num_workers": -1},
    "smoothing": {"label_smoothing_factor": 0.5},
    "checkpoints that cannot be gone on from": {"save_only_model": True},
    "an optimizer": {"optim": "adamw_of_mine"},
    "a schedule": {"lr_scheduler_type": "zigzag"},
    "a file": {"deepspeed": "none.json"},
}


@pytest.mark.parametrize("step", DEFAULTS)
@pytest.mark.parametrize("settings", NOT_AS_VALUES.values(), ids=NOT_AS_VALUES)
def test_what_is_no_value_is_found_when_the_recipe_is_read(settings, step):
    (name, *_) = settings
    with pytest.raises(ValueError, match=rf"(?s)`{step}` of the recipe: .*{name}"):
        recipe(step, **settings)


BY_THE_TRAINER = {
    "a metric": ("router", {"metric_for_best_model": "eval_margin"}),
    "a metric of the phases": ("phase3", {"metric_for_best_model": "eval_macro_f1"}),
    "a metric of the experts": ("phase2", {"metric_for_best_model": "zzz"}),
    "a schedule that follows a metric": ("phase2", {"lr_scheduler_type": "reduce_lr_on_plateau"}),
    "a schedule without its settings": ("phase1", {"lr_scheduler_type": "warmup_stable_decay"}),
    "settings of a schedule": ("baselines", {"lr_scheduler_kwargs": {"waves": 3}}),
    "an optimizer of a package that is not there": ("phase3", {"optim": "adamw_anyprecision"}),
    "a budget of tokens": ("router", {"train_tokens_per_batch": 100}),
    "noise on embeddings": ("phase3", {"neftune_noise_alpha": 1.0}),
    "no predictions": ("router", {"prediction_loss_only": True}),
}


@pytest.mark.parametrize("step, settings", BY_THE_TRAINER.values(), ids=BY_THE_TRAINER)
def test_what_only_a_trainer_refuses_is_found_by_a_step(step, settings, formatter):
    with pytest.raises(ValueError, match=f"`{step}` of the recipe: got settings with which its trainer fails"):
        rehearse(recipe(step, **settings), formatter, [step])


def test_only_the_stages_that_are_ahead_are_rehearsed(formatter):
    wrong = recipe("phase3", metric_for_best_model="zzz")
    rehearse(wrong, formatter, ["phase1", "router"])
    with pytest.raises(ValueError, match="`phase3` of the recipe"):
        rehearse(wrong, formatter, ["phase3"])


def test_where_metrics_are_reported_is_looked_for(formatter):
    with pytest.raises(ValueError, match="`report_to` of the recipe: got 'nowhere'"):
        rehearse(Recipe(**NEEDED, report_to="nowhere"), formatter, [])


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "sgd"},
        {"eval_strategy": "epoch"},
        {"max_steps": 3, "eval_steps": 500},
        {"lr_scheduler_type": "cosine"},
    ],
    ids=json.dumps,
)
def test_what_a_trainer_can_take_passes(settings, formatter):
    for step in DEFAULTS:
        rehearse(recipe(step, **settings), formatter, [step])
