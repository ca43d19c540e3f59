"""DMoERM: the router, the tasks' inner models, and the contract that TRL's trainers expect of a reward model."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import ModelOutput

from ..tasks import slug
from .configuration import DMoERMConfig
from .dividing import divide, over_processes, whole
from .embedding import embeddings
from .experts import adapter_name, add_experts
from .finite import check_rewards, is_nan_allowed
from .inner import InnerModel
from .placing import OTHERS, BasesNotRead, Device, bases_of_checkpoint, task_devices
from .pretrained import DMoERMPreTrainedModel, check_finite
from .quantised import check_full_precision, needs_full_precision
from .response_opening import ResponseOpening
from .router import Router
from .spans import Spans, find_spans, span_mask
from .starting import load_start, start_of

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
"""Arguments of transformers' models by which they would give another output: texts packed in a row, images, a cache, a loss."""


@dataclass
class DMoERMOutput(ModelOutput):
    """
    Attributes:
        logits (`Tensor` of shape (B, 1)): the rewards, normalised.
        route (`Tensor` of shape (B,)): index of the chosen task in `config.tasks` (equation 1).
        route_probabilities (`Tensor` of shape (B, tasks)): the router's E(t | x).
        capability_scores (`ModelOutput`): a dict, capability point -> scores of shape (B,) (equation 4); NaN where the
            text's task does not have the point. None for a model without experts.
        last_hidden_state (`Tensor` of shape (B, T, 1)): the reward at every position, from which TRL's PPO reads it.
        hidden_states (`tuple[Tensor]`): the same once more, where TRL 1.12 looks for it.
    """

    logits: Tensor | None = None
    route: Tensor | None = None
    route_probabilities: Tensor | None = None
    capability_scores: ModelOutput | None = None  # a plain dict would stop pipelines that batch
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def _is_given(value: Any) -> bool:
    """Whether an argument asks for something: an empty cache and False do not."""
    if value is None or value is False:
        return False
    return not callable(getattr(value, "get_seq_length", None)) or value.get_seq_length() > 0


