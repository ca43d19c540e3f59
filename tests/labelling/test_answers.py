"""The store of answers: what is in it is found again, by the same question to the same judge, however the process ended."""

import multiprocessing
import sqlite3
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoerm_trl.labelling.answers import AnswerStore, Spent
from dmoerm_trl.labelling.judges import Answer, Question

QUESTION = Question([{"role": "user", "content": "Wie geht's? 你好"}], "gut", "schlecht", "logic", "chitchat")
IDENTITY = {"kind": "server", "model": "a"}
TOKENS = st.integers(0, 10**6)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "answers.sqlite"


def test_an_answer_is_found_again_by_another_store_on_the_file(path):
    given = Answer(2, "【2】 好的 🙂", 120, 3)
    with AnswerStore(path, IDENTITY) as store:
        assert store.get(store.key(QUESTION)) is None
        store.add(store.key(QUESTION), given)
        assert store.get(store.key(QUESTION)) == given
    with AnswerStore(path, dict(reversed(IDENTITY.items()))) as store:
        assert store.get(store.key(QUESTION)) == given


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": [{"role": "user", "content": "Wie geht's?"}]},
        {"prompt": [{"role": "system", "content": QUESTION.prompt[0]["content"]}]},
        {"first": "schlecht", "second": "gut"},
        {"first": "gut "},
        {"point": "empathy ability"},
        {"point": None},
        {"task": "maths"},
        {"round": 1},
    ],
)
def test_another_question_has_another_answer(path, change):
    with AnswerStore(path, IDENTITY) as store:
        store.add(store.key(QUESTION), Answer(1, "1"))
        assert store.get(store.key(replace(QUESTION, **change))) is None


def test_judges_may_share_a_file_but_neither_answers_nor_costs(path):
    with AnswerStore(path, IDENTITY) as store:
        store.add(store.key(QUESTION), Answer(1, "1", 10, 2))
        store.add(store.key(replace(QUESTION, point=None)), Answer(None, "?", 11, 3))
    with AnswerStore(path, IDENTITY | {"model": "b"}) as store:
        assert store.get(store.key(QUESTION)) is None
        assert store.spent == Spent(0, 0, 0)
        store.add(store.key(QUESTION), Answer(2, "2", 100, 1))
    with AnswerStore(path, IDENTITY) as store:
        assert store.get(store.key(QUESTION)).choice == 1
        assert store.spent == Spent(2, 21, 5)


def test_unreadable_answers_are_asked_for_again_on_request_and_stay_on_record(path):
    readable = replace(QUESTION, point="readability")
    with AnswerStore(path, IDENTITY) as store:
        store.add(store.key(QUESTION), Answer(None, "well", 5, 5))
        store.add(store.key(readable), Answer(1, "1", 5, 5))
        assert store.get(store.key(QUESTION)) == Answer(None, "well", 5, 5)
    with AnswerStore(path, IDENTITY, forget_unreadable=True) as store:
        assert store.get(store.key(QUESTION)) is None
        assert store.get(store.key(readable)).choice == 1
        store.add(store.key(QUESTION), Answer(None, "hm", 5, 5))
        assert store.get(store.key(QUESTION)).text == "hm"  # one that came after the request counts
        assert store.spent == Spent(3, 15, 15)


def test_a_restart_does_not_ask_anew_for_what_was_asked_again(path):
    with AnswerStore(path, IDENTITY) as store:
        key = store.key(QUESTION)
        store.add(key, Answer(None, "well"))
    with AnswerStore(path, IDENTITY, forget_unreadable=True) as store:
        store.add(key, Answer(None, "hm"))
    with AnswerStore(path, IDENTITY, forget_unreadable=True) as store:
        assert store.get(key).text == "hm"
        store.finish()
    with AnswerStore(path, IDENTITY, forget_unreadable=True) as store:
        assert store.get(key) is None
    with AnswerStore(path, IDENTITY) as store:
        assert store.get(key).text == "hm"


def test_keys_are_counted_until_the_counting_starts_anew(path):
    with AnswerStore(path, IDENTITY) as store:
        assert [store.count(key) for key in (b"a", b"b", b"a")] == [0, 0, 1]
        assert [store.count(b"c", 5), store.count(b"c", 2), store.count(b"c")] == [0, 5, 7]
        store.start_counting()
        assert store.count(b"a") == 0


def test_a_file_that_another_process_uses_is_an_error(path):
    with AnswerStore(path, IDENTITY):
        with pytest.raises(ValueError, match="got a file that another process uses.*wait for the other"):
            AnswerStore(path, IDENTITY)
    AnswerStore(path, IDENTITY).close()


def test_a_file_of_another_kind_is_an_error_and_stays(path):
    path.write_text("a letter, " * 500)
    with pytest.raises(ValueError, match="answers.sqlite: got no store of answers.*move the file away"):
        AnswerStore(path, IDENTITY)
    assert path.read_text() == "a letter, " * 500


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.builds(Answer, st.sampled_from([1, 2, None]), st.text(), TOKENS, TOKENS))
    )
)
def test_the_last_answer_to_a_question_is_the_one(given):
    with AnswerStore(":memory:", IDENTITY) as store:
        for first, answer in given:
            store.add(store.key(replace(QUESTION, first=first)), answer)
        for first, answer in dict(given).items():
            assert store.get(store.key(replace(QUESTION, first=first))) == answer
        assert store.spent.calls == len(given)


def test_half_a_character_is_stored_as_a_question_mark(path):
    with AnswerStore(path, IDENTITY) as store:
        store.add(store.key(QUESTION), Answer(None, "\ud83d one"))
        assert store.get(store.key(QUESTION)).text == "? one"


def add_for_ever(path: Path, told: Connection) -> None:
    with AnswerStore(path, IDENTITY) as store:
        for number in range(10**9):
            store.add(store.key(replace(QUESTION, first=f"{number}")), Answer(1, "1"))
            told.send_bytes(b".")


@pytest.mark.parametrize("after", [1, 300])
def test_what_was_added_outlives_a_kill(path, after, start):
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = start(add_for_ever, path, writer)
    writer.close()
    told = 0
    with suppress(EOFError):
        while reader.recv_bytes():
            told += 1
            if told == after:
                process.kill()
    process.join()
    with AnswerStore(path, IDENTITY) as store:
        stored = [store.get(store.key(replace(QUESTION, first=f"{number}"))) for number in range(told)]
        assert stored == [Answer(1, "1")] * told
        assert told <= store.spent.calls <= told + 1


def test_the_file_can_be_read_with_sqlite_alone(path):
    with AnswerStore(path, IDENTITY) as store:
        store.add(store.key(QUESTION), Answer(1, "1", 7, 1))
    joined = "SELECT identity, choice, text, prompt_tokens FROM answers JOIN judges USING (judge)"
    assert sqlite3.connect(path).execute(joined).fetchall() == [('{"kind": "server", "model": "a"}', 1, "1", 7)]
