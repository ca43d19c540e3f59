"""
The configuration of a DMoERM.

With one task and no router it is the paper's DMoERM-w/o-Outer; without capability points it is a single reward model.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from numbers import Integral, Real
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..tasks import slug
from .response_opening import ResponseOpening

ACTIVATIONS = ("sigmoid", "none")

AGGREGATOR_INPUTS = ("embeddings", "scores")

LORA_LAYERS = {"all": 1, "top half": 2, "top third": 3}
"""Value of `lora_layers` -> divisor of the number of the backbone's layers."""


class DMoERMConfig(PreTrainedConfig):
    """
    Configuration of [`DMoERMForSequenceClassification`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`):
            Configuration of the base's backbone: any model that `AutoModel` loads, decoder or encoder.
        tasks (`dict[str, list[str]]`):
            Task name -> names of its capability points, one LoRA expert each. A task without points is an ordinary
            single reward model: the base and its head. The order of the tasks is that of the router's outputs;
            config.json stores the tasks as pairs.
        router_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the router's backbone. Required for two tasks or more.
        lora_rank (`int`), lora_alpha (`float`), lora_dropout (`float`), lora_target_modules (`list[str]`):
            LoRA settings of the experts; the defaults are those of the paper's table 5.
        lora_layers (`str` or `int`):
            Which of the backbone's layers have LoRA, counted from the top: `"all"` (as in the paper), `"top half"`,
            `"top third"` (both rounded up), or a number of layers. The layers below are the same for all experts, so
            they run only once.
        aggregator_input (`str`):
            What the aggregator reads of each expert: its `"embeddings"` (equation 5), or its `"scores"` before sigma, which
            leave far fewer weights to learn from few ranked rows.
        aggregator_hidden_size (`int`, *optional*):
            Width of the aggregator's hidden layer; the backbone's hidden size by default.
        aggregator_members (`int`):
            Number of MLPs of this width whose mean is the aggregator.
        activation (`str`):
            The sigma of equations 4 and 6: `"sigmoid"` as in the paper, or `"none"`.
        share_base (`bool`):
            Whether all tasks share one base instead of each having its own (the paper).
        response_marker (`list[int]`):
            Token ids with which the chat template opens an assistant turn. They mark the end of the prompt.
        end_of_turn (`list[int]`):
            Token ids that each end an assistant turn; the chat template writes the first of them.
        response_opening (`ResponseOpening` or `dict`, *optional*):
            What the chat template writes between the response marker and the response. Needed if that differs between
            a generation prompt and a complete chat, or contains thoughts; see
            [`~dmoerm_trl.modeling.response_opening.ResponseOpening`].
        reads_end (`bool`):
            Whether the end-of-turn token is part of the scored text; False if the chat template writes none.
        pad_token_id (`int`, *optional*):
            Id of the padding token, which may also be an end-of-turn token.
        added_bos (`int`, *optional*):
            Id of the token that the tokenizer adds before every text, if any.
        reads_bos (`bool`):
            Whether the scored text begins with `added_bos`; False if the chat template does not write it.

    Example:

    ```python
    from dmoerm_trl import DMoERMConfig
    from transformers import Qwen2Config

    config = DMoERMConfig(Qwen2Config(hidden_size=64), tasks={"chitchat": ["empathy ability", "logic"]}, lora_rank=8)
    ```
    """

    model_type = "dmoerm"
    sub_configs = {"backbone_config": AutoConfig, "router_config": AutoConfig}

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        tasks: dict[str, list[str]] | list[tuple[str, list[str]]] | None = None,
        router_config: PreTrainedConfig | dict[str, Any] | None = None,
        lora_rank: int = 32,
        lora_alpha: int = 32,
        lora_dropout: float = 0.05,
        lora_target_modules: list[str] | tuple[str, ...] = ("q_proj", "v_proj"),
        lora_layers: str | int = "all",
        aggregator_input: str = "embeddings",
        aggregator_hidden_size: int | None = None,
        aggregator_members: int = 1,
        activation: str = "sigmoid",
        share_base: bool = False,
        response_marker: list[int] | tuple[int, ...] = (),
        end_of_turn: list[int] | tuple[int, ...] = (),
        response_opening: ResponseOpening | dict[str, Any] | None = None,
        reads_end: bool = True,
        pad_token_id: int | None = None,
        added_bos: int | None = None,
        reads_bos: bool = True,
        **kwargs: Any,
    ):
        import_module(f"{__package__}.modeling_dmoerm")  # registers the models with the Auto classes
        self.tasks = _as_tasks(tasks)
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.lora_target_modules = _as_list(lora_target_modules)
        self.lora_layers = lora_layers
        self.aggregator_input = aggregator_input
        self.aggregator_hidden_size = aggregator_hidden_size
        self.aggregator_members = aggregator_members
        self.activation = activation
        self.share_base = share_base
        self.response_marker = _as_list(response_marker)
        self.end_of_turn = _as_list(end_of_turn)
        if isinstance(response_opening, ResponseOpening):
            response_opening = asdict(response_opening)
        self.response_opening = response_opening
        self.reads_end = reads_end
        self.pad_token_id = pad_token_id
        self.added_bos = added_bos
        self.reads_bos = reads_bos
        kwargs.setdefault("problem_type", "regression")  # so that `pipeline` returns the reward as it is
        kwargs.setdefault("num_labels", 1)
        super().__init__(**kwargs)
        # last, because the line above would reset their attention implementation
        self.backbone_config = as_config(backbone_config)
        self.router_config = as_config(router_config)
        self.check()

    def check(self) -> None:
        """
        Check every setting. It is called again when a model is built, because the configuration may have been edited.

        Raises:
            ValueError: If a setting is invalid; the message names it and says what it must be.
        """
        whole, ids = "a whole number, at least 1", "a list of token ids"
        needs = {
            "lora_rank": (_is_integer(self.lora_rank, 1), whole),
            "lora_alpha": (
                _is_number(self.lora_alpha) and self.lora_alpha > 0,
                "a number above 0, by which LoRA's part is multiplied: at 0 the experts would all be the base",
            ),
            "lora_dropout": (
                _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
                "a number from 0 to below 1",
            ),
            "lora_target_modules": (_is_list_of_names(self.lora_target_modules), "a list of names of linear modules"),
            "lora_layers": (
                isinstance(self.lora_layers, str)
                and self.lora_layers in LORA_LAYERS
                or _is_integer(self.lora_layers, 1),
                f"one of {list(LORA_LAYERS)} or a number of layers, at least 1",
            ),
            "aggregator_input": (self.aggregator_input in AGGREGATOR_INPUTS, f"one of {list(AGGREGATOR_INPUTS)}"),
            "aggregator_hidden_size": (
                self.aggregator_hidden_size is None or _is_integer(self.aggregator_hidden_size, 1),
                f"{whole}, or None for the size of the base's embeddings",
            ),
            "aggregator_members": (_is_integer(self.aggregator_members, 1), whole),
            "activation": (self.activation in ACTIVATIONS, f"one of {list(ACTIVATIONS)}"),
            "share_base": (isinstance(self.share_base, bool), "True or False"),
            "reads_end": (isinstance(self.reads_end, bool), "True or False"),
            "response_marker": (_is_list_of_ids(self.response_marker), ids),
            "end_of_turn": (_is_list_of_ids(self.end_of_turn), ids),
            "reads_bos": (isinstance(self.reads_bos, bool), "True or False"),
            "added_bos": (self.added_bos is None or _is_integer(self.added_bos, 0), "a token id or None"),
            "pad_token_id": (self.pad_token_id is None or _is_integer(self.pad_token_id, 0), "a token id or None"),
            "problem_type": (
                self.problem_type == "regression",
                "'regression', or a pipeline would put the reward through a sigmoid or a softmax of its own",
            ),
        }
        for name, (right, need) in needs.items():
            if not right:
                raise ValueError(f"got {name}={getattr(self, name)!r}, need {need}.")
        if len(self.tasks) > 1 and self.router_config is None:
            raise ValueError(
                f"got {len(self.tasks)} tasks and no `router_config`, need a router to choose among {list(self.tasks)}: "
                "train one on task labels, or keep a single task (DMoERM-w/o-Outer)."
            )
        for names in [list(self.tasks), *self.tasks.values()]:
            slugs = {slug(name) for name in names} - {""}
            if len(slugs) != len(names):
                raise ValueError(f"got the names {names}, need names that are distinct words: they name modules.")
            if taken := sorted(name for name in slugs if hasattr(nn.ModuleDict(), name)):
                raise ValueError(f"got the name {taken[0]!r}, which PyTorch has taken: they name modules. Rename it.")
        adapters: dict[str, tuple[str, str]] = {}
        for task, point in [(task, point) for task, points in self.tasks.items() for point in points]:
            first = adapters.setdefault(adapter_name(task, point), (task, point))
            if self.share_base and first != (task, point):
                raise ValueError(
                    f"got the points {first[1]!r} of {first[0]!r} and {point!r} of {task!r}, need names that give two "
                    f"adapters of the shared base, both would be {adapter_name(task, point)!r}: rename one."
                )

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict, with `tasks` as pairs: config.json sorts dicts, but the router needs the order."""
        return {**super().to_dict(), "tasks": [[task, points] for task, points in self.tasks.items()]}

    @property
    def layers_with_lora(self) -> list[int] | None:
        """
        Indices of the backbone's layers that have LoRA; None for all.

        Raises:
            ValueError: If the backbone has fewer layers than `lora_layers`, or its configuration has no number of
                layers.
        """
        if self.lora_layers == "all":
            return None
        total = getattr(self.backbone_config.get_text_config(), "num_hidden_layers", 0)
        divisor = LORA_LAYERS.get(self.lora_layers)
        count = self.lora_layers if divisor is None else -(-total // divisor)
        if not 0 < count <= total:
            raise ValueError(
                f"got lora_layers={self.lora_layers!r} for a base with {total} layers, need at most as many as it has: "
                'choose a smaller number, or "all".'
            )
        return list(range(total - count, total))

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        return self


def adapter_name(task: str, point: str) -> str:
    """Return the name of the PEFT adapter of a task's capability point."""
    return f"{slug(task)}__{slug(point)}"


