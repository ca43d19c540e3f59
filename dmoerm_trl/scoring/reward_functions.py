"""Reward models as functions of texts: for GRPO and RLOO, for a monitor, for a judge."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.formatting import Formatter
from ..data.preference_row import turn_text
from ..modeling.finite import check_rewards
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification
from .batch import map_encodings, points_of, score_capabilities
from .reward_models import ScorerSpec

TextScorer = Callable[[Sequence[list[dict]], Sequence[str]], Sequence[float] | Tensor]
"""`scorer(prompts, responses)` -> one reward a response; prompts are turns, the last of the user."""


class TextRewards:
    """
    The rewards that a reward model gives to texts, a [`TextScorer`].

    Texts are tokenised by the reward model's own formatter, so a policy may have another tokenizer and chat template, and a
    response that spells a special token does not get one. The last batch is remembered: several functions of one batch cost
    one forward.

    Args:
        model (`PreTrainedModel`): a DMoERM, or any model whose `logits` of shape (B, 1) are rewards. It is put into
            evaluation mode and stays where it is: move it to its device first.
        formatter (`Formatter`): with the reward model's tokenizer.

    Raises:
        ValueError: if the formatter's texts are not in the form of the model's training.

    Example:

    ```python
    from dmoerm_trl import TextRewards, load_reward_model

    rewards = TextRewards(*load_reward_model("runs/demo/model", max_length=512))
    rewards([[{"role": "user", "content": "Hello?"}]], ["Hi!"])
    ```
    """

    def __init__(self, model: PreTrainedModel, formatter: Formatter):
        self.model, self.formatter = model.eval(), formatter
        self.is_dmoerm = isinstance(model, DMoERMForSequenceClassification)
        if self.is_dmoerm:
            formatter.check_model(model.config)
        self.points = points_of(model) if self.is_dmoerm else []
        self._batch: tuple[list, list] | None = None
        self._scores = torch.empty(0)

    def __call__(self, prompts: Sequence[list[dict]], responses: Sequence[str]) -> Tensor:
        """The rewards, shape (B,), fp32, on the CPU."""
        return self.scores(prompts, responses)[:, 0]

    def point(self, name: str, prompts: Sequence[list[dict]], responses: Sequence[str]) -> Tensor:
        """The scores of one capability point, shape (B,); NaN where the router's task does not have the point."""
        return self.scores(prompts, responses)[:, 1 + self.points.index(name)]

    def weighted(self, weights: Mapping[str, float]) -> TextScorer:
        """The weighted sum over the capability points that a text's task has, as TRL adds up reward functions."""
        columns = torch.tensor([1 + self.points.index(name) for name in weights])
        factors = torch.tensor(list(weights.values()), dtype=torch.float32)
        return lambda prompts, responses: (self.scores(prompts, responses)[:, columns] * factors).nansum(1)

    def scores(self, prompts: Sequence[list[dict]], responses: Sequence[str]) -> Tensor:
        """
        Rewards and capability scores, shape (B, 1 + points).

        Raises:
            ValueError: if a reward is NaN or infinite, or a response is too long for the formatter.
        """
        batch = (list(prompts), list(responses))
        if batch != self._batch:
            encodings = [self.formatter.encode(*texts) for texts in zip(*batch, strict=True)]
            options = {"pad_token_id": self.formatter.tokenizer.pad_token_id}
            if self.is_dmoerm:
                found = score_capabilities(self.model, encodings, responses=responses, **options)
                scores = torch.cat([found.rewards.unsqueeze(1), found.scores], 1)
            else:
                scores = map_encodings(self._rewards, encodings, device=self.model.device, share=False, **options)
                check_rewards(scores[:, 0], responses)
            self._batch, self._scores = batch, scores
        return self._scores

    def _rewards(self, input_ids: Tensor, attention_mask: Tensor, _: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :1].float()


def gold_rewards(source: str, rows: Sequence[dict], *, max_length: int) -> TextScorer:
    """
    A gold reward for the prompts of `rows`.

    Args:
        source (`str`): the folder or hub name of a reward model, or `"module:function"`; see
            [`~dmoerm_trl.scoring.reward_models.ScorerSpec`]. A function gets the fields of a row.
        max_length (`int`): tokens of prompt and response.

    Example:

    ```python
    from dmoerm_trl import gold_rewards, read_prompts

    rows = read_prompts("runs/demo/data/test.jsonl", count=1)
    gold = gold_rewards("length", rows, max_length=512)
    assert gold([rows[0]["prompt"]], ["Hi!"]).tolist() == [3.0]
    ```
    """
    score = ScorerSpec(source, max_length).load()
    row_of = {repr(row["prompt"]): row for row in rows}

    def gold(prompts: Sequence[list[dict]], responses: Sequence[str]) -> Tensor:
        return torch.cat(
            [score(row_of[repr(prompt)], [text]).cpu() for prompt, text in zip(prompts, responses, strict=True)]
        )

    return gold


