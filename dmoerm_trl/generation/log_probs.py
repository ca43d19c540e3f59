"""Sample from a policy and compute its log-probabilities, for PPO's rollout and for the KL."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..data.formatting import Formatter


class Sample(NamedTuple):
    """
    Responses of a policy to a batch of prompts.

    Attributes:
        input_ids (`Tensor` of shape (B, P + T)): Prompts padded on the left, responses padded on the right.
        attention_mask (`Tensor` of shape (B, P + T)): 1 for tokens, including the end of the response.
        response_mask (`Tensor` of shape (B, T)): The same for the responses only.
        ended (`Tensor` of shape (B,)): Whether the response ended; otherwise it was cut off.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    ended: Tensor

    @property
    def responses(self) -> list[list[int]]:
        """Return the tokens of each response, without its end."""
        lengths = (self.response_mask.sum(1) - self.ended.long()).tolist()
        rows = self.input_ids[:, -self.response_mask.shape[1] :].tolist()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]


@torch.no_grad()
def sample(
    policy: PreTrainedModel,
    prompts: Sequence[list[dict]],
    formatter: Formatter,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Sample:
    """
    Sample one response per prompt, in one batch. The policy should be in evaluation mode.

    Args:
        prompts (`Sequence[list[dict]]`): Prompts as lists of turns; the last turn is the user's.
        formatter (`Formatter`): A formatter with the policy's tokenizer.
        max_new_tokens (`int`): Maximum tokens of a response.
    """
    tokenizer = formatter.tokenizer
    ids = [formatter.generation_prompt(prompt) for prompt in prompts]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(policy.device)
    ends = formatter.markers.end_of_turn or [tokenizer.eos_token_id]
    with _sampling_as_asked(policy):
        sequences = policy.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
            top_k=0,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=False,  # each process has the unsharded policy
        )
    answers = sequences[:, batch["input_ids"].shape[1] :]
    is_end = torch.isin(answers, torch.tensor(ends, device=answers.device))
    mask = (is_end.long().cumsum(1) - is_end.long() == 0).long()  # nothing ended before this token
    return Sample(sequences, torch.cat([batch["attention_mask"], mask], 1), mask, is_end.any(1))


@torch.no_grad()
def log_probs(model: PreTrainedModel, sample: Sample, temperature: float = 1.0) -> Tensor:
    """
    Compute the log-probability of each token of the responses under a language model, shape (B, T), at the given temperature
    and without top-p.
    """
    length = sample.response_mask.shape[1]
    positions = (sample.attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=sample.input_ids,
        attention_mask=sample.attention_mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits[:, :-1]
    logits = logits.float() / temperature
    return logits.gather(2, sample.input_ids[:, -length:].unsqueeze(2)).squeeze(2) - logits.logsumexp(2)


@contextmanager
def nucleus_rollout(policy: PreTrainedModel, top_p: float) -> Iterator[None]:
    """
    Context manager in which the rollout of TRL's PPO, which has no option for it, uses nucleus sampling: it samples from the
    smallest set of tokens whose probabilities sum to `top_p`.

    The log-probabilities of the rollout remain those of the full distribution, like those of the reference and the update.
    Otherwise the first ratio of an update would not be 1, and a token outside the nucleus that the reference finds likely would
    have an infinite penalty.
    """
    generate = policy.generate

    def rollout(*args: Any, generation_config: GenerationConfig | None = None, **kwargs: Any) -> Any:
        if generation_config is None:  # another call than TRL's rollout
            return generate(*args, **kwargs)
        generation_config.top_p = top_p
        with _sampling_as_asked(policy):
            output = generate(
                *args, generation_config=generation_config, **kwargs | {"output_scores": False, "output_logits": True}
            )
        output.scores = tuple(logits.div_(generation_config.temperature) for logits in output.logits)
        return output

    policy.generate = rollout
    try:
        yield
    finally:
        del policy.generate


@contextmanager
def _sampling_as_asked(policy: PreTrainedModel) -> Iterator[None]:
    """
    Context manager that ignores the checkpoint's generation_config.json; that of Qwen1.5-Chat penalises repetition.
    """
    before = policy.generation_config
    policy.generation_config = GenerationConfig(eos_token_id=before.eos_token_id, pad_token_id=before.pad_token_id)
    try:
        yield
    finally:
        policy.generation_config = before
