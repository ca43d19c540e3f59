"""Judge behind an OpenAI-compatible server: a hosted API, or vLLM, llama.cpp, Ollama and the like."""

import asyncio
import json
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from ..messages import quoted
from .completions import BrokenReply, Client, Reply, read_text, read_tokens
from .judges import Answer, JudgeError, Question, RefusesAll, check_integer, check_setting
from .parsing import WANTED, WANTED_STRUCTURED, read_choice
from .redaction import Redaction, looks_secret
from .server_settings import digests, read_address, read_extra_body, read_key, secrets_of
from .template import Template

BYTES_PER_TOKEN = 3
"""UTF-8 bytes per token, to estimate tokens without the model's tokenizer. Low, so that most estimates are too high."""

SHOWN = 300
"""Maximum number of characters of a server's text that an error message shows."""

_RETRYABLE = {408, 409, 425, 429}  # and every status from 500 on
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
    Judge that asks a language model by OpenAI-compatible chat completions; requires `pip install "dmoerm-trl[label]"`.

    Transient failures (5xx, time-outs, dropped connections, broken or endless replies) are counted in `failures` and retried,
    after the server's Retry-After or else after a delay that doubles with each retry and is drawn between half of it and all of
    it. A 429 pauses all requests, for a time that doubles until the next answer arrives. A question that is too long for the
    model or refused by the server's content filter is answered without a choice, and so is a question refused with status 400,
    413 or 422 while others are answered, up to 500 in a row. Redirects are not followed, because the key is meant for this
    server only.

    Error messages show the server's host and its text on one line, without the key, anything that looks like a secret in the
    path of `base_url` or in `extra_body`, and control characters.

    Args:
        base_url (`str`): Address of the server, such as `https://api.openai.com/v1` or `http://localhost:8000/v1`. It is not part
            of the judge's identity: the same model on another server is the same judge.
        model (`str`): Name of the model on the server.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`): Environment variable that holds the key; None for a
            server without keys.
        template (`str`, *optional*, defaults to `"en"`): See [`~dmoerm_trl.labelling.template.Template`].
        example (`str`, *optional*): See [`~dmoerm_trl.labelling.template.Template`].
        structured (`bool`, *optional*, defaults to `False`): See [`~dmoerm_trl.labelling.template.Template`]; requires a server
            that supports `response_format` with `json_schema`.
        temperature (`float`, *optional*, defaults to 0): Temperature of the sampling.
        seed (`int`, *optional*): Seed of the sampling, to which `round` is added; None for a server without seeds.
        max_tokens (`int`, *optional*, defaults to 16): Maximum tokens of an answer. A truncated answer is unreadable, so models
            that reason first need more.
        extra_body (`Mapping`, *optional*): Further fields of the request, such as
            `{"chat_template_kwargs": {"enable_thinking": false}}`. The value null removes a field, as in
            `{"max_tokens": null, "max_completion_tokens": 16}`; one of these two fields is required. The judge's identity holds
            digests of the texts in it, because they may be secrets.
        concurrency (`int`, *optional*, defaults to 16): Maximum number of concurrent requests.
        requests_per_minute (`float`, *optional*): Rate limit, kept by spacing requests evenly.
        tokens_per_minute (`float`, *optional*): Rate limit on the tokens of [`estimate_tokens`], kept likewise.
        timeout (`float`, *optional*, defaults to 120): Seconds allowed for a complete reply, from the request to the last byte.
        retries (`int`, *optional*, defaults to 6): Maximum number of retries of one question, and of 429s in a row without any
            answer, before the server counts as gone.
        first_wait (`float`, *optional*, defaults to 1): Seconds before the first retry.
        longest_wait (`float`, *optional*, defaults to 300): Maximum seconds before a retry. A server whose Retry-After is
            longer counts as gone.

    Raises:
        ImportError: If the package `openai` is missing.
        JudgeError: If the key is missing or cannot be sent.
        ValueError: If a setting is out of range.
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
        address = read_address(base_url)
        check_setting(
            "model", model, isinstance(model, str) and model.isprintable() and bool(model), "the name of a model"
        )
        check_setting("structured", structured, isinstance(structured, bool), "true or false")
        check_setting("temperature", temperature, _is_number(temperature) and temperature >= 0, "a number, 0 or more")
        check_setting("seed", seed, seed is None or type(seed) is int, "a whole number, or none")
        check_integer("max_tokens", max_tokens, 1)
        check_integer("concurrency", concurrency, 1, 1000)
        check_integer("retries", retries, 0)
        for name, value in (("timeout", timeout), ("first_wait", first_wait), ("longest_wait", longest_wait)):
            check_setting(name, value, _is_number(value) and value > 0, "a number of seconds above 0")
        for name, value in (("requests_per_minute", requests_per_minute), ("tokens_per_minute", tokens_per_minute)):
            good = value is None or (_is_number(value) and value > 0)
            check_setting(name, value, good, "a number above 0, or none")
        extra = read_extra_body(extra_body)
        self.host, self.model, self.concurrency = f"{address.scheme}://{address.netloc}", model, concurrency
        self._api_key_env, self._structured = api_key_env, structured
        self._retries, self._first_wait, self._longest_wait = retries, first_wait, longest_wait
        self._template = Template(template, example=example, structured=structured)
        own: dict[str, Any] = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        if structured:
            schema = {"name": "choice", "strict": True, "schema": _SCHEMA}
            own["response_format"] = {"type": "json_schema", "json_schema": schema}
        self._body = {name: value for name, value in (own | extra).items() if value is not None}
        self._longest_answer = self._body.get("max_completion_tokens", self._body.get("max_tokens"))
        if type(self._longest_answer) is not int or self._longest_answer < 1:
            raise ValueError(
                f"`judge` of the recipe: got extra_body={{{', '.join(map(repr, extra))}}}, need a whole number as max_tokens or "
                "max_completion_tokens, for the estimates: change it."
            )
        self.samples = self._body.get("temperature") != 0
        self._seed = seed if self.samples else None
        shown = own | {name: digests(value) for name, value in extra.items()}
        shown = {name: value for name, value in shown.items() if value is not None}
        self.identity = {"kind": "server", "template": self._template.digest, "seed": self._seed, **shown}
        key = read_key(api_key_env)
        self._redact = Redaction([key or "", *filter(looks_secret, address.path.split("/")), *secrets_of(extra)])
        self._client = Client(base_url, key, timeout)
        self._slots = asyncio.Semaphore(concurrency)
        self._requests, self._tokens = _RateLimiter(requests_per_minute), _RateLimiter(tokens_per_minute)
        self._go_on_at = self._counted_until = 0.0  # in the event loop's time
        self._pauses = 0  # in a row, since the last answer
        self.answered = False
        self._refused = 0  # questions in a row, since the last answer
        self._truncated = 0  # answers that were longer than max_tokens
        self.failures: Counter[str] = Counter()
        self._under_way, self._one_ended = 0, asyncio.Event()

    def __repr__(self) -> str:
        return f"ServerJudge(host={self.host!r}, model={self.model!r})"

    @property
    def wanted(self) -> str:
        cut = f"; {self._truncated} answers were cut off there" if self._truncated else ""
        form = WANTED_STRUCTURED if self._structured else WANTED
        return f"{form}, within max_tokens={self._longest_answer}{cut}"

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        tasks = [asyncio.ensure_future(self._answer(question)) for question in questions]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # those still running after another raised
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
        content = {**self._body, "messages": messages}
        if self._seed is not None:
            content["seed"] = self._seed + question.round
        try:
            body = json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Answer(None, "no answer: the text has half of a surrogate pair, which cannot be sent")
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
            self.failures[outcome.kind] += 1
            if outcome.for_all:
                is_new = sent >= self._counted_until  # a request sent before or during a pause does not extend it
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
                raise JudgeError(f"{self.host}: got {gone}")
            wait = outcome.wait
            if wait is None:
                wait = min(self._longest_wait, self._first_wait * 2 ** (tries - 1)) * share
            if wait > self._longest_wait:
                raise JudgeError(
                    f"{self.host}: got {outcome.reason}, with the order to wait {wait:.12g} s, need at most "
                    f"longest_wait={self._longest_wait:g} s: go on later, or raise longest_wait."
                )
            if outcome.for_all:
                end = clock() + wait
                self._go_on_at = max(self._go_on_at, end)
                self._counted_until = end if is_new else self._counted_until
            else:
                await asyncio.sleep(wait)

    async def _refuses_all(self) -> bool:
        """Whether the server refuses every question: none was answered before, and none of those under way is."""

        def may_be_this_question() -> bool:
            return self.answered and self._refused < _MOST_REFUSED

        self._under_way -= 1
        self._one_ended.set()
        try:
            while self._under_way and not may_be_this_question():
                self._one_ended.clear()
                await self._one_ended.wait()
        finally:
            self._under_way += 1
        if not may_be_this_question():
            return True
        self._refused += 1
        return False

    async def _request(self, body: bytes, estimate: tuple[int, int]) -> "Answer | _Retry | JudgeError":
        try:
            reply = await self._client.post(body)
        except BrokenReply as broken:
            return _Retry(broken.kind, self._quote_reply(str(broken)))
        status, headers, _ = reply
        error = reply.error
        if status == 200 and not error:
            return self._read(reply, estimate)
        code, message = error.get("code"), self._quote_reply(str(error.get("message") or ""))
        if status == 200:  # some gateways forward the error of another server this way
            status = code if type(code) is int and 400 <= code < 600 else 500
        code, reason = str(code), f"status {status} ({message})" if message else f"status {status}"
        if not 300 <= status < 600:
            return _Retry("broken reply", reason)
        if code in _THIS_QUESTION or (status == 400 and "maximum context length" in message):
            return Answer(None, f"no answer: {reason}")
        if (status in _RETRYABLE or status >= 500) and code not in _NO_MONEY:
            return _Retry(f"status {status}", reason, _retry_after(headers), for_all=status == 429)
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
        way = "need a request that it takes: change the judge's settings, such as structured or extra_body"
        if status < 400:
            elsewhere = re.match(r"[\w+.-]*://([^/?#]+)", self._quote_reply(headers.get("location", "")))
            target = elsewhere[1] if elsewhere else "another path"
            way = (
                f"a redirect to {target}, need an answer, because the key is for this address alone: correct base_url"
            )
        kind = RefusesAll if status in _MAY_BE_THIS_QUESTION else JudgeError
        return kind(f"{self.host}: got {reason}, {ways.get(status, way)}.")

    def _read(self, reply: Reply, estimate: tuple[int, int]) -> "Answer | _Retry":
        try:
            choice = reply.content["choices"][0]
            text, finish = read_text(choice), choice.get("finish_reason")
        except (AttributeError, LookupError, TypeError, ValueError):
            shown = self._quote_reply(str(reply.content), 200)
            return _Retry("broken reply", f"a reply that is not a chat completion: {shown!r}")
        whole = finish not in ("length", "content_filter")
        self._truncated += finish == "length"
        read = read_choice(text, structured=self._structured) if whole else None
        if not text and finish not in (None, "stop"):
            text = f"no answer: finish_reason {finish!r}"
        self._pauses, self._refused, self.answered = 0, 0, True
        return Answer(read, self._redact(text), *read_tokens(reply.content.get("usage"), estimate))

    def _quote_reply(self, text: str, most: int = SHOWN) -> str:
        """Redact and shorten a text of the server for a message."""
        text = quoted(self._redact(_USER.sub("//", text)))
        return text if len(text) <= most else f"{text[:most]}…"


_USER = re.compile(r"//[^/\s@]*@")
"""User and password in an address, such as the address of a proxy."""


class _Retry(NamedTuple):
    """A failed request that may succeed later."""

    kind: str
    """Kind of failure, under which it is counted."""
    reason: str
    wait: float | None = None
    """Seconds to wait, if the server requests them."""
    for_all: bool = False
    """Whether other requests would fail too."""


class _RateLimiter:
    """Rate limiter that spaces amounts evenly over time; without a limit, nothing waits."""

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
    """Seconds to wait according to the Retry-After header, which holds seconds or a date."""
    value = headers.get("retry-after", "")
    with suppress(ValueError):
        seconds = float(value)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    with suppress(ValueError, TypeError, OverflowError):
        return max((parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds(), 0.0)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