def as_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    """Convert a dict from config.json to the configuration of a backbone; return a configuration unchanged."""
    if not isinstance(config, dict):
        return config
    config = dict(config)
    if (model_type := config.pop("model_type", None)) not in CONFIG_MAPPING:
        raise ValueError(
            f"got the configuration of a backbone with model_type={model_type!r}, need one that this transformers knows: "
            "install the version that the model was saved with, or fix config.json."
        )
    return CONFIG_MAPPING[model_type](**config)


def _as_tasks(tasks: dict[str, list[str]] | list[tuple[str, list[str]]] | None) -> dict[str, list[str]]:
    """
    Convert tasks to a dict.

    Raises:
        ValueError: If they are not names with lists of names, or a task occurs twice.
    """
    pairs = list(tasks.items()) if isinstance(tasks, dict) else list(tasks or [])
    for pair in pairs:
        if not (
            isinstance(pair, Sequence)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], Sequence)
            and not isinstance(pair[1], str)
            and all(isinstance(point, str) for point in pair[1])
        ):
            raise ValueError(
                f"got the task {pair!r}, need its name and a list of its capability points' names, all text."
            )
    found = {task: list(points) for task, points in pairs}
    if len(found) != len(pairs):
        raise ValueError(f"got the tasks {[task for task, _ in pairs]}, need each of them once.")
    return found


def _as_list(values: Any) -> Any:
    """Convert a sequence to a list; return anything else unchanged, for `check` to refuse."""
    return list(values) if isinstance(values, Sequence) and not isinstance(values, str) else values


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of_names(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) and value for value in values)


def _is_list_of_ids(values: Any) -> bool:
    return isinstance(values, list) and all(_is_integer(value, 0) for value in values)


AutoConfig.register(DMoERMConfig.model_type, DMoERMConfig)
