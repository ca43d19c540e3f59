"""The answers of judges, on disk: each is stored as it comes, so that nothing is asked and paid for twice."""

import hashlib
import json
import os
import sqlite3
import time
from pathlib import Path
from typing import Any, NamedTuple

from .judges import Answer, Question


class Spent(NamedTuple):
    """What the stored answers of a judge took."""

    calls: int
    prompt_tokens: int
    completion_tokens: int


class AnswerStore:
    """
    The answers of one judge, in an SQLite file that may hold those of other judges too.

    An answer is found again by the SHA-256 of all that it depends on: the judge's identity and the question. It is in the
    file when [`add`] returns and outlives the process, however that ends; a power cut may take the last ones. One process at
    a time has the file.

    Args:
        path (`str`):
            The file, made if it is not there; `":memory:"` for a store that is not kept.
        identity (`dict`):
            The judge's, see [`~dmoerm_trl.labelling.judges.Judge`].
        forget_unreadable (`bool`, *optional*, defaults to `False`):
            Whether the unreadable answers that are there count as not given, so that they are asked for again: once each,
            however often the store is opened until [`finish`].

    Raises:
        ValueError: if another process has the file, or it is no store of answers.
    """

    def __init__(self, path: str | os.PathLike, identity: dict[str, Any], *, forget_unreadable: bool = False):
        written = json.dumps(identity, sort_keys=True)
        self._judge = hashlib.sha256(written.encode()).digest()
        try:
            self._connection = sqlite3.connect(path, timeout=0, isolation_level=None)  # each statement is committed
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.executescript(_TABLES)
            self._connection.execute("INSERT OR IGNORE INTO judges VALUES (?, ?)", (self._judge, written))
        except sqlite3.DatabaseError as error:
            in_use = "locked" in str(error)
            raise ValueError(
                f"{Path(path)}: got {'a file that another process uses' if in_use else f'no store of answers ({error})'}, "
                f"need one for itself: {'wait for the other `dmoerm label`, or end it' if in_use else 'move the file away'}."
            ) from error
        self._readable_up_to = self._mark() if forget_unreadable else 0

    def _mark(self) -> int:
        """The last answer that was there when unreadable ones were first asked for again."""
        self._connection.execute(
            "INSERT OR IGNORE INTO asking_again SELECT ?, coalesce(max(id), 0) FROM answers", (self._judge,)
        )
        found = self._connection.execute("SELECT last FROM asking_again WHERE judge = ?", (self._judge,))
        return found.fetchone()[0]

    def finish(self) -> None:
        """Says that all is answered: who asks for unreadable answers again from now on means all that are there by now."""
        self._connection.execute("DELETE FROM asking_again WHERE judge = ?", (self._judge,))

    def key(self, question: Question) -> bytes:
        """What a question's answer is found by."""
        return hashlib.sha256(self._judge + json.dumps(vars(question), sort_keys=True).encode()).digest()

    def get(self, key: bytes) -> Answer | None:
        """The answer to a question, the last one if it was asked again; `None` if there is none."""
        found = self._connection.execute(
            "SELECT choice, text, prompt_tokens, completion_tokens FROM answers "
            "WHERE key = ? AND (choice IS NOT NULL OR id > ?) ORDER BY id DESC LIMIT 1",
            (key, self._readable_up_to),
        ).fetchone()
        return None if found is None else Answer(*found)

    def add(self, key: bytes, answer: Answer) -> None:
        """Stores an answer. One that was given before stays in the file, as a record of what was paid for."""
        answer = answer._replace(text=answer.text.encode(errors="replace").decode())  # JSON may hold half a character
        self._connection.execute(
            "INSERT INTO answers (key, judge, choice, text, prompt_tokens, completion_tokens, time) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (key, self._judge, *answer, time.time()),
        )

    @property
    def spent(self) -> Spent:
        """What this judge's answers took, those of earlier runs included."""
        return Spent(
            *self._connection.execute(
                "SELECT count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) "
                "FROM answers WHERE judge = ?",
                (self._judge,),
            ).fetchone()
        )

    @property
    def has_choices(self) -> bool:
        """Whether any answer of this judge could be read."""
        found = self._connection.execute(
            "SELECT EXISTS (SELECT 1 FROM answers WHERE judge = ? AND choice IS NOT NULL)", (self._judge,)
        )
        return bool(found.fetchone()[0])

    def count(self, key: bytes, times: int = 1) -> int:
        """Counts a key, and returns the count before: since the store was opened or [`start_counting`] was called."""
        found = self._connection.execute("SELECT times FROM temp.counted WHERE key = ?", (key,)).fetchone()
        before = 0 if found is None else found[0]
        self._connection.execute("INSERT OR REPLACE INTO temp.counted VALUES (?, ?)", (key, before + times))
        return before

    def start_counting(self) -> None:
        self._connection.execute("DELETE FROM temp.counted")

    def close(self) -> None:
        self._connection.close()

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
CREATE TEMP TABLE counted (key BLOB PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID;
"""
