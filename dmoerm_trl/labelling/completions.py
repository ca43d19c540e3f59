"""Client for chat completions over HTTP. Replies are limited in time and size, whatever the server does."""

import asyncio
import json
import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from .. import __version__

MOST_BYTES = 8 << 20
"""Maximum size of a decompressed reply."""

MOST_TOKENS = 10_000_000
"""Maximum number of tokens of one question or answer that is believed; a higher count from a server is ignored."""


class BrokenReply(Exception):
    """Raised if no reply came, or an unreadable one. The message may contain what the server sent."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


class Reply(NamedTuple):
    """A reply of the server; `content` is the decoded JSON, or text if it is not JSON."""

    status: int
    headers: Mapping[str, str]
    content: Any

    @property
    def error(self) -> dict[str, Any]:
        """The error that the reply reports, with `message` and `code` if it has them; empty if it reports none."""
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
    Client that posts to `/chat/completions` under `base_url`. It follows no redirects, so the key is sent to no other address.

    Args:
        base_url (`str`): Address of the server.
        key (`str`, *optional*): API key.
        timeout (`float`): Seconds allowed for a complete reply, from the request to the last byte.

    Raises:
        ImportError: If the package `openai` is missing, whose HTTP client is designed for many concurrent requests.
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
        Send one request.

        Raises:
            BrokenReply: If no reply came in time, or the reply is too long or not valid HTTP.
        """
        try:
            return await asyncio.wait_for(self._post(body), self._timeout)
        except asyncio.TimeoutError:
            raise BrokenReply("time-out", f"no complete reply within timeout={self._timeout:g} s") from None
        except BrokenReply:
            raise
        except Exception as error:  # the HTTP libraries raise too many types to list
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
            return Reply(reply.status_code, reply.headers, _decode(bytes(content), reply.headers))

    async def close(self) -> None:
        await self._client.aclose()


def read_text(choice: Mapping[str, Any]) -> str:
    """
    Extract the text of a completion: its content, its joined parts, or the refusal; empty if it has none of them.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: If `choice` is not a completion.
    """
    message = choice["message"]
    text = message.get("content")
    if isinstance(text, list):
        text = "".join(part["text"] for part in text if part["type"] == "text")
    text = message.get("refusal") or "" if text is None or text == "" else text
    if not isinstance(text, str) or choice.get("finish_reason") == "error":
        raise ValueError("it is not text")
    return text


def read_tokens(usage: Any, estimate: tuple[int, int]) -> list[int]:
    """Number of prompt and completion tokens that the server reports, with the estimate in place of missing ones."""
    names = ("prompt_tokens", "completion_tokens")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in names]
    return [
        count if type(count) is int and 0 < count <= MOST_TOKENS else estimated
        for count, estimated in zip(counts, estimate, strict=True)
    ]


def _decode(content: bytes, headers: Mapping[str, str]) -> Any:
    """Decode a reply as JSON, in the encoding named in its headers or else the detected one; return text if it is not JSON."""
    named = re.search(r"charset=[\s\"']*([\w.:-]+)", headers.get("content-type", ""))
    for encoding in ([named[1]] if named else []) + [json.detect_encoding(content)]:
        with suppress(LookupError, ValueError, RecursionError):
            return json.loads(content.decode(encoding))
    return content.decode(errors="replace")


_TAG = re.compile(r"<[^<>]*>")
