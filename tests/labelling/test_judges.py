"""Judges behind a server, over a real connection, and what a recipe may say of judges."""

import asyncio
import json
import logging
import sys
import time

import pytest

from dmoerm_trl.labelling.judges import Answer, Judge, JudgeError, Question, judge_from_config

KEY = "sk-secret-0123456789"


def question(number: int = 0, first: str = "long enough", second: str = "short", **more) -> Question:
    return Question([{"role": "user", "content": f"Question {number}?"}], first, second, "logic", **more)


def make(server, **settings) -> Judge:
    defaults = {"base_url": getattr(server, "url", server), "model": "judge", "api_key_env": None, "first_wait": 0.01}
    return judge_from_config({"kind": "server", **defaults, **settings})


def ask(judge: Judge, *questions: Question) -> list[Answer]:
    async def run() -> list[Answer]:
        try:
            return await asyncio.wait_for(judge.ask(questions), 60)
        finally:
            await judge.close()

    return asyncio.run(run())


# Answers


@pytest.mark.parametrize("settings", [{}, {"template": "zh"}, {"structured": True}, {"example": "en"}])
def test_the_answer_is_of_the_responses_as_they_are_numbered(serve, settings):
    swapped = question(first="short", second="long enough")
    assert [answer.choice for answer in ask(make(serve("longer"), **settings), question(), swapped)] == [1, 2]


def test_an_answer_has_its_text_and_the_tokens_that_the_server_counted(serve):
    server = serve("The first.\nAnswer: 1")
    (answer,) = ask(make(server), question())
    assert answer == Answer(1, "The first.\nAnswer: 1", len(server.requests[0]["messages"][0]["content"].split()), 4)


@pytest.mark.parametrize("text", ["I prefer 1 over 2", "10", ""])
def test_an_answer_without_the_pattern_is_no_choice(serve, text):
    assert ask(make(serve(text)), question())[0][:2] == (None, text)


def test_a_structured_answer_must_be_the_json_asked_for(serve):
    server = serve("1")
    assert ask(make(server, structured=True), question())[0].choice is None
    assert server.requests[0]["response_format"]["json_schema"]["schema"]["properties"]["choice"]["enum"] == [1, 2]


def test_an_answer_that_was_cut_off_is_no_choice(serve):
    assert ask(make(serve("Answer: 1", faults=["cut"])), question())[0][:2] == (None, "Answer: 1")


def test_the_request_is_what_the_recipe_says(serve):
    server = serve()
    judge = make(
        server, temperature=0.5, seed=7, extra_body={"max_tokens": None, "max_completion_tokens": 9, "top_p": 0.5}
    )
    ask(judge, question(round=2))
    (request,) = server.requests
    expected = {"model": "judge", "temperature": 0.5, "seed": 9, "max_completion_tokens": 9, "top_p": 0.5}
    assert {name: request.get(name) for name in expected} == expected and "max_tokens" not in request
    assert judge.samples


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 0, "completion_tokens": 0}])
def test_an_answer_whose_tokens_the_server_does_not_count_has_those_of_the_estimate(serve, usage):
    judge = make(serve(edit=lambda reply: reply | {"usage": usage}), max_tokens=5)
    (answer,) = ask(judge, question())
    assert answer == (1, "1", *judge.estimate_tokens(question())) and answer.prompt_tokens > 50


@pytest.mark.parametrize(
    ("parts", "answer"),
    [
        (
            [
                {"type": "thinking", "thinking": "2?"},
                {"type": "text", "text": "Answer: "},
                {"type": "text", "text": "1"},
            ],
            (1, "Answer: 1"),
        ),
        ([{"type": "image_url", "image_url": {"url": "x"}}], (None, "")),
    ],
)
def test_an_answer_in_parts_is_read_by_its_text(serve, parts, answer):
    server = serve(edit=lambda reply: reply | {"choices": [{"message": {"content": parts}}]})
    assert ask(make(server), question())[0][:2] == answer
    assert sum(server.asked.values()) == 1


def test_no_more_requests_at_once_than_the_recipe_allows(serve):
    server = serve(latency=0.02)
    answers = ask(make(server, concurrency=3), *(question(number) for number in range(12)))
    assert [answer.choice for answer in answers] == [1] * 12
    assert server.most_in_flight == 3


@pytest.mark.parametrize("limited", ["requests", "tokens"])
def test_requests_keep_to_the_rate(serve, limited):
    """Of ten questions a second, the last of four is not asked before 0.3 s have passed."""
    server = serve()
    one = 1 if limited == "requests" else sum(make(server).estimate_tokens(question()))
    judge = make(server, **{f"{limited}_per_minute": 600 * one})

    async def run() -> float:
        await judge.ask([question()])  # connects
        started = time.monotonic()
        await judge.ask([question(number) for number in range(1, 5)])
        return time.monotonic() - started

    assert asyncio.run(run()) >= 0.3
    assert len(server.asked) == 5


