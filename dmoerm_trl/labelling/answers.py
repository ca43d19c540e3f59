"""The answers of judges, on disk: each is stored as it comes, so that nothing is asked and paid for twice."""

import hashlib
import json
import os
import socket
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..files import check_writable, write_text, writing
from ..messages import one_line
from .judges import Answer, Question, Tie


class Spent(NamedTuple):
    """What the stored answers of a judge took."""

    calls: int
    prompt_tokens: int
    completion_tokens: int


RESERVE = 1 << 20
"""Bytes on the disk that are kept for the answers under way when it is full."""


class AnswerStore:
    """
    The answers of one judge, in an SQLite file that may hold those of other judges too.

    An answer is found again by the SHA-256 of all that it depends on: the judge's identity and the question. It is in the
    file when [`add`] returns and outlives the process, however that ends; a power cut may take the last ones. One process at
    a time has the file, and only its owner may read it. Nothing is written of a judge before its first answer.

    Args:
        path (`str`):
            The file, made if it is not there; `":memory:"` for a store that is not kept.
        identity (`dict`):
            The judge's, see [`~dmoerm_trl.labelling.judges.Judge`].
        forget_unreadable (`bool`, *optional*, defaults to `False`):
            Whether the unreadable answers that are there count as not given, so that they are asked for again: once each,
            however often the store is opened until [`finish`].

    Attributes:
        full (`str`, *optional*): why no more should be asked: the disk took the last answers with difficulty.

    Raises:
        ValueError: if another process has the file, or it is no store of answers, or a broken one.
    """

    def __init__(self, path: str | os.PathLike, identity: dict[str, Any], *, forget_unreadable: bool = False):
        self._path = None if str(path) == ":memory:" else Path(path)
        self._written = json.dumps(identity, sort_keys=True)
        self._judge = hashlib.sha256(self._written.encode()).digest()
        self._is_new = True  # as long as this store added nothing
        self.full: str | None = None
        if self._path is not None:
            check_writable(self._path)
            with suppress(FileExistsError):
                os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        self._connection = sqlite3.connect(path, timeout=0, isolation_level=None)  # each statement is committed
        try:
            self._one("PRAGMA locking_mode = EXCLUSIVE")
            self._check()
            self._make_private()
            self._one("PRAGMA journal_mode = WAL")
            self._one("PRAGMA synchronous = NORMAL")
            self._connection.executescript(_TABLES)
        except sqlite3.Error as error:
            self._connection.close()
            raise ValueError(self._fault(error)) from error
        except ValueError:
            self._connection.close()
            raise
        if self._path is not None:
            with suppress(OSError):  # it serves a message only
                write_text(self._beside("owner"), f"process {os.getpid()} on {socket.gethostname()}", private=True)
        self._asked_again_after = self._readable_after = 0
        if forget_unreadable:
            marked = "SELECT max(last) FROM asking_again WHERE judge = ?"
            newest = "SELECT coalesce(max(id), 0) FROM answers"
            (self._asked_again_after,) = self._one(f"SELECT coalesce(({marked}), ({newest}))", self._judge)
            self._readable_after = self._asked_again_after

    def _check(self) -> None:
        tables = [name for (name,) in self._all("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if tables and "judges" not in tables:
            raise sqlite3.DatabaseError(f"it has the tables {', '.join(sorted(tables))}")
        (found,) = self._one("PRAGMA integrity_check(1)")
        if found != "ok":
            raise sqlite3.DatabaseError(found)

    def _make_private(self) -> None:
        """Lets its owner alone read the file and what SQLite writes beside it."""
        if self._path is not None:
            for name in (self._path.name, f"{self._path.name}-wal", f"{self._path.name}-shm"):
                with suppress(OSError):  # not there, or another user's who shares it
                    self._path.with_name(name).chmod(0o600)

    def _beside(self, what: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{what}")

    def _all(self, statement: str, *values: Any) -> list[tuple]:
        """The rows that a statement gives."""
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise ValueError(self._fault(error)) from error

    def _one(self, statement: str, *values: Any) -> tuple | None:
        """The first row that a statement gives."""
        rows = self._all(statement, *values)
        return rows[0] if rows else None

    def _fault(self, error: sqlite3.Error) -> str:
        """What is wrong with the file, and the way out."""
        said = " ".join(str(error).split())
        if "locked" in said:
            owner = "another process"
            with suppress(OSError):
                owner = one_line(self._beside("owner").read_text(encoding="utf-8"))
            return (
                f"{self._path}: got a file that another process uses ({owner}), need one for itself: wait for the other "
                "`dmoerm label`, or end it."
            )
        if isinstance(error, sqlite3.OperationalError) and "malformed" not in said and "no such" not in said:
            return (
                f"{self._path}: got a disk that does not take an answer ({said}), need room for every one, because each is paid "
                "for: free some space or mend the disk, and run the same command to go on. The answers before are kept."
            )
        return (
            f"{self._path}: got no store of answers ({one_line(said)}), need one: put a copy in its place, save what can be read "
            f"by `sqlite3 {self._path.name} .recover | sqlite3 new.sqlite`, or move the file away and pay for all anew."
        )

    def reserve(self) -> None:
        """
        Sets room aside on the disk, so that answers under way can be stored when it is full.

        Raises:
            ValueError: if there is none.
        """
        if self._path is None:
            return
        try:
            with writing(self._beside("reserve"), binary=True, private=True) as file:
                file.write(bytes(RESERVE))
        except OSError as error:
            raise ValueError(
                f"{self._path}: got no room for {RESERVE >> 20} MiB beside it ({error.strerror}), need that much because every "
                "answer is stored as it comes: free some space, or name another file in `answers`."
            ) from error

    def forget_given_up(self) -> None:
        """From now on the unreadable answers at which an earlier run gave up count as not given; see [`give_up`]."""
        (last,) = self._one("SELECT coalesce(max(last), 0) FROM given_up WHERE judge = ?", self._judge)
        self._readable_after = max(self._readable_after, last)

    def give_up(self) -> None:
        """Says that the unreadable answers that are there are worth nothing: the fault may be the server's."""
        self._one(
            "INSERT OR REPLACE INTO given_up SELECT ?, coalesce(max(id), 0) FROM answers WHERE judge = ?",
            self._judge,
            self._judge,
        )

    def said(self, *, unreadable: bool, most: int = 3) -> list[tuple[str, int]]:
        """What the judge says most often, and how often: in its unreadable answers, or in all."""
        which = "choice IS NULL AND id > ?" if unreadable else "id > ?"
        return self._all(
            f"SELECT text, count(*) FROM answers WHERE judge = ? AND {which} "
            "GROUP BY text ORDER BY count(*) DESC, max(id) DESC LIMIT ?",
            *(self._judge, self._readable_after if unreadable else 0, most),
        )

    def finish(self) -> None:
        """Says that all is answered: who asks for unreadable answers again from now on means all that are there by now."""
        self._one("DELETE FROM asking_again WHERE judge = ?", self._judge)

    def key(self, question: Question) -> bytes:
        """What a question's answer is found by."""
        return hashlib.sha256(self._judge + json.dumps(vars(question), sort_keys=True).encode()).digest()

    def get(self, key: bytes) -> Answer | None:
        """The answer to a question, the last one if it was asked again; `None` if there is none."""
        found = self._one(
            "SELECT choice, text, prompt_tokens, completion_tokens FROM answers "
            "WHERE key = ? AND (choice IS NOT NULL OR id > ?) ORDER BY id DESC LIMIT 1",
            key,
            self._readable_after,
        )
        if found is None:
            return None
        choice, *rest = found
        return Tie(None, *rest) if choice == 0 else Answer(choice, *rest)

    def add(self, key: bytes, answer: Answer) -> None:
        """
        Stores an answer. One that was given before stays in the file, as a record of what was paid for. On a full disk it uses
        up what [`reserve`] set aside, and says so in `full`.

        Raises:
            ValueError: if it cannot be stored.
        """
        text = answer.text.encode(errors="replace").decode()  # JSON may hold half a character
        try:
            self._insert(key, answer, text)
        except ValueError as error:
            if self._path is None or not self._beside("reserve").exists():
                raise
            self._beside("reserve").unlink()
            self._insert(key, answer, text)
            self.full = str(error).rstrip(".")

    def _insert(self, key: bytes, answer: Answer, text: str) -> None:
        if self._is_new:
            self._one("INSERT OR IGNORE INTO judges VALUES (?, ?)", self._judge, self._written)
            if self._asked_again_after:
                again = (self._judge, self._asked_again_after)
                self._one("INSERT OR IGNORE INTO asking_again VALUES (?, ?)", *again)
            self._is_new = False
        self._one(
            "INSERT INTO answers (key, judge, choice, text, prompt_tokens, completion_tokens, time) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(key, self._judge, answer.verdict, text, answer.prompt_tokens, answer.completion_tokens, time.time()),
        )

    @property
    def spent(self) -> Spent:
        """What this judge's answers took, those of earlier runs included."""
        return Spent(
            *self._one(
                "SELECT count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) "
                "FROM answers WHERE judge = ?",
                self._judge,
            )
        )

    @property
    def has_choices(self) -> bool:
        """Whether any answer of this judge could be read."""
        found = "SELECT EXISTS (SELECT 1 FROM answers WHERE judge = ? AND choice IS NOT NULL)"
        return bool(self._one(found, self._judge)[0])

    def count(self, key: bytes, times: int = 1) -> int:
        """Counts a key, and returns the count before: since the store was opened or [`start_counting`] was called."""
        found = self._one("SELECT times FROM temp.counted WHERE key = ?", key)
        before = 0 if found is None else found[0]
        self._one("INSERT OR REPLACE INTO temp.counted VALUES (?, ?)", key, before + times)
        return before

    def start_counting(self) -> None:
        self._one("DELETE FROM temp.counted")

    def close(self) -> None:
        self._connection.close()
        if self._path is not None:
            for what in ("reserve", "owner"):
                self._beside(what).unlink(missing_ok=True)

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_TABLES = """
CREATE TABLE IF NOT EXISTS judges (judge BLOB PRIMARY KEY, identity TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL, judge BLOB NOT NULL, choice INTEGER, text TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, time REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS answers_by_key ON answers (key);
CREATE TABLE IF NOT EXISTS asking_again (judge BLOB PRIMARY KEY, last INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS given_up (judge BLOB PRIMARY KEY, last INTEGER NOT NULL);
CREATE TEMP TABLE counted (key BLOB PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
"""
