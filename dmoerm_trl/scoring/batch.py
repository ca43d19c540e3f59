"""
Score many texts task by task, in batches with a token budget that keep the texts of a prompt together. Several processes may
share the batches. Their number changes neither the batches nor the scores.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..data.formatting import Encoding, Formatter
from ..data.rows import PreferenceRow
from ..modeling.finite import check_rewards, nan_allowed
from ..modeling.modeling_dmoerm import DMoERMForSequenceClassification, DMoERMModel
from ..modeling.prefix_tree import passes


@torch.no_grad()
def map_encodings(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    encodings: Sequence[Encoding],
    *,
    pad_token_id: int,
    device: torch.device | str = "cpu",
    tokens_per_batch: int = 16_384,
    description: str = "scoring",
    groups: Sequence[int] | None = None,
    share: bool = True,
    processes: PartialState | None = None,
) -> Tensor:
    """
    Apply `function(input_ids, attention_mask, prompt_lengths)`, whose result has the batch as its first dimension, to
    all texts and return the results in the texts' order, on the CPU.

    Args:
        tokens_per_batch (`int`): Token budget of a batch, in which a shared prompt counts once. A batch of long texts may have
            twice the tokens of its first text.
        groups (`Sequence[int]`, *optional*): Group of each text, such as its task; the groups are run one after the other.
        share (`bool`): Whether the model shares prefixes; otherwise all tokens count.
        processes (`PartialState`, *optional*): Processes that share the batches. Each calls this with the same texts and gets
            all results.
    """
    if not encodings:
        raise ValueError("got no texts, need at least one.")
    texts = [encoding.input_ids for encoding in encodings]
    groups = [0] * len(texts) if groups is None else groups
    batches = list(_batches(texts, groups, tokens_per_batch, share))
    quiet = False
    if processes is not None:
        batches, quiet = _share(batches, texts, processes), not processes.is_main_process
    parts: list[tuple[list[int], Tensor]] = []
    total = sum(map(len, batches))
    with tqdm(total=total, desc=description, unit=" texts", delay=3, leave=False, disable=quiet) as progress:
        for batch in batches:
            ids = [torch.tensor(texts[index]) for index in batch]
            values = function(
                torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id).to(device),
                torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device),
                torch.tensor([encodings[index].prompt_length for index in batch], device=device),
            )
            parts.append((batch, values.cpu()))
            progress.update(len(batch))
    if processes is not None:
        parts = gather_object(parts)
        if sorted(index for batch, _ in parts for index in batch) != list(range(len(texts))):
            raise RuntimeError(
                "got processes that divide the texts differently, need the same division, because some texts would have no "
                "score: start them on GPUs of the same kind, so that their routes are equal."
            )
    result = parts[0][1].new_empty(len(texts), *parts[0][1].shape[1:])
    for batch, values in parts:
        result[batch] = values
    return result


def _batches(texts: Sequence[list[int]], groups: Sequence[int], tokens: int, share: bool) -> Iterator[list[int]]:
    """Yield the indices of the texts of each batch, group by group."""
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    for _, own in sorted(members.items()):
        for batch in passes([texts[index] for index in own], tokens, share=share):
            yield [own[index] for index in batch]


def _share(batches: list[list[int]], texts: Sequence[list[int]], processes: PartialState) -> list[list[int]]:
    """Select the batches of this process: consecutive ones, so that it needs few groups, with an equal share of the tokens."""
    sizes = torch.tensor([sum(len(texts[index]) for index in batch) for batch in batches], dtype=torch.float64)
    owners = (sizes.cumsum(0) - sizes / 2) / sizes.sum() * processes.num_processes
    return [
        batch for batch, owner in zip(batches, owners.long().tolist(), strict=True) if owner == processes.process_index
    ]


def route_encodings(
    model: DMoERMForSequenceClassification, encodings: Sequence[Encoding], *, pad_token_id: int
) -> Tensor:
    """
    Compute `E(t | x)` of equation 1 for the prompts of texts, shape (N, tasks). Only the router runs, once per prompt.

    Raises:
        ValueError: If a probability is NaN.
    """
    model.eval()
    dmoerm = next(module for module in model.modules() if isinstance(module, DMoERMModel))  # it may be wrapped by PEFT
    if dmoerm.router is None:
        return torch.ones(len(encodings), 1)
    places: dict[tuple[int, ...], int] = {}
    prompts = [tuple(encoding.input_ids[: encoding.prompt_length]) for encoding in encodings]
    of_text = [places.setdefault(prompt, len(places)) for prompt in prompts]

    def route(input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
        return dmoerm.route(dmoerm.find_spans(input_ids, attention_mask, prompt_lengths))

    distinct = [Encoding(list(prompt), len(prompt), 0) for prompt in places]
    options = {"pad_token_id": pad_token_id, "device": dmoerm.router.device, "description": "routing"}
    found = map_encodings(route, distinct, **options)[of_text]
    check_rewards(found.sum(1), what="probabilities of the router")
    return found


def score_encodings(
    model: DMoERMForSequenceClassification,
    encodings: Sequence[Encoding],
    *,
    pad_token_id: int,
    responses: Sequence[str] | None = None,
    **options: Any,
) -> Tensor:
    """
    Compute the rewards of texts, shape (N,), task by task. The model is set to evaluation mode.

    Args:
        responses (`Sequence[str]`, *optional*): The responses, which an error quotes.

    Raises:
        ValueError: If a reward is NaN or infinite.
    """
    routes = route_encodings(model, encodings, pad_token_id=pad_token_id).argmax(1).tolist()

    def rewards(input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
        with nan_allowed():
            return model(input_ids, attention_mask, prompt_lengths=prompt_lengths).logits[:, 0]

    options |= {"pad_token_id": pad_token_id, "device": model.device, "groups": routes}
    found = map_encodings(rewards, encodings, **options)
    check_rewards(found, responses)
    return found


class CapabilityScores(NamedTuple):
    """
    Rewards, routes and capability scores of N texts.

    Attributes:
        rewards (`Tensor` of shape (N,)), routes (`Tensor` of shape (N,)): Rewards, and routes as indices of `config.tasks`.
        scores (`Tensor` of shape (N, points)): of all points of the model, see [`points_of`]; NaN where a text's task does not
            have the point.
    """

    rewards: Tensor
    routes: Tensor
    scores: Tensor


def points_of(model: DMoERMForSequenceClassification) -> list[str]:
    """List the distinct capability points of all tasks."""
    return list(dict.fromkeys(point for of_task in model.config.tasks.values() for point in of_task))


def score_capabilities(
    model: DMoERMForSequenceClassification,
    encodings: Sequence[Encoding],
    *,
    pad_token_id: int,
    responses: Sequence[str] | None = None,
    **options: Any,
) -> CapabilityScores:
    """
    Compute the capability scores of texts too; see [`score_encodings`].

    Raises:
        ValueError: If a reward, or a score of a point that the text's task has, is NaN or infinite.
    """
    model.eval()
    points = points_of(model)

    def columns(input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
        with nan_allowed():
            output = model(input_ids, attention_mask, prompt_lengths=prompt_lengths)
        scores = [output.capability_scores[point] for point in points]
        return torch.stack([column.float() for column in (output.logits[:, 0], output.route, *scores)], 1)

    table = map_encodings(columns, encodings, pad_token_id=pad_token_id, device=model.device, **options)
    found = CapabilityScores(table[:, 0], table[:, 1].long(), table[:, 2:])
    check_rewards(found.rewards, responses)
    for column, point in enumerate(points):
        own = torch.tensor([point in of_task for of_task in model.config.tasks.values()])[found.routes]
        check_rewards(found.scores[:, column].where(own, 0), responses, what=f"score for {point!r}")
    return found


def score_rows(
    model: DMoERMForSequenceClassification, rows: Sequence[PreferenceRow], formatter: Formatter, **options: Any
) -> list[list[float]]:
    """
    Compute the rewards of all responses, one list per row.

    Example:

    ```python
    from dmoerm_trl import load_reward_model, load_rows, score_rows

    model, formatter = load_reward_model("runs/demo/model", max_length=512)
    rows, _ = load_rows("runs/demo/data/test.jsonl")
    rewards = score_rows(model, rows[:2], formatter)
    ```
    """
    formatter.check_model(model.config)
    encodings, _ = formatter.encode_rows(rows)
    flat = [encoding for row in encodings for encoding in row]
    options |= {
        "pad_token_id": formatter.tokenizer.pad_token_id,
        "responses": [text for row in rows for text in row.responses],
    }
    rewards = iter(score_encodings(model, flat, **options).tolist())
    return [[next(rewards) for _ in row] for row in encodings]
