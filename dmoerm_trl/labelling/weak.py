"""
Weak labels: what can be counted in a text, for those who want to try the method before they pay a judge.

Each function is called as `function(prompt=..., response=...)` and returns a number, higher is better at the point. That is
what best of n takes as a scorer; [`weak`] is all of them in one, the judge `dmoerm_trl.labelling.weak:weak`, and
[`weak_ranks`] ranks all responses to a prompt. They need no model, no network and no further library.

A judge is asked about two responses, and ties those whose numbers are equal. [`weak_ranks`] sees all responses of a row and
ties those that are close on the scale of the row, so it says nothing of some pairs that the judge decides.

They are proxies, and weak ones. A function sees the surface: text that imitates it gets the label, so do not optimise a
policy against them. `content_richness` grows with length and `conciseness` falls with it: compare with the length-only row.
Of the paper's points, those that only a reader can judge have no function here: intent conformity, expressiveness, logic,
correctness, objectiveness, reasoning ability, depth and breadth of knowledge, convincing ability, viewpoint richness,
emotion expression, empathy ability, and what roleplay has of its own.

Words are runs of letters and digits; in Chinese and Japanese, which do not part their words, each character counts as one.
Text without a word is the worst at every point. textstat and lexicalrichness would cover one of the eight points each, but part
words at spaces, so a Chinese sentence is one word to them. textstat ends sentences at `.!?` alone and leaves out those of one or
two words; lexicalrichness has no MATTR for a text shorter than the window, and brings SciPy, pandas and TextBlob.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Prompt = str | Sequence[dict]
"""Text, or turns with `role` and `content`, oldest first."""

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])[^\W_])+(?:['’][^\W_]+)*")
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|[。！？]+|\n+")
LIST_OR_HEADING = re.compile(r"\s*(?:[-*•+]|\d+[.)、]|#+|```|\|)\s*\S")
PERSONS = frozenset("i i'm i've i'll me my you you're your yours we us our let's 我 你 您 咱".split())
WINDOW = 50
"""Words of the window of `lexical_variety`."""


def readability(*, response: str, **_: Any) -> float:
    """
    Short sentences and short words: 100 less the LIX index, words per sentence plus the percentage of words with more than
    six letters (Björnsson 1968), within 0 and 100. A line is a sentence at most.
    """
    words = _words(response)
    if not words:
        return 0.0
    sentences = _sentences(response)
    lix = len(words) / len(sentences) + 100 * sum(len(word) > 6 for word in words) / len(words)
    return max(100 - lix, 0.0)


def content_richness(*, response: str, **_: Any) -> float:
    """How many different words, as a logarithm: twice as many are one step more, however long the text."""
    return math.log2(1 + len(set(_words(response))))


def lexical_variety(*, response: str, **_: Any) -> float:
    """
    Share of different words in a window of 50 words, on average over the text (MATTR, Covington and McFall 2010), so that
    a long text is not worse for its length.
    """
    words = _words(response)
    if not words:
        return 0.0
    starts = range(max(len(words) - WINDOW, 0) + 1)
    return float(np.mean([len(set(words[start : start + WINDOW])) / min(WINDOW, len(words)) for start in starts]))


def conciseness(*, response: str, **_: Any) -> float:
    """Share of the words that are said for the first time: filler and repetition lower it, and so does length."""
    words = _words(response)
    return len(set(words)) / len(words) if words else 0.0


def structure(*, response: str, **_: Any) -> float:
    """Lines, and once more those that begin a list item, a heading, a table row or code, as a logarithm."""
    if not _words(response):
        return 0.0
    lines = [line for line in response.split("\n") if line.strip()]
    return math.log2(len(lines) + sum(LIST_OR_HEADING.match(line) is not None for line in lines) + 1)


def question_specific(*, prompt: Prompt, response: str, **_: Any) -> float:
    """Share of the question's different words, those of the last turn, that the response takes up."""
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    asked = set(_words(question))
    return len(asked & set(_words(response))) / len(asked) if asked else 0.0


def conversational_sense(*, response: str, **_: Any) -> float:
    """Share of words by which someone speaks to someone: I, you, we, in English and in Chinese."""
    words = _words(response)
    return sum(word in PERSONS for word in words) / len(words) if words else 0.0


def proactivity(*, response: str, **_: Any) -> float:
    """Share of the sentences that ask something back."""
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
"""Capability point -> its function. The first five are points of the paper's table 12, the others are this module's own."""


def weak(*, prompt: Prompt, response: str, point: str | None, **_: Any) -> float:
    """
    The number of a response at a point, by its function.

    Args:
        point (`str`): one of [`WEAK_POINTS`].

    Raises:
        ValueError: for a point without a function.
    """
    if point not in WEAK_POINTS:
        raise ValueError(
            f"got the point {point!r}, need one of {list(WEAK_POINTS)}: no function can judge the others, ask a judge."
        )
    return WEAK_POINTS[point](prompt=prompt, response=response)


def weak_ranks(prompt: Prompt, responses: Sequence[str], point: str, tolerance: float = 0.1) -> list[int]:
    """
    Ranks the responses to a prompt at a point, as a preference row takes them in `capability_ranks`.

    Args:
        responses (`Sequence[str]`): K texts.
        point (`str`): one of [`WEAK_POINTS`].
        tolerance (`float`): as of [`ranks_of`].

    Raises:
        ValueError: for a point without a function.
    """
    return ranks_of([weak(prompt=prompt, response=response, point=point) for response in responses], tolerance)


def ranks_of(scores: Sequence[float], tolerance: float = 0.1) -> list[int]:
    """
    Ranks by scores, of which the higher is the better; those that are close are tied.

    Args:
        scores (`Sequence[float]`): K numbers.
        tolerance (`float`): how far below the best of a tie its other members may be, in standard deviations of the K
            scores.

    Returns:
        `list[int]`: K ranks, 1 is best; a response's rank is one more than the number of those before its tie.
    """
    margin = tolerance * float(np.std(scores))
    ranks = [0] * len(scores)
    lead, rank = math.inf, 0
    for place, index in enumerate(sorted(range(len(scores)), key=lambda index: -scores[index]), start=1):
        if lead - scores[index] > margin:
            lead, rank = scores[index], place
        ranks[index] = rank
    return ranks


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _sentences(text: str) -> list[str]:
    """Parts with a word in them."""
    return [part for part in SENTENCE_END.split(text) if WORD.search(part)]
