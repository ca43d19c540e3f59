"""TRL's PPOTrainer with what a long run needs. It needs TRL 1.12, so import it by way of `dmoerm_trl.rl.ppo`."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from trl.experimental.ppo import PPOTrainer

from .sampling import nucleus_rollout


class ResumablePPOTrainer(PPOTrainer):
    """
    TRL's `PPOTrainer`, of which three steps are overridden:

    - `train` goes on from a checkpoint, which TRL's cannot, draws everything from `args.seed`, and samples with top-p.
    - `_save_checkpoint` saves the value model too, which TRL's forgets.
    - `log`, called before anything is saved, stops a run whose rewards are not numbers.

    A run that was killed and goes on ends with the weights of an unbroken one, on the same machine and with
    `num_sample_generations=0` (TRL's printed samples draw random numbers on a schedule that starts anew). Its logged
    `eps` counts the episodes before the kill too.

    Args:
        top_p (`float`): of the rollout, see [`~dmoerm_trl.rl.sampling.nucleus_rollout`].
        kwargs: as of `PPOTrainer`, by name.
    """

    def __init__(self, *, top_p: float = 1.0, **kwargs: Any):
        if not 0 < top_p <= 1:
            raise ValueError(f"got top_p={top_p}, need above 0 and at most 1: it is the share of probability kept.")
        if kwargs["args"].gradient_checkpointing:  # PPOTrainer leaves it to the models
            kwargs["model"].gradient_checkpointing_enable(kwargs["args"].gradient_checkpointing_kwargs)
            kwargs["value_model"].gradient_checkpointing_enable(kwargs["args"].gradient_checkpointing_kwargs)
        super().__init__(**kwargs)
        self.top_p = top_p
        self.is_fsdp_xla_v1_enabled = False  # loading asks for it, and PPOTrainer does not call Trainer.__init__
        self.model._keys_to_ignore_on_save = None  # loading a policy with tied weights asks for it

    def train(self, resume_from_checkpoint: str | os.PathLike | None = None) -> None:
        """
        Args:
            resume_from_checkpoint (`str`, *optional*): a folder `checkpoint-N` of this run; see
                [`~dmoerm_trl.training.trainer.last_checkpoint`].

        Raises:
            ValueError: if the checkpoint is of a run with other numbers of steps or episodes, or under DeepSpeed or FSDP.
        """
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
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                f"got {checkpoint} under DeepSpeed or FSDP, need one process for each whole model, because their optimizer "
                "states are not restored here: start without them, or in another output_dir."
            )
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        steps, done = self.args.num_total_batches, state["global_step"]
        if state["max_steps"] != steps or state["episode"] != done * self.args.batch_size:
            raise ValueError(
                f"got {checkpoint} of a run of {state['max_steps']} steps with {state['episode'] // done} episodes each, "
                f"need {steps} with {self.args.batch_size}, because the learning rate and the order of the prompts hang on "
                "them: go on with the recipe that began the run, or take another output_dir."
            )
        self._load_from_checkpoint(str(checkpoint), self.policy_model)
        self._load_from_checkpoint(str(checkpoint / "value_model"), self.value_model)
        self._load_optimizer_and_scheduler(str(checkpoint))
        for _ in range(done):
            next(self.dataloader)
        go_on = _GoOn(state, lambda: self._load_rng_state(str(checkpoint)))
        self.callback_handler.callbacks.insert(0, go_on)  # before those that look at the step

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # before TRL's, which writes the file that marks a whole checkpoint last
            self.value_model.save_pretrained(folder / "value_model")
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in ("objective/scores", "objective/kl"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(
                    f"got {name} {logs[name]} at step {self.state.global_step}, need a number, because one reward that is "
                    "none spoils the advantages of its whole batch, and with them the weights: score texts of the last "
                    "steps with the reward model, load it in float32 or bfloat16, or lower the learning rate. The "
                    f"checkpoints in {self.args.output_dir} are from before."
                )
        super().log(logs, start_time)


class _GoOn(TrainerCallback):
    """Puts a run that `PPOTrainer.train` has just set to step 0 where it was, right before its loop."""

    def __init__(self, state: dict[str, Any], restore_random_state: Any):
        self.saved, self.restore_random_state = state, restore_random_state

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.global_step, state.episode = self.saved["global_step"], self.saved["episode"]
        state.log_history = self.saved["log_history"]
        self.steps = args.num_total_batches
        args.num_total_batches -= state.global_step  # how often the loop runs
        self.restore_random_state()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        args.num_total_batches = self.steps


def _in_order(batches: Iterable, seed: int) -> Iterator:
    """What a data loader gives, epoch after epoch, in an order that hangs on the seed alone, not on what was drawn before."""
    seeds = torch.Generator().manual_seed(seed)
    while True:
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (), generator=seeds)))
            epoch = iter(batches)
            first = next(epoch)  # with which the whole order is drawn
        yield first
        yield from epoch
