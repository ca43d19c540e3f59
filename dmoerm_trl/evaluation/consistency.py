"""Consistency with the labels: the share of non-tied pairs that rewards and labels order the same way (section 6.2)."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Consistency is the share of non-tied pairs that the rewards order as the labels do. The pairs are all pairs of
responses to one prompt whose ranks differ; a pair whose two rewards are equal counts as half.
"""

_INPUTS = """
Args:
    predictions (`list[list[float]]`): The rewards of each prompt's responses. Their number may differ between prompts.
    references (`list[list[int]]`): The ranks of the same responses, 1 is best, ties allowed.
    confidence (`float`, defaults to 0.95): Coverage of the interval, between 0 and 1.
    resamples (`int`, defaults to 1000): Number of bootstrap resamples.
    seed (`int`, defaults to 0): Seed of the bootstrap.

Returns:
    `dict` with `consistency`, the bounds `low` and `high` of its percentile bootstrap interval over prompts, and the
    numbers of non-tied `pairs` and of `prompts` that have one.
"""

_CITATION = """
@inproceedings{quan2024dmoerm,
  title = {{DMoERM}: Recipes of Mixture-of-Experts for Effective Reward Modeling},
  author = {Quan, Shanghaoran},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2024},
  year = {2024},
}
"""


def pair_agreement(rewards: Sequence[float], ranks: Sequence[int]) -> tuple[float, int]:
    """
    Count the pairs of one prompt's K responses that rewards and ranks order the same way.

    Args:
        rewards (`Sequence[float]`): K finite rewards, higher is better.
        ranks (`Sequence[int]`): K finite ranks, 1 is best. Pairs with equal ranks are ignored.

    Returns:
        `tuple[float, int]`: Number of pairs in agreement, where a pair with equal rewards counts as half, and number of all
        pairs with different ranks, at most K (K - 1) / 2.

    Raises:
        ValueError: If the lengths differ, or a reward or a rank is NaN or infinite.
    """
    rewards, ranks = np.asarray(rewards, dtype=np.float64), np.asarray(ranks, dtype=np.float64)
    if rewards.ndim != 1 or rewards.shape != ranks.shape:
        raise ValueError(
            f"got rewards of shape {rewards.shape} and ranks of shape {ranks.shape}, need one reward and one rank per "
            "response: score exactly the responses that were ranked."
        )
    if not np.isfinite(ranks).all():
        raise ValueError(f"got ranks {ranks.tolist()}, need finite numbers: leave out the responses without a rank.")
    return agreement(rewards, np.argwhere(ranks[:, None] < ranks[None, :]))


def agreement(rewards: Sequence[float], pairs: Sequence[tuple[int, int]]) -> tuple[float, int]:
    """
    Count the labelled pairs of one prompt's K responses that the rewards order the same way.

    Args:
        rewards (`Sequence[float]`): K finite rewards, higher is better.
        pairs (`Sequence[tuple[int, int]]`): Indices (better, worse) of the labelled pairs, see
            [`~dmoerm_trl.data.preference_row.PreferenceRow.pairs_of`].

    Returns:
        `tuple[float, int]`: Number of pairs in agreement, where a pair with equal rewards counts as half, and number of all
        pairs.

    Raises:
        ValueError: If a reward is NaN or infinite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(rewards).all():
        raise ValueError(
            f"got rewards {rewards.tolist()}, need finite numbers because NaN and inf have no order: look for NaN in "
            "the weights or an overflow in half precision."
        )
    better, worse = rewards[
        np.asarray(pairs, dtype=int).reshape(-1, 2)
    ].T  # compared, because a difference could overflow
    return float((better > worse).sum() + (better == worse).sum() / 2), len(better)


class Consistency(evaluate.Metric):
    """
    Consistency of rewards with labels, as an [`evaluate.Metric`] that needs no download and no network.

    Predictions stay in memory, so no cache file is written. If several processes share the work, pass
    `keep_in_memory=False` with `num_process`, `process_id` and `experiment_id`, as for any metric of `evaluate`.

    Example:

    ```python
    from dmoerm_trl import Consistency

    found = Consistency().compute(predictions=[[0.9, 0.1, 0.4]], references=[[1, 2, 3]])
    assert round(found["consistency"], 3) == 0.667 and found["pairs"] == 3
    ```
    """

    def __init__(self, *args, keep_in_memory: bool = True, **kwargs):
        super().__init__(*args, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("float64")),  # int64 would truncate 1.5 to 1
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[list[int]],
        confidence: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, float | int]:
        agreements = []
        for prompt, (rewards, ranks) in enumerate(zip(predictions, references, strict=True)):
            try:
                agreements.append(pair_agreement(rewards, ranks))
            except ValueError as error:
                raise ValueError(f"prompt {prompt}: {error}") from error
        return pooled(agreements, confidence, resamples, seed)


def pooled(
    agreements: Sequence[tuple[float, int]], confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, float | int]:
    """
    Compute the consistency over prompts and its bootstrap interval.

    Args:
        agreements (`Sequence[tuple[float, int]]`): For each prompt, the result of [`agreement`].
        confidence (`float`, *optional*, defaults to 0.95): Coverage of the interval, between 0 and 1.
        resamples (`int`, *optional*, defaults to 1000): Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.

    Returns:
        `dict`: The result of [`Consistency`].

    Raises:
        ValueError: If no prompt has a pair, or an option is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"got confidence {confidence}, need a number between 0 and 1, such as 0.95.")
    if resamples < 1:
        raise ValueError(f"got resamples {resamples}, need at least 1.")
    paired = [(agreed, pairs) for agreed, pairs in agreements if pairs > 0]
    if not paired:
        raise ValueError(
            f"got {len(agreements)} prompts without a non-tied pair, need at least one prompt with two distinct "
            "ranks because consistency is a share of such pairs."
        )
    agreed, pairs = (np.array(counts) for counts in zip(*paired, strict=True))
    low, high = _bootstrap_interval(agreed, pairs, confidence, resamples, seed)
    return {
        "consistency": float(agreed.sum() / pairs.sum()),
        "low": low,
        "high": high,
        "pairs": int(pairs.sum()),
        "prompts": len(paired),
    }


def _bootstrap_interval(
    agreed: np.ndarray, pairs: np.ndarray, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """
    Compute the percentile bootstrap interval of `agreed.sum() / pairs.sum()`. Prompts are drawn with replacement, each with all
    its pairs, because pairs that share responses are not independent.

    A prompt matters only through its (agreed, pairs), which takes few distinct values. So a resample draws how often each
    distinct value occurs: this has the same distribution as drawing prompts, at a cost that does not grow with their number.

    Args:
        agreed (`np.ndarray` of shape `(prompts,)`): Number of pairs in agreement.
        pairs (`np.ndarray` of shape `(prompts,)`): Number of non-tied pairs, at least 1 each.
    """
    outcomes, prompts = np.unique(np.stack([agreed, pairs]), axis=1, return_counts=True)  # (2, O), (O,)
    random = np.random.default_rng(seed)
    draws = random.multinomial(prompts.sum(), prompts / prompts.sum(), size=resamples)  # (resamples, O)
    resampled_agreed, resampled_pairs = outcomes @ draws.T  # (resamples,) each
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled_agreed / resampled_pairs, [tail, 1 - tail])
    return float(low), float(high)
