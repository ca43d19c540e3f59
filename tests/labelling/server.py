"""
A judge's server for tests: the chat completions of the OpenAI protocol on loopback, which can fail in many ways.

In a test: `with Server(answer="longer", latency=0.01) as server:`, then `server.url`, `server.asked`, `server.answered`.
As a process of its own, to be killed: `python tests/labelling/server.py --port 8000 --answer longer --latency 0.2`, which prints
its URL when it listens; `GET /counts` says what it has counted.
"""

import argparse
import asyncio
import json
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

ANSWERS: dict[str, Callable[[str, str], int]] = {
    "longer": lambda first, second: 1 if len(first) > len(second) else 2,
    "first": lambda first, second: 1,
    "second": lambda first, second: 2,
}
"""Name -> which of the two responses the judge prefers. Of equal lengths `longer` prefers the second."""

RESPONSES = re.compile(r"<<(\w+) \w+ 1>>\n(.*)\n<<\1 \w+ 2>>\n(.*)\n<<\1 end>>", re.DOTALL)
"""The two responses between the marks of the package's own templates."""


class Server:
    """
    Serves in a thread. All settings may be changed while it runs.

    Args:
        answer (`str` or callable): a name of `ANSWERS`, a function of the whole question's text, or the very text to answer.
        latency (`float`): seconds before each reply.
        faults (`Sequence[str]`): what happens to the next requests, one each: a status such as `"500"`, with the seconds of
            Retry-After `"429:2"`, with an error code `"400 content_filter"`; `"broken"` JSON, `"page"` (HTML for JSON), `"empty"` (no choices), `"cut"` (stopped at
            max_tokens), `"drop"` (connection closed without a reply), `"half"` (closed within the reply), `"slow"`
            (a minute late), `"ok"`.
        fault_share (`float`): after those, the share of requests that are met with one of `kinds`.
        kinds (`Sequence[str]`): of the faults drawn.
        edit (`Callable[[dict], dict]`): makes of a chat completion what is sent.
        key (`str`): the key to demand; what was given instead stands in the error, and the key itself in those of `faults`.
        model (`str`): the one model that it knows.
        port (`int`): 0 takes any that is free.
    """

    def __init__(
        self,
        answer: str | Callable[[str], str] = "longer",
        *,
        latency: float = 0.0,
        faults: Sequence[str] = (),
        fault_share: float = 0.0,
        kinds: Sequence[str] = ("429:0.01", "500", "broken", "drop", "half"),
        edit: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        key: str | None = None,
        model: str = "judge",
        port: int = 0,
    ):
        self.answer, self.latency, self.faults = answer, latency, deque(faults)
        self.fault_share, self.kinds, self.edit = fault_share, kinds, edit
        self.key, self.model, self.port = key, model, port
        self.asked: Counter[str] = Counter()
        """Text of a question -> requests for it, those included that failed."""
        self.answered: Counter[str] = Counter()
        """Text of a question -> whole answers sent."""
        self.requests: deque[dict[str, Any]] = deque(maxlen=1000)
        """The last bodies, with `"authorization"` and the `"time"` of a monotonic clock in seconds added."""
        self.most_in_flight = self._in_flight = 0
        self._random = random.Random(0)
        self._loop = asyncio.new_event_loop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "Server":
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready.set,), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self, listening: Callable[[], None]) -> None:
        self._loop.run_until_complete(self.serve(listening))
        self._loop.close()

    async def serve(self, listening: Callable[[], None]) -> None:
        self._stop = asyncio.Event()
        connections: set[asyncio.Task] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            connections.add(task)
            try:
                await self._converse(reader, writer)
            except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
                pass
            finally:
                connections.discard(task)
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", self.port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        listening()
        await self._stop.wait()
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Replies to the requests of one connection, until a reply is to be the last."""
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            try:
                reply, go_on = await self._reply(head[0], headers, body)
            finally:
                self._in_flight -= 1
            writer.write(reply)
            await writer.drain()
            if not go_on:
                return

    async def _reply(self, request: str, headers: dict[str, str], body: bytes) -> tuple[bytes, bool]:
        if request.startswith("GET /counts "):
            return _http(200, {"asked": self.asked, "answered": self.answered}), True
        if not request.startswith("POST /v1/chat/completions "):
            return _error(404, f"got {request}, need POST /v1/chat/completions"), True
        content = json.loads(body)
        question = content["messages"][-1]["content"]
        self.requests.append(content | {"authorization": headers.get("authorization"), "time": time.monotonic()})
        self.asked[question] += 1
        if self.latency:
            await asyncio.sleep(self.latency)
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            given = headers.get("authorization", "").removeprefix("Bearer ")
            return _error(401, f"Incorrect API key provided: {given}", code="invalid_api_key"), True
        if content["model"] != self.model:
            return _error(404, f"The model `{content['model']}` does not exist", code="model_not_found"), True

        fault = self.faults.popleft() if self.faults else None
        if fault is None and self.fault_share and self._random.random() < self.fault_share:
            fault = self._random.choice(self.kinds)
        completion = _http(200, self._completion(content, question, cut=fault == "cut"))
        if fault in (None, "ok", "cut"):
            self.answered[question] += 1
            return completion, True
        if fault == "slow":
            await asyncio.sleep(60)
        if fault in ("slow", "drop"):
            return b"", False
        if fault == "half":
            return completion[:-20], False
        if fault == "broken":
            return _http(200, b'{"choices": [{"mess'), True
        if fault == "page":
            return _http(200, b"<html>one moment, please</html>", kind="text/html"), True
        if fault == "empty":
            return _http(200, {"choices": []}), True
        status, _, code = fault.partition(" ")
        status, _, seconds = status.partition(":")
        message = "try again" if self.key is None else f"try again with {self.key}"
        return _error(int(status), message, {"Retry-After": seconds} if seconds else {}, code or None), True

    def _completion(self, content: dict, question: str, *, cut: bool) -> dict[str, Any]:
        if callable(self.answer):
            text = self.answer(question)
        elif self.answer in ANSWERS:
            found = RESPONSES.search(question)
            assert found, f"no responses between marks in {question!r}"
            choice = ANSWERS[self.answer](found[2], found[3])
            text = json.dumps({"choice": choice}) if "response_format" in content else str(choice)
        else:
            text = self.answer
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": len(question.split()), "completion_tokens": len(text.split())}
        completion = {
            "id": "0",
            "object": "chat.completion",
            "created": 0,
            "model": self.model,
            "choices": [{"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }
        return self.edit(completion)


def _http(status: int, content: Any, headers: dict[str, str] | None = None, kind: str = "application/json") -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{head}\r\n".encode() + body


def _error(status: int, message: str, headers: dict[str, str] | None = None, code: str | None = None) -> bytes:
    return _http(status, {"error": {"message": message, "type": "error", "param": None, "code": code}}, headers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--answer", default="longer")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--fault_share", type=float, default=0.0)
    server = Server(**vars(parser.parse_args()))
    asyncio.run(server.serve(lambda: print(server.url, flush=True)))


if __name__ == "__main__":
    main()
