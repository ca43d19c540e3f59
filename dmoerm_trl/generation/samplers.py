"""Sample responses of a policy: one to each of many prompts, or many to one prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..data.formatting import Formatter
from ..modeling.load_errors import loading
from .log_probs import sample

Sampler = Callable[[list[dict], int, int], list[str]]
"""Function (prompt, number of responses, seed) -> texts without special tokens. The same arguments give the same texts."""


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
    Sample one response per prompt.

    Args:
        prompts (`Sequence[list[dict]]`): Prompts as lists of turns; the last turn is the user's.
        max_new_tokens (`int`): Maximum tokens of a response.
        seed (`int`): Seed of the sampling. The global random state is not changed.

    Returns:
        `list[str]`: The texts of the responses, without special tokens.

    Example:

    ```python
    from dmoerm_trl import Formatter, generate, load_policy

    policy, tokenizer = load_policy("runs/demo/base")
    (text,) = generate(policy, [[{"role": "user", "content": "Hello?"}]], Formatter(tokenizer, 512), max_new_tokens=4)
    ```
    """
    was_training, responses = policy.training, []
    policy.eval()
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(prompts), batch_size), desc="generating", delay=3, leave=False):
            drawn = sample(policy, prompts[start : start + batch_size], formatter, **options)
            responses += formatter.tokenizer.batch_decode(drawn.responses, skip_special_tokens=True)
    policy.train(was_training)
    return responses


def sampler(
    policy: PreTrainedModel,
    formatter: Formatter,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 500,
) -> Sampler:
    """
    Build a sampler of many responses to one prompt with transformers' `generate`. The prompt goes through the policy once,
    whatever the number of responses.

    Args:
        max_new_tokens (`int`): Maximum tokens of a response.
        batch_size (`int`): Number of responses generated at a time, which bounds memory. Another number samples other texts.
    """
    policy.eval()
    tokenizer = formatter.tokenizer
    end = formatter.markers.end_of_turn or [tokenizer.eos_token_id]
    generator = torch.Generator(policy.device)
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(_Draw(generator))

    @torch.inference_mode()
    def draw(prompt: list[dict], count: int, seed: int) -> list[str]:
        generator.manual_seed(seed)
        ids = torch.tensor([formatter.generation_prompt(prompt)], device=policy.device)
        texts: list[str] = []
        while len(texts) < count:
            rows = min(batch_size, count - len(texts))
            cache = DynamicCache(config=policy.config)
            if ids.shape[1] > 1:
                policy(ids[:, :-1], past_key_values=cache, use_cache=True)
                cache.batch_repeat_interleave(rows)
            batch = ids.expand(rows, -1)
            sequences = policy.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                past_key_values=cache,
                max_new_tokens=max_new_tokens,
                do_sample=False,  # the last processor has already drawn the token
                repetition_penalty=1.0,  # some models set another
                logits_processor=processors,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts += tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)
        return texts

    return draw


class _Draw(LogitsProcessor):
    """
    Logits processor that draws the next token and masks all others. Unlike `do_sample` it has its own random state and uses one
    random number per row instead of one per token of the vocabulary, which takes a third of the time on a CPU.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = scores.float().softmax(-1).double().cumsum(-1)  # (B, V)
        # in [0, 1)
        uniform = torch.rand(len(scores), 1, generator=self.generator, dtype=torch.float64, device=scores.device)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def vllm_sampler(
    policy: str, formatter: Formatter, *, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0, **engine
) -> Sampler:
    """
    Build a sampler with vLLM, which batches the responses and shares the prompt; see [`sampler`].

    Args:
        policy (`str`): Folder or hub name.
        engine: Further arguments of `vllm.LLM`, such as `dtype` and `tensor_parallel_size`.

    Raises:
        ImportError: If vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ImportError(
            "got backend 'vllm', which is not installed: run `pip install vllm`, or take the backend 'transformers'."
        ) from error
    llm = LLM(model=policy, **engine)

    def draw(prompt: list[dict], count: int, seed: int) -> list[str]:
        parameters = SamplingParams(
            n=count,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_new_tokens,
            seed=seed,
            stop_token_ids=formatter.markers.end_of_turn,
            skip_special_tokens=True,
        )
        (request,) = llm.generate(
            {"prompt_token_ids": formatter.generation_prompt(prompt)}, parameters, use_tqdm=False
        )
        return [output.text for output in request.outputs]

    return draw


@dataclass(frozen=True)
class SamplerSpec:
    """
    Specification of a [`Sampler`], which [`load`] builds.

    Args:
        name (`str`): Folder or hub name of a causal language model.
        max_new_tokens (`int`): Maximum tokens of a response.
        temperature, top_p (`float`): Settings of the sampling.
        batch_size (`int`): Number of responses that transformers generates at a time.
        backend (`str`): `"transformers"` or `"vllm"`.
        dtype (`str`): Dtype of the policy.
        max_length (`int`): Maximum tokens of a prompt; older turns are cut.

    Example:

    ```python
    from dmoerm_trl import SamplerSpec

    sample = SamplerSpec("runs/demo/base", max_new_tokens=4, max_length=256).load()
    texts = sample([{"role": "user", "content": "Hello?"}], 3, 0)  # three responses, by seed 0
    ```
    """

    name: str
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 500
    backend: str = "transformers"
    dtype: str = "float32"
    max_length: int = 2048

    def __post_init__(self):
        if self.backend not in ("transformers", "vllm"):
            raise ValueError(f"got backend {self.backend!r}, need 'transformers' or 'vllm'.")
        if min(self.max_new_tokens, self.batch_size) < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"got max_new_tokens={self.max_new_tokens}, batch_size={self.batch_size}, temperature={self.temperature} and "
                f"top_p={self.top_p}, need at least 1, at least 1, above 0, and above 0 up to 1."
            )
        check_dtype(self.dtype)

    def load(self) -> Sampler:
        with loading(self.name, "a causal language model"):
            tokenizer = AutoTokenizer.from_pretrained(self.name)
        check_chat_template(tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        formatter = Formatter(tokenizer, self.max_length)
        options = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p}
        if self.backend == "vllm":
            return vllm_sampler(self.name, formatter, **options, dtype=self.dtype)
        with loading(self.name, "a causal language model"):
            policy = AutoModelForCausalLM.from_pretrained(self.name, dtype=getattr(torch, self.dtype))
        policy = policy.to("cuda" if torch.cuda.is_available() else "cpu")
        return sampler(policy, formatter, **options, batch_size=self.batch_size)


def load_policy(name: str, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a causal language model and its tokenizer, which pads on the left.

    Raises:
        ValueError: If it cannot be read, or has no chat template.

    Example:

    ```python
    from dmoerm_trl import load_policy

    policy, tokenizer = load_policy("runs/demo/base")
    ```
    """
    with loading(name, "a causal language model"):
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    check_chat_template(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    with loading(name, "a causal language model"):
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)), tokenizer


def check_dtype(dtype: str) -> None:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"got dtype {dtype!r}, need 'float32', 'bfloat16' or 'float16'.")


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Check that a tokenizer has a chat template. Policies and reward models exchange text, so their vocabularies may differ, but
    each needs its own chat format.

    Raises:
        ValueError: If a decoder's tokenizer has no chat template.
    """
    if not tokenizer.chat_template and tokenizer.sep_token_id is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: got a tokenizer without a chat template, need one because the turns of a prompt "
            "would run into each other, and a model would read what it was never trained on: set "
            "tokenizer.chat_template to that of its training and save the tokenizer."
        )
