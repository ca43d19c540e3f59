"""A server that sends any bytes it is told to, for tests of what is no proper reply."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Handler = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]
"""What is sent, or what writes it; the connection is closed then."""


def completion(content: Any = "1", usage: Any = None, finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    """The JSON of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {
        "id": "0",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [choice],
        "usage": usage,
    }


def http(content: Any, status: str = "200 OK", kind: str = "application/json", **headers: str) -> bytes:
    """A reply: bytes as they are, all else as JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


class RawServer:
    """
    Serves in a thread on loopback, one request a connection.

    Args:
        handlers (`Sequence[Handler]`): of the requests in turn; the last one of all that follow.

    Attributes:
        requests (`list[bytes]`): head and body of each.
    """

    def __init__(self, handlers: Sequence[Handler]):
        self.handlers, self.requests = handlers, []
        self._loop, self._ready = asyncio.new_event_loop(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "RawServer":
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").lower().split("\r\n")
            length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), 0)
            handler = self.handlers[min(len(self.requests), len(self.handlers) - 1)]
            self.requests.append(head + await reader.readexactly(length))
            if isinstance(handler, bytes):
                writer.write(handler)
                await writer.drain()
            else:
                await handler(writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()
