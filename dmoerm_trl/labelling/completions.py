"""Chat completions over HTTP: one request, and a reply that is bounded in time and size, whatever the server does."""

import asyncio
import json
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from .. import __version__

MOST_BYTES = 8 << 20
"""Of a reply, when it is decompressed."""

MOST_TOKENS = 10_000_000
"""Of one question or answer: a server that counts more cannot count."""


class BrokenReply(Exception):
    """There is no reply, or none that could be read. Its text may hold what the server sent."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


class Reply(NamedTuple):
    """What came back: its content as JSON, or as text where it is none."""

    status: int
    headers: Mapping[str, str]
    content: Any

    @property
    def error(self) -> dict[str, Any]:
        """What it says of an error, with `message` and `code` where it has them; empty where it says nothing of one."""
        reply = self.content
        if isinstance(reply, str):
            return {} if self.status == 200 else {"message": _TAG.sub(" ", reply)}
        if not isinstance(reply, dict) or reply.get("choices"):
            return {}
        error = reply.get("error") or {}
        if isinstance(error, dict):
            return error or {name: reply[name] for name in ("message", "code") if reply.get(name)}
        return {"message": error}


class Client:
    """
    Posts to `base_url` and `/chat/completions`; follows no redirect, and sends the key nowhere else.

    Args:
        base_url (`str`), key (`str`, *optional*): where, and what for.
        timeout (`float`): seconds for a whole reply, from the request to its last byte.

    Raises:
        ImportError: if the package `openai` is missing, whose HTTP client is made for many requests at once.
    """

    def __init__(self, base_url: str, key: str | None, timeout: float):
        try:
            from openai import DefaultAioHttpClient
        except ImportError as error:
            raise ImportError(
                'got no package `openai`, need it to ask a server: pip install "dmoerm-trl[label]"'
            ) from error
        self._url, self._timeout = base_url.rstrip("/") + "/chat/completions", timeout
        headers = {"Accept-Encoding": "gzip", "User-Agent": f"dmoerm-trl/{__version__}"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self._client = DefaultAioHttpClient(timeout=timeout, follow_redirects=False, headers=headers)

    async def post(self, body: bytes) -> Reply:
        """
        One request.

        Raises:
            BrokenReply: if no reply came, or not in time, or one that is too long or no HTTP.
        """
        try:
            return await asyncio.wait_for(self._post(body), self._timeout)
        except asyncio.TimeoutError:
            raise BrokenReply("time-out", f"no whole reply within timeout={self._timeout:g} s") from None
        except BrokenReply:
            raise
        except Exception as error:  # the HTTP libraries have too many kinds of them to list
            raise BrokenReply("broken connection", f"{type(error).__name__}: {error}") from None

    async def _post(self, body: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        async with self._client.stream("POST", self._url, content=body, headers=headers) as reply:
            compression = reply.headers.get("content-encoding", "identity").strip().lower()
            if compression not in ("identity", "gzip"):
                raise BrokenReply("broken reply", f"a reply compressed by {compression!r}, which was not asked for")
            inflate = zlib.decompressobj(wbits=31).decompress if compression == "gzip" else None
            content = bytearray()
            async for part in reply.aiter_raw():
                content += part if inflate is None else inflate(part, MOST_BYTES + 1 - len(content))
                if len(content) > MOST_BYTES:
                    raise BrokenReply("broken reply", f"a reply of more than {MOST_BYTES >> 20} MiB")
            return Reply(reply.status_code, reply.headers, _content(bytes(content), reply.headers))

    async def close(self) -> None:
        await self._client.aclose()


def read_text(choice: Mapping[str, Any]) -> str:
    """
    The text of a completion, that of its parts, or why the model refuses; empty where there is none.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: if it is no completion.
    """
    message = choice["message"]
    text = message.get("content")
    if isinstance(text, list):
        text = "".join(part["text"] for part in text if part["type"] == "text")
    text = message.get("refusal") or "" if text is None or text == "" else text
    if not isinstance(text, str) or choice.get("finish_reason") == "error":
        raise ValueError("it is no text")
    return text


def read_tokens(usage: Any, estimate: tuple[int, int]) -> list[int]:
    """The tokens of question and answer as the server counts them, or the estimate where it does not count."""
    names = ("prompt_tokens", "completion_tokens")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in names]
    return [
        count if type(count) is int and 0 < count <= MOST_TOKENS else estimated
        for count, estimated in zip(counts, estimate, strict=True)
    ]


def _content(content: bytes, headers: Mapping[str, str]) -> Any:
    """The JSON of a reply, in the encoding that its headers name or else the one that JSON tells; its text if it is none."""
    named = re.search(r"charset=[\s\"']*([\w.:-]+)", headers.get("content-type", ""))
    for encoding in ([named[1]] if named else []) + [json.detect_encoding(content)]:
        with suppress(LookupError, ValueError, RecursionError):
            return json.loads(content.decode(encoding))
    return content.decode(errors="replace")


_TAG = re.compile(r"<[^<>]*>")
