"""DMoERM reward models for TRL. Importing a model's name registers it with transformers' Auto classes."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "TaskTable": "tasks",
    "PreferenceRow": "data.rows",
    "load_rows": "data.rows",
    "Formatter": "data.formatting",
    "World": "data.world",
    "DMoERMConfig": "modeling.configuration",
    "DMoERMForSequenceClassification": "modeling.modeling",
    "DMoERMModel": "modeling.modeling",
    "Router": "modeling.router",
    "assemble": "modeling.assembly",
    "inner_model": "modeling.assembly",
    "base_reward_model": "modeling.assembly",
    "export_expert": "modeling.assembly",
    "PhaseConfig": "training.trainer",
    "RankedRewardTrainer": "training.trainer",
    "ranking_loss": "training.trainer",
    "Recipe": "training.recipe",
    "Pipeline": "training.pipeline",
    "Consistency": "evaluation.consistency",
    "run_best_of_n": "evaluation.best_of_n",
    "win_rate": "evaluation.win_rate",
    "ppo_trainer": "rl.ppo",
    "PolicyMonitor": "rl.monitor",
    "RewardProcessor": "rl.reward_functions",
    "TextRewards": "rl.reward_functions",
    "reward_functions": "rl.reward_functions",
}
"""Public name -> the module it lives in, imported when the name is first used."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("DMoERMConfig", "DMoERMForSequenceClassification", "DMoERMModel"):
        import_module(f"{__name__}.modeling.modeling")  # registers all of them
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
