"""Measure a policy during RL: rewards, KL, length and repetition on held-out prompts, one JSON line per measured step."""

import json
import math
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.formatting import Formatter
from ..distributed.processes import is_main
from ..distributed.sharding import unsharded
from ..evaluation.kl import KLEstimate, policy_kl
from ..files import write_text, writing
from ..generation.log_probs import log_probs, sample
from ..scoring.reward_functions import TextScorer


def every(steps: int) -> range:
    """
    Return the steps 0, `steps`, 2 `steps`, ... at which a run is measured.

    Raises:
        ValueError: If `steps` is less than 1.
    """
    if steps < 1:
        raise ValueError(
            f"got monitor_every={steps}, need at least 1: set the number of steps between two measurements."
        )
    return range(0, sys.maxsize, steps)


class PolicyMonitor(TrainerCallback):
    """
    Callback that measures the policy at chosen steps of PPO, GRPO or RLOO. Each line of its file has these keys:

    | key | |
    | --- | --- |
    | `step` | step of the trainer; 0 is before the first update |
    | `proxy`, `gold` | mean reward of the responses; `gold` only where it is known |
    | `k1`, `k2`, `k3` | KL from the reference policy, in nats per response; see recipes/ESTIMATORS.md |
    | `length` | mean number of tokens of a response, without the end token |
    | `repetition` | mean [`repetition`] |
    | `without_end` | share of responses that were cut off |
    | `prompts`, `temperature`, `top_p` | settings of the measurement |

    All keys but those of the last two rows have a `<key>_error` too, the standard error over prompts. The responses are written
    to `responses/<step>.jsonl` beside the file. With top-p below 1 the responses come from the truncated policy and the
    log-probabilities from the full one: the estimates are still 0 for equal policies, but biased.

    Measuring leaves the random state and the mode of the policy unchanged. A run that resumes from a checkpoint drops the lines
    of the steps that it repeats. In a distributed run all processes measure the same prompts, so that ZeRO-3 can gather the
    weights and no process times out; only the main process writes and calls `gold`.

    Args:
        path (`str` or `Path`): The JSONL file. A run that starts at step 0 overwrites it.
        prompts (`Sequence[list[dict]]`): Held-out prompts as lists of turns; the last turn is the user's.
        formatter (`Formatter`): A formatter with the policy's tokenizer.
        reference (`PreTrainedModel`): The policy before training; it is moved to the policy's device.
        steps (`Container[int]`): The steps to measure, such as `range(0, 3001, 100)` or [`every`].
        proxy ([`TextScorer`]): The reward that is optimised.
        gold ([`TextScorer`], *optional*): The reward that stands for the truth.
        max_new_tokens, temperature, top_p: Settings of the sampling; use those of the run.
        batch_size (`int`): Number of prompts per forward pass.
        seed (`int`): Seed of the sampling, the same at every step.

    Example:

    ```python
    from dmoerm_trl import Formatter, PolicyMonitor, TextRewards, load_policy, load_reward_model

    policy, tokenizer = load_policy("runs/demo/base")
    monitor = PolicyMonitor(
        "runs/monitor.jsonl",
        [[{"role": "user", "content": "Hello?"}]],
        Formatter(tokenizer, 512),
        load_policy("runs/demo/base")[0],
        steps=range(0, 100, 10),
        proxy=TextRewards(*load_reward_model("runs/demo/model", max_length=512)),
        max_new_tokens=4,
    )
    monitor.measure(policy)["k3"]  # 0: the policy is still the reference
    ```
    """

    def __init__(
        self,
        path: str | Path,
        prompts: Sequence[list[dict]],
        formatter: Formatter,
        reference: PreTrainedModel,
        *,
        steps: Container[int],
        proxy: TextScorer,
        gold: TextScorer | None = None,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 16,
        seed: int = 0,
    ):
        if not prompts:
            raise ValueError("got no prompts to measure on, need one or more: hold some out.")
        self.path, self.prompts, self.formatter, self.steps = Path(path), list(prompts), formatter, steps
        self.reference = reference.eval()
        self.scorers: dict[str, TextScorer] = {"proxy": proxy} | ({"gold": gold} if gold is not None else {})
        self.sampling = {"temperature": temperature, "top_p": top_p}
        self.max_new_tokens, self.batch_size, self.seed = max_new_tokens, batch_size, seed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        kept = read_monitor(self.path) if state.global_step else []
        kept = [line for line in kept if line["step"] <= state.global_step]
        if is_main():
            write_text(self.path, "".join(map(_json_line, kept)))
        (measured,) = _from_main(state.global_step in {line["step"] for line in kept})
        if not measured:
            self._measure_at(state.global_step, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._measure_at(state.global_step, model)

    def _measure_at(self, step: int, model: Any) -> None:
        if step in self.steps:
            policy = getattr(model, "policy", model)  # PPO trains policy and value model in one module
            line = {"step": step} | self.measure(policy, self.path.parent / "responses" / f"{step}.jsonl")
            if is_main():
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(_json_line(line))

    @torch.no_grad()
    def measure(self, policy: PreTrainedModel, responses_to: Path | None = None) -> dict[str, float]:
        """
        Measure the policy and return one line of the file without its step. This works without training too.

        Args:
            responses_to (`Path`, *optional*): JSONL file to which the responses and their rewards are written.

        Raises:
            ValueError: If a reward is not a number, or the number of rewards is not that of the responses.
        """
        home = self.reference.device
        self.reference.to(policy.device)
        was_training, values, texts = policy.training, [], []
        policy.eval()
        starts = range(0, len(self.prompts), self.batch_size)
        with torch.random.fork_rng(), unsharded(policy), unsharded(self.reference):
            torch.manual_seed(self.seed)
            for start in tqdm(starts, desc="measuring", delay=3, leave=False, disable=not is_main()):
                batch, written = self._measure_batch(policy, self.prompts[start : start + self.batch_size])
                values.append(batch)
                texts += written
        policy.train(was_training)
        self.reference.to(home)
        columns = {name: torch.cat([batch[name] for batch in values]).float() for name in values[0]}
        # all processes have to call a sharded reward model equally often, so with the same texts
        texts = _from_main(*texts)
        scorers = self.scorers if is_main() else {"proxy": self.scorers["proxy"]}
        for name, scorer in scorers.items():
            columns[name] = _rewards(name, scorer, self.prompts, texts)
        if responses_to is not None and is_main():
            rewards = zip(*(columns[name].tolist() for name in scorers), strict=True)
            _write_responses(responses_to, self.prompts, texts, list(scorers), list(rewards))
        line: dict[str, float] = {}
        for name, column in columns.items():
            estimate = KLEstimate(column)  # a mean over prompts and its standard error, whatever the quantity
            line[name], error = estimate.mean, estimate.standard_error
            line[f"{name}_error"] = error if math.isfinite(error) else None
        return line | {"prompts": len(self.prompts), **self.sampling}

    def _measure_batch(
        self, policy: PreTrainedModel, prompts: list[list[dict]]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Compute one value per prompt of each quantity that depends on tokens, and decode the responses."""
        drawn = sample(policy, prompts, self.formatter, max_new_tokens=self.max_new_tokens, **self.sampling)
        of_policy, of_reference = (
            log_probs(model, drawn, self.sampling["temperature"]) for model in (policy, self.reference)
        )
        kl = policy_kl(of_policy, of_reference, drawn.response_mask)
        responses = drawn.responses
        values = {name: estimate.per_sequence.cpu() for name, estimate in kl.items()} | {
            "length": torch.tensor([len(ids) for ids in responses]),
            "repetition": torch.tensor([repetition(ids) for ids in responses]),
            "without_end": (~drawn.ended).cpu(),
        }
        return values, self.formatter.tokenizer.batch_decode(responses, skip_special_tokens=True)


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """
    Compute the share of a response's n-grams that occurred in it before: 1 - distinct / all, from 0 to below 1.

    Args:
        tokens (`Sequence[int]`): The response; with fewer than n tokens the share is 0.
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def read_monitor(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines of a monitor's file; none if there is no file. A last line that a kill left incomplete is skipped."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_responses(path: str | Path) -> tuple[list[list[dict]], list[str]]:
    """Read the prompts and responses of a monitor's `responses/<step>.jsonl`."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [row["prompt"] for row in rows], [row["response"] for row in rows]


def _write_responses(path: Path, prompts: list, texts: list[str], names: list[str], rewards: list[tuple]) -> None:
    with writing(path) as file:
        for prompt, text, values in zip(prompts, texts, rewards, strict=True):
            file.write(_json_line({"prompt": prompt, "response": text} | dict(zip(names, values, strict=True))))


def _json_line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def _from_main(*values: Any) -> list[Any]:
    """Return the main process's values in all processes."""
    return broadcast_object_list(list(values)) if dist.is_initialized() else list(values)


def _rewards(name: str, scorer: TextScorer, prompts: list[list[dict]], texts: list[str]) -> Tensor:
    rewards = torch.as_tensor(scorer(prompts, texts), dtype=torch.float32)
    if rewards.shape != (len(texts),) or not rewards.isfinite().all():
        raise ValueError(
            f"got {name} rewards of shape {tuple(rewards.shape)}, {int((~rewards.isfinite()).sum())} of them NaN or infinite, "
            f"need {len(texts)} numbers, one a response: fix what `{name}` returns."
        )
    return rewards
