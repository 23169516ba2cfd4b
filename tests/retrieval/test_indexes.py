"""The index after every opening is the one that SQLite's vectors make, whatever lies in its image's place."""

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from retrieval_audit import audit
from retrieval_fakes import WordEmbedder, document, library, prose

from millrace.retrieval import indexes, snapshot
from millrace.retrieval.catalog import Collection
from millrace.retrieval.documents import Change
from millrace.retrieval.index import hnsw
from millrace.retrieval.index.auto import AutoIndex
from millrace.retrieval.types import SearchMode, SearchRequest

WORDS = [f"word{n}" for n in range(100)]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each attempt to load an image went well."""
    outcomes: list[bool] = []
    load = AutoIndex.load

    def watched(self: AutoIndex, path: Path, model: str) -> None:
        outcomes.append(False)
        load(self, path, model)
        outcomes[-1] = True

    monkeypatch.setattr(AutoIndex, "load", watched)
    return outcomes


async def ask(lib) -> dict[str, float]:
    """Every document, with its score. A label too many in the index would take the place of one."""
    count = (await lib.list_collections("t"))[0].documents
    request = SearchRequest("c", "word1 word2", top_k=count, candidates=count, mode=SearchMode.VECTOR)
    return {hit.chunk.document_id: hit.score for hit in (await lib.search("t", request)).hits}


def expected(directory: Path) -> dict[str, float]:
    """Worked out from the texts."""
    embedder = WordEmbedder()

    def unit(text: str) -> np.ndarray:
        vector = embedder.vector(text).astype(np.float64)
        return vector / np.linalg.norm(vector)

    stored = {name: text for (_, _, name), (text, _) in audit(directory).items()}
    return {name: float(unit(text) @ unit("word1 word2")) for name, text in stored.items()}


async def fill(lib, names: range) -> None:
    for n in names:
        await lib.upsert("t", "c", document(f"d{n}", prose(WORDS, 8, seed=n)))


async def test_the_image_is_used(tmp_path, loads: list[bool]) -> None:
    async with library(tmp_path) as lib:
        await fill(lib, range(12))
        first = await ask(lib)
    assert len(list((tmp_path / "indexes").glob("*.index"))) == 1
    async with library(tmp_path) as lib:
        assert await ask(lib) == first
    assert loads == [True]
    assert first == pytest.approx(expected(tmp_path), abs=1e-6)


async def test_what_happened_since_is_made_up_for(tmp_path, loads: list[bool]) -> None:
    """Changes of a collection whose index was never loaded reach it when it is."""
    async with library(tmp_path) as lib:
        await fill(lib, range(12))
        await ask(lib)
    async with library(tmp_path) as lib:
        await lib.delete_documents("t", "c", ["d1", "d2"])
        await fill(lib, range(12, 16))
        await lib.upsert("t", "c", document("d5", "something new"))
    async with library(tmp_path) as lib:
        assert await ask(lib) == pytest.approx(expected(tmp_path), abs=1e-6)
    assert loads == [True]


def flipped(image: Path) -> None:
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)


def truncated(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:-1])


def empty(image: Path) -> None:
    image.write_bytes(b"")


def missing(image: Path) -> None:
    image.unlink()


@pytest.mark.parametrize("damage", [flipped, truncated, empty, missing])
async def test_a_damaged_image_costs_time_only(tmp_path, loads: list[bool], damage: Callable[[Path], None]) -> None:
    async with library(tmp_path) as lib:
        await fill(lib, range(12))
        await ask(lib)
    (image,) = (tmp_path / "indexes").glob("*.index")
    damage(image)
    for _ in range(2):
        async with library(tmp_path) as lib:
            assert await ask(lib) == pytest.approx(expected(tmp_path), abs=1e-6)
    assert loads == [False, True]


class PatientEmbedder(WordEmbedder):
    """Embeds questions at once, and what is stored when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = asyncio.Event()

    async def embed(self, texts, *, background: bool = False, **others):
        if background:
            await self.may.wait()
        return await super().embed(texts, background=background, **others)


async def test_damaged_vectors_are_left_out_and_made_anew(tmp_path, caplog) -> None:
    async with library(tmp_path) as lib:
        await fill(lib, range(12))
        whole = await ask(lib)
    next((tmp_path / "indexes").glob("*.index")).unlink()
    useless = [np.full(16, np.nan, "<f4").tobytes(), bytes(64), b"short", b""]
    with sqlite3.connect(tmp_path / "millrace.db") as db:
        db.executemany("UPDATE chunks SET vector = ? WHERE label = ?", zip(useless, (1, 4, 5, 9), strict=True))
    db.close()
    embedder = PatientEmbedder()
    async with library(tmp_path, embedder) as lib:
        for _ in range(2):
            assert await ask(lib) == {name: whole[name] for name in whole.keys() - {"d0", "d3", "d4", "d8"}}
        assert "4 vectors of a collection are damaged" in caplog.text
        await lib.delete_documents("t", "c", ["d8"])
        del whole["d8"]
        embedder.may.set()
        async with asyncio.timeout(10):
            while await ask(lib) != whole:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert expected(tmp_path) == pytest.approx(whole, abs=1e-6)
    assert await _reopened(tmp_path) == whole


