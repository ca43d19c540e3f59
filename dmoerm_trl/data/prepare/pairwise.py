"""Converters of sets of pairs, in which an example has two responses and the preferred one."""

from typing import Any

from ..preference_row import PreferenceRow, RowError, short, turns_of, typed
from ..ranks import number, overall_ranks
from .prompts import helpsteer2_prompt, transcript


def hh(example: dict[str, Any]) -> PreferenceRow:
    """Convert Anthropic's HH: two transcripts that differ in the assistant's last turn."""
    chosen, rejected = transcript(example["chosen"], "chosen"), transcript(example["rejected"], "rejected")
    if chosen[:-1] != rejected[:-1] or not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
        raise RowError(
            "transcripts that differ before the last answer",
            f"got {short(chosen)} and {short(rejected)}, need the same turns up to one answer of the assistant at the end "
            "of both, because responses are compared on one prompt.",
        )
    return PreferenceRow(chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]], [1, 2])


def shp(example: dict[str, Any], *, tie_margin: float = 0.0, min_score_ratio: float = 1.0) -> PreferenceRow:
    """
    Convert Stanford Human Preferences: two comments on a post with their scores, the votes for them.

    Comments whose `score_ratio`, the larger score divided by the smaller, is below `min_score_ratio` are left out.
    """
    ratio = number(example["score_ratio"])
    if ratio is None or ratio < min_score_ratio:
        raise RowError(
            "score ratio below the least",
            f"got score_ratio={short(example['score_ratio'])}, need {min_score_ratio} or more.",
        )
    ranks = overall_ranks([example["score_A"], example["score_B"]], tie_margin)
    if ranks not in ({1: [1, 2], 0: [2, 1]}.get(number(example["labels"])), [1, 1]):
        raise RowError(
            "label against the scores",
            f"got labels={short(example['labels'])} for the scores {example['score_A']} and {example['score_B']}, need 1 "
            "where A has more, 0 where B has.",
        )
    return PreferenceRow(
        turns_of(example["history"], "history"), [example["human_ref_A"], example["human_ref_B"]], ranks
    )


def helpsteer2_preference(example: dict[str, Any], *, tie_margin: float = 0.0) -> PreferenceRow:
    """
    Convert HelpSteer 2's preferences: `preference_strength` from -3 (the first response is much better) to 3 (the second is).
    """
    ranks = overall_ranks([0, example["preference_strength"]], tie_margin)
    return PreferenceRow(helpsteer2_prompt(example["prompt"]), [example["response_1"], example["response_2"]], ranks)


def helpsteer3(example: dict[str, Any], *, tie_margin: float = 0.0, annotators_agree: bool = False) -> PreferenceRow:
    """
    Convert HelpSteer 3's preferences: `overall_preference` from -3 (the first response is much better) to 3 (the second is).

    With `annotators_agree`, pairs are left out unless every score of `individual_preference` is on the same side.
    """
    if annotators_agree:
        annotations = typed(example["individual_preference"], list, "individual_preference")
        scores = [number(typed(one, dict, "individual_preference").get("score")) for one in annotations]
        if None in scores or not (scores and (max(scores) < 0 or min(scores) > 0)):
            raise RowError(
                "annotators who disagree", f"got the individual preferences {scores}, need all on one side."
            )
    ranks = overall_ranks([0, example["overall_preference"]], tie_margin)
    return PreferenceRow(turns_of(example["context"], "context"), [example["response1"], example["response2"]], ranks)


def pairs(example: dict[str, Any]) -> PreferenceRow:
    """Convert any set of pairs with `prompt`, `response_1`, `response_2` and `preferred`: 1, 2, or 0 for a tie."""
    ranks = {0: [1, 1], 1: [1, 2], 2: [2, 1]}.get(number(example["preferred"]))
    if ranks is None:
        raise RowError(
            "unknown preference", f"field `preferred`: got {short(example['preferred'])}, need 1, 2, or 0 for a tie."
        )
    return PreferenceRow(turns_of(example["prompt"], "prompt"), [example["response_1"], example["response_2"]], ranks)
