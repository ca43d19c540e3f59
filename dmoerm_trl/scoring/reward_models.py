"""Scorers of responses: any reward model, the length, or a Python function."""

import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ..data.formatting import Encoding, Formatter
from ..files import file_digest
from ..generation.samplers import check_chat_template, check_dtype
from ..modeling.configuration_dmoerm import DMoERMConfig
from ..modeling.finite import WAY_OUT, check_rewards
from ..modeling.load_errors import loading
from .batch import map_encodings, score_encodings

Scorer = Callable[[dict, Sequence[str]], Tensor]
"""Function (row with `prompt`, N responses) -> scores of shape (N,); higher is better."""

LENGTH = "length"


@dataclass(frozen=True)
class ScorerSpec:
    """
    Specification of a scorer, which [`load`] builds.

    Args:
        name (`str`):
            `"length"`, the number of characters; `"module:function"`, which is called as `function(prompt=..., response=...,
            **other_fields_of_the_row)` and returns a number; or the folder or hub name of a reward model: a DMoERM, or any
            sequence classification model with one label, with its own tokenizer and chat template.
        max_length (`int`): Maximum tokens of prompt and response; older turns are cut.
        dtype (`str`): Dtype of the reward model.
    """

    name: str
    max_length: int = 2048
    dtype: str = "float32"

    def __post_init__(self):
        check_dtype(self.dtype)
        if self.max_length < 1:
            raise ValueError(
                f"got max_length={self.max_length}, need at least 1: it is the tokens of prompt and response."
            )

    def load(self) -> Scorer:
        """
        Build the scorer. It raises a `ValueError` for a score that is NaN or infinite.
        """
        if self.name == LENGTH:
            return lambda row, responses: torch.tensor([float(len(response)) for response in responses])
        if self.is_program:
            score, way_out = _function(self.name), f"fix what {self.name} returns"
        else:
            way_out = WAY_OUT
            score = _reward_model(self.name, self.max_length, getattr(torch, self.dtype))

        def finite_score(row: dict, responses: Sequence[str]) -> Tensor:
            scores = score(row, responses)
            check_rewards(scores, responses, what="the score", way_out=way_out)
            return scores

        return finite_score

    @property
    def is_program(self) -> bool:
        """Return whether the scorer is a function, without a model to load."""
        return self.name == LENGTH or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.name) is not None

    @property
    def is_standardised(self) -> bool:
        """Return whether the scores are standardised, because a DMoERM stores its mean and standard deviation."""
        if self.is_program:
            return False
        with loading(self.name, "a reward model"):
            return isinstance(AutoConfig.from_pretrained(self.name), DMoERMConfig)

    def check(self) -> None:
        """
        Check that the scorer exists, before responses are generated for it.

        Raises:
            ValueError: If it does not.
        """
        if self.is_program and self.name != LENGTH:
            _function_of(self.name)
        self.is_standardised  # noqa: B018  (reads the configuration)

    def settings(self) -> dict[str, Any]:
        """Return the settings on which the scores depend."""
        if self.name == LENGTH:
            return {"name": self.name}
        if self.is_program:
            return {
                "name": self.name,
                "sha256 of its file": file_digest([Path(inspect.getfile(_function_of(self.name)))]),
            }
        return {**asdict(self), "sha256 of the weights": weights_digest(self.name)}


def weights_digest(model: str) -> str | None:
    """Compute a digest of the weights in a folder; None for a model on the hub."""
    files = sorted(Path(model).glob("*.safetensors"))
    return file_digest(files) if files else None


def _function_of(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"got {name!r}, need an importable module:function: {error}. Put its folder on PYTHONPATH."
        ) from error


def _function(name: str) -> Scorer:
    function = _function_of(name)

    def score(row: dict, responses: Sequence[str]) -> Tensor:
        try:
            inspect.signature(function).bind(**row, response="")
        except TypeError as error:
            raise ValueError(
                f"{name}: {error}. It is called with the fields of a row, {sorted(row)}, and `response`: give the rows the "
                "field, or the function `**_` for those that it does not read."
            ) from error
        scores = [function(**row, response=response) for response in responses]
        try:
            return torch.tensor([float(value) for value in scores])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: got {scores[0]!r} for one response, need one number: {error}.") from error

    return score


def _reward_model(name: str, max_length: int, dtype: torch.dtype) -> Scorer:
    with loading(name, "a reward model"):
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    if model.config.num_labels != 1:
        raise ValueError(
            f"{name}: got num_labels={model.config.num_labels}, need 1 because a reward model gives one reward a text: "
            "this one is a classifier, or was loaded without its head."
        )
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(model.config, DMoERMConfig):
        formatter = Formatter.for_model(model.config, tokenizer, max_length)

        def score_all(encodings: list[Encoding]) -> Tensor:
            return score_encodings(model, encodings, pad_token_id=tokenizer.pad_token_id)

    else:
        check_chat_template(tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        formatter = Formatter(tokenizer, max_length)
        own_pad = model.config.pad_token_id

        def score_all(encodings: list[Encoding]) -> Tensor:
            if own_pad is None:  # a decoder refuses batches without one, and reads the last token that is not it
                last = {encoding.input_ids[-1] for encoding in encodings}
                model.config.pad_token_id = next(token for token in count() if token not in last)
            return map_encodings(
                lambda input_ids, attention_mask, _: model(input_ids, attention_mask=attention_mask).logits[:, 0],
                encodings,
                pad_token_id=model.config.pad_token_id,
                device=model.device,
                share=False,
            )

    def score(row: dict, responses: Sequence[str]) -> Tensor:
        encodings = formatter.encode_responses(row["prompt"], responses)
        if cut := sum(encoding.cut_turns > 0 for encoding in encodings):
            warnings.warn(
                f"{name}: for {cut} of {len(encodings)} responses, the prompt {row['prompt'][-1]['content'][:60]!r} lost its "
                f"oldest part to fit into max_length={max_length}.",
                stacklevel=2,
            )
        return score_all(encodings)

    return score
