"""Converters of sets with scores: the overall score gives the ranks, and the aspects give capability labels."""

from collections.abc import Sequence
from typing import Any

from ..preference_row import PreferenceRow, RowError, short, turns_of, typed
from ..ranks import capability_labels, overall_ranks
from .prompts import helpsteer2_prompt

ULTRAFEEDBACK_ASPECTS = ("instruction_following", "helpfulness", "honesty", "truthfulness")
HELPSTEER2_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def ultrafeedback(example: dict[str, Any], *, tie_margin: float = 0.0) -> PreferenceRow:
    """Convert UltraFeedback: four completions with an `overall_score` and a `Rating` per aspect, which may be `"N/A"`."""
    completions = [typed(one, dict, "completions") for one in typed(example["completions"], list, "completions")]
    annotations = [typed(completion.get("annotations") or {}, dict, "annotations") for completion in completions]
    ratings = {
        aspect: [
            typed(of_one.get(aspect) or {}, dict, f"annotations.{aspect}").get("Rating") for of_one in annotations
        ]
        for aspect in ULTRAFEEDBACK_ASPECTS
    }
    return PreferenceRow(
        turns_of(example["instruction"], "instruction"),
        [completion.get("response") for completion in completions],
        overall_ranks([completion.get("overall_score") for completion in completions], tie_margin),
        **capability_labels(ratings, tie_margin),
    )


def helpsteer2(examples: Sequence[dict[str, Any]], *, tie_margin: float = 0.0) -> PreferenceRow:
    """Convert HelpSteer 2: the responses to a prompt are consecutive examples. Helpfulness is the overall score too."""
    ratings = {attribute: [example.get(attribute) for example in examples] for attribute in HELPSTEER2_ATTRIBUTES}
    return PreferenceRow(
        helpsteer2_prompt(examples[0]["prompt"]),
        [example["response"] for example in examples],
        overall_ranks(ratings["helpfulness"], tie_margin),
        **capability_labels(ratings, tie_margin),
    )


def scored(example: dict[str, Any], *, tie_margin: float = 0.0, aspects: Sequence[str] = ()) -> PreferenceRow:
    """Convert any set with `prompt`, `responses` and `scores`. Each of `aspects` is a column with one rating per response."""
    responses = typed(example["responses"], list, "responses")
    aspects = [aspect for aspect in aspects if example.get(aspect) is not None]
    for column in ("scores", *aspects):
        if len(typed(example[column], list, column)) != len(responses):
            raise RowError(
                "scores and responses of different lengths",
                f"field `{column}`: got {short(example[column])} for {len(responses)} responses, need one a response.",
            )
    return PreferenceRow(
        turns_of(example["prompt"], "prompt"),
        responses,
        overall_ranks(example["scores"], tie_margin),
        **capability_labels({aspect: example[aspect] for aspect in aspects}, tie_margin),
    )


def table(
    examples: Sequence[dict[str, Any]], *, tie_margin: float = 0.0, aspects: Sequence[str] = ()
) -> PreferenceRow:
    """Convert any set with one example per response: `prompt`, `response`, `score`, and a column for each of `aspects`."""
    columns = {name: [example.get(name) for example in examples] for name in ("prompt", "response", "score", *aspects)}
    if any(prompt != columns["prompt"][0] for prompt in columns["prompt"]):
        raise RowError(
            "several prompts of one id", f"got the prompts {short(columns['prompt'])}, need one a prompt_id."
        )
    return scored(
        {"prompt": columns["prompt"][0], "responses": columns["response"], "scores": columns["score"]}
        | {aspect: columns[aspect] for aspect in aspects},
        tie_margin=tie_margin,
        aspects=aspects,
    )