def test_an_estimate_asks_nothing_and_grows_with_the_question(serve):
    server = serve()
    judge = make(server, max_tokens=5)
    short, long = (judge.estimate_tokens(question(first="word " * count)) for count in (1, 301))
    assert long[0] - short[0] == 500  # 1500 bytes
    assert short[1] == 5 and not server.asked


# Failures that pass


@pytest.mark.parametrize(
    "fault", ["429", "429:0", "500", "503", "408", "409", "broken", "page", "empty", "drop", "half", "slow"]
)
def test_what_may_pass_is_tried_again(serve, fault):
    server = serve(faults=[fault, fault])
    assert ask(make(server, timeout=1), question())[0].choice == 1
    assert sum(server.asked.values()) == 3 and sum(server.answered.values()) == 1


def test_each_question_is_asked_until_it_is_answered_once(serve):
    server = serve(fault_share=0.5)
    answers = ask(make(server, longest_wait=0.05, retries=40), *(question(number) for number in range(60)))
    assert [answer.choice for answer in answers] == [1] * 60
    assert sum(server.asked.values()) > 80
    assert len(server.answered) == 60 and set(server.answered.values()) == {1}


def test_waits_grow_between_retries(serve):
    server = serve(faults=["500"] * 4)
    ask(make(server, first_wait=0.04), question())
    times = [request["time"] for request in server.requests]
    waits = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    for retry, wait in enumerate(waits):  # drawn between half and the whole of 0.04 s, doubled each time
        assert 0.02 * 2**retry <= wait


@pytest.mark.parametrize("longest_wait", [1, 2])
def test_retry_after_is_honoured_by_all_requests(serve, longest_wait):
    server = serve(faults=["429:0.5"])
    judge = make(server, concurrency=1, longest_wait=longest_wait)
    ask(judge, question(0), question(1))
    first, *rest = (request["time"] for request in server.requests)
    assert len(rest) == 2 and min(rest) - first >= 0.5


def test_other_requests_wait_too_after_429(serve):
    server = serve(faults=["429:1"])

    async def run(judge: Judge) -> None:
        early = asyncio.create_task(judge.ask([question(0)]))
        while not server.requests:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # by now the reply is there
        await judge.ask([question(1)])
        await early

    asyncio.run(run(make(server)))
    first, *rest = (request["time"] for request in server.requests)
    assert len(rest) == 2 and min(rest) - first >= 1


def test_a_limit_below_the_concurrency_is_no_fault(serve):
    """Each answer is followed by five 429s: more in all than one question's or all questions' retries."""
    server = serve(faults=["ok", *["429"] * 5] * 20)
    judge = make(server, concurrency=8, retries=5, longest_wait=0.05)
    answers = ask(judge, *(question(number) for number in range(20)))
    assert [answer.choice for answer in answers] == [1] * 20
    assert sum(server.asked.values()) > 20 + 5 * 10


def test_many_429s_at_once_are_one_pause(serve):
    """Eight of them: counted one by one the second wait would be of 0.05 s * 2^8, and the retries would not do."""
    server = serve(faults=["429"] * 8 + ["ok"] * 8, latency=0.1)
    judge = make(server, concurrency=8, first_wait=0.05, retries=1)
    assert [a.choice for a in ask(judge, *(question(number) for number in range(8)))] == [1] * 8


@pytest.mark.parametrize("fault", ["429", "429:0", "429:0.02"])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_server_that_says_429_alone_counts_as_gone(serve, fault, concurrency):
    server = serve(fault_share=1, kinds=[fault], latency=0.005)
    questions = [question(number) for number in range(concurrency)]
    with pytest.raises(
        JudgeError, match="status 429 .*, 4 times in a row and no answer .*requests_per_minute .*go on later"
    ):
        ask(make(server, retries=3, concurrency=concurrency), *questions)
    assert 4 <= sum(server.asked.values()) <= 5 * concurrency


def test_a_server_that_asks_for_a_long_wait_counts_as_gone(serve):
    with pytest.raises(
        JudgeError, match="status 429 .*order to wait 3600 s, need at most longest_wait=300 s: go on later"
    ):
        ask(make(serve(faults=["429:3600"])), question())


# Failures that do not


