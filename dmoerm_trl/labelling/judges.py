"""
Judges: who says which of two responses is better, at one capability point or overall (section 4.3).

| kind | what it is | the rest of its settings |
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
    Which of two responses to a prompt is better?

    Args:
        prompt (`list[dict]`): turns with `role` and `content`, oldest first; the last is the user's.
        first (`str`): the response that is shown as number 1.
        second (`str`): the response that is shown as number 2.
        point (`str`, *optional*): the capability point to judge by alone; None: overall.
        task (`str`, *optional*): the prompt's task, for judges that read it.
        round (`int`): 0; 1 and more where the same is asked again, so that a judge that samples draws anew.
    """

    prompt: list[dict]
    first: str
    second: str
    point: str | None
    task: str | None = None
    round: int = 0


class Answer(NamedTuple):
    """What a judge said to one question."""

    choice: Literal[1, 2] | None
    """The better response; None where the answer cannot be read or the judge does not prefer one."""
    text: str
    """The answer in the judge's own words, or why there is none, for the record."""
    prompt_tokens: int = 0
    """Tokens of the question as the server billed them or the model read them; an estimate where a server does not say."""
    completion_tokens: int = 0

    @property
    def verdict(self) -> Literal[0, 1, 2] | None:
        """The choice, or 0 for a [`Tie`]."""
        return self.choice


class Tie(Answer):
    """The answer of a judge that gives both responses the same score: it can be read, and prefers neither."""

    verdict = 0


class JudgeError(RuntimeError):
    """Asking on is pointless: a wrong key, an unknown model, a server that is gone. Its text holds no secret."""


class RefusesAll(JudgeError):
    """The judge refuses every question by now, so those that it refused before may be answered when it is mended."""


class Judge(Protocol):
    """
    Answers questions.

    Attributes:
        identity (`dict`): JSON of all that the answers depend on beside the question: kind, model, template, sampling. Neither
            a key nor an address is in it.
        batch_size (`int`): the questions to give to one call of `ask`.
        concurrency (`int`): the calls of `ask` to have under way at once.
        samples (`bool`): whether another `round` of a question may be answered otherwise.
        answered (`bool`): whether it is known to have answered a question. Who asks sets it by what earlier runs stored, so that
            a judge can tell what goes wrong with one question from what does with all.
        wanted (`str`, *optional*): what an answer needs to have so that it can be read, for messages.
        failures (`Mapping[str, int]`, *optional*): kind -> requests that failed and were made again.
    """

    identity: dict[str, Any]
    batch_size: int
    concurrency: int
    samples: bool
    answered: bool

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """
        One answer a question, in their order. Any number of questions may be asked: more than `batch_size` take longer.

        Raises:
            JudgeError: where asking on is pointless.
        """

    def estimate_tokens(self, question: Question) -> tuple[int, int]:
        """The tokens of the question and the most that its answer may have, without asking; zeros for what has none."""

    async def close(self) -> None:
        """Gives connections back."""


def judge_from_config(config: Mapping[str, Any]) -> Judge:
    """
    The judge that a recipe describes.

    Args:
        config (`Mapping`): `kind`, one of the table above, and the arguments of its class.

    Raises:
        ValueError: for an unknown kind, an unknown or a missing setting, or one that is out of range.
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
    Checks a setting of a judge.

    Raises:
        ValueError: if it is not good; it shows the value.
    """
    if not good:
        raise ValueError(f"`judge` of the recipe: got {name}={value!r}, need {need}: change it.")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Checks that a setting of a judge is a whole number of at least `least`, and of at most `most`."""
    good = type(value) is int and value >= least and (most is None or value <= most)
    need = f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}"
    check_setting(name, value, good, need)


_KINDS = {
    "server": "server_judge:ServerJudge",
    "model": "local_judges:ModelJudge",
    "reward_model": "local_judges:RewardJudge",
    "function": "local_judges:FunctionJudge",
}
"""Kind -> its class, imported only when it is wanted."""
