"""What a judge's server may send instead of a proper answer, and what it may not get out of it."""

import asyncio
import base64
import gzip
import json
import time
import tracemalloc
import zlib
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_server import completion, http

from dmoerm_trl.labelling.completions import read_tokens
from dmoerm_trl.labelling.judges import Answer, Judge, JudgeError, Question, judge_from_config
from dmoerm_trl.labelling.redaction import Redaction

KEY = "sk-Secret-0123456789/abc+DEF"
GOOD = http(completion(usage={"prompt_tokens": 7, "completion_tokens": 1}))
QUESTION = Question([{"role": "user", "content": "Why?"}], "long enough", "short", "logic")


def make(url: str, **settings) -> Judge:
    defaults = {"base_url": url, "model": "judge", "api_key_env": None, "first_wait": 0.01, "timeout": 5, "retries": 1}
    return judge_from_config({"kind": "server", **defaults, **settings})


def ask(judge: Judge) -> Answer:
    async def run() -> Answer:
        try:
            return (await asyncio.wait_for(judge.ask([QUESTION]), 60))[0]
        finally:
            await judge.close()

    return asyncio.run(run())


# Broken replies


def bomb(size: int) -> bytes:
    """So many blanks in gzip."""
    squeeze = zlib.compressobj(wbits=31)
    return b"".join(squeeze.compress(b" " * (1 << 20)) for _ in range(size >> 20)) + squeeze.flush()


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while True:
        writer.write(b" " * (1 << 20))
        await writer.drain()