@pytest.mark.parametrize("fault", ["500", "drop", "broken"])
def test_after_the_last_retry_the_server_counts_as_gone(serve, fault):
    server = serve(faults=[fault] * 10)
    with pytest.raises(
        JudgeError, match="got no answer to one question in 4 requests, the last time .*: see that it runs"
    ):
        ask(make(server, retries=3), question())
    assert sum(server.asked.values()) == 4


def test_a_server_that_is_killed_counts_as_gone(serve_process):
    process, url = serve_process(latency=0.1)

    async def run(judge: Judge) -> None:
        assert (await judge.ask([question(0)]))[0].choice == 1
        process.kill()
        process.wait()
        await judge.ask([question(number) for number in range(8)])

    with pytest.raises(JudgeError, match="need a server that answers"):
        asyncio.run(run(make(url, retries=2)))


@pytest.mark.parametrize(
    ("settings", "faults", "message"),
    [
        (
            {"api_key_env": "WRONG_KEY"},
            [],
            "status 401 .*need a key that it takes: put it into the environment variable WRONG_KEY",
        ),
        ({"model": "other"}, [], "status 404 .*need a model that it has, got 'other'"),
        ({}, ["403"], "status 403 .*need a key that may use the model 'judge'"),
        ({}, ["400"], "status 400 .*need a request that it takes"),
        ({}, ["422"], "status 422 .*need a request that it takes"),
        ({}, ["402"], "status 402 .*need an account that can pay"),
    ],
)
def test_what_cannot_pass_stops_at_once(serve, monkeypatch, settings, faults, message):
    monkeypatch.setenv("WRONG_KEY", "sk-wrong-0123456789")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(faults=faults, key=KEY)
    with pytest.raises(JudgeError, match=message):
        ask(make(server, **{"api_key_env": "JUDGE_KEY", **settings}), question())
    assert sum(server.asked.values()) == 1