class DMoERMModel(DMoERMPreTrainedModel):
    """Both layers; see [`DMoERMForSequenceClassification`]."""

    def __init__(self, config: DMoERMConfig, backbones: Mapping[str, PreTrainedModel] | None = None):
        super().__init__(config)
        if not config.tasks or config.backbone_config is None:
            raise ValueError("got a configuration without `tasks` or `backbone_config`, need both.")
        self.divided = False
        self.router = Router(config) if config.router_config is not None else None
        self.backbones = backbones if isinstance(backbones, BasesNotRead) else nn.ModuleDict()
        self.inner_models = nn.ModuleDict({slug(task): InnerModel(config, task) for task in config.tasks})
        if self.backbones is not backbones:
            self._build_bases(dict(backbones or {}))
        self.post_init()
        self.train(self.training)

    def _build_bases(self, backbones: dict[str, PreTrainedModel]) -> None:
        """Those of all tasks, with untrained experts; a base that is not given is drawn at random."""
        for task in self.config.tasks:
            key = self.backbone_key(task)
            if key not in self.backbones:
                self.backbones[key] = backbones.get(key) or AutoModel.from_config(self.config.backbone_config)
            add_experts(self.backbones[key], self.config, self.inner_models[slug(task)].adapters)

    def backbone_key(self, task: str) -> str:
        return "shared" if self.config.share_base else slug(task)

    def train(self, mode: bool = True) -> "DMoERMModel":
        """The router stays frozen and in evaluation mode; `from_pretrained` comes by here too."""
        super().train(mode)
        if self.router is not None:
            self.router.eval().requires_grad_(False)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return next(iter(self.backbones.values())).get_input_embeddings()

    def divide(self, config: dict[str, Any]) -> None:
        """
        Divides the weights over all processes (ZeRO-3), which from now on have to call the model equally often, each with its
        own texts. Within a call each process has the router whole, then one task after the other.

        Args:
            config (`dict`): of DeepSpeed; its `offload_param` says where the parts are.
        """
        check_full_precision(self, "divide over processes")
        divide(self, config)
        self.divided = True

    def _whole(self, *modules: nn.Module) -> AbstractContextManager:
        return whole(*modules) if self.divided else nullcontext()

    def find_spans(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt_lengths: Tensor | None = None
    ) -> Spans:
        """See [`~dmoerm_trl.modeling.spans.find_spans`], which here refuses texts in another chat format than the model's."""
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
        """`E(t | x)` of equation 1 for the prompts of `spans`, shape (B, tasks)."""
        if self.router is None:
            return torch.ones(len(spans.lengths), 1, device=spans.lengths.device)
        width = int(spans.prompt_lengths.max())
        with self._whole(self.router):
            return self.router.probabilities(spans.input_ids[:, :width], span_mask(spans.prompt_lengths, width))

    def embed(self, task: str, spans: Spans, points: Sequence[str] | None = None) -> Tensor:
        """
        The embeddings z of all texts of `spans` under one task's experts (equation 3).

        Args:
            points (`Sequence[str]`, *optional*): the capability points whose experts embed; all of the task if absent.

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
        Args:
            input_ids (`Tensor` of shape (B, T)): prompts with their responses, padded on either side.
            attention_mask (`Tensor` of shape (B, T), *optional*): nonzero for tokens.
            prompt_lengths (`Tensor` of shape (B,), *optional*): number of tokens of each prompt, padding not counted.
                Not needed where the chat template marks the prompt's end.
            token_type_ids (`Tensor` of shape (B, T), *optional*): the segments of an encoder's pair; of a model without a chat
                template the prompt ends where the second begins. They are not given to the bases.
            position_ids, use_cache, output_hidden_states, return_dict: taken because TRL and pipelines pass them. Positions are
                made anew when the padding is removed.
            others: further columns of a batch, such as TRL's `margin`, are not read, as in models of transformers.

        Raises:
            ValueError: for what a model of transformers would read and this one cannot ([`NOT_READ`]), and as [`find_spans`].
        """
        if given := sorted(name for name in NOT_READ & others.keys() if _is_given(others[name])):
            raise ValueError(
                f"got the argument {given[0]!r}, need `input_ids` and their mask alone, because without it the reward would not be "
                "that of what was meant: give the whole texts' tokens, and leave it out."
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
        if self.divided:
            over_processes(counts)  # a task's weights are gathered by all, whoever has texts of it
        for index, (task, points) in enumerate(self.config.tasks.items()):
            if not counts[index]:
                continue
            rows = (route == index).nonzero().squeeze(1)
            inner = self.inner_models[slug(task)]
            with self._whole(self.backbones[self.backbone_key(task)], inner):
                if not len(rows):
                    continue
                width = int(spans.lengths[rows].max())
                part = Spans(spans.input_ids[rows, :width], spans.lengths[rows], spans.prompt_lengths[rows])
                z = self.embed(task, part)
                rewards = rewards.index_put((rows,), inner.reward(z))
                for name, score in zip(points, inner.capability_scores(z).unbind(1), strict=True):
                    scores[name] = scores[name].index_put((rows,), score)
        rewards = rewards.masked_fill(probabilities.isnan().any(1, keepdim=True), torch.nan)  # it has no route
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
    concatenated embeddings into the reward (equations 5 and 6), which is normalised with numbers stored in the model.

    It is a reward model for TRL: `RewardTrainer(model=...)`, `PPOTrainer(reward_model=...)`,
    `GRPOTrainer(reward_funcs=[...])`, `RLOOTrainer(reward_funcs=[...])`, and for `pipeline("text-classification")`.

    The prompt of a text ends where `prompt_lengths` says, else at the last response marker. In a whole chat that a plain tokenizer
    made of one text, a response that spells special tokens opens turns of its own, and so may choose its own judge. Where responses
    are not trusted, encode them with [`~dmoerm_trl.data.formatting.Formatter.batch`], or score texts with
    [`~dmoerm_trl.rl.reward_functions.TextRewards`] or a [`~dmoerm_trl.rl.reward_functions.RewardProcessor`].
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
        Takes what [`DMoERMModel`] takes.

        Raises:
            ValueError: where no gradient is wanted, for a reward that is NaN or infinite; but not within
                [`~dmoerm_trl.modeling.finite.nan_allowed`].
        """
        output = self.model(input_ids, attention_mask, **kwargs)
        if not (torch.is_grad_enabled() or is_nan_allowed()):
            check_rewards(output.logits[:, 0])
        return output

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """
        `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: if a base is quantised.
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
        `PreTrainedModel.from_pretrained`, safetensors only, which can place the tasks' bases. A `quantization_config`, a
        `BitsAndBytesConfig`, quantises the bases alone, and without a `device_map` puts the model on the GPU if there is one.
        In 8 bits set `llm_int8_threshold=0.0`: bitsandbytes looks for outliers over all texts of a batch, and a reward would
        depend a little on a text's neighbours.

        Args:
            device_map (*optional*):
                A device for the whole model, or task -> device of its base, where `""` stands for all else: the router, the
                heads, the other bases; the CPU if absent. A base that has a device of its own stays there when the model is
                moved. The texts go where the router is.
            resident_tasks (`int`, *optional*):
                How many tasks' bases are in memory at a time. A base is read when the first text is routed to it, and the one
                that was used longest ago is freed for it. Such a model scores, but is neither trained nor saved.

        Raises:
            ValueError: if the checkpoint has other weights than its config.json says, or one that is not finite (a base that
                is not read yet is checked when it is); if a task or a device is unknown, the limit is below 1, or the tasks
                share one base and are to be placed one by one.
        """
        name = pretrained_model_name_or_path
        if resident_tasks is None and not (isinstance(device_map, Mapping) and set(device_map) - {OTHERS}):
            return super().from_pretrained(name, *args, device_map=device_map, **kwargs)
        home, devices = task_devices(device_map)
        report = kwargs.pop("output_loading_info", False)
        whole = {**kwargs, "backbones": BasesNotRead(), "device_map": home, "output_loading_info": True}
        whole["quantization_config"] = None  # is of the bases alone
        model, info = super().from_pretrained(name, *args, **whole)
        placing = {"home": home, "devices": devices, "resident_tasks": resident_tasks}
        model.model.backbones = bases_of_checkpoint(name, model.config, kwargs, **placing)
        return (model, info) if report else model

    @classmethod
    def from_base(
        cls, base: str | PreTrainedModel, *, task: str, trust_remote_code: bool = False, **config: Any
    ) -> "DMoERMForSequenceClassification":
        """
        A single reward model, to be trained in phase 1: a pretrained backbone and a head, no experts yet. The head of a reward
        model is kept where it is one linear layer over a decoder's last token; else it is new.

        Args:
            base (`str` or `PreTrainedModel`): folder or hub name of anything that `AutoModel` loads, of a reward model, or of a
                model of this package with one task; or such a model. Of a multimodal model the part that reads text is used.
            task (`str`): the one task that it serves.
            config: further arguments of [`DMoERMConfig`].

        Raises:
            ValueError: if the base cannot be trained as a whole: an adapter, several tasks, a quantised one, a weight that is
                not finite, an architecture that does not read texts alone.
        """
        if config.pop("quantization_config", None) is not None:
            raise needs_full_precision("train as a whole")
        if isinstance(base, str):
            dtype = config.pop("dtype", "float32")
            start = load_start(base, trust_remote_code=trust_remote_code, dtype=dtype)
        else:
            start = start_of(base)
        backbone = start.backbone
        check_finite(backbone)
        config = DMoERMConfig(backbone_config=backbone.config, tasks={task: []}, **config)
        model = cls(config, {"shared" if config.share_base else slug(task): backbone})
        inner = model.model.inner_models[slug(task)].float()
        if start.head is not None:
            inner.base_head.load_state_dict(start.head)
        return model


AutoConfig.register("dmoerm", DMoERMConfig)
AutoModel.register(DMoERMConfig, DMoERMModel)
AutoModelForSequenceClassification.register(DMoERMConfig, DMoERMForSequenceClassification)
