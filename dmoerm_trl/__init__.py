"""
DMoERM reward models for TRL. Importing the package registers the model with transformers' Auto classes. The public names are listed
below; each is imported when it is first used.
"""

from importlib import import_module
from typing import Any

from .auto_classes import register

__version__ = "0.2.0"

_HOMES = {
    "BestOfNArguments": "evaluation.best_of_n_arguments",
    "Consistency": "evaluation.consistency",
    "DMoERMConfig": "modeling.configuration_dmoerm",
    "DMoERMForSequenceClassification": "modeling.modeling_dmoerm",
    "DMoERMModel": "modeling.modeling_dmoerm",
    "Formatter": "data.formatting",
    "GRPOArguments": "rl.arguments",
    "Judge": "labelling.judges",
    "PPOArguments": "rl.arguments",
    "Parser": "arguments",
    "Pipeline": "training.pipeline",
    "PolicyMonitor": "rl.monitor",
    "PreferenceRow": "data.preference_row",
    "RLSetup": "rl.setup",
    "RankedRewardConfig": "training.ranked_trainer",
    "RankedRewardTrainer": "training.ranked_trainer",
    "Recipe": "training.recipe",
    "RewardEnsemble": "scoring.ensemble",
    "RewardProcessor": "scoring.reward_functions",
    "Router": "modeling.router",
    "SamplerSpec": "generation.samplers",
    "TaskTable": "tasks",
    "TextRewards": "scoring.reward_functions",
    "World": "demo.world",
    "assemble": "modeling.assembly",
    "base_reward_model": "modeling.assembly",
    "best_of_n": "evaluation.best_of_n_estimate",
    "best_of_n_kl_bound": "evaluation.kl",
    "best_of_n_kl_estimate": "evaluation.kl",
    "consistency_table": "evaluation.table",
    "describe": "scoring.describe",
    "explanation": "scoring.explain",
    "export_adapter": "scoring.export",
    "export_expert": "modeling.assembly",
    "export_reward_model": "scoring.export",
    "generate": "generation.samplers",
    "gold_rewards": "scoring.reward_functions",
    "grpo_config": "rl.grpo",
    "grpo_trainer": "rl.grpo",
    "inner_model": "modeling.assembly",
    "judge_from_config": "labelling.judges",
    "keep_needed_tasks": "rl.routes",
    "keep_tasks": "rl.routes",
    "launched_processes": "distributed.processes",
    "load_policy": "generation.samplers",
    "load_prompts": "generation.prompts",
    "load_reward_model": "scoring.ensemble",
    "load_rows": "data.rows",
    "locked_folder": "files",
    "mean_reward": "scoring.aggregation",
    "optimised_reward": "rl.grpo",
    "parse_grpo": "rl.grpo",
    "phase1": "training.phases",
    "phase2": "training.phases",
    "phase3": "training.phases",
    "plot_policy_curves": "rl.policy_curves",
    "policy_kl": "evaluation.kl",
    "ppo_config": "rl.ppo",
    "ppo_trainer": "rl.ppo",
    "ranked_dataset": "training.ranked_dataset",
    "ranking_loss": "training.ranked_trainer",
    "read_prompts": "generation.prompts",
    "reward_functions": "scoring.reward_functions",
    "reward_judge": "evaluation.win_rate",
    "routed_tasks": "rl.routes",
    "rows_from_dataset": "data.rows",
    "run": "console",
    "run_best_of_n": "evaluation.best_of_n",
    "score_rows": "scoring.batch",
    "sequence_classifier": "scoring.export",
    "split_rows": "data.splits",
    "train_or_resume": "training.ranked_trainer",
    "train_router": "training.router_training",
    "uncertainty_weighted_reward": "scoring.aggregation",
    "value_model_from": "rl.value_model",
    "win_rate": "evaluation.win_rate",
    "worst_case_reward": "scoring.aggregation",
    "write_rows": "data.rows",
}
"""Public name -> the module it lives in; `__init__.pyi` has the same for type checkers."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


register()