@pytest.mark.parametrize("code", ["context_length_exceeded", "content_filter"])
def test_a_question_that_the_server_refuses_is_no_choice(serve, code):
    refused, answered = ask(make(serve(faults=[f"400 {code}"]), concurrency=1), question(0), question(1))
    assert refused.choice is None and refused.text.startswith("no answer: status 400")
    assert answered.choice == 1


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_after_an_answer_a_refusal_is_of_its_question_alone(serve, monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(faults=["ok", status, "ok"], key=KEY)
    judge = make(server, concurrency=1, api_key_env="JUDGE_KEY")
    first, refused, last = ask(judge, *(question(number) for number in range(3)))
    assert (first.choice, refused.choice, last.choice) == (1, None, 1)
    assert refused.text == f"no answer: status {status} (try again with [key])"
    assert sum(server.asked.values()) == 3


def test_a_refusal_waits_for_the_first_answer_to_others(serve):
    """A restart begins with the question that was refused: it must not end there again."""
    server = serve(faults=["400", "500"], latency=0.02)
    answers = ask(make(server, concurrency=3), *(question(number) for number in range(3)))
    assert sorted(str(answer.choice) for answer in answers) == ["1", "1", "None"]


def test_refusals_of_all_are_an_error_at_once(serve):
    server = serve(fault_share=1, kinds=["400"], latency=0.02)
    with pytest.raises(JudgeError, match="status 400 .*need a request that it takes"):
        ask(make(server, concurrency=4), *(question(number) for number in range(20)))
    assert len(server.asked) <= 8


def test_a_server_that_begins_to_refuse_all_is_an_error(serve):
    server = serve(faults=["ok"], fault_share=1, kinds=["400"])
    with pytest.raises(JudgeError, match="status 400"):
        ask(make(server, concurrency=1), *(question(number) for number in range(600)))
    assert 500 < len(server.asked) < 510


def test_an_account_without_money_is_not_tried_again(serve):
    server = serve(faults=["429 insufficient_quota"])
    with pytest.raises(JudgeError, match="status 429 .*need an account that can pay"):
        ask(make(server), question())
    assert sum(server.asked.values()) == 1


def test_text_that_cannot_be_sent_is_no_choice(serve):
    broken, whole = ask(make(serve()), question(first="half \ud83d"), question())
    assert broken.choice is None and "surrogate" in broken.text
    assert whole.choice == 1


def test_one_failure_ends_the_other_requests(serve):
    server = serve(faults=["400"], latency=0.05)

    async def run(judge: Judge) -> None:
        with pytest.raises(JudgeError):
            await judge.ask([question(number) for number in range(50)])
        await asyncio.sleep(0.5)

    asyncio.run(run(make(server, concurrency=1)))
    assert len(server.asked) < 5


# Keys


def test_the_key_is_sent_and_stands_nowhere_else(serve, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = serve(f"the key is {KEY}", key=KEY)
    judge = make(server, api_key_env="JUDGE_KEY")
    (answer,) = ask(judge, question())
    assert server.requests[0]["authorization"] == f"Bearer {KEY}"
    assert answer.text == "the key is [key]"
    assert KEY not in repr(judge) + json.dumps(judge.identity) + caplog.text


def test_an_error_does_not_tell_the_key_that_a_server_echoes(serve, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(JudgeError, match="Incorrect API key provided: \\[key\\]") as caught:
        ask(make(serve(key="another"), api_key_env="JUDGE_KEY"), question())
    error, told = caught.value, ""
    while error is not None:
        told += repr(error)
        error = error.__cause__ or error.__context__
    assert KEY not in told + caplog.text


@pytest.mark.parametrize("padding", range(150, 200, 7))
def test_no_part_of_a_key_is_told_where_a_reply_is_cut(serve, monkeypatch, padding):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with pytest.raises(JudgeError, match="a reply that is not a chat completion") as caught:
        server = serve(edit=lambda reply: {"x": "y" * padding + KEY})
        ask(make(server, api_key_env="JUDGE_KEY", retries=0), question())
    assert KEY[:5] not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-ключ-0123", "sk-one\nsk-two", "sk\u2013secret"])
def test_a_key_that_cannot_be_sent_is_told_before_anything_is_asked(monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(JudgeError, match="environment variable JUDGE_KEY .*outside ASCII.*copy it anew") as caught:
        make("http://localhost/v1", api_key_env="JUDGE_KEY")
    assert key not in str(caught.value) and "secret" not in str(caught.value)


def test_a_server_without_a_key_is_not_sent_one(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve()
    ask(make(server), question())
    assert server.requests[0]["authorization"] is None


def test_a_key_in_the_place_of_its_variables_name_is_not_told():
    with pytest.raises(JudgeError, match="in the environment variable that `api_key_env` names, need one") as caught:
        make("http://localhost/v1", api_key_env=KEY)
    assert KEY not in str(caught.value)


def test_a_missing_key_is_told_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(
        JudgeError, match="environment variable OPENAI_API_KEY, .*`api_key_env: null` for a server that wants"
    ):
        judge_from_config({"kind": "server", "base_url": "http://localhost/v1", "model": "judge"})


# Recipes


def test_the_identity_is_all_that_answers_depend_on(serve):
    judge = make("http://one/v1")
    same = [make("http://two/v1"), make("http://one/v1", timeout=3, concurrency=2, retries=1, seed=3)]
    others = [
        make("http://one/v1", **settings)
        for settings in (
            {"model": "other"},
            {"template": "zh"},
            {"example": "en"},
            {"structured": True},
            {"temperature": 0.5},
            {"temperature": 0.5, "seed": 1},
            {"max_tokens": 3},
            {"extra_body": {"top_p": 0.5}},
        )
    ]
    assert all(other.identity == judge.identity for other in same)
    identities = {json.dumps(other.identity, sort_keys=True) for other in [judge, *others]}
    assert len(identities) == 1 + len(others)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "oracle"}, "kind='oracle', need one of .*'server', 'model', 'reward_model', 'function'"),
        ({}, "kind=None"),
        ({"kind": "server", "url": "x", "model": "y"}, r"unknown keys \['url'\], need some of \['base_url', 'model'"),
        ({"kind": "server", "base_url": "http://x/v1"}, r"got no \['model'\], need them for the kind 'server'"),
        ({"kind": "function", "function": "math:sqrt", "model": "x"}, r"unknown keys \['model'\]"),
    ],
)
def test_a_recipe_names_settings_that_there_are(config, message):
    with pytest.raises(ValueError, match=message):
        judge_from_config(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "ftp://x"},
        {"base_url": "http://user:secret@x/v1"},
        {"base_url": "http://x/v1?key=secret"},
        {"temperature": -1},
        {"temperature": "1e-1"},
        {"max_tokens": 0},
        {"concurrency": 0},
        {"concurrency": 2.5},
        {"requests_per_minute": 0},
        {"timeout": 0},
        {"retries": -1},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"got {next(iter(settings))}=") as caught:
        make("http://x/v1", **settings)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("body", [{"max_tokens": None}, {"max_tokens": "16"}, {"max_completion_tokens": 0}])
def test_an_answer_without_a_limit_is_refused(body):
    with pytest.raises(
        ValueError, match="got extra_body=.*need a whole number as max_tokens or max_completion_tokens"
    ):
        make("http://x/v1", extra_body=body)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'got no package `openai`.*pip install "dmoerm-trl\[label\]"'):
        make("http://x/v1")
