"""
Bases in 8 or 4 bits, by bitsandbytes: the linear layers of the tasks' bases alone are quantised, when a checkpoint in full
precision is loaded. The router, LoRA, the heads and the aggregator stay as they are. Such a base is frozen, and is not saved.
"""

import copy
import logging
from importlib.util import find_spec

import torch
from torch import nn
from transformers import BitsAndBytesConfig

NOT_OF_A_BASE = [r"(model\.)?router", r".*\.lora_[AB]"]
"""What transformers is told to leave; the heads are of a class of their own, which it leaves anyway."""


def quantization(
    load_in_4bit: bool, load_in_8bit: bool, compute_dtype: torch.dtype = torch.float32
) -> BitsAndBytesConfig | None:
    """
    The configuration that TRL's and transformers' two switches stand for: NF4, or LLM.int8() without its search for outliers,
    which is one over all texts of a batch, so that a reward would depend on a text's neighbours. None if both are off.

    Args:
        compute_dtype (`torch.dtype`): in which the products with 4-bit weights are computed.

    Raises:
        ValueError: for both, or without bitsandbytes.
    """
    if not (load_in_4bit or load_in_8bit):
        return None
    if load_in_4bit and load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit are both True, need one of them: leave the other out.")
    _check_installed()
    return BitsAndBytesConfig(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        llm_int8_threshold=0.0,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
    )


def of_bases_alone(config: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """
    The configuration with which `from_pretrained` quantises the bases and nothing else.

    Raises:
        ValueError: for another method than that of bitsandbytes, or without bitsandbytes.
    """
    if not isinstance(config, BitsAndBytesConfig):
        raise ValueError(
            f"got a quantization_config of type {type(config).__name__}, need transformers' BitsAndBytesConfig, because the "
            "experts' LoRA is known to fit bitsandbytes' layers alone."
        )
    _check_installed()
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_of_a_cast)
    config = copy.deepcopy(config)
    config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or []), *NOT_OF_A_BASE]
    return config


def keep_differentiable(model: nn.Module) -> None:
    """
    Has 4-bit layers stay as they were loaded. On some CPUs bitsandbytes packs them anew at the first evaluation, into a form
    through which no gradient flows in the training that follows.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantised(module: nn.Module) -> bool:
    """Whether some of its weights are of bitsandbytes."""
    return any(type(weight).__module__.startswith("bitsandbytes.") for weight in module.parameters())


def check_full_precision(module: nn.Module, purpose: str) -> None:
    """
    Raises:
        ValueError: for a quantised base, where the weights themselves are wanted.
    """
    if is_quantised(module):
        raise needs_full_precision(purpose)


def needs_full_precision(purpose: str) -> ValueError:
    """The error of [`check_full_precision`], for what need not be loaded first."""
    return ValueError(
        f"got a quantised base to {purpose}, need full precision, because what was rounded away does not come back: load "
        "the model without `quantization_config`, and quantise where it is used."
    )


def _check_installed() -> None:
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "got a quantised base to load and no bitsandbytes, need the package: pip install 'dmoerm-trl[quantised]', or load "
            "the base as it is."
        )


def _is_not_of_a_cast(record: logging.LogRecord) -> bool:
    """bitsandbytes warns at each product that it casts to fp16."""
    return "inputs will be cast" not in str(record.msg)
