"""The store of answers: what is in it is found again, by the same question to the same judge, however the process ended."""

import errno
import multiprocessing
import os
import random
import socket
import sqlite3
from contextlib import closing, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoerm_trl.labelling.answer_store import AnswerStore, Spent
from dmoerm_trl.labelling.judges import Answer, Question, Tie

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


def test_the_process_that_uses_a_file_is_named(path):
    with AnswerStore(path, IDENTITY):
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on {socket.gethostname()}"):
            AnswerStore(path, IDENTITY)


def test_its_owner_alone_may_read_a_store(path):
    path.touch(0o644)
    before = os.umask(0)
    try:
        with AnswerStore(path, IDENTITY) as store:
            store.reserve()
            store.add(store.key(QUESTION), Answer(1, "1"))
            names = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert {"answers.sqlite", "answers.sqlite-wal"} <= names.keys() and {*names.values()} == {0o600}
    assert [file.name for file in path.parent.iterdir()] == ["answers.sqlite"]


@pytest.fixture
def filled(path) -> Path:
    """A store with 300 answers."""
    with AnswerStore(path, IDENTITY) as store:
        for number in range(300):
            store.add(store.key(replace(QUESTION, first=f"{number}")), Answer(1, "1 " * 50))
    return path


@pytest.mark.parametrize("damage", ["head", "middle", "index", "end"])
def test_a_broken_store_is_an_error_and_stays(filled, damage):
    content = bytearray(filled.read_bytes())
    places = {"head": 0, "middle": len(content) // 3 // 4096 * 4096, "index": 4096 * 3, "end": None}
    if (place := places[damage]) is None:
        del content[len(content) // 2 :]
    else:
        content[place : place + 5000] = random.Random(0).randbytes(5000)
    filled.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"got no usable answer store.*put a copy in its place.*\.recover.*move the file away"
    ):
        AnswerStore(filled, IDENTITY)
    assert filled.read_bytes() == content


def test_an_index_that_lacks_an_answer_is_an_error(filled):
    """It would be asked again, and paid for twice."""
    with closing(sqlite3.connect(filled)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("DELETE FROM sqlite_master WHERE name = 'answers_by_key'")
        connection.commit()
        connection.execute("VACUUM")
    with closing(sqlite3.connect(filled)) as connection:
        connection.execute("CREATE INDEX answers_by_key ON answers (key) WHERE id < 0")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = 'CREATE INDEX answers_by_key ON answers (key)' WHERE type = 'index' AND name = 'answers_by_key'"
        )
        connection.commit()
    with pytest.raises(ValueError, match="got no usable answer store"):
        AnswerStore(filled, IDENTITY)


def test_a_store_that_breaks_while_it_is_used_is_an_error(path):
    with AnswerStore(path, IDENTITY) as store:
        store._connection.execute("DROP TABLE answers")
        for use in (lambda: store.get(b""), lambda: store.add(b"", Answer(1, "1")), lambda: store.spent):
            with pytest.raises(ValueError, match="no such table: answers.*move the file away"):
                use()


def test_another_database_is_not_made_a_store(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE places (name TEXT)")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="got no usable answer store .it has the tables places."):
        AnswerStore(path, IDENTITY)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["folder", "below a file"])
def test_a_place_that_cannot_be_written_is_an_error(tmp_path, kind):
    (tmp_path / "file").touch()
    place = tmp_path if kind == "folder" else tmp_path / "file" / "answers.sqlite"
    with pytest.raises(ValueError, match="got a file that cannot be written"):
        AnswerStore(place, IDENTITY)


class FullDisk:
    """A connection that stores no answer while a file is there, or ever."""

    def __init__(self, connection: sqlite3.Connection, reserve: Path | None):
        self.connection, self.reserve = connection, reserve

    def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        if statement.startswith("INSERT INTO answers") and (self.reserve is None or self.reserve.exists()):
            raise sqlite3.OperationalError("database or disk is full")
        return self.connection.execute(statement, *values)

    def __getattr__(self, name: str) -> object:
        return getattr(self.connection, name)


@pytest.fixture
def fill(monkeypatch):
    """From now on the disk is full, until a file is removed from it."""
    connect = sqlite3.connect

    def full(reserve: Path | None) -> None:
        monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: FullDisk(connect(*args, **more), reserve))

    return full


