"""A judge behind a server that speaks the OpenAI protocol: a hosted one, or vLLM, llama.cpp, Ollama and their like."""

import asyncio
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from .judges import Answer, JudgeError, Question
from .reading import read_choice
from .template import Template

BYTES_PER_TOKEN = 3
"""Of UTF-8, for estimates without the model's tokenizer: few, so that most estimates are too high rather than too low."""

_TRY_AGAIN = {408, 409, 425, 429}  # and all from 500 on
_NO_MONEY = {"insufficient_quota", "billing_hard_limit_reached"}
_THIS_QUESTION = {"context_length_exceeded", "content_filter"}
_MAY_BE_THIS_QUESTION = {400, 413, 422}
_MOST_REFUSED = 500  # more than the questions of one long prompt: 360 for nine responses at five points

_TOP_UP = "need an account that can pay: top it up and go on later"

_SCHEMA = {
    "type": "object",
    "properties": {"choice": {"type": "integer", "enum": [1, 2]}},
    "required": ["choice"],
    "additionalProperties": False,
}


class ServerJudge:
    """
    Asks a language model by the chat completions of the OpenAI protocol; needs `pip install "dmoerm-trl[label]"`.

    What may pass (5xx, time-outs, dropped connections, broken replies) is tried again, after a time that doubles with each
    retry and is drawn between its half and its whole, or after the server's Retry-After. A 429 holds back all requests, for a
    time that doubles until the next answer comes. A question that is too long for the model, or that the server's filter
    refuses, is answered without a choice; so is any that it refuses with status 400, 413 or 422 while it answers others, up
    to 500 in a row.

    Args:
        base_url (`str`): such as `https://api.openai.com/v1` or `http://localhost:8000/v1`. It is not part of the judge's
            identity: the same model elsewhere is the same judge.
        model (`str`): the model's name on the server.
        api_key_env (`str`, *optional*): the environment variable that holds the key; None for a server that wants none.
        template (`str`), example (`str`, *optional*), structured (`bool`): see
            [`~dmoerm_trl.labelling.template.Template`]; `structured` needs a server that knows `response_format` with
            `json_schema`.
        temperature (`float`): of the sampling.
        seed (`int`, *optional*): of the sampling, sent with `round` added; None where the server does not know seeds.
        max_tokens (`int`): of an answer. One that is cut off there is unreadable: models that reason first need more.
        extra_body (`Mapping`, *optional*): more fields of the request, such as
            `{"chat_template_kwargs": {"enable_thinking": false}}`; null leaves a field out, as in
            `{"max_tokens": null, "max_completion_tokens": 16}`; one of these two has to be there.
        concurrency (`int`): requests under way at once.
        requests_per_minute (`float`, *optional*), tokens_per_minute (`float`, *optional*): limits to keep to, evenly; tokens
            are those of [`estimate_tokens`].
        timeout (`float`): seconds to wait for a reply.
        retries (`int`): of one question, after which the server counts as gone; of 429s, in a row without any answer.
        first_wait (`float`), longest_wait (`float`): seconds before the first retry, and the most before any: a
            server whose Retry-After says more counts as gone.

    Raises:
        ImportError: if the package `openai` is missing.
        JudgeError: if the key is missing or cannot be sent.
        ValueError: if a setting is out of range.
    """

    batch_size = 1

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = "OPENAI_API_KEY",
        template: str = "en",
        example: str | None = None,
        structured: bool = False,
        temperature: float = 0.0,
        seed: int | None = None,
        max_tokens: int = 16,
        extra_body: Mapping[str, Any] | None = None,
        concurrency: int = 16,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        first_wait: float = 1.0,
        longest_wait: float = 300.0,
    ):
        _check_address(base_url)
        _check("temperature", temperature, _is_number(temperature) and temperature >= 0, "a number, 0 or more")
        for name, value, least in (
            ("max_tokens", max_tokens, 1),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
        ):
            _check(name, value, type(value) is int and value >= least, f"a whole number, {least} or more")
        for name, value in (("timeout", timeout), ("first_wait", first_wait), ("longest_wait", longest_wait)):
            _check(name, value, _is_number(value) and value > 0, "a number of seconds above 0")
        for name, value in (("requests_per_minute", requests_per_minute), ("tokens_per_minute", tokens_per_minute)):
            _check(name, value, value is None or (_is_number(value) and value > 0), "a number above 0, or none")
        self.base_url, self.model, self.concurrency = base_url, model, concurrency
        self._api_key_env, self._structured = api_key_env, structured
        self._retries, self._first_wait, self._longest_wait = retries, first_wait, longest_wait
        self._template = Template(template, example=example, structured=structured)
        self._body: dict[str, Any] = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        if structured:
            schema = {"name": "choice", "strict": True, "schema": _SCHEMA}
            self._body["response_format"] = {"type": "json_schema", "json_schema": schema}
        self._body |= extra_body or {}
        self._body = {name: value for name, value in self._body.items() if value is not None}
        self._longest_answer = longest = self._body.get("max_completion_tokens", self._body.get("max_tokens"))
        limited = type(longest) is int and longest >= 1
        _check(
            "extra_body",
            extra_body,
            limited,
            "a whole number as max_tokens or max_completion_tokens, for the estimates",
        )
        self.samples = self._body.get("temperature") != 0
        self._seed = seed if self.samples else None
        self.identity = {"kind": "server", "template": self._template.digest, "seed": self._seed, **self._body}
        self._key = _read_key(api_key_env)
        self._client, self._options = _client(base_url, self._key, timeout)
        self._slots = asyncio.Semaphore(concurrency)
        self._requests, self._tokens = _Pace(requests_per_minute), _Pace(tokens_per_minute)
        self._go_on_at = self._counted_until = 0.0  # on the event loop's clock
        self._pauses = 0  # in a row, since the last answer
        self.answered = False
        self._refused = 0  # questions in a row, since the last answer
        self._under_way, self._one_ended = 0, asyncio.Event()

    def __repr__(self) -> str:
        return f"ServerJudge(base_url={self.base_url!r}, model={self.model!r})"

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        tasks = [asyncio.ensure_future(self._answer(question)) for question in questions]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # those that are left where one raised
                task.cancel()

    def estimate_tokens(self, question: Question) -> tuple[int, int]:
        return self._estimate(self._template.messages(question))

    async def close(self) -> None:
        await self._client.close()

    def _estimate(self, messages: list[dict[str, str]]) -> tuple[int, int]:
        size = sum(len(turn["content"].encode(errors="replace")) for turn in messages)
        return math.ceil(size / BYTES_PER_TOKEN), self._longest_answer

    async def _answer(self, question: Question) -> Answer:
        async with self._slots:
            self._under_way += 1
            try:
                return await self._try(question)
            finally:
                self._under_way -= 1
                self._one_ended.set()

    async def _try(self, question: Question) -> Answer:
        messages = self._template.messages(question)
        body = {**self._body, "messages": messages}
        if self._seed is not None:
            body["seed"] = self._seed + question.round
        estimate = self._estimate(messages)
        clock, failures = asyncio.get_running_loop().time, 0
        while True:
            while (pause := self._go_on_at - clock()) > 0:
                await asyncio.sleep(pause * random.uniform(1, 1.1))
            await self._requests.take(1)
            await self._tokens.take(sum(estimate))
            sent = clock()
            outcome = await self._request(body, estimate)
            if isinstance(outcome, Answer):
                return outcome
            if isinstance(outcome, JudgeError):
                raise outcome
            if outcome.for_all:
                is_new = sent >= self._counted_until  # what was sent before or in a pause calls for no second one
                self._pauses += is_new
                tries, share = max(self._pauses, 1), 1.0
                gone = (
                    f"{outcome.reason}, {tries} times in a row and no answer in between, need one: keep to the server's limit "
                    "by requests_per_minute or tokens_per_minute, or go on later."
                )
            else:
                tries = failures = failures + 1
                share = random.uniform(0.5, 1)
                gone = (
                    f"no answer to one question in {tries} requests, the last time {outcome.reason}, need a server that "
                    "answers: see that it runs and go on later."
                )
            if tries > self._retries:
                raise JudgeError(f"{self.base_url}: got {gone}")
            wait = outcome.wait
            if wait is None:
                wait = min(self._longest_wait, self._first_wait * 2 ** (tries - 1)) * share
            if wait > self._longest_wait:
                raise JudgeError(
                    f"{self.base_url}: got {outcome.reason}, with the order to wait {wait:.0f} s, need at most "
                    f"longest_wait={self._longest_wait:g} s: go on later, or raise longest_wait."
                )
            if outcome.for_all:
                end = clock() + wait
                self._go_on_at = max(self._go_on_at, end)
                self._counted_until = end if is_new else self._counted_until
            else:
                await asyncio.sleep(wait)

    async def _refuses_all(self) -> bool:
        """Whether a refusal is of any question, because none is answered: neither before, nor of those under way."""

        def may_be_of_one() -> bool:
            return self.answered and self._refused < _MOST_REFUSED

        self._under_way -= 1
        self._one_ended.set()
        try:
            while self._under_way and not may_be_of_one():
                self._one_ended.clear()
                await self._one_ended.wait()
        finally:
            self._under_way += 1
        if not may_be_of_one():
            return True
        self._refused += 1
        return False

    async def _request(self, body: dict[str, Any], estimate: tuple[int, int]) -> "Answer | _Later | JudgeError":
        """One request. What the client raises is not chained to what is raised here: it holds what the server echoed."""
        import openai

        try:
            reply = await self._client.post("/chat/completions", body=body, cast_to=object, options=self._options)
        except openai.APIStatusError as error:
            status, headers, details = error.status_code, error.response.headers, error.body
            if not isinstance(details, dict):
                details = {}
            message = self._redact(str(details.get("message") or error.message))[:300]
        except openai.APIConnectionError as error:  # time-outs are of this kind
            return _Later(self._redact(f"{error} ({type(error.__cause__ or error).__name__})"))
        except UnicodeEncodeError:
            return Answer(None, "no answer: the text has half of a surrogate pair, which cannot be sent")
        except ValueError:
            return _Later("broken JSON")
        else:
            return self._read(reply, estimate)

        code, reason = str(details.get("code")), f"status {status} ({message})"
        if code in _THIS_QUESTION or (status == 400 and "maximum context length" in message):
            return Answer(None, f"no answer: {reason}")
        if (status in _TRY_AGAIN or status >= 500) and code not in _NO_MONEY:
            return _Later(reason, _retry_after(headers), for_all=status == 429)
        if status in _MAY_BE_THIS_QUESTION and not await self._refuses_all():
            return Answer(None, f"no answer: {reason}")
        where = "name its environment variable in `api_key_env`"
        if self._api_key_env is not None:
            where = f"put it into the environment variable {self._api_key_env}"
        ways = {
            401: f"need a key that it takes: {where}",
            402: _TOP_UP,
            403: f"need a key that may use the model {self.model!r}: {where}",
            404: f"need a model that it has, got {self.model!r}, and a base_url that ends where /chat/completions begins: "
            "correct them",
            429: _TOP_UP,
        }
        way = ways.get(
            status, "need a request that it takes: change the judge's settings, such as structured or extra_body"
        )
        return JudgeError(f"{self.base_url}: got {reason}, {way}.")

    def _read(self, reply: Any, estimate: tuple[int, int]) -> "Answer | _Later":
        try:
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            text = choice["message"].get("content") or choice["message"].get("refusal") or ""
            if isinstance(text, list):
                text = "".join(part["text"] for part in text if part["type"] == "text")
            whole = choice.get("finish_reason") != "length"
            names = ("prompt_tokens", "completion_tokens")
            tokens = [int(usage.get(name) or most) for name, most in zip(names, estimate, strict=True)]
            read = read_choice(text, structured=self._structured) if whole else None
        except (AttributeError, LookupError, TypeError, ValueError):
            return _Later(f"what is no chat completion: {self._redact(str(reply))[:200]!r}")
        self._pauses, self._refused, self.answered = 0, 0, True
        return Answer(read, self._redact(text), *tokens)

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


