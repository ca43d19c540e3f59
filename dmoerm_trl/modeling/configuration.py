"""The configuration of a DMoERM: one task and no router is the paper's DMoERM-w/o-Outer, no points is a single RM."""

from dataclasses import asdict
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..tasks import slug
from .response_opening import ResponseOpening

ACTIVATIONS = ("sigmoid", "none")

LORA_LAYERS = {"all": 1, "top half": 2, "top third": 3}
"""Value of `lora_layers` -> by how much the number of the backbone's layers is divided."""


class DMoERMConfig(PreTrainedConfig):
    """
    Configuration of [`DMoERMForSequenceClassification`].

    Args:
        backbone_config (`PreTrainedConfig` or `dict`):
            Configuration of the base's backbone: any model that `AutoModel` loads, decoder or encoder.
        tasks (`dict[str, list[str]]`):
            Task name -> names of its capability points, one LoRA expert each. A task without points is an ordinary
            single reward model: the base and its head. Their order is the router's; config.json has it as pairs.
        router_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the router's backbone. Needed for two tasks or more, absent for one.
        lora_rank (`int`), lora_alpha (`int`), lora_dropout (`float`), lora_target_modules (`list[str]`):
            The LoRA experts; the defaults are the paper's table 5.
        lora_layers (`str` or `int`):
            Which of the backbone's layers have LoRA, counted from the top: `"all"` (the paper), `"top half"`,
            `"top third"`, both rounded up, or a number of layers. Below them the experts are one, so that part of the
            backbone runs once for all of them.
        aggregator_hidden_size (`int`, *optional*):
            Width of the aggregator's hidden layer; the backbone's hidden size if not given.
        activation (`str`):
            The sigma of equations 4 and 6: `"sigmoid"` as in the paper, or `"none"`.
        share_base (`bool`):
            Whether all tasks share one base instead of each having its own (the paper).
        response_marker (`list[int]`):
            Token ids with which the chat template opens an assistant turn. With it the prompt's end is known.
        end_of_turn (`list[int]`):
            Token ids any one of which ends an assistant turn; the chat template writes the first.
        response_opening (`ResponseOpening` or `dict`, *optional*):
            What the chat template writes between the response marker and the response, where that differs between a generation
            prompt and a whole chat, or holds thoughts; see [`~dmoerm_trl.modeling.response_opening.ResponseOpening`].
        reads_end (`bool`):
            Whether the end of the turn belongs to the text that is scored; not where the chat template writes none.
        pad_token_id (`int`, *optional*):
            The padding token; it may be an end of turn.
        added_bos (`int`, *optional*):
            The token that the tokenizer puts before every text, if it puts one there.
        reads_bos (`bool`):
            Whether the text that is scored begins with it; not where the chat template does not write it.
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
        aggregator_hidden_size: int | None = None,
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
        tasks = {task: list(points) for task, points in dict(tasks or {}).items()}
        if activation not in ACTIVATIONS:
            raise ValueError(f"got activation={activation!r}, need one of {list(ACTIVATIONS)}.")
        if not (
            isinstance(lora_layers, str) and lora_layers in LORA_LAYERS or type(lora_layers) is int and lora_layers > 0
        ):
            raise ValueError(
                f"got lora_layers={lora_layers!r}, need one of {list(LORA_LAYERS)} or a number of layers, at least 1."
            )
        if len(tasks) > 1 and router_config is None:
            raise ValueError(
                f"got {len(tasks)} tasks and no `router_config`, need a router to choose among {list(tasks)}: train one "
                "on task labels, or keep a single task (DMoERM-w/o-Outer)."
            )
        for names in [list(tasks), *tasks.values()]:
            slugs = {slug(name) for name in names} - {""}
            if len(slugs) != len(names):
                raise ValueError(f"got the names {names}, need names that are distinct words: they name modules.")
            if taken := sorted(name for name in slugs if hasattr(nn.ModuleDict, name)):
                raise ValueError(f"got the name {taken[0]!r}, which PyTorch has taken: they name modules. Rename it.")
        self.tasks = tasks
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.lora_target_modules = list(lora_target_modules)
        self.lora_layers = lora_layers
        self.aggregator_hidden_size = aggregator_hidden_size
        self.activation = activation
        self.share_base = share_base
        self.response_marker = list(response_marker)
        self.end_of_turn = list(end_of_turn)
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
        self.backbone_config = _as_config(backbone_config)  # last: the line above would reset their attention
        self.router_config = _as_config(router_config)

    def to_dict(self) -> dict[str, Any]:
        """As of any configuration, but `tasks` as pairs: config.json sorts a dict, and the router counts the tasks."""
        return {**super().to_dict(), "tasks": [[task, points] for task, points in self.tasks.items()]}

    @property
    def layers_with_lora(self) -> list[int] | None:
        """
        Indices of the backbone's layers that have LoRA; None for all.

        Raises:
            ValueError: if the backbone has fewer layers than `lora_layers` names, or does not say how many it has.
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


def _as_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig | None:
    if not isinstance(config, dict):
        return config
    config = dict(config)
    return CONFIG_MAPPING[config.pop("model_type")](**config)
