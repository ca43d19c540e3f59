"""Judges that run locally: a language model, a reward model, a Python function."""

import asyncio
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ..data.formatting import Formatter
from ..data.preference_row import short
from ..generation.samplers import check_chat_template, check_dtype
from ..modeling.load_errors import loading
from ..modeling.prefix_tree import passes
from ..scoring.reward_functions import TextRewards
from ..scoring.reward_models import ScorerSpec, file_digest, weights_digest
from .judges import Answer, JudgeError, Question, Tie, check_integer
from .template import Template


class ModelJudge:
    """
    Judge that asks a causal language model of transformers with its own chat template, and takes the likelier of the answers 1
    and 2. Equally likely answers are a tie.

    Both likelihoods come from one forward pass over the question. Nothing is sampled and nothing is parsed, so every answer can
    be read, and text such as "Answer: 1" in a response has no effect on reading it. A model that has to reason before it
    answers should be asked through a server instead.

    Args:
        model (`str`): Folder or hub name of the model.
        template (`str`, *optional*, defaults to `"en"`): See [`~dmoerm_trl.labelling.template.Template`].
        example (`str`, *optional*): See [`~dmoerm_trl.labelling.template.Template`].
        max_length (`int`, *optional*, defaults to 8192): Maximum tokens of a question; a longer one is not asked and gets no
            choice.
        tokens_per_batch (`int`, *optional*, defaults to 16384): Token budget of a forward pass, not counting padding; questions
            of similar length are batched together.
        batch_size (`int`, *optional*, defaults to 64): Number of questions to pass to one call of `ask`.
        dtype (`str`, *optional*, defaults to `"float32"`): Data type of the model.

    Raises:
        ValueError: If a setting is out of range, or the chat template renders both answers the same.
    """

    concurrency = 1
    samples = False
    failures: Mapping[str, int] = {}
    wanted = "a question that fits max_length"

    def __init__(
        self,
        model: str,
        *,
        template: str = "en",
        example: str | None = None,
        max_length: int = 8192,
        tokens_per_batch: int = 16_384,
        batch_size: int = 64,
        dtype: str = "float32",
    ):
        check_dtype(dtype)
        check_integer("max_length", max_length, 1)
        check_integer("tokens_per_batch", tokens_per_batch, 1)
        check_integer("batch_size", batch_size, 1)
        self.batch_size, self._max_length, self._tokens_per_batch = batch_size, max_length, tokens_per_batch
        self._template = Template(template, example=example)
        with loading(model, "a causal language model"):
            self._tokenizer = AutoTokenizer.from_pretrained(model)
        check_chat_template(self._tokenizer)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with loading(model, "a causal language model"):
            self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval().to(device)
        self.identity = {
            "kind": "model",
            "model": model,
            "sha256 of the weights": weights_digest(model),
            "dtype": dtype,
            "max_length": max_length,
            "template": self._template.digest,
        }

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        return await asyncio.to_thread(self._answer, questions)

    def estimate_tokens(self, question: Question) -> tuple[int, int]:
        return len(self._encode(question).input_ids), 1

    async def close(self) -> None:
        pass

    def _answer(self, questions: Sequence[Question]) -> list[Answer]:
        encoded = [self._encode(question) for question in questions]
        lengths = [len(question.input_ids) for question in encoded]
        answers = [
            Answer(None, f"no answer: the question has {length} tokens, more than max_length={self._max_length}")
            for length in lengths
        ]
        fitting = [index for index, length in enumerate(lengths) if length <= self._max_length]
        for batch in passes([encoded[index].input_ids for index in fitting], self._tokens_per_batch, share=False):
            indices = [fitting[place] for place in batch]
            likelihoods = self._log_likelihoods([encoded[index] for index in indices])
            for index, (one, two) in zip(indices, likelihoods, strict=True):
                if math.isnan(one) or math.isnan(two):
                    raise JudgeError(
                        f"{self.identity['model']}: got likelihoods that are NaN, need numbers because the likelier answer is taken: "
                        "set `dtype: float32` or `dtype: bfloat16`."
                    )
                text = f"log p(1) = {one:.4f}, log p(2) = {two:.4f}"
                answers[index] = _preferred(one, two, text, lengths[index], 1)
        return answers

    @torch.no_grad()
    def _log_likelihoods(self, questions: Sequence["_Encoded"]) -> list[list[float]]:
        """Compute the log-likelihoods of the answers 1 and 2 to each question."""
        ids = {"input_ids": [question.input_ids for question in questions]}
        batch = self._tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(self._model.device)
        output = self._model.generate(
            **batch,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        log_likelihoods = output.logits[0].float().log_softmax(-1)
        tokens = torch.tensor([question.answers for question in questions], device=self._model.device)
        return log_likelihoods.gather(1, tokens).tolist()

    def _encode(self, question: Question) -> "_Encoded":
        """
        Tokenize the chats that end in the answers 1 and 2, up to the first difference; works with any template and tokenizer.
        """
        turns = self._template.messages(question)
        one, two = (
            self._tokenizer.apply_chat_template(
                [*turns, {"role": "assistant", "content": answer}], return_dict=False, sanitize_control_tokens=True
            )
            for answer in ("1", "2")
        )
        part = next((place for place, (left, right) in enumerate(zip(one, two, strict=False)) if left != right), None)
        if part is None:
            raise ValueError(
                f"{self._tokenizer.name_or_path}: got a chat template that shows no difference between the answers 1 and 2, need "
                "one that shows what the assistant says: give the tokenizer another template."
            )
        return _Encoded(one[:part], (one[part], two[part]))


def _preferred(first: float, second: float, *record: Any) -> Answer:
    """Build the answer that prefers the higher score."""
    return Tie(None, *record) if first == second else Answer(1 if first > second else 2, *record)


class _Encoded(NamedTuple):
    """Token ids of a question, and the token ids of its two answers."""

    input_ids: list[int]
    answers: tuple[int, int]


class _Text(NamedTuple):
    """A response to score at a point."""

    prompt: list[dict]
    response: str
    point: str | None
    task: str | None


class _ScoreJudge(ABC):
    """
    Base of judges that prefer the response with the higher score; equal scores are a tie, and a score of None is no choice.
    """

    concurrency = 1
    samples = False
    failures: Mapping[str, int] = {}

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        return await asyncio.to_thread(self._answer, questions)

    def estimate_tokens(self, question: Question) -> tuple[int, int]:
        return 0, 0

    async def close(self) -> None:
        return None  # there is nothing to close

    def _answer(self, questions: Sequence[Question]) -> list[Answer]:
        pairs = [[_Text(q.prompt, text, q.point, q.task) for text in (q.first, q.second)] for q in questions]
        texts = {repr(text): text for pair in pairs for text in pair}  # both orders contain the same texts
        scores = dict(zip(texts, self._score(list(texts.values())), strict=True))
        answers = []
        for first, second in ((scores[repr(first)], scores[repr(second)]) for first, second in pairs):
            text = f"scores {first} and {second}"
            has_scores = first is not None and second is not None
            answers.append(_preferred(first, second, text) if has_scores else Answer(None, text))
        return answers

    @abstractmethod
    def _score(self, texts: list[_Text]) -> list[float | None]:
        """Score each text; None if a text has no score."""


class RewardJudge(_ScoreJudge):
    """
    Judge that prefers the higher reward of a reward model. A DMoERM judges a capability point by its score at the point, and
    makes no choice if its router sends the prompt to a task without the point. Any other reward model gives the same reward at
    all points.

    Args:
        model (`str`): Folder or hub name of a reward model, used with its own tokenizer and chat template.
        max_length (`int`, *optional*, defaults to 2048): Maximum tokens of prompt and response; the oldest turns are truncated.
            A question gets no choice if a response alone is too long, or if the chat template rejects the turns.
        batch_size (`int`, *optional*, defaults to 64): Number of questions to pass to one call of `ask`.
        dtype (`str`, *optional*, defaults to `"float32"`): Data type of the model.
    """

    wanted = "two responses that fit max_length, at a point of the task to which the router sends the prompt"

    def __init__(self, model: str, *, max_length: int = 2048, batch_size: int = 64, dtype: str = "float32"):
        check_integer("max_length", max_length, 1)
        check_integer("batch_size", batch_size, 1)
        spec = ScorerSpec(model, max_length, dtype)
        if spec.is_program:
            raise ValueError(f"got model={model!r}, need a reward model: judge by the kind 'function' instead.")
        self.batch_size = batch_size
        self.identity = {"kind": "reward_model", **spec.settings()}
        with loading(model, "a reward model"):
            tokenizer = AutoTokenizer.from_pretrained(model)
        if spec.is_standardised:
            with loading(model, "a reward model"):
                dmoerm = AutoModelForSequenceClassification.from_pretrained(model, dtype=getattr(torch, dtype))
            self._formatter = Formatter.for_model(dmoerm.config, tokenizer, max_length)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._rewards = TextRewards(dmoerm.to(device), self._formatter)
        else:
            self._rewards, self._scorer = None, spec.load()
            if tokenizer.pad_token_id is None:  # as the scorer does
                tokenizer.pad_token = tokenizer.eos_token
            self._formatter = Formatter(tokenizer, max_length)

    def _answer(self, questions: Sequence[Question]) -> list[Answer]:
        faults = [self._fault(question) for question in questions]
        fitting = [question for question, fault in zip(questions, faults, strict=True) if fault is None]
        answers = iter(super()._answer(fitting) if fitting else [])
        return [next(answers) if fault is None else Answer(None, f"no answer: {fault}") for fault in faults]

    def _fault(self, question: Question) -> str | None:
        """Describe why a response cannot be tokenized, if so."""
        try:
            self._formatter.encode_responses(question.prompt, [question.first, question.second])
        except ValueError as error:
            return str(error)
        return None

    def _score(self, texts: list[_Text]) -> list[float | None]:
        scores = self._plain_rewards(texts) if self._rewards is None else self._point_scores(texts)
        return [None if math.isnan(score) else score for score in scores]

    def _point_scores(self, texts: list[_Text]) -> list[float]:
        """Score texts by a DMoERM: at their points, or by the reward if they have none; NaN if the task lacks the point."""
        names = ["reward", *self._rewards.points]
        wanted = ["reward" if text.point is None else text.point for text in texts]
        if unknown := set(wanted) - set(names):
            raise JudgeError(
                f"got the capability points {sorted(unknown)}, need some of {self._rewards.points} because a DMoERM judges by "
                "the scores of its own: take another judge for them."
            )
        table = self._rewards.scores([text.prompt for text in texts], [text.response for text in texts])
        columns = torch.tensor([names.index(name) for name in wanted])
        return table.gather(1, columns.unsqueeze(1)).squeeze(1).tolist()

    def _plain_rewards(self, texts: list[_Text]) -> list[float]:
        """Score texts by a plain reward model, prompt by prompt, scoring each response once for all points."""
        groups: dict[str, list[_Text]] = {}
        for text in texts:
            groups.setdefault(repr(text.prompt), []).append(text)
        rewards: dict[tuple[str, str], float] = {}
        for key, group in groups.items():
            responses = list(dict.fromkeys(text.response for text in group))
            scores = self._scorer({"prompt": group[0].prompt}, responses).tolist()
            rewards |= {(key, response): score for response, score in zip(responses, scores, strict=True)}
        return [rewards[repr(text.prompt), text.response] for text in texts]


class FunctionJudge(_ScoreJudge):
    """
    Judge that prefers the response with the higher score of a Python function.

    Args:
        function (`str`): `"module:function"`, called as `function(prompt=, response=, point=, task=)`, with the prompt as
            turns. It returns a number, higher is better at the point, or None if it has no opinion. It is never called
            concurrently, and its result must depend on its arguments only.
        batch_size (`int`, *optional*, defaults to 256): Number of questions to pass to one call of `ask`.

    Raises:
        ValueError: If the function does not exist or cannot be called this way.
    """

    wanted = "a number for each response"

    def __init__(self, function: str, *, batch_size: int = 256):
        check_integer("batch_size", batch_size, 1)
        try:
            self._function = resolve_name(str(function))
        except Exception as error:  # importing its module may raise anything
            raise ValueError(
                f"got function={function!r}, need an importable module:function: {error}. Put its folder on PYTHONPATH."
            ) from error
        try:
            inspect.signature(self._function).bind(prompt=[], response="", point="", task="")
        except (TypeError, ValueError) as error:  # ValueError: some built-in functions have no signature
            raise ValueError(
                f"{function}: {error}. It is called as function(prompt=, response=, point=, task=): give it `**_` for those "
                "that it does not read."
            ) from error
        try:
            file = Path(inspect.getsourcefile(inspect.unwrap(self._function)))
        except TypeError as error:  # for a partial, a callable object, a built-in function
            raise ValueError(
                f"got function={function!r}, a {type(self._function).__name__} without a file of its own, need a function whose "
                "file shows when it changes: call this one from a `def`."
            ) from error
        self.batch_size, self._name = batch_size, function
        self.identity = {"kind": "function", "function": function, "sha256 of its file": file_digest([file])}

    def _score(self, texts: list[_Text]) -> list[float | None]:
        return [self._score_one(text) for text in texts]

    def _score_one(self, text: _Text) -> float | None:
        response = f"the response {text.response[:80]!r} at {text.point!r}"
        try:
            score = self._function(**text._asdict())
        except Exception as error:  # user code may raise anything
            said = f"{type(error).__name__}: {error}"
            raise JudgeError(f"{self._name}: got {said} for {response}, need a number or None: fix it.") from error
        if score is None:
            return None
        with suppress(OverflowError):
            if isinstance(score, Real) and math.isfinite(score):
                return float(score)
        raise JudgeError(
            f"{self._name}: got {short(score)} for {response}, need a finite number, or None where the function has no opinion: "
            "fix it."
        )
