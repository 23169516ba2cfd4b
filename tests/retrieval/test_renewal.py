"""Another embedding model: what is stored is embedded again, and nobody gets a mixture."""

import asyncio

import pytest
from retrieval_audit import audit
from retrieval_fakes import WordEmbedder, document, library, prose

from millrace.retrieval.types import SearchMode, SearchRequest
from millrace.server.errors import ModelLoading, Unavailable

WORDS = [f"word{n}" for n in range(100)]
OLD, NEW = ("old", 16), ("new", 24)


async def fill(directory, embedder: WordEmbedder, count: int = 70) -> None:
    async with library(directory, embedder) as lib:
        for n in range(count):
            await lib.upsert("t", "c", document(f"d{n}", prose(WORDS, 8, seed=n), title=f"title {n}"))
        await lib.search("t", SearchRequest("c", "word1"))


async def until_searchable(lib) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await lib.search("t", SearchRequest("c", "word1"))
                return
            except Unavailable:
                await asyncio.sleep(0.01)


async def test_at_the_next_start(tmp_path) -> None:
    await fill(tmp_path, WordEmbedder(*OLD))
    embedder = WordEmbedder(*NEW)
    embedder.gate.clear()
    async with library(tmp_path, embedder) as lib:
        for _ in range(2):
            with pytest.raises(Unavailable, match="embedded again") as caught:
                await lib.search("t", SearchRequest("c", "word1"))
            assert caught.value.retry_after
            await asyncio.sleep(0.05)
        words = await lib.search("t", SearchRequest("c", "word1", mode=SearchMode.LEXICAL))
        assert words.hits
        embedder.gate.set()
        await until_searchable(lib)
        (info,) = await lib.list_collections("t")
        assert (info.embedding_model, info.dimensions) == NEW
        text = prose(WORDS, 8, seed=3)
        best = (await lib.search("t", SearchRequest("c", f"title 3 {text}", mode=SearchMode.VECTOR))).hits[0]
        assert (best.chunk.document_id, best.score) == ("d3", pytest.approx(1))
        assert sorted(embedder.texts[:70]) == sorted(f"title {n}\n\n{prose(WORDS, 8, seed=n)}" for n in range(70))
    assert len(audit(tmp_path, embedder)) == 70


async def test_interrupted_it_goes_on(tmp_path) -> None:
    await fill(tmp_path, WordEmbedder(*OLD))
    embedded = []
    for start in range(15):
        embedder = WordEmbedder(*NEW)
        async with library(tmp_path, embedder) as lib:
            await asyncio.sleep(0.002 * start)
            if start == 14:
                await until_searchable(lib)
        embedded.append(len(embedder.texts))
    assert embedded[0] < 70 <= sum(embedded)
    audit(tmp_path, WordEmbedder(*NEW))


async def test_uploads_and_deletions_beside_it(tmp_path) -> None:
    await fill(tmp_path, WordEmbedder(*OLD))
    embedder = WordEmbedder(*NEW)
    async with library(tmp_path, embedder) as lib:
        for n in range(0, 60, 3):
            await lib.upsert("t", "c", document(f"d{n}", prose(WORDS, 9, seed=n), title=f"title {n}"))
            await lib.delete_documents("t", "c", [f"d{n + 1}"])
        await until_searchable(lib)
        request = SearchRequest("c", "word1", top_k=100, candidates=100, mode=SearchMode.VECTOR)
        assert len((await lib.search("t", request)).hits) == 50
    assert len(audit(tmp_path, embedder)) == 50


async def test_a_collection_deleted_meanwhile(tmp_path) -> None:
    await fill(tmp_path, WordEmbedder(*OLD))
    embedder = WordEmbedder(*NEW)
    embedder.gate.clear()
    async with library(tmp_path, embedder) as lib:
        await asyncio.sleep(0.05)
        await lib.delete_collection("t", "c")
        embedder.gate.set()
        await lib.upsert("t", "c", document("d", "word1"))
        await until_searchable(lib)
    assert len(audit(tmp_path, embedder)) == 1


async def test_a_model_that_comes_late(tmp_path) -> None:
    await fill(tmp_path, WordEmbedder(*OLD))
    embedder = WordEmbedder(*NEW)
    embedder.fault = ModelLoading("not yet", retry_after=0.02)
    async with library(tmp_path, embedder) as lib:
        await asyncio.sleep(0.1)
        with pytest.raises(ModelLoading):
            await lib.search("t", SearchRequest("c", "word1"))
        embedder.fault = None
        async with asyncio.timeout(10):
            while (await lib.list_collections("t"))[0].embedding_model != "new":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await until_searchable(lib)
    audit(tmp_path, embedder)


async def test_a_model_that_changes_while_serving(tmp_path) -> None:
    """There and back again; the first search notices, and so does an upload."""
    embedder = WordEmbedder(*OLD)
    old, new = embedder.described, WordEmbedder(*NEW).described
    async with library(tmp_path, embedder) as lib:
        for n in range(40):
            await lib.upsert("t", "c", document(f"d{n}", prose(WORDS, 8, seed=n)))
        for described in (new, old, new):
            embedder.described = described
            with pytest.raises(Unavailable):
                await lib.search("t", SearchRequest("c", "word1"))
            await until_searchable(lib)
        embedder.described = old
        await lib.upsert("t", "c", document("e", "word1"))
        await until_searchable(lib)
        assert len((await lib.search("t", SearchRequest("c", "word1", top_k=50, candidates=50))).hits) == 41
    audit(tmp_path, embedder)


async def test_uploads_with_one_model_and_another(tmp_path) -> None:
    """An index of the first model must not pass for whole when that model is back."""
    embedder = WordEmbedder(*OLD)
    old, new = embedder.described, WordEmbedder(*NEW).described
    async with library(tmp_path, embedder) as lib:
        await lib.upsert("t", "c", document("a", "word1"))
        await until_searchable(lib)
        for described, name in ((new, "b"), (old, "e")):
            embedder.described = described
            await lib.upsert("t", "c", document(name, "word1"))
        await until_searchable(lib)
        request = SearchRequest("c", "word1", mode=SearchMode.VECTOR)
        assert len((await lib.search("t", request)).hits) == 3
    audit(tmp_path, embedder)


async def test_a_model_that_changes_during_an_upload(tmp_path) -> None:
    embedder = WordEmbedder(*OLD)
    async with library(tmp_path, embedder) as lib:
        embedder.gate.clear()
        upload = asyncio.create_task(lib.upsert("t", "c", document("d", "word1")))
        await asyncio.sleep(0.05)
        embedder.described = WordEmbedder("other", 16).described
        embedder.gate.set()
        with pytest.raises(Unavailable, match="exchanged"):
            await upload
        assert await lib.list_collections("t") == []


async def test_an_upload_renews_its_document_at_once(tmp_path) -> None:
    await fill(tmp_path, WordEmbedder(*OLD), 2)
    embedder = WordEmbedder(*NEW)
    async with library(tmp_path, embedder) as lib:
        for task in lib._tasks:
            task.cancel()
        done = [
            await lib.upsert("t", "c", document(f"d{n}", prose(WORDS, 8, seed=n), title=f"title {n}")) for n in range(2)
        ]
        assert [result.chunks_embedded for result in done] == [1, 1]
    audit(tmp_path, embedder)
