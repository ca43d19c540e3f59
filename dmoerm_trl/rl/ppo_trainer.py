"""TRL's PPOTrainer with resuming and checks for long runs. It needs TRL 1.12, so import it through `dmoerm_trl.rl.ppo`."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.integrations.deepspeed import deepspeed_load_checkpoint, unset_hf_deepspeed_config
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from ..distributed.engines import check_engine, check_installed, start_deepspeed, wants_fsdp
from ..distributed.processes import processes
from ..distributed.sharding import unsharded
from ..generation.log_probs import nucleus_rollout
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification, DMoERMModel
from ..scoring.ensemble import RewardEnsemble
from ..training.checkpoints import check_checkpoint, last_checkpoint


@dataclass
class DeepSpeedPPOConfig(PPOConfig):
    """
    TRL's `PPOConfig` that accepts a DeepSpeed configuration, as `deepspeed` or from the launcher. The value `"auto"` means what
    PPOTrainer does without DeepSpeed: gradients are not clipped.
    """

    def __post_init__(self):
        if self.deepspeed:
            check_installed()
        given = self.max_grad_norm, self.world_size
        self.max_grad_norm = 0.0
        self.world_size = processes()  # read for batch sizes; TRL's field hides the property
        super().__post_init__()
        self.max_grad_norm, self.world_size = given
        if self.deepspeed_plugin is not None and self.deepspeed_plugin.is_auto("gradient_clipping"):
            self.deepspeed_plugin.deepspeed_config["gradient_clipping"] = 0.0
        unset_hf_deepspeed_config()  # otherwise models would be loaded in shards, but the trainer shards them


class ResumablePPOTrainer(PPOTrainer):
    """
    TRL's `PPOTrainer` with four methods overridden:

    - `train` can resume from a checkpoint, draws all random numbers from `args.seed`, and samples with top-p.
    - `_save_checkpoint` saves the value model too, which TRL leaves out.
    - `save_model` saves a policy that several processes trained, which TRL cannot under ZeRO-3 or without DeepSpeed.
    - `log`, which is called before anything is saved, stops a run whose rewards are not numbers.

    A resumed run ends with the weights of an uninterrupted one, on the same machine and with `num_sample_generations=0`: the
    samples that TRL prints draw random numbers on a schedule that starts again. The logged `eps` counts the episodes before the
    interruption too.

    Args:
        top_p (`float`): Nucleus of the rollout; see [`~dmoerm_trl.generation.log_probs.nucleus_rollout`].
        kwargs: Arguments of `PPOTrainer`, by name.

    Raises:
        ValueError: If DeepSpeed is configured but would not run, or if the run uses FSDP.
    """

    def __init__(self, *, top_p: float = 1.0, **kwargs: Any):
        if not 0 < top_p <= 1:
            raise ValueError(
                f"got top_p={top_p}, need above 0 and at most 1, because it is the share of probability that is kept."
            )
        if kwargs["args"].gradient_checkpointing:  # PPOTrainer leaves it to the models
            kwargs["model"].gradient_checkpointing_enable(kwargs["args"].gradient_checkpointing_kwargs)
            kwargs["value_model"].gradient_checkpointing_enable(kwargs["args"].gradient_checkpointing_kwargs)
        start_deepspeed(kwargs["args"])
        if kwargs["args"].deepspeed_plugin is not None:
            Accelerator(deepspeed_plugin=kwargs["args"].deepspeed_plugin)  # PPOTrainer's own then has the plugin too
        with _reward_models_left_alone():
            super().__init__(**kwargs)
        check_engine(self)
        if wants_fsdp(self):
            raise ValueError(
                "got FSDP, need DeepSpeed or plain data parallelism, because PPOTrainer supports no other engine: "
                "use recipes/accelerate/deepspeed.yaml."
            )
        if self.is_deepspeed_enabled:
            _place(self.reward_model, self.accelerator)
        self.top_p = top_p
        # loading and saving read these attributes, which PPOTrainer does not set, because it does not call Trainer.__init__
        self.is_fsdp_xla_v1_enabled = self.is_distributed_loading_by_transformers = False
        self.model._keys_to_ignore_on_save = None  # loading a policy with tied weights reads it

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None) -> None:
        """
        Train, starting from a checkpoint if one is given.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A folder `checkpoint-N` of this run, or True for the last
                complete one in `output_dir`, if there is one.

        Raises:
            ValueError: If the checkpoint is from a run with other numbers of steps or episodes, another ZeRO stage or, with
                ZeRO, another number of processes.
        """
        if isinstance(resume_from_checkpoint, bool):
            resume_from_checkpoint = last_checkpoint(self.args.output_dir) if resume_from_checkpoint else None
        set_seed(self.local_seed)
        batches = self.dataloader
        self.dataloader = _in_order(batches, self.args.seed)
        try:
            if resume_from_checkpoint is not None:
                self._go_on_from(Path(resume_from_checkpoint))
            with nucleus_rollout(self.policy_model, self.top_p):
                super().train()
        finally:
            self.dataloader = batches

    def _go_on_from(self, checkpoint: Path) -> None:
        check_checkpoint(checkpoint, self)
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        steps, done = self.args.num_total_batches, state["global_step"]
        if state["max_steps"] != steps or state["episode"] != done * self.args.batch_size:
            raise ValueError(
                f"got {checkpoint} of a run of {state['max_steps']} steps with {state['episode'] // done} episodes each, "
                f"need {steps} with {self.args.batch_size}, because the learning rate and the order of the prompts depend on "
                "them: use the recipe that began the run, or another output_dir."
            )
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model, str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint), self.policy_model)
            self._load_from_checkpoint(str(checkpoint / "value_model"), self.value_model)
        self._load_optimizer_and_scheduler(str(checkpoint))
        for _ in range(done):
            next(self.dataloader)
        go_on = _GoOn(state, lambda: self._load_rng_state(str(checkpoint)))
        self.callback_handler.callbacks.insert(0, go_on)  # before the callbacks that read the step

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with unsharded(self.value_model):
            if self.args.should_save:  # before TRL, which writes the file that marks a complete checkpoint last
                self.value_model.save_pretrained(folder / "value_model")
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        before = self.model, self.is_deepspeed_enabled
        self.model, self.is_deepspeed_enabled = self.policy_model, False
        with unsharded(self.policy_model):
            super().save_model(output_dir, _internal_call)
        self.model, self.is_deepspeed_enabled = before

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in ("objective/scores", "objective/kl"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(
                    f"got {name} {logs[name]} at step {self.state.global_step}, need a number, because one NaN or infinite "
                    "reward spoils the advantages of its whole batch, and with them the weights: score texts of the last "
                    "steps with the reward model, load it in float32 or bfloat16, or lower the learning rate. The "
                    f"checkpoints in {self.args.output_dir} are from earlier steps."
                )
        super().log(logs, start_time)


@contextmanager
def _reward_models_left_alone() -> Iterator[None]:
    """Context manager that keeps our reward models out of DeepSpeed's engine; see [`~dmoerm_trl.distributed.sharding`]."""
    prepare = ppo_trainer.prepare_deepspeed

    def prepare_others(model: nn.Module, accelerator: Accelerator) -> nn.Module:
        ours = isinstance(model, (DMoERMForSequenceClassification, RewardEnsemble))
        return model if ours else prepare(model, accelerator)

    ppo_trainer.prepare_deepspeed = prepare_others
    try:
        yield
    finally:
        ppo_trainer.prepare_deepspeed = prepare