BROKEN = {
    "garbage": (bytes(range(256)) * 4, "broken connection"),
    "nothing": (b"", "broken connection"),
    "half": (GOOD[:-9], "broken connection"),
    "long header": (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", "broken connection"),
    "no gzip": (http(b"no gzip", Content_Encoding="gzip"), "broken connection"),
    "half of a gzip": (http(gzip.compress(b"{" + b" " * 999)[:-15], Content_Encoding="gzip"), "broken reply"),
    "zstd": (http(b"(\xb5/\xfd\x04X\x11\x00\x00{}", Content_Encoding="zstd"), "broken reply"),
    "endless": (endless, "broken reply"),
    "bomb": (http(bomb(64 << 20), Content_Encoding="gzip"), "broken reply"),
    "long text": (http(completion("x" * (9 << 20))), "broken reply"),
    "deep": (http(b"[" * 100_000), "broken reply"),
    "long number": (http(b'{"choices": ' + b"9" * 5000 + b"}"), "broken reply"),
    "no UTF-8": (http(b'{"choices": "\xff\xfe\x80"}'), "broken reply"),
    "a page": (http(b"<html>1</html>", kind="text/html"), "broken reply"),
    "a list": (http([]), "broken reply"),
    "no choices": (http({"choices": []}), "broken reply"),
    "choices are no list": (http({"choices": {"message": {"content": "1"}}}), "broken reply"),
    "no message": (http({"choices": [{"message": None}]}), "broken reply"),
    "a number": (http(completion(1)), "broken reply"),
    "false": (http(completion(False)), "broken reply"),
    "an object": (http(completion({"text": "1"})), "broken reply"),
    "texts that are none": (http(completion([{"type": "text", "text": None}])), "broken reply"),
    "an error in the choice": (http(completion("1", finish="error")), "broken reply"),
    "an error in a good reply": (http({"error": {"message": "busy", "code": 503}}), "status 503"),
    "an error in words": (http({"error": "overloaded"}), "status 500"),
    "an unknown status": (http({}, status="799 Huh"), "broken reply"),
    "no content": (http(b"", status="204 No Content"), "broken reply"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reply_is_counted_and_the_question_asked_again(serve_raw, name):
    reply, kind = BROKEN[name]
    server = serve_raw(reply, GOOD)
    judge = make(server.url)
    assert ask(judge) == Answer(1, "1", 7, 1)
    assert dict(judge.failures) == {kind: 1}
    assert len(server.requests) == 2


@pytest.mark.parametrize("name", BROKEN)
def test_a_server_that_sends_nothing_else_counts_as_gone(serve_raw, name):
    server = serve_raw(BROKEN[name][0])
    with pytest.raises(JudgeError, match=r"got no answer to one question in 2 requests, .*: see that it runs"):
        ask(make(server.url))


WORDS = st.sampled_from(
    ["choices", "message", "content", "refusal", "usage", "type", "text", "error", "finish_reason"]
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


def test_any_json_is_an_answer_or_a_failure(serve_raw):
    server = serve_raw(GOOD)

    @settings(max_examples=30, deadline=None)
    @given(ANY_JSON | st.builds(lambda choice, usage: {"choices": [choice], "usage": usage}, ANY_JSON, ANY_JSON))
    def check(content):
        server.handlers = [http(content)]
        judge = make(server.url, retries=0)
        try:
            answer = ask(judge)
        except JudgeError:
            return
        assert answer.choice in (1, 2, None) and min(answer[2:]) > 0

    check()


async def slow_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(1000):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


async def slow_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(1000):
        writer.write(b"X-%d: y\r\n" % number)
        await writer.drain()
        await asyncio.sleep(0.05)


async def silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize("handler", [slow_body, slow_head, silent])
def test_the_time_for_a_reply_is_that_of_the_whole(serve_raw, handler):
    server = serve_raw(handler)
    started = time.monotonic()
    with pytest.raises(JudgeError, match="no complete reply within timeout=0.4 s"):
        ask(make(server.url, timeout=0.4))
    assert time.monotonic() - started < 4


def test_a_bomb_takes_no_memory(serve_raw):
    server = serve_raw(http(bomb(256 << 20), Content_Encoding="gzip"))
    judge = make(server.url, retries=0)
    tracemalloc.start()
    try:
        with pytest.raises(JudgeError, match="a reply of more than 8 MiB"):
            ask(judge)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


# Replies that are good, if unusual


@pytest.mark.parametrize(
    "reply",
    [
        http(gzip.compress(json.dumps(completion()).encode()), Content_Encoding="gzip"),
        http(completion(), kind="text/plain"),
        http(completion(), kind="application/json; charset=nonsense"),
        http(json.dumps(completion()).encode("utf-8-sig")),
        http(json.dumps(completion()).encode("utf-16")),
        http(
            json.dumps(completion("答案：1"), ensure_ascii=False).encode("gbk"), kind="application/json; charset=gbk"
        ),
        http(completion("Ich wäge ab.</think>\n1")),
        http(completion(None, refusal="1")),
    ],
)
def test_an_answer_is_read_whatever_its_wrapping(serve_raw, reply):
    judge = make(serve_raw(reply).url)
    assert ask(judge).choice == 1 and not judge.failures


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (completion(None, finish="tool_calls", tool_calls=[{}]), "no answer: finish_reason 'tool_calls'"),
        (completion(None, finish="content_filter"), "no answer: finish_reason 'content_filter'"),
        (completion("1", finish="content_filter"), "1"),
        (completion("1", finish="length"), "1"),
        (completion(None, refusal="I cannot judge that."), "I cannot judge that."),
        (completion(None, reasoning_content="1"), ""),
    ],
)
def test_an_answer_that_is_none_is_unreadable_and_not_asked_again(serve_raw, reply, text):
    server = serve_raw(http(reply))
    assert ask(make(server.url))[:2] == (None, text)
    assert len(server.requests) == 1


# Counts of tokens


@given(
    st.none() | st.booleans() | st.integers(max_value=0) | st.integers(min_value=10**8)
    | st.floats() | st.text() | st.lists(st.integers())
)  # fmt: skip
def test_a_count_that_is_none_is_the_estimate(count):
    assert read_tokens({"prompt_tokens": count, "completion_tokens": 3}, (50, 9)) == [50, 3]
    assert read_tokens({"prompt_tokens": 3, "completion_tokens": count}, (50, 9)) == [3, 9]
    assert read_tokens(count, (50, 9)) == [50, 9]


def test_counts_below_zero_lift_no_budget(serve_raw):
    usage = {"prompt_tokens": -(10**12), "completion_tokens": -9}
    judge = make(serve_raw(http(completion(usage=usage))).url)
    assert ask(judge)[2:] == judge.estimate_tokens(QUESTION)


# Where the key goes, and what is told


@pytest.mark.parametrize("status", ["301 X", "302 X", "303 X", "307 X", "308 X"])
def test_a_redirect_is_not_followed(serve_raw, monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    target = serve_raw(GOOD)
    place = f"http://user:{quote(KEY, safe='')}@127.0.0.1:{target.port}/v1/chat/completions?key={KEY}"
    server = serve_raw(http({}, status=status, Location=place))
    with pytest.raises(
        JudgeError, match=rf"status {status[:3]}, a redirect to 127.0.0.1:{target.port}, .*: correct base_url"
    ):
        ask(make(server.url, api_key_env="JUDGE_KEY"))
    assert not target.requests and len(server.requests) == 1


@pytest.mark.parametrize("place", ["", "/v2", "file:///etc/passwd", "http://[", "//[x"])
def test_a_redirect_to_nowhere_is_an_error(serve_raw, place):
    with pytest.raises(JudgeError, match="status 307, a redirect to "):
        ask(make(serve_raw(http({}, status="307 X", Location=place)).url))


def escaped(text: str, form: str) -> str:
    return "".join(form.format(ord(character)) for character in text)


ECHOES = {
    "as it is": KEY,
    "in capitals": KEY.upper(),
    "in part": KEY[:15] + "...",
    "backwards": KEY[::-1],
    "base64": base64.b64encode(KEY.encode()).decode(),
    "basic": base64.b64encode(f"user:{KEY}".encode()).decode(),
    "base64 of a header": base64.urlsafe_b64encode(f"Authorization: Bearer {KEY}\n".encode()).decode(),
    "hexadecimal": KEY.encode().hex(),
    "percents where needed": quote(KEY, safe=""),
    "percents": escaped(KEY, "%{:02x}"),
    "percents twice": escaped(KEY, "%25{:02x}"),
    "JSON": escaped(KEY, "\\u{:04x}"),
    "JSON twice": escaped(KEY, "\\\\u{:04x}"),
    "bytes": escaped(KEY, "\\x{:02x}"),
    "HTML": escaped(KEY, "&#{};"),
    "HTML in hexadecimal": escaped(KEY, "&#x{:x};"),
}


@pytest.mark.parametrize("name", ECHOES)
@pytest.mark.parametrize("status", ["200 OK", "200 broken", "400 X", "401 X", "500 X"])
def test_an_echo_of_the_key_is_hidden(serve_raw, monkeypatch, name, status):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    echo = f"what is {ECHOES[name]} for"
    reply = {"error": {"message": echo, "code": echo}}
    if status.startswith("200"):
        reply = completion(echo) if status == "200 OK" else {"strange": echo}
    judge = make(serve_raw(http(reply, status=status)).url, api_key_env="JUDGE_KEY")
    try:
        told = ask(judge).text
    except JudgeError as error:
        told = str(error)
    assert "[key]" in told
    assert not any(part in told for part in (KEY[:8], KEY[-8:], KEY[8:16], ECHOES[name], ECHOES[name][-20:-8]))


@given(
    st.text(max_size=20),
    st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=8, max_size=40),
    st.text(max_size=20),
)
def test_no_part_of_a_secret_is_left(before, secret, after):
    hidden = Redaction([secret])(f"{before}{secret}{after}")
    assert not any(secret[at : at + 8] in hidden for at in range(len(secret) - 7))


@given(st.text(max_size=200))
def test_a_text_without_a_secret_stays_as_it_is(text):
    assert Redaction(["sk-0123456789abcdef"])(text) == text
    assert Redaction([])(text) == text


SECRET = "TOPsecretVALUE42"


@pytest.mark.parametrize(
    "configured",
    [
        {"extra_body": {"api_key": SECRET}},
        {"extra_body": {"metadata": [{"anything": SECRET}]}},
        {"extra_body": {"password": "hunterhunter"}},
        {"path": "/" + SECRET},
    ],
)
def test_secrets_in_other_settings_are_told_nowhere(serve_raw, configured):
    secret = "hunterhunter" if "password" in str(configured) else SECRET
    server = serve_raw(http({"error": {"message": f"unknown {secret}"}}, status="400 X"))
    judge = make(
        server.url + configured.get("path", ""),
        **{name: value for name, value in configured.items() if name != "path"},
    )
    with pytest.raises(JudgeError, match="status 400") as error:
        ask(judge)
    assert secret.encode() in server.requests[0]
    assert secret not in repr(judge) + json.dumps(judge.identity) + str(error.value)


def test_another_text_in_extra_body_is_another_judge():
    one, other = (make("http://x/v1", extra_body={"reasoning": {"effort": effort}}) for effort in ("low", "high"))
    assert one.identity != other.identity and "low" not in json.dumps(one.identity)
    assert make("http://x/v1", extra_body={"top_p": 0.5}).identity["top_p"] == 0.5


@pytest.mark.parametrize(
    "url",
    [
        f"http://me:{SECRET}@x/v1",
        f"http://me:pa/{SECRET}@x/v1",
        f"http://x/v1?key={SECRET}",
        f"http://x/v1#{SECRET}",
        f"{SECRET}://x/v1",
        f"http://x:{SECRET}/v1",
        f"http://x/{SECRET} /v1",
        f"http://[{SECRET}/v1",
        SECRET,
        "",
        None,
        8000,
        [f"http://{SECRET}/v1"],
    ],
)
def test_an_address_that_is_refused_is_not_shown(url):
    with pytest.raises(ValueError, match="got base_url=.*need an http") as error:
        make(url)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        ({"extra_body": [SECRET]}, "got a list as extra_body"),
        ({"extra_body": {"messages": [SECRET]}}, r"extra_body=\{'messages'\}"),
        ({"extra_body": {"stream": True, "x": SECRET}}, r"extra_body=\{'stream'\}"),
        ({"extra_body": {"n": 3}}, r"extra_body=\{'n'\}"),
        ({"extra_body": {"x": float("nan"), "y": SECRET}}, "need values that JSON can hold"),
        ({"extra_body": {"x": "\ud800", "y": SECRET}}, "need values that JSON can hold"),
        ({"extra_body": {"max_tokens": SECRET}}, "need a whole number as max_tokens"),
        ({"api_key_env": "SECRETAKIA0123456789"}, "in the environment variable that `api_key_env` names"),
        ({"api_key_env": 3}, "got an `api_key_env` that is not a name"),
        ({"model": ""}, "got model=''"),
        ({"model": 3}, "got model=3"),
        ({"structured": "no"}, "got structured='no'"),
        ({"seed": 1.5}, "got seed=1.5"),
        ({"concurrency": 10**9}, "got concurrency=1000000000, need a whole number from 1 to 1000"),
        ({"template": 3}, "got 3, need one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused_without_a_secret(configured, message):
    with pytest.raises((ValueError, JudgeError), match=message) as error:
        make("http://x/v1", **configured)
    assert SECRET not in str(error.value) and "0123456789" not in str(error.value)


@pytest.mark.parametrize("status", ["401 X", "500 X", "200 OK"])
def test_what_a_server_says_cannot_steer_a_terminal_nor_be_html(serve_raw, status):
    nasty = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e<script>alert(1)</script>\r\n# heading\u2028| a |"
    server = serve_raw(http({"error": {"message": nasty}} if status != "200 OK" else {"x": nasty}, status=status))
    with pytest.raises(JudgeError) as error:
        ask(make(server.url, retries=0))
    told = str(error.value)
    assert told.isprintable() and "<" not in told and "alert(1)" in told


def test_a_page_of_an_error_is_told_by_its_words(serve_raw):
    page = b"<html><head><title>502 Bad Gateway</title></head><body><h1>nginx</h1></body></html>"
    with pytest.raises(JudgeError, match=r"status 502 \( ?502 Bad Gateway nginx ?\)"):
        ask(make(serve_raw(http(page, status="502 X", kind="text/html")).url, retries=0))
