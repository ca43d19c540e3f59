"""
Weak labels from simple text statistics, to try the method before paying a judge.

Each function is called as `function(prompt=..., response=...)` and returns a number; higher is better at the point. Best of n
accepts such a function as a scorer. [`weak`] combines all of them in one judge, `dmoerm_trl.labelling.heuristics:weak`, and
[`weak_ranks`] ranks all responses to a prompt. They need no model, no network and no additional library.

The judge compares two responses and calls a tie only if their numbers are equal. [`weak_ranks`] sees all responses of a row and
ties those that are close relative to the spread of the row, so it leaves some pairs unlabelled that the judge decides.

These are weak proxies. The functions look only at the surface of a text, which is easy to imitate, so do not optimise a policy
against them. `content_richness` grows with length and `conciseness` falls with it: compare with the length-only row. Points of
the paper that only a reader can judge have no function here: intent conformity, expressiveness, logic, correctness,
objectiveness, reasoning ability, depth and breadth of knowledge, convincing ability, viewpoint richness, emotion expression,
empathy ability, and the points that only roleplay has.

Words are runs of letters and digits; in Chinese and Japanese, which do not separate words, each character counts as a word.
Text without any word is the worst at every point. The libraries textstat and lexicalrichness would cover one of the eight
points each, but they split words at spaces, so a Chinese sentence is a single word to them. textstat ends sentences only at
`.!?` and ignores those of one or two words; lexicalrichness has no MATTR for a text shorter than the window, and depends on
SciPy, pandas and TextBlob.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..data.ranks import ranks_of

Prompt = str | Sequence[dict]
"""A text, or a list of turns with `role` and `content`, oldest first."""

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])[^\W_])+(?:['’][^\W_]+)*")
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|[。！？]+|\n+")
LIST_OR_HEADING = re.compile(r"\s*(?:[-*•+]|\d+[.)、]|#+|```|\|)\s*\S")
PERSONS = frozenset("i i'm i've i'll me my you you're your yours we us our let's 我 你 您 咱".split())
WINDOW = 50
"""Window of [`lexical_variety`], in words."""


def readability(*, response: str, **_: Any) -> float:
    """
    Shortness of sentences and words: 100 minus the LIX index (words per sentence plus the percentage of words with more than
    six letters, Björnsson 1968), from 0 to 100. A line break always ends a sentence.
    """
    words = _words(response)
    if not words:
        return 0.0
    sentences = _sentences(response)
    lix = len(words) / len(sentences) + 100 * sum(len(word) > 6 for word in words) / len(words)
    return max(100 - lix, 0.0)


def content_richness(*, response: str, **_: Any) -> float:
    """Binary logarithm of the number of distinct words, so that twice as many add 1 at any length."""
    return math.log2(1 + len(set(_words(response))))


def lexical_variety(*, response: str, **_: Any) -> float:
    """
    Share of distinct words in a sliding window of 50 words, averaged over the text (MATTR, Covington and McFall 2010), so
    that a long text is not penalised.
    """
    words = _words(response)
    if not words:
        return 0.0
    starts = range(max(len(words) - WINDOW, 0) + 1)
    return float(np.mean([len(set(words[start : start + WINDOW])) / min(WINDOW, len(words)) for start in starts]))


def conciseness(*, response: str, **_: Any) -> float:
    """Share of distinct words among all words: filler and repetition lower it, and so does length."""
    words = _words(response)
    return len(set(words)) / len(words) if words else 0.0


def structure(*, response: str, **_: Any) -> float:
    """Binary logarithm of the number of lines, where a list item, heading, table row or code fence counts as two."""
    if not _words(response):
        return 0.0
    lines = [line for line in response.split("\n") if line.strip()]
    return math.log2(len(lines) + sum(LIST_OR_HEADING.match(line) is not None for line in lines) + 1)


def question_specific(*, prompt: Prompt, response: str, **_: Any) -> float:
    """Share of the distinct words of the question, which is the last turn, that occur in the response."""
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    asked = set(_words(question))
    return len(asked & set(_words(response))) / len(asked) if asked else 0.0


def conversational_sense(*, response: str, **_: Any) -> float:
    """Share of first- and second-person pronouns (I, you, we), in English and Chinese, among the words."""
    words = _words(response)
    return sum(word in PERSONS for word in words) / len(words) if words else 0.0


def proactivity(*, response: str, **_: Any) -> float:
    """Share of the sentences that are questions."""
    if not _words(response):
        return 0.0
    return min((response.count("?") + response.count("？")) / len(_sentences(response)), 1.0)


WEAK_POINTS: dict[str, Callable[..., float]] = {
    "readability": readability,
    "content richness": content_richness,
    "question specific": question_specific,
    "conversational sense": conversational_sense,
    "proactivity": proactivity,
    "lexical variety": lexical_variety,
    "conciseness": conciseness,
    "structure": structure,
}
"""Capability point -> function. The first five are points of the paper's table 12; the others are additional."""


def weak(*, prompt: Prompt, response: str, point: str | None, **_: Any) -> float:
    """
    Score a response at a capability point.

    Args:
        point (`str`): One of [`WEAK_POINTS`].

    Raises:
        ValueError: For a point without a function.
    """
    if point not in WEAK_POINTS:
        raise ValueError(
            f"got the point {point!r}, need one of {list(WEAK_POINTS)}: no function can judge the others, ask a judge."
        )
    return WEAK_POINTS[point](prompt=prompt, response=response)


def weak_ranks(prompt: Prompt, responses: Sequence[str], point: str, tolerance: float = 0.1) -> list[int]:
    """
    Rank the responses to a prompt at a point, in the format of a preference row's `capability_ranks`.

    Args:
        responses (`Sequence[str]`): K texts.
        point (`str`): One of [`WEAK_POINTS`].
        tolerance (`float`, *optional*, defaults to 0.1): Spread of a tie, see [`tied_ranks`].

    Raises:
        ValueError: For a point without a function.
    """
    return tied_ranks([weak(prompt=prompt, response=response, point=point) for response in responses], tolerance)


def tied_ranks(scores: Sequence[float], tolerance: float = 0.1) -> list[int]:
    """
    Convert scores, where higher is better, into ranks in which close scores are tied.

    Args:
        scores (`Sequence[float]`): K scores.
        tolerance (`float`, *optional*, defaults to 0.1): Largest distance of a score from the best score of its tie, in
            standard deviations of the K scores.

    Returns:
        `list[int]`: K ranks, 1 is best; a rank is one more than the number of responses ranked above the tie.
    """
    return ranks_of(scores, tolerance * float(np.std(scores)), gaps=True)


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _sentences(text: str) -> list[str]:
    """Split a text into sentences, ignoring parts without a word."""
    return [part for part in SENTENCE_END.split(text) if WORD.search(part)]