def _place(reward_model: nn.Module, accelerator: Accelerator) -> None:
    """Cast the bases of our reward models to bf16 if it is on, and shard them under ZeRO-3, as DeepSpeed's engine would."""
    plugin = accelerator.state.deepspeed_plugin
    for module in reward_model.modules():
        if isinstance(module, DMoERMModel):
            if plugin.deepspeed_config.get("bf16", {}).get("enabled") is True:
                for weight in module.backbones.parameters():  # not buffers: positions need fp32
                    weight.data = weight.data.to(torch.bfloat16)
            if plugin.zero_stage == 3:
                module.shard(plugin.deepspeed_config)  # weight by weight, so before they are all on one device
            module.to(accelerator.device)


class _GoOn(TrainerCallback):
    """Callback that restores the step of a resumed run, which `PPOTrainer.train` has just set to 0, right before its loop."""

    def __init__(self, state: dict[str, Any], restore_random_state: Any):
        self.saved, self.restore_random_state = state, restore_random_state

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.global_step, state.episode = self.saved["global_step"], self.saved["episode"]
        state.log_history = self.saved["log_history"]
        self.steps = args.num_total_batches
        args.num_total_batches -= state.global_step  # the number of steps that the loop runs
        self.restore_random_state()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.num_total_batches = self.steps  # before a checkpoint saves it; the loop has read it by now

    on_train_end = on_step_end  # for a run without steps left


def _in_order(batches: Iterable, seed: int) -> Iterator:
    """Yield the batches of a data loader, epoch after epoch, in an order that depends only on the seed."""
    seeds = torch.Generator().manual_seed(seed)
    while True:
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (), generator=seeds)))
            epoch = iter(batches)
            first = next(epoch)  # this draws the whole order
        yield first
        yield from epoch
