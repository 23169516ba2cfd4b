"""The file that everything is kept in: one process, one writer, readers beside it.

SQLite in WAL mode with `synchronous=FULL`: a transaction that has returned survives the loss of power. All writes
run one after another on one thread; reads run on a few others, each on a connection of its own that cannot write.
"""

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar

from millrace.retrieval import schema
from millrace.server.errors import ConfigError, Draining, InternalError, Unavailable

T = TypeVar("T")

READERS = 6  # threads
BUSY_SECONDS = 30  # that a reader waits while the file is recovered after a crash
WAL_BYTES = 64 << 20  # that the log keeps on disk after a large transaction
FULL_SECONDS = 60.0  # after which to try again on a full disk
NO_ROOM = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}


class Database:
    """Belongs to one event loop. Functions given to `read` and `write` get a connection and run on a thread."""

    def __init__(self, directory: Path, lock: int, writer: sqlite3.Connection):
        self.directory = directory
        self._lock = lock
        self._writer = writer
        self._write_thread = ThreadPoolExecutor(1, "millrace-write")
        self._read_threads = ThreadPoolExecutor(READERS, "millrace-read")
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._closed = False

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Raises ConfigError, which says what to do, for a directory or a file that cannot be used."""
        lock = _lock(directory)
        try:
            return cls(directory, lock, _open_writer(directory / "millrace.db"))
        except BaseException:
            os.close(lock)
            raise

    async def read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """`function` sees one state of the file from beginning to end."""
        return await self._run(self._read_threads, lambda: self.read_here(function))

    async def write(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """`function` opens its `transaction`s itself. Once begun it runs to its end, whether or not the caller is
        cancelled. Raises Unavailable if the disk is full."""
        return await self._run(self._write_thread, lambda: _write(self._writer, function))

    async def run(self, function: Callable[[], T]) -> T:
        """`function` on a thread where `read_here` is allowed."""
        return await self._run(self._read_threads, function)

    def read_here(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """`read`, on the calling thread, which must be one of `run`."""
        db: sqlite3.Connection | None = getattr(self._local, "db", None)
        if db is None:
            db = self._local.db = _open_reader(self.directory / "millrace.db")
            self._readers.append(db)
        return _read(db, function)

    async def close(self) -> None:
        """Wait for what runs, then release the directory. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._read_threads.shutdown()
        self._write_thread.shutdown()
        for db in (*self._readers, self._writer):
            db.close()
        os.close(self._lock)

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        if self._closed:
            raise Draining("the server is shutting down; use another replica")
        return await asyncio.get_running_loop().run_in_executor(threads, function)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All that is written inside, or nothing of it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite has rolled back itself after some errors, a full disk among them
            db.execute("ROLLBACK")
        raise


def _snapshot(db: sqlite3.Connection, function: Callable[[sqlite3.Connection], T]) -> T:
    db.execute("BEGIN")
    try:
        return function(db)
    finally:
        db.execute("ROLLBACK")


def _read(db: sqlite3.Connection, function: Callable[[sqlite3.Connection], T]) -> T:
    try:
        return _snapshot(db, function)
    except sqlite3.Error as error:
        raise InternalError(f"{type(error).__name__}: {error}") from error


def _write(db: sqlite3.Connection, function: Callable[[sqlite3.Connection], T]) -> T:
    try:
        return function(db)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in NO_ROOM:
            raise Unavailable(
                "the server's data directory cannot be written to, its disk may be full; nothing of this was stored",
                retry_after=FULL_SECONDS,
            ) from error
        raise InternalError(f"{type(error).__name__}: {error}") from error


def _lock(directory: Path) -> int:
    """Make the directory this process's own; the kernel lets go of it however the process ends."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"--data-dir {directory}: cannot be written to ({error.strerror}); name a directory of the user who "
            "runs the server"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    except BlockingIOError:
        with contextlib.closing(os.fdopen(lock)) as file:
            owner = file.read().strip() or "unknown"
        raise ConfigError(
            f"--data-dir {directory}: in use by another server (process {owner}); stop it, or name another directory"
        ) from None
    except OSError as error:
        os.close(lock)
        raise ConfigError(
            f"--data-dir {directory}: cannot be written to ({error.strerror}); free some space"
        ) from error
    return lock


def _open_writer(path: Path) -> sqlite3.Connection:
    if sqlite3.sqlite_version_info < (3, 37):
        raise ConfigError(f"this Python has SQLite {sqlite3.sqlite_version}; use one with 3.37 or newer")
    db = None
    try:
        path.touch(mode=0o600)  # SQLite would let everybody read it
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        schema.migrate(db)
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            db.execute(f"PRAGMA {pragma}")
        db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        return db
    except (sqlite3.Error, ValueError, OSError) as error:
        if db:
            db.close()
        raise ConfigError(
            f"{path}: cannot be used: {error}; restore it from a backup, or move it away to begin with no documents"
        ) from error


def _open_reader(path: Path) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_SECONDS)
