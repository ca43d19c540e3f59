"""Judges' answers on disk. Each answer is stored as soon as it arrives, so that no question is paid for twice."""

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
    """Number of calls and tokens that the stored answers of a judge cost."""

    calls: int
    prompt_tokens: int
    completion_tokens: int


RESERVE = 1 << 20
"""Bytes of disk space reserved for the answers of pending requests, in case the disk fills up."""


class AnswerStore:
    """
    Answers of one judge, in an SQLite file that other judges may share.

    The key of an answer is the SHA-256 of everything it depends on: the judge's identity and the question. An answer is in
    the file when [`add`] returns, and survives any end of the process; a power cut may lose the last ones. The file belongs to
    one process at a time, and only its owner has permission to read it. Nothing about a judge is written before its first
    answer.

    Args:
        path (`str`):
            The file, created if it does not exist; `":memory:"` for a store that is not saved.
        identity (`dict`):
            Identity of the judge, see [`~dmoerm_trl.labelling.judges.Judge`].
        forget_unreadable (`bool`, *optional*, defaults to `False`):
            Whether to ignore the stored answers that could not be read, so that their questions are asked again: once each,
            however often the store is opened before [`finish`].

    Attributes:
        full (`str`, *optional*): Why no further question should be asked: the disk is full and the reserve is used up.

    Raises:
        ValueError: If another process has opened the file, or the file is not an answer store or is corrupt.
    """

    def __init__(self, path: str | os.PathLike, identity: dict[str, Any], *, forget_unreadable: bool = False):
        self._path = None if str(path) == ":memory:" else Path(path)
        self._written = json.dumps(identity, sort_keys=True)
        self._judge = hashlib.sha256(self._written.encode()).digest()
        self._is_new = True  # until this store adds an answer
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
            with suppress(OSError):  # it is only read for an error message
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
        """Restrict the file, and the files that SQLite writes next to it, to their owner."""
        if self._path is not None:
            for name in (self._path.name, f"{self._path.name}-wal", f"{self._path.name}-shm"):
                with suppress(OSError):  # it does not exist, or belongs to another user
                    self._path.with_name(name).chmod(0o600)

    def _beside(self, what: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{what}")

    def _all(self, statement: str, *values: Any) -> list[tuple]:
        """Execute a statement and return its rows."""
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise ValueError(self._fault(error)) from error

    def _one(self, statement: str, *values: Any) -> tuple | None:
        """Execute a statement and return its first row."""
        rows = self._all(statement, *values)
        return rows[0] if rows else None

    def _fault(self, error: sqlite3.Error) -> str:
        """Describe what is wrong with the file and how to recover."""
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
                f"{self._path}: got a disk that cannot store an answer ({said}), need room for every answer because each is paid "
                "for: free some space or fix the disk, and run the same command to go on. Earlier answers are kept."
            )
        return (
            f"{self._path}: got no usable answer store ({one_line(said)}), need one: put a copy in its place, save what can be read "
            f"by `sqlite3 {self._path.name} .recover | sqlite3 new.sqlite`, or move the file away and pay for all answers again."
        )

    def reserve(self) -> None:
        """
        Reserve disk space, so that the answers of pending requests can be stored if the disk fills up.

        Raises:
            ValueError: If there is not enough space.
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
        """Ignore the unreadable answers at which an earlier run gave up, so that they are asked again; see [`give_up`]."""
        (last,) = self._one("SELECT coalesce(max(last), 0) FROM given_up WHERE judge = ?", self._judge)
        self._readable_after = max(self._readable_after, last)

    def give_up(self) -> None:
        """Mark the unreadable answers stored so far as ones to ask again, because the server may be at fault."""
        self._one(
            "INSERT OR REPLACE INTO given_up SELECT ?, coalesce(max(id), 0) FROM answers WHERE judge = ?",
            self._judge,
            self._judge,
        )

    def said(self, *, unreadable: bool, most: int = 3) -> list[tuple[str, int]]:
        """The judge's most frequent texts with their counts, among its unreadable answers or among all."""
        which = "choice IS NULL AND id > ?" if unreadable else "id > ?"
        return self._all(
            f"SELECT text, count(*) FROM answers WHERE judge = ? AND {which} "
            "GROUP BY text ORDER BY count(*) DESC, max(id) DESC LIMIT ?",
            *(self._judge, self._readable_after if unreadable else 0, most),
        )

    def finish(self) -> None:
        """Record that every question is answered. A later `forget_unreadable` then applies to all answers stored by now."""
        self._one("DELETE FROM asking_again WHERE judge = ?", self._judge)

    def key(self, question: Question) -> bytes:
        """Compute the key under which the answer to a question is stored."""
        return hashlib.sha256(self._judge + json.dumps(vars(question), sort_keys=True).encode()).digest()

    def get(self, key: bytes) -> Answer | None:
        """Look up the answer to a question: the latest one if it was asked again, `None` if there is no answer."""
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
        Store an answer. Earlier answers to the question stay in the file, as a record of what was paid for. If the disk is
        full, the space set aside by [`reserve`] is used up, and `full` is set.

        Raises:
            ValueError: If the answer cannot be stored.
        """
        text = answer.text.encode(errors="replace").decode()  # JSON may hold a lone surrogate
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
        """Number of calls and tokens that this judge's answers cost, including those of earlier runs."""
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
        """Add to the count of a key and return its previous count; counts start at 0 with [`start_counting`]."""
        found = self._one("SELECT times FROM temp.counted WHERE key = ?", key)
        before = 0 if found is None else found[0]
        self._one("INSERT OR REPLACE INTO temp.counted VALUES (?, ?)", key, before + times)
        return before

    def start_counting(self) -> None:
        """Reset all counts."""
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