class _Later(NamedTuple):
    """Why a request failed that may succeed later."""

    reason: str
    wait: float | None = None
    """Seconds, where the server says."""
    for_all: bool = False
    """Whether other requests would fail as well."""


class _Pace:
    """Spreads what is taken evenly over time; without a limit, nothing waits."""

    def __init__(self, per_minute: float | None):
        self._seconds = 0.0 if per_minute is None else 60 / per_minute
        self._free_at = 0.0

    async def take(self, amount: float) -> None:
        if self._seconds:
            now = asyncio.get_running_loop().time()
            start = max(now, self._free_at)
            self._free_at = start + amount * self._seconds
            await asyncio.sleep(start - now)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a reply asks to wait, given as such or as a date."""
    value = headers.get("retry-after", "")
    with suppress(ValueError):
        seconds = float(value)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    with suppress(ValueError, TypeError):
        return max((parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds(), 0.0)
    return None


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        usual = re.fullmatch("[A-Z_][A-Z0-9_]*", variable)  # else it may be the key itself
        raise JudgeError(
            f"got no key in the environment variable {variable if usual else 'that `api_key_env` names'}, need one because the server may ask for it: set it, name "
            "another variable in `api_key_env`, or set `api_key_env: null` for a server that wants none."
        )
    if not (key.isascii() and key.isprintable()):
        raise JudgeError(
            f"got a key in the environment variable {variable} with a line break or a character outside ASCII, need one "
            "without because it is sent in a header: copy it anew."
        )
    return key


def _client(base_url: str, key: str | None, timeout: float) -> tuple[Any, dict[str, Any]]:
    """A client that leaves retries to us, and the options of its requests."""
    try:
        from openai import AsyncOpenAI, DefaultAioHttpClient, Omit
    except ImportError as error:
        raise ImportError(
            'got no package `openai`, need it to ask a server: pip install "dmoerm-trl[label]"'
        ) from error
    # Without an explicit key the client would send the one of OPENAI_API_KEY.
    options = {"api_key": key or "none", "timeout": timeout, "max_retries": 0}
    client = AsyncOpenAI(base_url=base_url, http_client=DefaultAioHttpClient(timeout=timeout), **options)
    return client, {} if key else {"headers": {"Authorization": Omit()}}


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    bare = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and not parts.query
    shown = f"{parts.scheme}://{parts.hostname}..."  # what is left out may be a secret
    _check("base_url", shown, bool(bare), "an http(s) address without a user, a password or a query")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: Any, good: bool, need: str) -> None:
    if not good:
        raise ValueError(f"`judge` of the recipe: got {name}={value!r}, need {need}: change it.")
