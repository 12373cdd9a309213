"""Caches answers on disk, so that no question is paid for twice."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any


_TABLE = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"
_PATIENCE = 60.0  # seconds to wait for another process that is writing


def hash_request(request: Mapping[str, Any]) -> str:
    """Key of a request, a JSON object: the same for the same content, images included."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """
    A SQLite file of answers, for any number of threads and processes. A stored answer survives the death of the
    process. Requests are stored only as hashes.

    Args:
        path (`Path`):
            The file; it and its folder are created if missing.

    Raises:
        `OSError`: If the file cannot be opened, is not a SQLite file, or the disk is full; at any call.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # readers do not wait for a writer
            connection.execute(_TABLE)

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns the answer stored under a key, or `None`."""
        with self._open() as connection:
            row = connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, answer: Mapping[str, Any]) -> None:
        """Stores an answer, a JSON object. The first answer of a key stays."""
        with self._open() as connection:
            connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # One connection per access, so that none is shared between threads or inherited by a forked process.
        try:
            with closing(sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)) as connection:
                yield connection
        except sqlite3.Error as error:
            raise OSError(
                f"The cache of answers {self.path} cannot be used: {error}. Free some space if the disk is full; if the file "
                "is damaged or not a cache, delete it or name another."
            ) from error