def reward_functions(
    rewards: TextRewards, points: Sequence[str] | None = None, tasks: Sequence[str] | None = None
) -> list[Callable[..., list[float | None]]]:
    """
    What `reward_funcs` of TRL's GRPOTrainer and RLOOTrainer takes: one function for the reward, or one for each of the
    named capability points, to be weighted by `reward_weights`. All functions of a batch share one forward.

    A function returns None, which TRL takes as "does not apply", for a text whose task does not have its point.

    Args:
        points (`Sequence[str]`, *optional*): capability points; without them the one function `dmoerm`.
        tasks (`Sequence[str]`, *optional*): the tasks that the prompts are routed to; all of the model if absent.

    Raises:
        ValueError: if a point is unknown, or a task has none of them, so that its texts would all be rewarded with 0.

    Example:

    ```python
    from dmoerm_trl import TextRewards, load_reward_model, reward_functions

    rewards = TextRewards(*load_reward_model("runs/demo/model", max_length=512))
    (function,) = reward_functions(rewards)  # for GRPOTrainer(reward_funcs=[function], ...)
    function(prompts=["Hello?"], completions=["Hi!"])
    ```
    """
    if points is None:
        return [_trl_function("dmoerm", rewards)]
    if unknown := [point for point in points if point not in rewards.points]:
        raise ValueError(
            f"got weights for the capability points {unknown}, need some of {rewards.points}: rename them."
        )
    own: Mapping[str, list[str]] = rewards.model.config.tasks
    if bare := [task for task in tasks or own if not set(own[task]) & set(points)]:
        raise ValueError(
            f"got weights for {list(points)} alone, of which the tasks {bare} have none, need one or more of each task that "
            f"prompts are routed to, because all their responses would be worth 0: weight one of "
            f"{ {task: own[task] for task in bare} }, or leave those prompts out."
        )

    def scores_of(point: str) -> TextScorer:
        return lambda prompts, responses: rewards.point(point, prompts, responses)

    return [_trl_function(point, scores_of(point)) for point in points]


def _trl_function(name: str, scorer: TextScorer) -> Callable[..., list[float | None]]:
    """A scorer as TRL calls reward functions; `name` is what TRL logs it under."""

    def function(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        turns = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
        values = scorer(turns, [text_of(completion) for completion in completions])
        return [None if value != value else value for value in torch.as_tensor(values).tolist()]

    function.__name__ = name
    return function


def text_of(completion: str | list[dict]) -> str:
    """
    What is scored of a completion as TRL passes it: text itself, or the text of the assistant's turns, joined by blank lines.
    What tools answered is not the policy's, and what it called them with is not part of its answer.
    """
    if isinstance(completion, str):
        return completion
    turns = [turn for turn in completion if turn["role"] == "assistant" and turn.get("content") is not None]
    texts = [turn_text(turn, "completion") for turn in turns]
    return "\n\n".join(text for text in texts if text.strip())


class RewardProcessor:
    """
    A processing class for GRPOTrainer and RLOOTrainer with the reward model itself in `reward_funcs`:

        GRPOTrainer(reward_funcs=[model], reward_processing_classes=[RewardProcessor(formatter)], ...)

    With a tokenizer in its place, TRL writes the whole chat as one text and tokenises that: a completion that spells special
    tokens opens turns of its own, and may choose its own judge. Here each chat is encoded by the formatter, and the model is
    told where its prompt ends.

    Args:
        formatter (`Formatter`): the reward model's, see [`~dmoerm_trl.data.formatting.Formatter.for_model`].

    Example:

    ```python
    from dmoerm_trl import RewardProcessor, load_reward_model

    model, formatter = load_reward_model("runs/demo/model", max_length=512)
    options = {"reward_funcs": [model], "reward_processing_classes": [RewardProcessor(formatter)]}  # of GRPOTrainer
    ```
    """

    def __init__(self, formatter: Formatter):
        self.formatter = formatter
        self.pad_token_id, self.eos_token_id = formatter.tokenizer.pad_token_id, formatter.tokenizer.eos_token_id

    def apply_chat_template(self, conversation: list[dict], **_: Any) -> str:
        """The chat as text that [`__call__`] reads. What follows the last turn of the user is the completion."""
        last = max((i for i, turn in enumerate(conversation) if turn["role"] == "user"), default=-1)
        return json.dumps([conversation[: last + 1], text_of(conversation[last + 1 :])])

    def __call__(self, text: Sequence[str], **_: Any) -> dict[str, Tensor]:
        """See [`~dmoerm_trl.data.formatting.Formatter.batch`]."""
        try:
            prompts, responses = zip(*map(json.loads, text), strict=True)
        except ValueError as error:
            raise ValueError(
                f"got the text {text[0][:80]!r}, need chats, because in plain text a prompt's end is not known: give the trainer "
                "conversational prompts, or reward functions (`reward_functions`) in place of the model."
            ) from error
        return self.formatter.batch(prompts, responses)
