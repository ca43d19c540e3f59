"""Prompts of language-model judges: a Jinja template for the question, and a worked example for one-shot prompting."""

import hashlib
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateRuntimeError, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from .judges import Question

_FOLDER = Path(__file__).with_name("templates")
LANGUAGES = ("en", "zh")
"""Languages of the package's own templates."""


class Template:
    """
    Template that turns questions into chat messages for a language model.

    The template is rendered with `prompt` (the turns, each with `role` and `content`), `first`, `second`, `point` and `task`
    (both may be None), `structured` (whether JSON is required) and `mark`. The mark is a word that occurs in none of the texts
    and that their authors cannot predict, so a response cannot forge lines that begin with it. It is the same for both orders
    of two responses.

    Args:
        source (`str`, *optional*, defaults to `"en"`): `"en"`, `"zh"`, or the path of your own Jinja file. It must show the
            last turn of the prompt, both responses, and the point if there is one; it may omit the earlier turns and the task.
        example (`str`, *optional*): Worked example for one-shot prompting: `"en"`, `"zh"`, or the path of a YAML file with
            `prompt` (text), `first`, `second`, `choice` (1 or 2), and `point`. The choice must hold at the point and overall.
        structured (`bool`, *optional*, defaults to `False`): Whether to require a JSON object, for servers that enforce it.

    Raises:
        ValueError: If the template does not render or omits what it must show, or the example is incomplete.
    """

    def __init__(self, source: str = "en", *, example: str | None = None, structured: bool = False):
        self.source, self.structured = source, structured
        text = _read(source, ".jinja")
        environment = SandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=self._check_printed
        )
        try:
            self._template = environment.from_string(text)
        except TemplateSyntaxError as error:
            raise ValueError(f"template {source!r}, line {error.lineno}: {error}, need Jinja: fix it.") from error
        # A template may support only questions with a point, or only overall questions.
        self._faults = {pointed: self._fault(pointed) for pointed in (True, False)}
        if all(self._faults.values()):
            raise ValueError(self._faults[True])
        self._example = None if example is None else _read_example(example)
        self.digest = hashlib.sha256(repr((text, self._example, structured)).encode()).hexdigest()
        """Digest of everything that the messages depend on besides the question."""

    def messages(self, question: Question) -> list[dict[str, str]]:
        """
        Build the chat messages of a question; the last one is the user's.

        Raises:
            ValueError: If the template omits a part of the question, or prints a point although the question has none.
        """
        if fault := self._faults[question.point is not None]:
            raise ValueError(fault)
        turns = []
        if self._example is not None:
            shown, choice = self._example
            shown = shown if question.point is not None else replace(shown, point=None)
            answer = f'{{"choice": {choice}}}' if self.structured else str(choice)
            turns += [{"role": "user", "content": self._render(shown)}, {"role": "assistant", "content": answer}]
        return [*turns, {"role": "user", "content": self._render(question)}]

    def _render(self, question: Question) -> str:
        return self._template.render(
            prompt=question.prompt,
            first=question.first,
            second=question.second,
            point=question.point,
            task=question.task,
            structured=self.structured,
            mark=_mark(question),
        ).strip()

    def _check_printed(self, value: Any) -> Any:
        if value is None:
            raise TemplateRuntimeError(
                "it prints a `point` or a `task` that is not there, and has to ask for it first, as in {% if task %}"
            )
        return value

    def _fault(self, pointed: bool) -> str | None:
        """Describe what is wrong with the template for questions of this form, found by rendering unique words."""
        words = {name: f"word{index}of{name}" for index, name in enumerate(("prompt", "first", "second", "point"))}
        turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"))]
        turns.append({"role": "user", "content": words["prompt"]})
        question = Question(turns, words["first"], words["second"], words["point"] if pointed else None)
        form = "with a capability point" if pointed else "about the whole"
        try:
            text = self._render(question)
        except Exception as error:  # rendering a template may raise anything
            return f"template {self.source!r}, for questions {form}: {error}, need a template that renders: fix it."
        if missing := [name for name in words if words[name] not in text and (pointed or name != "point")]:
            return (
                f"template {self.source!r}, for questions {form}: got a text without {missing}, need all of them in it because "
                f"the judge sees nothing else: write {' and '.join('{{ ' + name + ' }}' for name in missing)} into it."
            )
        return None


def _mark(question: Question) -> str:
    """Digest of all texts, which none of them can contain; the same for both orders."""
    texts = [*sorted([question.first, question.second]), *(text for turn in question.prompt for text in turn.values())]
    texts += [question.point or "", question.task or ""]
    marks = (hashlib.sha256(repr((number, texts)).encode()).hexdigest()[:8] for number in count())
    return next(mark for mark in marks if not any(mark in text for text in texts))


def _read(source: str, ending: str) -> str:
    try:
        path = _FOLDER / f"{source}{ending}" if source in LANGUAGES else Path(source)
        return path.read_text(encoding="utf-8")
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"got {source!r}, need one of {LANGUAGES} or the path of a text file: {error}.") from error


def _read_example(source: str) -> tuple[Question, int]:
    """Read a worked example and its answer."""
    try:
        content = yaml.safe_load(_read(source, "_example.yaml"))
    except yaml.YAMLError as error:
        raise ValueError(f"example {source!r}: got {error}, need YAML: fix it.") from error
    fields = {"prompt", "first", "second", "point", "choice"}
    if not isinstance(content, dict) or set(content) != fields or content["choice"] not in (1, 2):
        raise ValueError(
            f"example {source!r}: got {content!r}, need exactly {sorted(fields)}, with 1 or 2 as `choice`: write them."
        )
    texts = {name: str(content[name]) for name in ("first", "second", "point")}
    return Question([{"role": "user", "content": str(content["prompt"])}], **texts), int(content["choice"])
