"""Malformed replies of a judge's server."""

import gzip
import json
import random
from pathlib import Path

import yaml
from fuzz_case import Case, Material, lines_of
from fuzz_server import GOOD, http
from fuzz_values import changed
from kills import command


def replies(material: Material, draw: random.Random, at: Path) -> Case:
    if not (material.folder / "labels").exists():
        (material.folder / "labels").mkdir()
        material.result_of(
            "labels", command("label"), ["--config", str(labelling(material, material.folder / "labels", "good"))]
        )
    meant = lines_of(material.folder / "labels" / "out" / "labelled.jsonl")
    name = f"{at.name}-{draw.randrange(10**9)}"
    folder = material.folder.parent / "replies" / name
    folder.mkdir(parents=True)
    reply, what, slowly = malformed_reply(draw)
    (folder / "reply").write_bytes(reply)
    always = draw.random() < 0.3
    for flag, there in (("always", always), ("slowly", slowly)):
        if there:
            (folder / flag).touch()

    def right(said: str) -> str:
        report = json.loads((at / "out" / "report.json").read_text(), parse_constant=lambda word: None)
        numbers = [report["spent"][name] for name in ("calls", "prompt_tokens", "completion_tokens")]
        if not all(type(number) is int and 0 <= number < 10**5 for number in numbers):
            return "wrong"
        found = lines_of(at / "out" / "labelled.jsonl")
        if found == meant:
            return "right"
        fewer = [row | {"capability_pairs": {}} for row in meant]
        told = "unreadable" in json.dumps(report)
        kept = [row | {"capability_pairs": {}} for row in found] == fewer and told
        less = all(
            f["capability_pairs"] == m["capability_pairs"] or not any(f["capability_pairs"].values())
            for f, m in zip(found, meant, strict=True)
        )
        return "counted" if kept and less else "wrong"

    config = labelling(material, at, name)
    place = (("judge", "server", "127.0.0.1", "answer"),)
    return Case(
        f"{'always' if always else 'once'} {what}", command("label"), (["--config", str(config)],), place, right
    )


def labelling(material: Material, at: Path, name: str) -> Path:
    """Rows and a recipe that asks the server of a case four questions."""
    judge = {
        "kind": "server",
        "base_url": f"http://127.0.0.1:{material.port}/{name}/v1",
        "model": "judge",
        "api_key_env": None,
    }
    judge |= {"timeout": 4, "retries": 2, "first_wait": 0.01, "longest_wait": 1, "concurrency": 1}
    rows = [
        {"prompt": f"Say {i}", "responses": ["a" * (3 + i), "b" * (5 - 2 * i)], "ranks": [1, 2], "task": "maths"}
        for i in range(2)
    ]
    (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "rows": str(at / "rows.jsonl"),
        "output_dir": str(at / "out"),
        "tasks": str(material.table),
        "judge": judge,
        "points": ["correctness"],
    }
    (at / "label.yaml").write_text(yaml.safe_dump(recipe))
    return at / "label.yaml"


def malformed_reply(draw: random.Random) -> tuple[bytes, str, bool]:
    """A reply of a server, what is wrong with it, and whether it comes byte by byte."""
    body = json.dumps(GOOD).encode()
    if draw.random() < 0.5:
        changed_body, what, _ = changed(draw, GOOD)
        return http(json.dumps(changed_body).encode()), f"body {what}", False
    replies = {
        "closed at once": b"",
        "no HTTP": b"\x16\x03\x01 what?\r\n\r\n",
        "an unknown status": http(body, "799 What"),
        "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
        "a redirect to itself": http(b"", "307 Temporary Redirect", {"Location": "/v1/chat/completions"}),
        "a redirect to a file": http(b"", "302 Found", {"Location": "file:///etc/passwd"}),
        "429 with Retry-After nan": http(b"{}", "429 Too Many", {"Retry-After": "nan"}),
        "429 with Retry-After -5": http(b"{}", "429 Too Many", {"Retry-After": "-5"}),
        "429 with Retry-After 10^9": http(b"{}", "429 Too Many", {"Retry-After": 10**9}),
        "500 without JSON": http(b"oops", "500 Internal"),
        "a length too long": http(body, headers={"Content-Length": len(body) + 10}),
        "a length too short": http(body, headers={"Content-Length": 20}),
        "a length that is none": http(body, headers={"Content-Length": "many"}),
        "a length of -1": http(body, headers={"Content-Length": -1}),
        "no gzip": http(body, headers={"Content-Encoding": "gzip"}),
        "an unknown encoding": http(body, headers={"Content-Encoding": "zip"}),
        "a bomb": http(gzip.compress(b" " * (1 << 28)), headers={"Content-Encoding": "gzip"}),
        "64 MiB": http(b" " * (1 << 26) + body),
        "a header of 1 MiB": http(body, headers={"X": "x" * (1 << 20)}),
        "broken chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + body,
        "HTML": http(b"<html>1</html>", headers={"Content-Type": "text/html"}),
        "half a body": http(body)[:-40],
        "UTF-16": http(body.decode().encode("utf-16")),
        "a byte order mark": http(b"\xef\xbb\xbf" + body),
        "100,000 brackets": http(b"[" * 100_000),
        "not UTF-8": http(body.replace(b'"1"', b'"1\xff"')),
        "an error in a body of 200": http(b'{"error": {"message": "no such model", "code": 404}}'),
        "a number": http(b"1"),
        "null": http(b"null"),
        "one byte in 0.3 s": http(body),
    }
    what = draw.choice(list(replies))
    return replies[what], what, what == "one byte in 0.3 s"
