"""Responses of a policy."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.formatting import Formatter


@torch.no_grad()
def generate(
    policy: PreTrainedModel,
    prompts: Sequence[list[dict]],
    formatter: Formatter,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> list[str]:
    """
    One sampled response a prompt.

    Args:
        prompts (`Sequence[list[dict]]`): turns, the last of the user.
        max_new_tokens (`int`): tokens after which a response is cut off.
        seed (`int`): of the sampling; the global random state is left as it was.

    Returns:
        `list[str]`: the responses' texts, without special tokens.
    """
    tokenizer, was_training, responses = formatter.tokenizer, policy.training, []
    policy.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(prompts), batch_size), desc="generating", delay=3, leave=False):
            encodings = [formatter.encode(prompt, "") for prompt in prompts[start : start + batch_size]]
            ids = [encoding.input_ids[: encoding.prompt_length] for encoding in encodings]
            batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(policy.device)
            sequences = policy.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                eos_token_id=formatter.markers.end_of_turn or tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            answers = sequences[:, batch["input_ids"].shape[1] :]
            responses += tokenizer.batch_decode(answers, skip_special_tokens=True)
    policy.train(was_training)
    return responses
