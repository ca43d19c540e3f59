"""Rehearsal of each training: one step on a tiny model finds settings that a trainer refuses before any real training."""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2Model
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from ..data.formatting import Formatter
from ..data.preference_row import PreferenceRow
from ..distributed.processes import is_main, processes, wait_for_all
from ..modeling.assembly import export_expert, with_experts
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from .phases import phase1, phase2, phase3
from .recipe import Recipe
from .router_training import train_router

ONE_STEP = {
    **{"max_steps": 1, "eval_steps": 1, "eval_delay": 0, "logging_steps": 1, "disable_tqdm": True},
    **{"full_determinism": False, "torch_compile": False, "push_to_hub": False, "dataloader_drop_last": False},
    **{
        "deepspeed": None,
        "fsdp": None,
        "fsdp_config": None,
        "resume_from_checkpoint": None,
    },
}
"""Settings that a rehearsal overrides: its length, its outputs, and what depends on the model size or on other processes."""

TASK, POINT = "task", "point"


def rehearse(recipe: Recipe, formatter: Formatter, steps: Collection[str]) -> None:
    """
    Train a tiny model for one step, evaluate and save it, with the recipe's tokenizer and its settings of each stage.

    Args:
        steps (`Collection[str]`): Some of `"router"`, `"phase1"`, `"phase2"`, `"phase3"` and `"baselines"`.

    Raises:
        ValueError: If a trainer fails with the settings of its stage. The message names the stage.
    """
    _check_reports(recipe)
    asked = {step: _settings(step, recipe, formatter) for step in sorted(steps)}
    if not (ahead := [step for step, settings in asked.items() if settings not in _passed]):
        return
    recipe, formatter = replace(recipe, report_to="none"), copy(formatter)
    formatter.max_length = 10**6
    with _folder(Path(recipe.output_dir)) as folder, _quiet():
        if is_main():
            _tiny_base(formatter, folder / "base")
        wait_for_all()
        for step in ahead:
            try:
                _train(step, recipe, formatter, folder)
            except OSError:
                raise
            except Exception as error:
                raise ValueError(
                    f"`{step}` of the recipe: got settings with which its trainer fails ({type(error).__name__}: {error}), "
                    "need others: change them, or leave them out."
                ) from error
            _passed.add(asked[step])


_passed: set[str] = set()  # settings that passed in this process


def _settings(step: str, recipe: Recipe, formatter: Formatter) -> str:
    """Return all settings on which a rehearsal depends, as text."""
    own = {
        **getattr(recipe, step),
        "seed": recipe.seed,
        "balance": recipe.router_balance if step == "router" else None,
    }
    return json.dumps([step, formatter.tokenizer.name_or_path, own], sort_keys=True, default=str)


def _train(step: str, recipe: Recipe, formatter: Formatter, folder: Path) -> None:
    modules = {"optim_target_modules": "all-linear"} if getattr(recipe, step).get("optim_target_modules") else {}
    args = recipe.phase(step, str(folder / step), **ONE_STEP, **modules)
    rows = [
        PreferenceRow(
            [{"role": "user", "content": content}], ["three", "four"], [1, 2], task, capability_ranks={POINT: [1, 2]}
        )
        for content, task in (("one", TASK), ("two", "other"))
    ]
    base = str(folder / "base")
    if step == "router":
        train_router(base, [TASK, "other"], rows, rows, formatter, args, balance=recipe.router_balance)
    elif step in ("phase1", "baselines"):
        phase1(base, TASK, rows, rows, formatter, args)
    elif step == "phase2":
        phase2(_model(base, formatter), [POINT], rows, rows, formatter, args)
    else:
        adapter = folder / "adapter"
        if is_main():
            export_expert(with_experts(_model(base, formatter), [POINT]), TASK, POINT, adapter)
        wait_for_all()
        phase3(_model(base, formatter), {POINT: adapter}, rows, rows, formatter, args)


def _model(base: str, formatter: Formatter) -> DMoERMForSequenceClassification:
    return DMoERMForSequenceClassification.from_base(
        base, task=TASK, lora_rank=1, lora_alpha=1, **formatter.model_settings
    )


def _tiny_base(formatter: Formatter, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        config = Qwen2Config(
            vocab_size=len(formatter.tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        Qwen2Model(config).save_pretrained(folder)
    formatter.tokenizer.save_pretrained(folder)


def _check_reports(recipe: Recipe) -> None:
    args: Any = recipe.phase("phase1", recipe.output_dir)
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"`report_to` of the recipe: got {recipe.report_to!r}: {error}") from error


@contextlib.contextmanager
def _folder(place: Path) -> Iterator[Path]:
    """Context manager of the rehearsal's folder: a temporary one, or one in `place` that several processes share."""
    if processes() == 1:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = place / ".rehearsal"  # a fixed name, so that the next start deletes the folder of a killed run
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    wait_for_all()
    try:
        yield folder
        wait_for_all()
    finally:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that silences the logs of the steps, which are not part of a training."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
