"""Use reward models as functions of texts, for GRPO, RLOO, monitors and judges."""

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
"""`scorer(prompts, responses)` returns one reward per response. Prompts are lists of turns; the last turn is the user's."""


class TextRewards:
    """
    A [`TextScorer`] that gives texts the rewards of a reward model.

    The reward model's own formatter tokenises the texts. So a policy may have another tokenizer and chat template, and a
    special token that a response spells is ordinary text. The scores of the last batch are cached, so several functions of one
    batch share one forward pass.

    Args:
        model (`PreTrainedModel`): A DMoERM, or any model whose `logits` of shape (B, 1) are rewards. It is set to evaluation
            mode and stays on its device.
        formatter (`Formatter`): A formatter with the reward model's tokenizer.

    Raises:
        ValueError: If the formatter does not render texts as in the training of the model.

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
        """Return the rewards, shape (B,), fp32, on the CPU."""
        return self.scores(prompts, responses)[:, 0]

    def point(self, name: str, prompts: Sequence[list[dict]], responses: Sequence[str]) -> Tensor:
        """Return the scores of one capability point, shape (B,); NaN if the text's task does not have the point."""
        return self.scores(prompts, responses)[:, 1 + self.points.index(name)]

    def weighted(self, weights: Mapping[str, float]) -> TextScorer:
        """
        Return a scorer of the weighted sum over the capability points that a text's task has, as TRL sums reward functions.
        """
        columns = torch.tensor([1 + self.points.index(name) for name in weights])
        factors = torch.tensor(list(weights.values()), dtype=torch.float32)
        return lambda prompts, responses: (self.scores(prompts, responses)[:, columns] * factors).nansum(1)

    def scores(self, prompts: Sequence[list[dict]], responses: Sequence[str]) -> Tensor:
        """
        Return rewards and capability scores, shape (B, 1 + points).

        Raises:
            ValueError: If a reward is NaN or infinite, or a response is too long for the formatter.
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
    Build a gold reward for the prompts of `rows`.

    Args:
        source (`str`): Folder or hub name of a reward model, or `"module:function"`; see
            [`~dmoerm_trl.scoring.reward_models.ScorerSpec`]. A function gets the fields of a row.
        max_length (`int`): Maximum tokens of prompt and response.

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
    Build the `reward_funcs` of TRL's GRPOTrainer and RLOOTrainer: one function for the reward, or one for each of the named
    capability points, to be weighted by `reward_weights`. All functions of a batch share one forward pass.

    For a text whose task does not have the point a function returns None, which TRL leaves out.

    Args:
        points (`Sequence[str]`, *optional*): Capability points. By default the only function is `dmoerm`, the reward.
        tasks (`Sequence[str]`, *optional*): Tasks to which the prompts are routed; all tasks by default.

    Raises:
        ValueError: If a point is unknown, or a task has none of the points, so that all its texts would have the reward 0.

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
    """Wrap a scorer in the signature of TRL's reward functions; TRL logs it under `name`."""

    def function(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        turns = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
        values = scorer(turns, [text_of(completion) for completion in completions])
        return [None if value != value else value for value in torch.as_tensor(values).tolist()]

    function.__name__ = name
    return function


def text_of(completion: str | list[dict]) -> str:
    """
    Return the text of a completion that is scored: a plain text, or the text of the assistant's turns, joined by blank lines.
    Tool calls and answers of tools are not scored.
    """
    if isinstance(completion, str):
        return completion
    turns = [turn for turn in completion if turn["role"] == "assistant" and turn.get("content") is not None]
    texts = [turn_text(turn, "completion") for turn in turns]
    return "\n\n".join(text for text in texts if text.strip())


class RewardProcessor:
    """
    A processing class for GRPOTrainer and RLOOTrainer if `reward_funcs` has the reward model itself:

        GRPOTrainer(reward_funcs=[model], reward_processing_classes=[RewardProcessor(formatter)], ...)

    With a tokenizer instead, TRL renders the chat as one text and tokenises it: a completion that spells special tokens could
    open turns of its own, and so choose the task that scores it. This class encodes each chat with the formatter, and tells the
    model where the prompt ends.

    Args:
        formatter (`Formatter`): The formatter of the reward model; see [`~dmoerm_trl.data.formatting.Formatter.for_model`].

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
        """Encode a chat as text that [`__call__`] reads. The completion follows the last turn of the user."""
        last = max((i for i, turn in enumerate(conversation) if turn["role"] == "user"), default=-1)
        return json.dumps([conversation[: last + 1], text_of(conversation[last + 1 :])])

    def __call__(self, text: Sequence[str], **_: Any) -> dict[str, Tensor]:
        """Encode chats; see [`~dmoerm_trl.data.formatting.Formatter.batch`]."""
        try:
            prompts, responses = zip(*map(json.loads, text), strict=True)
        except ValueError as error:
            raise ValueError(
                f"got the text {text[0][:80]!r}, need chats, because in plain text a prompt's end is not known: give the trainer "
                "conversational prompts, or reward functions (`reward_functions`) in place of the model."
            ) from error
        return self.formatter.batch(prompts, responses)