async def test_a_restored_backup_does_not_believe_a_younger_image(tmp_path, loads: list[bool]) -> None:
    """In the backup's history the same labels came to stand for other vectors."""
    live, backup = tmp_path / "live", tmp_path / "backup"
    async with library(live) as lib:
        await fill(lib, range(5))
        await ask(lib)
    shutil.copytree(live, backup)
    async with library(live) as lib:
        await fill(lib, range(5, 10))
        await ask(lib)
    shutil.copy(backup / "millrace.db", live / "millrace.db")
    async with library(live) as lib:
        await fill(lib, range(20, 25))  # labels as above, other texts
    async with library(live) as lib:
        assert await ask(lib) == pytest.approx(expected(live), abs=1e-6)
    assert loads == [True, False]


async def test_images_are_written_in_the_background(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(indexes, "LEAST_CHANGES", 4)
    async with library(tmp_path) as lib:
        await fill(lib, range(1))
        await ask(lib)
        await fill(lib, range(1, 9))
        await lib.delete_documents("t", "c", [])  # behind it in the writer's queue
        (image,) = (tmp_path / "indexes").glob("*.index")
        before = image.read_bytes()
    assert image.read_bytes() != before  # the rest, when it was closed


async def test_files_of_nobody_are_deleted(tmp_path) -> None:
    async with library(tmp_path) as lib:
        await fill(lib, range(2))
        await ask(lib)
    (kept,) = (tmp_path / "indexes").iterdir()
    for name in ("0123.index", f"{kept.name}.tmp"):
        (tmp_path / "indexes" / name).write_bytes(b"left behind")
    async with library(tmp_path):
        assert list((tmp_path / "indexes").iterdir()) == [kept]


async def test_what_cannot_be_stored_leaves_the_index_as_it_was(tmp_path, monkeypatch) -> None:
    async with library(tmp_path, max_chunks=6) as lib:
        await fill(lib, range(6))
        before = await ask(lib)
        results = [await _error(lib.upsert("t", "c", document(f"e{n}", prose(WORDS, 8, seed=n)))) for n in range(3)]
        assert all(results)
        add = lib._indexes.add

        def fail(change: Change) -> None:
            add(change)
            raise MemoryError("no room")

        monkeypatch.setattr(lib._indexes, "add", fail)
        assert await _error(lib.upsert("t", "c", document("d1", "word1 word2")))
        assert await ask(lib) == before
    assert await _reopened(tmp_path) == before


async def test_writes_while_it_is_loaded(tmp_path, monkeypatch) -> None:
    async with library(tmp_path) as lib:
        await fill(lib, range(12))
        await ask(lib)
    built, go_on = threading.Event(), threading.Event()
    async with library(tmp_path) as lib:
        build = lib._indexes._build

        def slow(collection: Collection) -> object:
            loaded = build(collection)
            built.set()
            assert go_on.wait(10)
            return loaded

        monkeypatch.setattr(lib._indexes, "_build", slow)
        search = asyncio.create_task(ask(lib))
        await asyncio.to_thread(built.wait)
        await lib.upsert("t", "c", document("d99", "word1 word2"))
        await lib.delete_documents("t", "c", ["d1", "d2"])
        go_on.set()
        await search
        after = await ask(lib)
    assert after == pytest.approx(expected(tmp_path), abs=1e-6)


@pytest.mark.parametrize(("work", "flat_until"), [("rebuilding", 4), ("saving", 4), ("saving", 100)])
async def test_searches_go_on_beside_long_work_of_the_writer(tmp_path, monkeypatch, work: str, flat_until: int) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def held(function):
        def slow(*args):
            begun.set()
            assert go_on.wait(20)
            return function(*args)

        return slow

    monkeypatch.setattr(indexes, "AutoIndex", partial(AutoIndex, flat_until=flat_until))
    async with library(tmp_path) as lib:
        await fill(lib, range(12))
        before = await ask(lib)
        if work == "saving":
            monkeypatch.setattr(indexes, "LEAST_CHANGES", 1)
            monkeypatch.setattr(snapshot, "write", held(snapshot.write))
        else:
            monkeypatch.setattr(hnsw, "MAX_WEAR", -1)
            monkeypatch.setattr(hnsw.HnswIndex, "_built_over", held(hnsw.HnswIndex._built_over))
        change = asyncio.create_task(lib.delete_documents("t", "c", ["d1"]))
        assert await asyncio.to_thread(begun.wait, 10)
        try:
            async with asyncio.timeout(5):
                for _ in range(3):
                    assert await ask(lib) == {name: before[name] for name in before.keys() - {"d1"}}
        finally:
            go_on.set()
        assert await change == 1


async def _error(call) -> BaseException | None:
    try:
        await call
    except Exception as error:
        return error
    return None


async def _reopened(directory: Path) -> dict[str, float]:
    async with library(directory) as lib:
        return await ask(lib)
