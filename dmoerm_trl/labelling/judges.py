"""
Judges, which decide which of two responses is better, at one capability point or overall (section 4.3).

| kind | what it is | its other settings |
| --- | --- | --- |
| `server` | a language model behind an OpenAI-compatible server | [`~dmoerm_trl.labelling.server_judge.ServerJudge`] |
| `model` | a language model of transformers, on this machine | [`~dmoerm_trl.labelling.local_judges.ModelJudge`] |
| `reward_model` | a reward model; a DMoERM judges by its capability scores | [`~dmoerm_trl.labelling.local_judges.RewardJudge`] |
| `function` | a Python function that scores one response | [`~dmoerm_trl.labelling.local_judges.FunctionJudge`] |
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple, Protocol


@dataclass(frozen=True)
class Question:
    """
    The question which of two responses to a prompt is better.

    Args:
        prompt (`list[dict]`): Turns with `role` and `content`, oldest first; the last turn is the user's.
        first (`str`): Response shown as number 1.
        second (`str`): Response shown as number 2.
        point (`str`, *optional*): The only capability point to judge by; None to judge overall.
        task (`str`, *optional*): Task of the prompt, for judges that use it.
        round (`int`, *optional*, defaults to 0): 0 for the first time, and 1 or more if the same question is repeated, so that
            a judge that samples draws a new answer.
    """

    prompt: list[dict]
    first: str
    second: str
    point: str | None
    task: str | None = None
    round: int = 0


class Answer(NamedTuple):
    """Answer of a judge to one question."""

    choice: Literal[1, 2] | None
    """The better response; None if the answer cannot be read or the judge prefers neither."""
    text: str
    """The answer in the judge's own words, or the reason why there is no answer; kept as a record."""
    prompt_tokens: int = 0
    """Tokens of the question, as billed by the server or read by the model; an estimate if the server does not report them."""
    completion_tokens: int = 0

    @property
    def verdict(self) -> Literal[0, 1, 2] | None:
        """The choice, or 0 for a [`Tie`]."""
        return self.choice


class Tie(Answer):
    """A readable answer that prefers neither response, because the judge gives both the same score."""

    verdict = 0


class JudgeError(RuntimeError):
    """Raised if further questions are pointless: wrong key, unknown model, unreachable server. The message holds no secret."""


class RefusesAll(JudgeError):
    """Raised if the judge now refuses every question, so that earlier refused questions may be answered once it is repaired."""


class Judge(Protocol):
    """
    Interface of a judge, which answers questions.

    Attributes:
        identity (`dict`): Everything besides the question that the answers depend on, as JSON: kind, model, template, sampling.
            It contains neither a key nor an address.
        batch_size (`int`): Number of questions to pass to one call of `ask`.
        concurrency (`int`): Number of concurrent calls of `ask`.
        samples (`bool`): Whether another `round` of a question may get another answer.
        answered (`bool`): Whether the judge is known to have answered a question. The caller sets it from the stored answers,
            so that the judge can distinguish a problem with one question from a problem with all.
        wanted (`str`, *optional*): Form of a readable answer, for messages.
        failures (`Mapping[str, int]`, *optional*): Kind of failure -> number of requests that failed and were retried.

    Example:

    ```python
    from dmoerm_trl import Judge

    class Longest:  # a Judge of your own: which of two responses is longer
        identity, batch_size, concurrency, samples, answered = {"kind": "longest"}, 100, 1, False, True

        async def ask(self, questions):
            return [...]

    judge: Judge = Longest()
    ```
    """

    identity: dict[str, Any]
    batch_size: int
    concurrency: int
    samples: bool
    answered: bool

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """
        Answer each question, in order. More than `batch_size` questions are allowed, but take longer.

        Raises:
            JudgeError: If further questions are pointless.
        """

    def estimate_tokens(self, question: Question) -> tuple[int, int]:
        """Estimate the tokens of the question and the maximum of its answer, without asking; zeros if nothing is billed."""

    async def close(self) -> None:
        """Close connections."""


def judge_from_config(config: Mapping[str, Any]) -> Judge:
    """
    Create the judge described by a recipe.

    Args:
        config (`Mapping`): `kind`, see the table of this module, and the arguments of its class.

    Raises:
        ValueError: For an unknown kind, or a setting that is unknown, missing or out of range.

    Example:

    ```python
    from dmoerm_trl import judge_from_config

    judge = judge_from_config({"kind": "function", "function": "dmoerm_trl.labelling.heuristics:weak"})
    ```
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"`judge` of the recipe: got a {type(config).__name__}, need `kind` and its settings.")
    settings = dict(config)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"`judge` of the recipe: got kind={kind!r}, need one of {list(_KINDS)}.")
    judge = resolve_name(f"{__package__}.{_KINDS[kind]}")
    known = inspect.signature(judge).parameters
    if unknown := settings.keys() - known:
        raise ValueError(
            f"`judge` of the recipe: got the unknown keys {sorted(map(str, unknown))}, need some of {list(known)} because these are "
            f"the settings of the kind {kind!r}: rename or remove them."
        )
    if missing := [
        name for name, setting in known.items() if setting.default is setting.empty and name not in settings
    ]:
        raise ValueError(f"`judge` of the recipe: got no {missing}, need them for the kind {kind!r}: add them.")
    return judge(**settings)


def check_setting(name: str, value: Any, good: bool, need: str) -> None:
    """
    Check a setting of a judge.

    Raises:
        ValueError: If `good` is false; the message shows the value.
    """
    if not good:
        raise ValueError(f"`judge` of the recipe: got {name}={value!r}, need {need}: change it.")


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Check that a setting of a judge is a whole number from `least` to `most`."""
    good = type(value) is int and value >= least and (most is None or value <= most)
    need = f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}"
    check_setting(name, value, good, need)


_KINDS = {
    "server": "server_judge:ServerJudge",
    "model": "local_judges:ModelJudge",
    "reward_model": "local_judges:RewardJudge",
    "function": "local_judges:FunctionJudge",
}
"""Kind -> class, imported only when it is used."""