def test_an_answer_is_stored_though_the_disk_is_full(path, fill):
    fill(path.with_name("answers.sqlite.reserve"))
    with AnswerStore(path, IDENTITY) as store:
        store.reserve()
        for first in "ab":
            store.add(store.key(replace(QUESTION, first=first)), Answer(1, first))
        assert "got a disk that cannot store an answer (database or disk is full)" in store.full
        assert "free some space" in store.full
        assert store.spent.calls == 2
    assert not path.with_name("answers.sqlite.reserve").exists()


def test_an_answer_that_cannot_be_stored_is_an_error(path, fill):
    with AnswerStore(path, IDENTITY) as store:
        store.add(store.key(QUESTION), Answer(1, "1"))
    fill(None)
    with AnswerStore(path, IDENTITY) as store:
        store.reserve()
        with pytest.raises(ValueError, match="database or disk is full.*free some space .*Earlier answers are kept"):
            store.add(store.key(replace(QUESTION, first="a")), Answer(1, "1"))
        assert store.get(store.key(QUESTION)).choice == 1


def test_a_disk_without_room_is_an_error_before_anything_is_asked(path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with AnswerStore(path, IDENTITY) as store:
        monkeypatch.setattr("dmoerm_trl.labelling.answer_store.writing", full)
        with pytest.raises(ValueError, match="got no room for 1 MiB beside it .No space left.*free some space"):
            store.reserve()


def test_a_tie_is_stored_as_one_and_can_be_read(path):
    with AnswerStore(path, IDENTITY) as store:
        store.add(store.key(QUESTION), Tie(None, "scores 1 and 1"))
    with AnswerStore(path, IDENTITY, forget_unreadable=True) as store:
        answer = store.get(store.key(QUESTION))
        assert (answer, answer.verdict, store.has_choices) == (Answer(None, "scores 1 and 1"), 0, True)


def test_what_was_given_up_is_asked_again_by_who_says_so(path):
    good = replace(QUESTION, point="readability")
    with AnswerStore(path, IDENTITY) as store:
        store.add(store.key(QUESTION), Answer(None, "well"))
        store.add(store.key(good), Answer(1, "1"))
        store.give_up()
        assert store.get(store.key(QUESTION)).text == "well"
    for _ in range(2):
        with AnswerStore(path, IDENTITY) as store:
            assert store.get(store.key(QUESTION)).text == "well"
            store.forget_given_up()
            assert store.get(store.key(QUESTION)) is None
            assert store.get(store.key(good)).choice == 1
    with AnswerStore(path, IDENTITY | {"model": "b"}) as store:
        store.add(store.key(QUESTION), Answer(None, "hm"))
        store.forget_given_up()
        assert store.get(store.key(QUESTION)).text == "hm"
    with AnswerStore(path, IDENTITY) as store:
        store.forget_given_up()
        store.add(store.key(QUESTION), Answer(None, "hm"))
        assert store.get(store.key(QUESTION)).text == "hm" and store.spent.calls == 3


def test_what_a_judge_says_most_often(path):
    with AnswerStore(path, IDENTITY) as store:
        for number, text in enumerate(["1", "1", "1", "well", "hm", "hm"]):
            store.add(store.key(replace(QUESTION, first=f"{number}")), Answer(1 if text == "1" else None, text))
        assert store.said(unreadable=False, most=2) == [("1", 3), ("hm", 2)]
        assert store.said(unreadable=True) == [("hm", 2), ("well", 1)]


def test_opening_a_store_writes_nothing_of_the_judge(path):
    with AnswerStore(path, IDENTITY, forget_unreadable=True):
        pass
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM judges").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM asking_again").fetchone() == (0,)


def test_a_file_of_another_kind_is_an_error_and_stays(path):
    path.write_text("a letter, " * 500)
    with pytest.raises(ValueError, match="answers.sqlite: got no usable answer store.*move the file away"):
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
