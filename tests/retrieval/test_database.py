"""The file: who may open it, what it survives, what its errors say."""

import asyncio
import json
import os
import resource
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from retrieval_audit import audit
from retrieval_fakes import document, library, open_library

from millrace.retrieval import schema
from millrace.retrieval.database import Database, transaction
from millrace.retrieval.types import SearchRequest
from millrace.server.errors import ConfigError, InternalError

TESTS = Path(__file__).parent.parent
FULL_DISK = """
import asyncio, json, resource, signal, sys
from pathlib import Path
from retrieval_fakes import document, library
from millrace.server.errors import Unavailable

async def main():
    directory = Path(sys.argv[1])
    acknowledged, refused = [], 0
    async with library(directory) as lib:
        for n in range(20):
            await lib.upsert("t", "c", document(f"small{n}", f"word{n} letters"))
            acknowledged.append(f"small{n}")
        room = (directory / "millrace.db-wal").stat().st_size + 200_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        for n in range(12):
            text = " ".join(f"w{n}x{i}" for i in range(4_000 if n % 2 else 40))
            try:
                await lib.upsert("t", "c", document(f"large{n}", text))
                acknowledged.append(f"large{n}")
            except Unavailable as error:
                assert error.retry_after
                refused += 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await lib.upsert("t", "c", document("after", "room again"))
        acknowledged.append("after")
    print(json.dumps([acknowledged, refused]))

asyncio.run(main())
"""


async def test_durable_and_apart(tmp_path) -> None:
    database = Database.open(tmp_path)
    try:
        for pragma, expected in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            query = f"PRAGMA {pragma}"
            assert await database.write(lambda db, q=query: db.execute(q).fetchone()[0]) == expected
        with pytest.raises(InternalError, match="readonly"):
            await database.read(lambda db: db.execute("DELETE FROM documents"))
    finally:
        await database.close()


async def test_a_failed_transaction_leaves_nothing(tmp_path) -> None:
    def fail(db: sqlite3.Connection) -> None:
        with transaction(db):
            db.execute("INSERT INTO embedders (name, revision, dimensions) VALUES ('a', 'b', 1)")
            raise KeyError("stop")

    def count(db: sqlite3.Connection) -> int:
        return db.execute("SELECT count(*) FROM embedders").fetchone()[0]

    database = Database.open(tmp_path)
    try:
        with pytest.raises(KeyError):
            await database.write(fail)
        assert await database.write(count) == await database.read(count) == 0
    finally:
        await database.close()


async def test_a_cancelled_write_runs_to_its_end(tmp_path) -> None:
    def slow(db: sqlite3.Connection) -> None:
        with transaction(db):
            db.execute("INSERT INTO embedders (name, revision, dimensions) VALUES ('a', 'b', 1)")
            begun.set()
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result()

    loop, begun = asyncio.get_running_loop(), threading.Event()
    database = Database.open(tmp_path)
    try:
        write = asyncio.create_task(database.write(slow))
        await asyncio.to_thread(begun.wait)
        write.cancel()
        await asyncio.gather(write, return_exceptions=True)
        query = "SELECT count(*) FROM embedders"
        assert await database.write(lambda db: db.execute(query).fetchone()) == (1,)
    finally:
        await database.close()


async def test_one_process_at_a_time(tmp_path) -> None:
    async with library(tmp_path) as lib:
        await lib.upsert("t", "c", document("d", "word"))
        with pytest.raises(ConfigError, match=f"in use by another server .process {os.getpid()}.*another directory"):
            await open_library(tmp_path)
        script = "import sys; from pathlib import Path; from millrace.retrieval.database import Database\n"
        script += "Database.open(Path(sys.argv[1]))"
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
        assert "ConfigError" in done.stderr
        assert f"process {os.getpid()}" in done.stderr
        assert len((await lib.search("t", SearchRequest("c", "word"))).hits) == 1
    async with library(tmp_path):
        pass


def test_directories_that_cannot_be_used(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere"), Path("/dev/null")):
        with pytest.raises(ConfigError, match=f"--data-dir {directory}: .*name a directory"):
            Database.open(directory)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written to"):
        Database.open(tmp_path)
    tmp_path.chmod(0o700)


async def test_a_missing_directory_is_made_private(tmp_path) -> None:
    async with library(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o077 for path in (tmp_path / "a" / "b").iterdir()} == {0}


def foreign(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs (x)")
    db.close()


def newer(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    db.close()


def no_database(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to look at. " * 100)


def truncated(path: Path) -> None:
    db = sqlite3.connect(path)
    schema.migrate(db)
    db.close()
    path.write_bytes(path.read_bytes()[:3000])


def zeroed_schema(path: Path) -> None:
    db = sqlite3.connect(path)
    schema.migrate(db)
    db.close()
    data = bytearray(path.read_bytes())
    data[100:4096] = bytes(3996)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (foreign, "another program"),
        (newer, "newer Millrace"),
        (no_database, "not a database"),
        (truncated, "malformed|cannot be used"),
        (zeroed_schema, "cannot be used"),
    ],
)
def test_files_that_are_not_ours(tmp_path, make, words: str) -> None:
    path = tmp_path / "millrace.db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=words) as caught:
        Database.open(tmp_path)
    assert "restore it from a backup, or move it away" in str(caught.value)
    assert path.read_bytes() == before


async def test_damage_deeper_in_the_file_is_an_error_and_no_crash(tmp_path) -> None:
    async with library(tmp_path) as lib:
        for n in range(40):
            await lib.upsert("t", "c", document(f"d{n}", "word " * 400))
    path = tmp_path / "millrace.db"
    data = bytearray(path.read_bytes())
    for page in range(30, len(data) // 4096, 3):
        data[page * 4096 : (page + 1) * 4096] = os.urandom(4096)
    path.write_bytes(data)
    async with library(tmp_path) as lib:
        failed = 0
        for n in range(40):
            try:
                await lib.get_document("t", "c", f"d{n}")
                await lib.search("t", SearchRequest("c", "word"))
            except (InternalError, UnicodeDecodeError):
                failed += 1
        assert failed


def test_an_interrupted_migration_is_taken_up_again(tmp_path, monkeypatch) -> None:
    path = tmp_path / "millrace.db"
    monkeypatch.setattr(schema, "MIGRATIONS", (schema.TABLES + "SELECT no_such_function();",))
    with pytest.raises(ConfigError):
        Database.open(tmp_path)
    monkeypatch.undo()
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)
    schema.migrate(db)
    assert db.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
    db.close()


def test_a_full_disk_refuses_a_document_and_no_more(tmp_path) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert soft == resource.RLIM_INFINITY
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    acknowledged, refused = json.loads(done.stdout)
    assert refused >= 2
    assert {name for _, _, name in audit(tmp_path)} == set(acknowledged)
