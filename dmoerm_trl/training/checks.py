"""Checks of the models and folders of a recipe before any training."""

import os
from collections.abc import Iterable
from pathlib import Path

import psutil
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..data.formatting import Formatter
from ..modeling.configuration_dmoerm import DMoERMConfig
from ..modeling.experts import check_target_modules
from ..modeling.load_errors import loading
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..modeling.positions import check_positions
from ..tasks import OVERALL, TaskTable, slug
from .recipe import Recipe

FOLDERS = {"data", "router", "ensemble", "model", "work", "judges", OVERALL}
"""Names of the folders of a run besides those of its tasks."""


def formatter_of(recipe: Recipe) -> Formatter:
    """
    Return the formatter of a recipe's base. If its tokenizer has no pad token, one is set. Padding is masked, so any token will
    do.

    Raises:
        ValueError: If the recipe names a token that the tokenizer lacks, or if it must name one.
    """
    tokenizer = _tokenizer(recipe.base_model, recipe)
    if recipe.pad_token is not None:
        if recipe.pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"`pad_token` of the recipe: got {recipe.pad_token!r}, which the tokenizer of {recipe.base_model} does not "
                "have, need one of its tokens: name another, or leave it out."
            )
        tokenizer.pad_token = recipe.pad_token
    elif tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"got the tokenizer of {recipe.base_model}, which has no pad token and no eos token, need a token for padding: "
                "name one of its tokens by `pad_token`."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return Formatter(tokenizer, recipe.max_length, recipe.score_thinking)


def check_places(root: Path, names: Iterable[str]) -> None:
    """
    Check that the folders of unfinished stages are free, and that they are on the same disk as their checkpoints.

    Args:
        root (`Path`): The folder of a run.
        names (`Iterable[str]`): Its unfinished stages.

    Raises:
        ValueError: If a stage would write its result over something else, or if the checkpoints are on another disk.
    """
    for name in names:
        path = root / name
        above = [one for one in path.parents if one != root and one.is_relative_to(root) and os.path.lexists(one)]
        is_free = not os.path.lexists(path) or path.is_dir() and not path.is_symlink() and not any(path.iterdir())
        if not is_free or not all(one.is_dir() for one in above):
            raise ValueError(
                f"{path}: got something that no stage has written, need a free path for the stage {name!r}, because existing "
                "files are never overwritten: move it away, or choose another `output_dir`."
            )
    work = root / "work"
    if work.is_dir() and work.stat().st_dev != root.stat().st_dev:
        raise ValueError(
            f"{work}: got a folder on another disk than {root}, need one disk for both, because a finished stage is moved by a "
            "rename: put all of `output_dir` on one disk."
        )


def check_models(recipe: Recipe, tasks: TaskTable, formatter: Formatter) -> None:
    """
    Check that the models of a recipe can be loaded, and check their weights, positions and tokens, and the planned experts and
    aggregators.

    Raises:
        ValueError: If a model cannot be used. The message names the key and says how to fix it.
    """
    if taken := [task for task in tasks.tasks if slug(task) in FOLDERS]:
        raise ValueError(
            f"{recipe.tasks}: got the task {taken[0]!r}, whose folder a run uses for something else: rename the task."
        )
    if unknown := [task for task in recipe.task_base_models if task not in tasks.tasks]:
        raise ValueError(
            f"`task_base_models` of the recipe: got the tasks {unknown}, need some of {list(tasks.tasks)}."
        )
    base = _config_of(recipe.base_model, "`base_model`", recipe, recipe.lora_target_modules)
    router = base
    others = {f"`task_base_models` of {task}": name for task, name in recipe.task_base_models.items()}
    others |= {} if recipe.router_model is None else {"`router_model`": recipe.router_model}
    for key, name in others.items():
        config = _config_of(name, key, recipe)
        if _tokenizer(name, recipe).get_vocab() != formatter.tokenizer.get_vocab():
            raise ValueError(
                f"{key} of the recipe: got {name}, whose tokenizer has other tokens than that of {recipe.base_model}, need the "
                "same tokens, because texts are tokenised once: choose a model of the base's family."
            )
        if key == "`router_model`":
            router = config
        elif odd := sorted(item for item in _shape(config).items() ^ _shape(base).items()):
            raise ValueError(
                f"{key} of the recipe: got {name}, which differs from {recipe.base_model} in {odd[0][0]!r}, need a model of "
                "the same shape, because a DMoERM has one configuration for all bases: choose one that differs only in weights."
            )
    if recipe.router_layers is not None and recipe.router_layers > router.num_hidden_layers:
        raise ValueError(
            f"`router_layers` of the recipe: got {recipe.router_layers}, need at most {router.num_hidden_layers}, the layers "
            f"of {recipe.router_model or recipe.base_model}."
        )
    for table in (tasks.tasks, {OVERALL: tasks.overall}):
        config = DMoERMConfig(tasks=table, backbone_config=base, router_config=router, **recipe.model_settings)
        _check_size(config)


def _config_of(name: str, key: str, recipe: Recipe, target_modules: list[str] | None = None) -> PreTrainedConfig:
    options = {"task": OVERALL, "trust_remote_code": recipe.trust_remote_code}
    model = DMoERMForSequenceClassification.from_base(name, **options)
    backbone = model.model.backbones[OVERALL]
    check_positions(backbone, f"{key} {name}", recipe.max_length)
    if target_modules is not None:
        check_target_modules(backbone, target_modules)
    return model.config.backbone_config


def _check_size(config: DMoERMConfig) -> None:
    """
    Check that the experts and the aggregator fit the model and the memory.

    Raises:
        ValueError: If the model does not have `lora_layers`, or the experts and the aggregator alone exceed the machine's
            memory.
    """
    config.layers_with_lora  # noqa: B018  (checks it)
    hidden = config.backbone_config.hidden_size
    k = max(len(points) for points in config.tasks.values())
    width = config.aggregator_members * (config.aggregator_hidden_size or hidden)
    read = k * (hidden if config.aggregator_input == "embeddings" else 1)
    needed, there = 4 * (2 * config.lora_rank * hidden * k + read * width), psutil.virtual_memory().total
    if needed > there:
        raise ValueError(
            f"got lora_rank={config.lora_rank} and an aggregator of width {width}, which take at least {needed / 2**30:.0f} "
            f"GiB, need at most the machine's {there / 2**30:.0f} GiB of memory: lower them."
        )


def _tokenizer(name: str, recipe: Recipe) -> PreTrainedTokenizerBase:
    with loading(name, "a base model"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=recipe.trust_remote_code)


def _shape(config: PreTrainedConfig) -> dict[str, str]:
    """Return a configuration without the keys that do not describe the model."""
    other = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
    return {name: repr(value) for name, value in config.to_dict().items() if name not in other}
