"""
Quantise bases to 8 or 4 bits with bitsandbytes.

Only the linear layers of the tasks' bases are quantised, when a checkpoint in full precision is loaded. The router,
LoRA, the heads and the aggregator stay in full precision. A quantised base is frozen and cannot be saved.
"""

import copy
import logging
from importlib.util import find_spec

import torch
from torch import nn
from transformers import BitsAndBytesConfig

NOT_OF_A_BASE = [r"(model\.)?router", r".*\.lora_[AB]"]
"""Modules that transformers must not quantise. The heads are not listed: it skips their class anyway."""


def quantization(
    load_in_4bit: bool, load_in_8bit: bool, compute_dtype: torch.dtype = torch.float32
) -> BitsAndBytesConfig | None:
    """
    Build the quantisation for the switches `load_in_4bit` and `load_in_8bit` of TRL and transformers; None if both are
    off.

    In 4 bits it is NF4. In 8 bits it is LLM.int8() without its search for outliers, which looks at all texts of a
    batch, so that a reward would depend on the other texts.

    Args:
        compute_dtype (`torch.dtype`): Dtype of the products with 4-bit weights.

    Raises:
        ValueError: If both are on, or bitsandbytes is not installed.
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
    Restrict a quantisation to the bases: the result makes `from_pretrained` quantise nothing else.

    Raises:
        ValueError: If the method is not that of bitsandbytes, or bitsandbytes is not installed.
    """
    if not isinstance(config, BitsAndBytesConfig):
        raise ValueError(
            f"got a quantization_config of type {type(config).__name__}, need transformers' BitsAndBytesConfig, because the "
            "experts' LoRA is known to fit bitsandbytes' layers alone."
        )
    _check_installed()
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_warning)
    config = copy.deepcopy(config)
    config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or []), *NOT_OF_A_BASE]
    return config


def keep_differentiable(model: nn.Module) -> None:
    """
    Prevent bitsandbytes from repacking 4-bit layers. On some CPUs it does so at the first evaluation, and no gradient
    flows through the repacked form if training follows.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantised(module: nn.Module) -> bool:
    """Return whether a module has weights of bitsandbytes."""
    return any(type(weight).__module__.startswith("bitsandbytes.") for weight in module.parameters())


def check_full_precision(module: nn.Module, purpose: str) -> None:
    """
    Check that a module is not quantised, for a purpose that needs the original weights.

    Raises:
        ValueError: If it is quantised.
    """
    if is_quantised(module):
        raise needs_full_precision(purpose)


def needs_full_precision(purpose: str) -> ValueError:
    """Build the error of [`check_full_precision`], for callers that refuse a quantised base before loading it."""
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


def _is_no_cast_warning(record: logging.LogRecord) -> bool:
    """Filter out the warning of bitsandbytes, at each product, that it casts to fp16."""
    return "inputs will be cast" not in str(record.msg)
