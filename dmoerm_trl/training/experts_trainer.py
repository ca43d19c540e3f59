"""Trainer of phase 2: all experts of a task on one stream of responses, each as if it were trained alone."""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SchedulerType

from ..distributed.engines import unsharded_afterwards
from ..distributed.sharding import full_copy
from ..modeling.assembly import expert_names, with_experts
from ..modeling.experts import lora_layers
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from ..modeling.pretrained import DMoERMPreTrainedModel
from ..tasks import slug
from .checkpoints import is_complete
from .ranked_config import RankedRewardConfig
from .ranked_trainer import RankedRewardTrainer


def untrained_experts(
    base: DMoERMForSequenceClassification, points: Sequence[str], seed: int
) -> DMoERMForSequenceClassification:
    """
    Add experts as [`with_experts`] does, with random LoRA weights that depend only on the seed and the capability point, so
    that it makes no difference which experts are trained together.
    """
    model = with_experts(base, points)
    (task,) = model.config.tasks
    for point, adapter in zip(points, model.model.inner_models[slug(task)].adapters, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {point}".encode()).digest()[:4], "big"))
            for layer in lora_layers(model):
                layer.reset_lora_parameters(adapter, init_lora_weights=True)
    return model


class Experts(DMoERMPreTrainedModel):
    """
    A one-task DMoERM in phase 2, which trains the LoRA weights and heads of its experts. Each expert gives a reward of its own.
    Everything else is frozen and is not part of a checkpoint.

    Args:
        model (`DMoERMForSequenceClassification`): The model, whose experts are trained in place.

    Attributes:
        points (`list[str]`): The capability points.
        active (`list[str]`): The points whose experts are still in training.
    """

    def __init__(self, model: DMoERMForSequenceClassification):
        super().__init__(copy.deepcopy(model.config))
        ((self.task, self.points),) = model.config.tasks.items()
        self.active = list(self.points)
        self.model = model.model
        self._names = {point: list(expert_names(self, self.task, point)) for point in self.points}
        trained = {name for names in self._names.values() for name in names}
        for name, weight in self.named_parameters():
            weight.requires_grad_(name in trained)
        self._keys_to_ignore_on_save = [name for name in self.state_dict() if name not in trained]

    def expert(self, point: str) -> dict[str, nn.Parameter]:
        """Return the weights of a point's expert by name."""
        return {name: self.get_parameter(name) for name in self._names[point]}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict, from which frozen weights may be missing."""
        trained = {name for names in self._names.values() for name in names}
        if missing := sorted(trained - state_dict.keys()) if strict else []:
            raise ValueError(
                f"got a checkpoint without {len(missing)} weights of the experts (such as {missing[0]!r}), need all of them, "
                "because the run cannot resume without them: delete the checkpoint."
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor, points: Sequence[str]
    ) -> SequenceClassifierOutput:
        """
        Compute the capability scores of `points` (equation 4) as `logits` of shape (B, points). The texts are given as for
        [`DMoERMModel`]. The experts of other points are not run.
        """
        spans = self.model.find_spans(input_ids, attention_mask, prompt_lengths)
        z = self.model.embed(self.task, spans, points)
        return SequenceClassifierOutput(logits=self.model.inner_models[slug(self.task)].capability_scores(z, points))


class ExpertsTrainer(RankedRewardTrainer):
    """
    [`RankedRewardTrainer`] for several rankings of the same responses, one per capability point. Each of a row's `pairs` begins
    with the index of its point. The loss is the sum over points of equation 7 over the prompts that have a pair of the point.
    Metrics are named after the point: `eval_accuracy/<point>`.

    Each expert is trained as if it were alone. It has its own labels, gradient clipping, best weights and patience
    ([`BestExperts`]), and Adam does not change it in a step without a pair of its point. The result is that of training the
    experts one after the other, except that LoRA dropout draws other masks.

    Raises:
        ValueError: For a learning rate that follows a metric, an unknown metric, or a DeepSpeed configuration that has an
            optimizer or splits an expert.
    """

    def __init__(
        self,
        model: Experts,
        args: RankedRewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
    ):
        metric = str(args.metric_for_best_model).removeprefix("eval_")
        if metric not in ("accuracy", "loss", "margin"):
            raise ValueError(
                f"got metric_for_best_model={metric!r}, need 'eval_accuracy', 'eval_loss' or 'eval_margin'."
            )
        if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            raise ValueError(
                f"got lr_scheduler_type={args.lr_scheduler_type.value!r}, need one that does not follow a metric, because the "
                "experts share the learning rate and each has a metric of its own: such as 'linear' or 'cosine'."
            )
        keep_best, patience = args.load_best_model_at_end, args.patience
        best = BestExperts(f"eval_{metric}", args.greater_is_better, patience, keep_best)
        args = copy.copy(args)
        args.ddp_find_unused_parameters = True  # an expert without a pair in a batch is not computed
        args.load_best_model_at_end, args.metric_for_best_model = False, None  # there is no one best model
        self.rankings = [f"/{point}" for point in model.points]
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(model, args, **data, processing_class=processing_class, callbacks=[best])
        self._sharded = self.is_fsdp_enabled  # whether a process has a shard of the gradients
        if self.is_deepspeed_enabled:
            plugin = self.accelerator.state.deepspeed_plugin
            self._sharded = plugin.zero_stage > 0
            self._check_configuration(plugin.deepspeed_config)
            plugin.deepspeed_config["gradient_clipping"] = 0.0  # of all experts together; see `_each_alone`
        self._at_rest: set[str] = set()
        self._hooked: WeakSet[torch.optim.Optimizer] = WeakSet()

    def _check_configuration(self, configuration: dict[str, Any]) -> None:
        if "optimizer" in configuration:
            raise ValueError(
                "got an `optimizer` in the DeepSpeed configuration of phase 2, need none, because each expert is a group of "
                "weights of its own: delete that section, and set `optim` and `learning_rate`."
            )
        size = max(sum(weight.numel() for weight in self.model.expert(point).values()) for point in self.model.points)
        most = configuration["zero_optimization"].get("sub_group_size", size)
        if most != "auto" and most < size:
            raise ValueError(
                f"got sub_group_size={most} in the DeepSpeed configuration, need {size} at least, because an expert's "
                "gradient is clipped as a whole: leave it out, or set 1e9."
            )

    def rank(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        inputs = dict(inputs)
        pairs, groups = inputs.pop("pairs"), inputs.pop("groups")
        pairs = {point: pairs[pairs[:, 0] == index, 1:] for index, point in enumerate(self.model.points)}
        active = self.model.active
        points = active
        # DeepSpeed and FSDP need all processes to run the same experts
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            # at least one, so that all processes take part
            points = [point for point in active if len(pairs[point])] or active[:1]
        rewards = model(**inputs, points=points).logits
        return {f"/{point}": (rewards[:, i], pairs[point], groups) for i, point in enumerate(points)}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Return the batches of an optimizer step, and note the experts that have no pair in it."""
        batches, prompts = super().get_batch_samples(*args, **kwargs)
        counts = dict(zip(self.model.points, prompts.tolist(), strict=True))
        self._at_rest = {point for point, count in counts.items() if not count or point not in self.model.active}
        return batches, prompts

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with unsharded_afterwards(self):  # DeepSpeed's optimizer holds its own weights
            output = super().train(*args, **kwargs)
        # resuming replaces the callback of `__init__`
        (best,) = (one for one in self.callback_handler.callbacks if isinstance(one, BestExperts))
        best.restore(self.args, self.model)
        return output

    # The optimizer.

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return all names, so that there is one parameter group, which `create_optimizer` splits."""
        return [name for name, _ in model.named_parameters()]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer with one parameter group per expert; ZeRO shards each group by itself."""
        if self.optimizer is None:
            super().create_optimizer(model)
            (together, _) = self.optimizer.param_groups
            self.optimizer.param_groups = [
                {**together, "params": list(self.model.expert(point).values()), "point": point}
                for point in self.model.points
            ]
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """
        Train a step. Before the first one, hook the optimizer, which accelerate and DeepSpeed have wrapped or replaced by then.
        """
        optimizer = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if optimizer not in self._hooked:
            optimizer.register_step_pre_hook(self._each_alone)
            self._hooked.add(optimizer)
            if self.is_deepspeed_enabled:
                engine = self.model_wrapped
                engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        return super().training_step(*args, **kwargs)

    def _each_alone(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        """
        Clip each expert's gradient, and remove the gradients of experts without a pair, so that Adam does not change them. ZeRO
        calls this for one expert after the other with this process's shard of the gradient; FSDP calls it for all experts, in
        shards.
        """
        for group in optimizer.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights and group["point"] in self._at_rest:
                for weight in weights:
                    weight.grad = None
            elif weights:
                own = [
                    weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad for weight in weights
                ]
                square = torch.stack([gradient.float().square().sum() for gradient in own]).sum()
                norm = float((self._over_processes(square) if self._sharded else square).sqrt())
                self._metrics["train"][f"grad_norm/{group['point']}"] = [norm]
                if 0 < self.args.max_grad_norm < norm:
                    for weight in weights:
                        weight.grad.mul_(self.args.max_grad_norm / norm)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Return the norm of all gradients; [`_each_alone`] clips them."""
        return self._get_grad_norm(model)


class BestExperts(TrainerCallback, ExportableState):
    """
    Callback that keeps the best weights of each expert, and stops an expert after `patience` evaluations without improvement (0
    for never). Training stops with the last expert. The best weights are written to `output_dir/best/` at once, one file per
    point and step. They are deleted when a checkpoint records better ones, so that a run that is killed at any time finds the
    files of its last checkpoint.

    Args:
        metric (`str`): Prefix of the metric, whose name is `<metric>/<point>`.
        greater_is_better (`bool`): Whether a larger value is better.
        patience (`int`): Number of evaluations.
        keep_best (`bool`): Whether the experts get their best weights at the end, or keep the last.
    """

    def __init__(self, metric: str, greater_is_better: bool, patience: int, keep_best: bool):
        self.arguments = {
            "metric": metric,
            "greater_is_better": greater_is_better,
            "patience": patience,
            "keep_best": keep_best,
        }
        self.records: dict[str, dict[str, Any]] = {}  # point -> best value, its step, and evaluations since

    def state(self) -> dict[str, Any]:
        return {"args": self.arguments, "attributes": {"records": self.records}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Experts, **kwargs: Any) -> None:
        """
        Check that a resumed run has the best weights of its experts, and stop the experts whose training has ended.

        Raises:
            ValueError: If the best weights of an expert are missing.
        """
        best = [self._path(args, point) for point, record in self.records.items() if record["step"] is not None]
        if missing := [path for path in best if not is_complete(path)]:
            raise ValueError(
                f"{missing[0]}: got no weights that can be read, need those of the expert at its best, because its training ends with "
                f"them: put them back, or delete {args.output_dir} to begin this stage anew."
            )
        self._stop(model)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Experts, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        for point in model.active:
            value = metrics[f"{self.arguments['metric']}/{point}"]
            sign = 1 if self.arguments["greater_is_better"] else -1
            record = self.records.setdefault(point, {"best": -sign * math.inf, "step": None, "since": 0})
            if sign * value > sign * record["best"]:
                self.records[point] = {"best": value, "step": state.global_step, "since": 0}
                weights = {name: full_copy(weight) for name, weight in model.expert(point).items()}
                if args.should_save:
                    self._write(weights, self._path(args, point))
            else:
                record["since"] += 1
        self._stop(model)
        if not model.active:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            current = {self._path(args, point) for point in self.records}
            for path in set((Path(args.output_dir) / "best").glob("*")) - current:
                path.unlink()

    def restore(self, args: RankedRewardConfig, model: Experts) -> None:
        """Load the best weights of each expert into an unsharded model."""
        if not self.arguments["keep_best"]:
            return
        PartialState().wait_for_everyone()  # for the files
        for point, record in self.records.items():
            if record["step"] is not None:
                best = load_file(self._path(args, point))
                for name, weight in model.expert(point).items():
                    weight.data.copy_(best[name])

    def _stop(self, model: Experts) -> None:
        patience = self.arguments["patience"]
        since = {point: record["since"] for point, record in self.records.items()}
        model.active = [point for point in model.points if not patience or since.get(point, 0) < patience]

    def _path(self, args: Any, point: str) -> Path:
        return Path(args.output_dir) / "best" / f"{slug(point)}-{self.records[point]['step']}.safetensors"

    def _write(self, weights: dict[str, Tensor], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file(weights, temporary)
        temporary.replace(path)


def history_of(history: list[dict[str, Any]], point: str) -> list[dict[str, Any]]:
    """Return one point's part of the log history of [`ExpertsTrainer`], with the names that training it alone would give."""
    entries = []
    for entry in history:
        shared = {key: value for key, value in entry.items() if "/" not in key}
        own = {key.partition("/")[0]: value for key, value in entry.items() if key.partition("/")[2] == point}
        if own:
            entries.append(shared | own)
    return entries
