"""The DMoERM models: a router and one inner model per task, usable as a reward model in TRL's trainers."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import ModelOutput

from ..distributed.sharding import gathered, shard, sum_over_processes
from ..tasks import slug
from .base_placement import OTHERS, Device, UnloadedBases, bases_of_checkpoint, task_devices
from .boundaries import Spans, find_spans, span_mask
from .configuration_dmoerm import DMoERMConfig
from .embedding import embeddings
from .experts import adapter_name, add_experts
from .finite import check_rewards, is_nan_allowed
from .initial_weights import initial_weights_of, load_initial_weights
from .inner import InnerModel
from .pretrained import DMoERMPreTrainedModel, check_finite
from .quantization import check_full_precision, needs_full_precision
from .response_opening import ResponseOpening
from .router import Router

NOT_READ = {
    "cross_attn_head_mask",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "decoder_input_ids",
    "encoder_hidden_states",
    "head_mask",
    "image_grid_thw",
    "images",
    "input_features",
    "inputs_embeds",
    "labels",
    "output_attentions",
    "past_key_values",
    "pixel_values",
    "pixel_values_videos",
    "seq_idx",
}
"""
Arguments of transformers' models that are refused, because they would change the output: packed sequences, images, a
cache, a loss.
"""


@dataclass
class DMoERMOutput(ModelOutput):
    """
    The output of a DMoERM.

    Attributes:
        logits (`Tensor` of shape (B, 1)): The normalised rewards.
        route (`Tensor` of shape (B,)): Index of the chosen task in `config.tasks` (equation 1).
        route_probabilities (`Tensor` of shape (B, tasks)): The router's E(t | x).
        capability_scores (`ModelOutput`): A dict, capability point -> scores of shape (B,) (equation 4); NaN where the
            text's task does not have the point. None for a model without experts.
        last_hidden_state (`Tensor` of shape (B, T, 1)): The reward, repeated at every position; TRL's PPO reads it
            here.
        hidden_states (`tuple[Tensor]`): `last_hidden_state` in a tuple; TRL 1.12 reads it here.
    """

    logits: Tensor | None = None
    route: Tensor | None = None
    route_probabilities: Tensor | None = None
    capability_scores: ModelOutput | None = None  # a plain dict would stop pipelines that batch
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def _is_given(value: Any) -> bool:
    """Return whether an argument has an effect; None, False and an empty cache have none."""
    if value is None or value is False:
        return False
    return not callable(getattr(value, "get_seq_length", None)) or value.get_seq_length() > 0


class DMoERMModel(DMoERMPreTrainedModel):
    """
    The outer and the inner layer of a DMoERM, without a sequence classification interface; see
    [`DMoERMForSequenceClassification`].

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification

    model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    dmoerm = model.model  # the DMoERMModel
    list(dmoerm.backbones), list(dmoerm.inner_models)
    ```
    """

    def __init__(self, config: DMoERMConfig, backbones: Mapping[str, PreTrainedModel] | None = None):
        super().__init__(config)
        if not config.tasks or config.backbone_config is None:
            raise ValueError("got a configuration without `tasks` or `backbone_config`, need both.")
        self.sharded = False
        self.router = Router(config) if config.router_config is not None else None
        self.backbones = backbones if isinstance(backbones, UnloadedBases) else nn.ModuleDict()
        self.inner_models = nn.ModuleDict({slug(task): InnerModel(config, task) for task in config.tasks})
        if self.backbones is not backbones:
            self._build_bases(dict(backbones or {}))
        self.post_init()
        self.train(self.training)

    def _build_bases(self, backbones: dict[str, PreTrainedModel]) -> None:
        """Build the bases of all tasks with untrained experts; initialise a base that is not given at random."""
        for task in self.config.tasks:
            key = self.backbone_key(task)
            if key not in self.backbones:
                self.backbones[key] = backbones.get(key) or AutoModel.from_config(self.config.backbone_config)
            add_experts(self.backbones[key], self.config, self.inner_models[slug(task)].adapters)

    def backbone_key(self, task: str) -> str:
        return "shared" if self.config.share_base else slug(task)

    def train(self, mode: bool = True) -> "DMoERMModel":
        """Set the mode, but keep the router frozen and in evaluation mode; `from_pretrained` calls this too."""
        super().train(mode)
        if self.router is not None:
            self.router.eval().requires_grad_(False)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return next(iter(self.backbones.values())).get_input_embeddings()

    def shard(self, config: dict[str, Any]) -> None:
        """
        Shard the weights over all processes (ZeRO-3). From then on all processes must call the model equally often,
        each with its own texts. A call gathers the router's weights first, then those of one task after the other.

        Args:
            config (`dict`): The DeepSpeed configuration; its `offload_param` sets where the shards are stored.
        """
        check_full_precision(self, "shard over processes")
        shard(self, config)
        self.sharded = True

    def _gathered(self, *modules: nn.Module) -> AbstractContextManager:
        """Context manager in which the weights are gathered if [`shard`] sharded them; an engine's own are left to it."""
        return gathered(*modules) if self.sharded else nullcontext()

    def find_spans(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt_lengths: Tensor | None = None
    ) -> Spans:
        """
        Find the span boundaries of each text; see [`~dmoerm_trl.modeling.boundaries.find_spans`].

        Raises:
            ValueError: If a text is not in the chat format of the model.
        """
        opening = self.config.response_opening
        return find_spans(
            input_ids,
            attention_mask,
            prompt_lengths,
            response_marker=self.config.response_marker,
            end_of_turn=self.config.end_of_turn,
            response_opening=opening and ResponseOpening(**opening),
            reads_end=self.config.reads_end,
            pad_token_id=self.config.pad_token_id,
            added_bos=self.config.added_bos,
            reads_bos=self.config.reads_bos,
            needs_marker=bool(self.config.response_marker),
        )

    def route(self, spans: Spans) -> Tensor:
        """Compute `E(t | x)` of equation 1 for the prompts of `spans`, shape (B, tasks)."""
        if self.router is None:
            return torch.ones(len(spans.lengths), 1, device=spans.lengths.device)
        width = int(spans.prompt_lengths.max())
        with self._gathered(self.router):
            return self.router.probabilities(spans.input_ids[:, :width], span_mask(spans.prompt_lengths, width))

    def embed(self, task: str, spans: Spans, points: Sequence[str] | None = None) -> Tensor:
        """
        Compute the embeddings z of all texts of `spans` with one task's experts (equation 3).

        Args:
            points (`Sequence[str]`, *optional*): The capability points whose experts are run; all of the task by
                default.

        Returns:
            `Tensor` of shape (B, max(k, 1), H) for k experts.
        """
        base = self.backbones[self.backbone_key(task)]
        z = embeddings(
            base,
            [adapter_name(task, point) for point in (self.config.tasks[task] if points is None else points)],
            spans.input_ids.to(base.device),
            spans.lengths.to(base.device),
        )
        return z.to(spans.input_ids.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> DMoERMOutput:
        """
        Compute the rewards of a batch of texts.

        Args:
            input_ids (`Tensor` of shape (B, T)): Prompts with their responses, padded on either side.
            attention_mask (`Tensor` of shape (B, T), *optional*): Nonzero for tokens, 0 for padding.
            prompt_lengths (`Tensor` of shape (B,), *optional*): Number of tokens of each prompt, without padding. Not
                needed if the chat template marks the end of the prompt.
            token_type_ids (`Tensor` of shape (B, T), *optional*): The segments of an encoder's sentence pair. If the
                model has no chat template, the prompt ends where the second segment begins. They are not passed to the
                bases.
            position_ids, use_cache, output_hidden_states, return_dict: Accepted because TRL and pipelines pass them,
                and ignored. Positions are recomputed after the padding is removed.
            others: Further columns of a batch, such as TRL's `margin`; ignored, as in the models of transformers.

        Raises:
            ValueError: For an argument that would change the output of a transformers model and is not supported here
                ([`NOT_READ`]), and for what [`find_spans`] refuses.
        """
        if given := sorted(name for name in NOT_READ & others.keys() if _is_given(others[name])):
            raise ValueError(
                f"got the argument {given[0]!r}, need `input_ids` and their mask alone, because this model cannot "
                "read it and would give another reward than you expect: give the complete texts' tokens, and leave it out."
            )
        if input_ids is None:
            raise ValueError("got no `input_ids`, need the tokens of the texts.")
        if prompt_lengths is None and token_type_ids is not None and not self.config.response_marker:
            attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            prompt_lengths = (attended.bool() & ((token_type_ids == 1).cumsum(1) == 0)).sum(1)
        spans = self.find_spans(input_ids, attention_mask, prompt_lengths)
        probabilities = self.route(spans)
        route = probabilities.argmax(-1)
        names = dict.fromkeys(point for points in self.config.tasks.values() for point in points)
        rewards = probabilities.new_zeros(len(route), 1, dtype=torch.float32)
        scores = {name: rewards.new_full((len(route),), torch.nan) for name in names}
        counts = route.bincount(minlength=len(self.config.tasks))
        if self.sharded:
            sum_over_processes(counts)  # all processes gather a task's weights, even those without texts of it
        for index, (task, points) in enumerate(self.config.tasks.items()):
            if not counts[index]:
                continue
            rows = (route == index).nonzero().squeeze(1)
            inner = self.inner_models[slug(task)]
            with self._gathered(self.backbones[self.backbone_key(task)], inner):
                if not len(rows):
                    continue
                width = int(spans.lengths[rows].max())
                part = Spans(spans.input_ids[rows, :width], spans.lengths[rows], spans.prompt_lengths[rows])
                z = self.embed(task, part)
                rewards = rewards.index_put((rows,), inner.reward(z))
                for name, score in zip(points, inner.capability_scores(z).unbind(1), strict=True):
                    scores[name] = scores[name].index_put((rows,), score)
        # these texts have no route
        rewards = rewards.masked_fill(probabilities.isnan().any(1, keepdim=True), torch.nan)
        everywhere = rewards.unsqueeze(1).expand(-1, input_ids.shape[1], -1)
        return DMoERMOutput(
            logits=rewards,
            route=route,
            route_probabilities=probabilities,
            capability_scores=ModelOutput(scores) if scores else None,
            last_hidden_state=everywhere,
            hidden_states=(everywhere,),
        )


class DMoERMForSequenceClassification(DMoERMPreTrainedModel):
    """
    A double-layer mixture-of-experts reward model (Quan, ACL 2024 Findings).

    The frozen router chooses the task of a text from its prompt (equations 1 and 2). In the task's inner model each LoRA
    expert embeds the text (equation 3), its head scores one capability point (equation 4), and the aggregator turns the
    concatenated embeddings into the reward (equations 5 and 6), which is normalised with the mean and standard
    deviation stored in the model.

    It can be used as a reward model in TRL: `RewardTrainer(model=...)`, `PPOTrainer(reward_model=...)`,
    `GRPOTrainer(reward_funcs=[...])`, `RLOOTrainer(reward_funcs=[...])`, and in `pipeline("text-classification")`.

    The prompt of a text ends after `prompt_lengths` tokens if they are given, else at the last response marker. If a
    plain tokenizer encodes a rendered chat as one string, a response that spells out special tokens can open turns of
    its own and so choose the task that scores it. Encode untrusted responses with
    [`~dmoerm_trl.data.formatting.Formatter.batch`], or score texts with
    [`~dmoerm_trl.scoring.reward_functions.TextRewards`] or a [`~dmoerm_trl.scoring.reward_functions.RewardProcessor`].

    Example:

    ```python
    from dmoerm_trl import DMoERMForSequenceClassification, Formatter
    from transformers import AutoTokenizer

    model = DMoERMForSequenceClassification.from_pretrained("runs/demo/model")
    formatter = Formatter.for_model(model.config, AutoTokenizer.from_pretrained("runs/demo/model"), max_length=512)
    output = model(**formatter.batch(["How are you?"], ["I feel a bit lonely."]))
    output.logits, output.route, output.capability_scores
    ```
    """

    def __init__(self, config: DMoERMConfig, backbones: Mapping[str, PreTrainedModel] | None = None):
        super().__init__(config)
        self.num_labels = config.num_labels
        if self.num_labels != 1:
            raise ValueError(f"got num_labels={self.num_labels}, need 1: a reward model gives one reward a text.")
        self.model = DMoERMModel(config, backbones)
        self.score = nn.Identity()  # PPO applies it to `hidden_states[-1]`, which holds the reward already
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> DMoERMOutput:
        """
        Compute the rewards of a batch of texts; the arguments are those of [`DMoERMModel.forward`].

        Raises:
            ValueError: For a reward that is NaN or infinite, unless gradients are enabled or
                [`~dmoerm_trl.modeling.finite.nan_allowed`] is active.
        """
        output = self.model(input_ids, attention_mask, **kwargs)
        if not (torch.is_grad_enabled() or is_nan_allowed()):
            check_rewards(output.logits[:, 0])
        return output

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """
        Save the model; see `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: If a base is quantised.
        """
        check_full_precision(self, "save")
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *args: Any,
        device_map: Device | Mapping[str, Device] | None = None,
        resident_tasks: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Load a model from safetensors, optionally with a device per task; see `PreTrainedModel.from_pretrained`.

        A `quantization_config` (a `BitsAndBytesConfig`) quantises only the bases, and without a `device_map` puts the
        model on the GPU if there is one. For 8 bits set `llm_int8_threshold=0.0`: otherwise bitsandbytes looks for
        outliers over all texts of a batch, and a reward depends slightly on the other texts.

        Args:
            device_map (*optional*):
                One device for the complete model, or a dict of task -> device of its base, where the key `""` stands
                for everything else: the router, the heads and the other bases, which are on the CPU by default. A base
                with a device of its own stays there when the model is moved. Put the input on the router's device.
            resident_tasks (`int`, *optional*):
                Maximum number of tasks' bases in memory at a time. A base is loaded when the first text is routed to
                it, and replaces the least recently used one. Such a model can score, but can be neither trained nor
                saved.

        Raises:
            ValueError: If the weights of the checkpoint do not match its config.json or are not finite (a base that is
                loaded later is checked then); if a task or a device is unknown; if `resident_tasks` is below 1; or if
                the tasks share one base, which cannot be placed by task.
        """
        name = pretrained_model_name_or_path
        if resident_tasks is None and not (isinstance(device_map, Mapping) and set(device_map) - {OTHERS}):
            return super().from_pretrained(name, *args, device_map=device_map, **kwargs)
        home, devices = task_devices(device_map)
        report = kwargs.pop("output_loading_info", False)
        whole = {**kwargs, "backbones": UnloadedBases(), "device_map": home, "output_loading_info": True}
        whole["quantization_config"] = None  # for the bases only
        model, info = super().from_pretrained(name, *args, **whole)
        placing = {"home": home, "devices": devices, "resident_tasks": resident_tasks}
        model.model.backbones = bases_of_checkpoint(name, model.config, kwargs, **placing)
        return (model, info) if report else model

    @classmethod
    def from_base(
        cls, base: str | PreTrainedModel, *, task: str, trust_remote_code: bool = False, **config: Any
    ) -> "DMoERMForSequenceClassification":
        """
        Build a single reward model for phase 1: a pretrained backbone and a head, without experts.

        The head of a reward model is kept if it is one linear layer over a decoder's last token; otherwise a new head
        is initialised.

        Args:
            base (`str` or `PreTrainedModel`): Folder or hub name of a model that `AutoModel` loads, of a reward model,
                or of a model of this package with one task; or such a model, already loaded. Only the text part of a
                multimodal model is used.
            task (`str`): The model's only task.
            config: Further arguments of [`DMoERMConfig`].

        Raises:
            ValueError: If all weights of the base cannot be trained: it is an adapter, has several tasks, is
                quantised, has a weight that is not finite, or is an architecture that needs other inputs than text.
        """
        if config.pop("quantization_config", None) is not None:
            raise needs_full_precision("train as a whole")
        if isinstance(base, str):
            dtype = config.pop("dtype", "float32")
            start = load_initial_weights(base, trust_remote_code=trust_remote_code, dtype=dtype)
        else:
            start = initial_weights_of(base)
        backbone = start.backbone
        check_finite(backbone)
        config = DMoERMConfig(backbone_config=backbone.config, tasks={task: []}, **config)
        model = cls(config, {"shared" if config.share_base else slug(task): backbone})
        inner = model.model.inner_models[slug(task)].float()
        if start.head is not None:
            inner.base_head.load_state_dict(start.head)
        return model


AutoModel.register(DMoERMConfig, DMoERMModel)
AutoModelForSequenceClassification.register(DMoERMConfig, DMoERMForSequenceClassification)
