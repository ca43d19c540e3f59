"""A judge's server that gives one reply as malformed as a file says, and answers all other questions well."""

import asyncio
import json
from pathlib import Path
from typing import Any

from server import ANSWERS, RESPONSES

GOOD = {
    "id": "0",
    "object": "chat.completion",
    "created": 0,
    "model": "judge",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "1"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 50, "completion_tokens": 1, "total_tokens": 51},
}
"""A completion."""


def http(body: bytes, status: str = "200 OK", headers: dict[str, Any] | None = None) -> bytes:
    """A reply of the protocol."""
    head = {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in head.items())]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode() + body


def serve(folder: Path, listening: Any) -> None:
    """
    Serves at any free port, whose number `listening.value` becomes. A request to `/N/...` is met with the bytes of
    `folder/N/reply` if that is there and N has not been asked before, or `folder/N/always` is there too; slowly, byte by byte, if
    `folder/N/slowly` is there.
    """
    asked: set[str] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                lengths = [
                    line.split(":")[1] for line in head.lower().split("\r\n") if line.startswith("content-length")
                ]
                body = await reader.readexactly(int(lengths[0]) if lengths else 0)
                at = folder / head.split("/")[1]
                bad = (at / "reply").exists() and (at.name not in asked or (at / "always").exists())
                asked.add(at.name)
                if not bad:
                    question = RESPONSES.search(json.loads(body)["messages"][-1]["content"])
                    completion = json.loads(json.dumps(GOOD))
                    completion["choices"][0]["message"]["content"] = str(ANSWERS["longer"](question[2], question[3]))
                    writer.write(http(json.dumps(completion).encode()))
                    await writer.drain()
                    continue
                reply, slowly = (at / "reply").read_bytes(), (at / "slowly").exists()
                for part in [reply[i : i + 1] for i in range(len(reply))] if slowly else [reply]:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.3 if slowly else 0)
                return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(converse, "127.0.0.1", 0)
        listening.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    asyncio.run(main())
