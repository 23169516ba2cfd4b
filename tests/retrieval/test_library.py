"""Documents in, replaced, deleted; and what happens when two things happen at once."""

import asyncio
import dataclasses
import math

import pytest
from retrieval_audit import audit
from retrieval_fakes import (
    SPECIAL_TOKENS,
    WordEmbedder,
    document,
    library,
    open_library,
    prose,
    settings,
    word_tokenizer,
)

from millrace.retrieval.library import Library
from millrace.retrieval.types import (
    CollectionInfo,
    Condition,
    Document,
    MediaType,
    SearchMode,
    SearchRequest,
    UpsertStatus,
)
from millrace.server.errors import (
    CollectionNotFound,
    ConfigError,
    DocumentNotFound,
    Draining,
    EmptyDocument,
    InternalError,
    InvalidRequest,
    ModelLoading,
    QuotaExceeded,
    Unavailable,
    UnknownDocumentType,
)

WORDS = [f"word{n}" for n in range(200)]


async def labels(lib, collection: str = "c") -> set[int]:
    hits = (await lib.search("t", SearchRequest(collection, "word1", top_k=100, candidates=100))).hits
    return {hit.chunk.label for hit in hits}


async def test_what_goes_in_comes_out(tmp_path) -> None:
    metadata = {"n": 1, "s": "x", "b": False, "l": ("p", "q", "p")}
    async with library(tmp_path) as lib:
        text = prose(WORDS, 150)
        done = await lib.upsert("t", "c", document("d", text, metadata=metadata))
        assert (done.status, done.chunks) == (UpsertStatus.CREATED, done.chunks_embedded)
        assert done.chunks > 2
        assert done.embedding_tokens > 150
        stored = await lib.get_document("t", "c", "d")
        assert (stored.text, stored.text_size, stored.byte_start, stored.chunks) == (text, len(text), 0, done.chunks)
        assert stored.metadata == {"n": 1.0, "s": "x", "b": False, "l": ("p", "q", "p")}
        assert stored.metadata["b"] is False
        assert (stored.source, stored.title) == ("d", "d")
        assert await lib.list_collections("t") == [CollectionInfo("c", 1, done.chunks, "words", 16, "flat")]
    assert audit(tmp_path) == {("t", "c", "d"): (text, dict(stored.metadata))}


async def test_unchanged_documents_cost_nothing(tmp_path) -> None:
    embedder = WordEmbedder()
    first = document("d", prose(WORDS, 100), metadata={"a": "1", "b": 2})
    same = dataclasses.replace(first, metadata={"b": 2.0, "a": "1"})
    async with library(tmp_path, embedder) as lib:
        done = await lib.upsert("t", "c", first)
        embedder.texts.clear()
        again = await lib.upsert("t", "c", same)
        assert (again.status, again.chunks, again.chunks_embedded) == (UpsertStatus.UNCHANGED, done.chunks, 0)
    async with library(tmp_path, embedder) as lib:
        assert (await lib.upsert("t", "c", first)).status is UpsertStatus.UNCHANGED
        changes = [{"metadata": {"a": "1"}}, {"source": "elsewhere"}, {"title": "title"}, {"content": b"word1"}]
        for change in changes:
            first = dataclasses.replace(first, **change)
            assert (await lib.upsert("t", "c", first)).status is UpsertStatus.UPDATED
    async with library(tmp_path, embedder, chunk_tokens=64) as lib:
        assert (await lib.upsert("t", "c", first)).status is UpsertStatus.UPDATED


async def test_metadata_alone_embeds_nothing(tmp_path) -> None:
    embedder = WordEmbedder()
    text = prose(WORDS, 100)
    async with library(tmp_path, embedder) as lib:
        done = await lib.upsert("t", "c", document("d", text, metadata={"colour": "red", "old": "x"}))
        before = await labels(lib)
        embedder.texts.clear()
        again = await lib.upsert("t", "c", document("d", text, metadata={"colour": "blue"}))
        assert (again.status, again.chunks_embedded) == (UpsertStatus.UPDATED, 0)
        assert embedder.texts == []
        for value, expected in (("red", 0), ("blue", done.chunks)):
            request = SearchRequest("c", "word1", top_k=20, filter=(Condition("colour", equals=value),))
            assert len((await lib.search("t", request)).hits) == expected
        assert await labels(lib) == before
    audit(tmp_path)


async def test_chunks_that_stay_keep_label_and_vector(tmp_path) -> None:
    embedder = WordEmbedder()
    head, tail = prose(WORDS, 120, seed=1), prose(WORDS, 60, seed=2)
    async with library(tmp_path, embedder, chunk_overlap=0) as lib:
        await lib.upsert("t", "c", document("d", head + "\n\n" + tail))
        before = await labels(lib)
        embedder.texts.clear()
        again = await lib.upsert("t", "c", document("d", head + "\n\n" + prose(WORDS, 60, seed=3)))
        after = await labels(lib)
        assert 0 < again.chunks_embedded < again.chunks
        assert len(embedder.texts) == again.chunks_embedded + 1  # and the question
        assert len(before & after) == again.chunks - again.chunks_embedded
        assert min(after - before) > max(before)
    audit(tmp_path)


async def test_moved_chunks_point_to_where_they_are(tmp_path) -> None:
    """Text before them changes; the chunks, their vectors and labels do not."""
    embedder = WordEmbedder()
    paragraphs = [prose(WORDS, 40, seed=n) for n in range(4)]
    async with library(tmp_path, embedder, chunk_overlap=0) as lib:
        await lib.upsert("t", "c", document("d", "\n\n".join(paragraphs)))
        again = await lib.upsert("t", "c", document("d", "\n\n".join(["né " + prose(WORDS, 39, seed=9), *paragraphs])))
        assert again.chunks_embedded < again.chunks
    audit(tmp_path)


async def test_a_new_title_is_searched_and_embedded(tmp_path) -> None:
    embedder = WordEmbedder()
    async with library(tmp_path, embedder) as lib:
        await lib.upsert("t", "c", document("d", "word1 word2", title="Alpha"))
        again = await lib.upsert("t", "c", document("d", "word1 word2", title="Beta"))
        assert again.chunks_embedded == 1
        for word, expected in (("alpha", 0), ("beta", 1)):
            result = await lib.search("t", SearchRequest("c", word, mode=SearchMode.LEXICAL))
            assert len(result.hits) == expected
    audit(tmp_path)


async def test_a_new_title_that_is_not_embedded_is_searched_all_the_same(tmp_path) -> None:
    """It is too long to stand before a full chunk, so the vectors stay."""
    text = prose(WORDS, 300)
    async with library(tmp_path) as lib:
        await lib.upsert("t", "c", document("d", text, title="alpha " * 10))
        again = await lib.upsert("t", "c", document("d", text, title="beta " * 10))
        assert again.chunks_embedded <= 1 < again.chunks
        for word, expected in (("alpha", 0), ("beta", again.chunks)):
            request = SearchRequest("c", word, top_k=20, mode=SearchMode.LEXICAL)
            assert len((await lib.search("t", request)).hits) == expected


async def test_deleting(tmp_path) -> None:
    async with library(tmp_path) as lib:
        for name in ("a", "b", "e"):
            await lib.upsert("t", "c", document(name, f"word1 {name}", metadata={"k": name}))
        assert await lib.delete_documents("t", "c", ["a", "b", "nothing", "a"]) == 2
        assert [hit.chunk.document_id for hit in (await lib.search("t", SearchRequest("c", "word1"))).hits] == ["e"]
        with pytest.raises(DocumentNotFound):
            await lib.get_document("t", "c", "a")
        assert await lib.delete_documents("t", "c", ["e"]) == 1
        assert (await lib.search("t", SearchRequest("c", "word1"))).hits == ()
        assert (await lib.list_collections("t"))[0].documents == 0
        await lib.upsert("t", "c", document("f", "word1"))
        assert await lib.delete_collection("t", "c") == 1
        assert await lib.list_collections("t") == []
        with pytest.raises(CollectionNotFound):
            await lib.search("t", SearchRequest("c", "word1"))
    assert audit(tmp_path) == {}
    assert list((tmp_path / "indexes").iterdir()) == []


async def test_collections_by_name_and_page(tmp_path) -> None:
    async with library(tmp_path) as lib:
        for name in ("b", "a", "C", "d"):
            await lib.upsert("t", name, document("x", "word1"))
        await lib.upsert("u", "aa", document("x", "word1"))
        assert [c.name for c in await lib.list_collections("t")] == ["C", "a", "b", "d"]
        assert [c.name for c in await lib.list_collections("t", "a", 1)] == ["b"]
        assert await lib.list_collections("nobody") == []


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, "aé🙂b"),
        (0, 0, ""),
        (1, 3, "é"),
        (3, None, "🙂b"),
        (None, 7, "aé🙂"),
        (8, None, ""),
        (2, None, "byte_start"),
        (0, 2, "byte_end"),
        (3, 5, "byte_end"),
        (0, 9, "byte_end"),
        (9, None, "byte_start"),
        (3, 1, "byte_end"),
    ],
)
async def test_pieces_of_the_text(tmp_path, start: int | None, end: int | None, expected: str) -> None:
    async with library(tmp_path) as lib:
        await lib.upsert("t", "c", document("d", "aé🙂b"))
        if expected.startswith("byte"):
            with pytest.raises(InvalidRequest) as caught:
                await lib.get_document("t", "c", "d", start, end)
            assert caught.value.violations[0].field == expected
        else:
            found = await lib.get_document("t", "c", "d", start, end)
            assert (found.text, found.byte_start, found.text_size) == (expected, start or 0, 8)


async def test_a_long_text_comes_in_pieces_of_whole_characters(tmp_path) -> None:
    text = "x" + "é" * 600_000  # 1 MiB ends inside a character
    async with library(tmp_path) as lib:
        await lib.upsert("t", "c", document("d", text))
        pieces, at = [], 0
        while at < len(text.encode()):
            pieces.append((await lib.get_document("t", "c", "d", at)).text)
            at += len(pieces[-1].encode())
        assert "".join(pieces) == text
        assert len(pieces[0].encode()) == (1 << 20) - 1
        with pytest.raises(InvalidRequest):
            await lib.get_document("t", "c", "d", 0, (1 << 20) + 1)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (document("d", "  "), EmptyDocument),
        (document("d", "word1", metadata={"k": math.nan}), InvalidRequest),
        (document("d", "word1", metadata={"k": 10**400}), InvalidRequest),
        (document("d", "word1", metadata={"k": None}), InvalidRequest),
        (document("d", "word1", metadata={"k": (1.0,)}), InvalidRequest),
        (document("d", "word1", metadata={"k": "\ud800"}), InvalidRequest),
        (document("d", "word1", title="\ud800"), InvalidRequest),
        (Document("\ud800", b"word1"), InvalidRequest),
    ],
)
async def test_bad_documents_store_nothing(tmp_path, bad: Document, error: type[Exception]) -> None:
    async with library(tmp_path) as lib:
        with pytest.raises(error):
            await lib.upsert("t", "c", bad)
        assert await lib.list_collections("t") == []
        await lib.upsert("t", "c", document("other", "word1"))
    audit(tmp_path)


async def test_quota(tmp_path) -> None:
    async with library(tmp_path, max_chunks=5, chunk_overlap=0) as lib:
        small = await lib.upsert("t", "c", document("a", prose(WORDS, 60)))
        assert small.chunks == 2
        with pytest.raises(QuotaExceeded) as caught:
            await lib.upsert("t", "other", document("b", prose(WORDS, 170)))
        assert caught.value.metadata == {"tenant": "t", "limit": "5", "quota": "max_chunks"}
        assert len(await lib.list_collections("t")) == 1
        await lib.upsert("t", "c", document("a", prose(WORDS, 170, seed=1)))  # instead of the two
        await lib.upsert("u", "c", document("b", prose(WORDS, 170)))
    audit(tmp_path)


async def test_quota_holds_between_uploads_at_once(tmp_path) -> None:
    async with library(tmp_path, max_chunks=5) as lib:
        uploads = [lib.upsert("t", "c", document(f"d{n}", "word1")) for n in range(9)]
        done = await asyncio.gather(*uploads, return_exceptions=True)
        assert sum(isinstance(result, QuotaExceeded) for result in done) == 4
    assert len(audit(tmp_path)) == 5


async def test_no_embedder_no_upload(tmp_path) -> None:
    embedder = WordEmbedder()
    embedder.fault = ModelLoading("wait")
    async with library(tmp_path, embedder) as lib:
        with pytest.raises(ModelLoading):
            await lib.upsert("t", "c", document("d", "word1"))
        embedder.fault = None
        await lib.upsert("t", "c", document("d", "word1"))


async def test_unusable_vectors_are_a_bug_and_not_stored(tmp_path, monkeypatch) -> None:
    embedder = WordEmbedder()
    async with library(tmp_path, embedder) as lib:
        for wrong in (math.nan, 0.0):
            monkeypatch.setattr(embedder, "vector", lambda text, wrong=wrong: WordEmbedder().vector(text) * wrong)
            with pytest.raises(InternalError):
                await lib.upsert("t", "c", document("d", "word1"))
        assert await lib.list_collections("t") == []


async def test_the_last_of_two_uploads_stays(tmp_path) -> None:
    embedder = WordEmbedder()
    async with library(tmp_path, embedder) as lib:
        for _ in range(10):
            embedder.gate.clear()
            uploads = [
                asyncio.create_task(lib.upsert("t", "c", document("d", prose(WORDS, 50 + n, seed=n)))) for n in range(4)
            ]
            await asyncio.sleep(0.01)
            embedder.gate.set()
            await asyncio.gather(*uploads)
            assert (await lib.get_document("t", "c", "d")).text == prose(WORDS, 53, seed=3)
    audit(tmp_path)


async def test_an_upload_beside_the_deletion_of_its_collection(tmp_path) -> None:
    """Chunks that were to keep their vectors are gone by the end: they are embedded after all."""
    embedder = WordEmbedder()
    head = prose(WORDS, 120, seed=1)
    async with library(tmp_path, embedder, chunk_overlap=0) as lib:
        await lib.upsert("t", "c", document("d", head))
        embedder.gate.clear()
        upload = asyncio.create_task(lib.upsert("t", "c", document("d", head + "\n\n" + prose(WORDS, 40, seed=2))))
        await asyncio.sleep(0.1)
        assert await lib.delete_collection("t", "c") == 1
        embedder.gate.set()
        done = await upload
        assert (done.status, done.chunks_embedded) == (UpsertStatus.CREATED, done.chunks)
        found = (await lib.search("t", SearchRequest("c", "word1", top_k=20))).hits
        assert len(found) == done.chunks
    assert len(audit(tmp_path)) == 1


@pytest.mark.parametrize("seed", range(3))
async def test_cancelled_anywhere(tmp_path, seed: int) -> None:
    """Cancelled after so many steps of the loop: all of it is there or nothing, and the next one works."""
    embedder = WordEmbedder()
    async with library(tmp_path, embedder) as lib:
        await lib.upsert("t", "c", document("d", "before"))
        ends = set()
        for steps in range(40):
            text = prose(WORDS, 60, seed=100 * seed + steps)
            upload = asyncio.create_task(lib.upsert("t", "c", document("d", text)))
            for _ in range(steps):
                await asyncio.sleep(0 if seed else 0.0003)
            upload.cancel()
            ended = await asyncio.gather(upload, return_exceptions=True)
            ends.add(type(ended[0]))
            # Through the writer's queue: whatever began has ended.
            await lib.delete_documents("t", "c", ["nothing"])
            stored = (await lib.get_document("t", "c", "d")).text
            found = (await lib.search("t", SearchRequest("c", text, top_k=20))).hits
            assert "".join(sorted({hit.chunk.document_id for hit in found})) == "d"
            assert all(hit.chunk.text in stored for hit in found)
        assert asyncio.CancelledError in ends
    audit(tmp_path)


async def test_cancelled_while_embedding_stores_nothing(tmp_path) -> None:
    embedder = WordEmbedder()
    async with library(tmp_path, embedder) as lib:
        embedder.gate.clear()
        upload = asyncio.create_task(lib.upsert("t", "c", document("d", "word1")))
        await asyncio.sleep(0.05)
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        assert await lib.list_collections("t") == []
        embedder.gate.set()
        assert (await lib.upsert("t", "c", document("d", "word1"))).status is UpsertStatus.CREATED
    audit(tmp_path)


async def test_closed(tmp_path) -> None:
    lib = await open_library(tmp_path)
    await lib.upsert("t", "c", document("d", "word1"))
    await lib.close()
    await lib.close()
    for call in (lib.upsert("t", "c", document("e", "x")), lib.search("t", SearchRequest("c", "x"))):
        with pytest.raises((Draining, Unavailable)):
            await call


async def test_settings_that_leave_no_text_stop_the_start(tmp_path) -> None:
    with pytest.raises(ConfigError):
        await open_library(tmp_path, chunk_tokens=48, chunk_overlap=40)
    async with library(tmp_path):
        pass


async def test_with_the_parser_of_the_server(tmp_path) -> None:
    """Headings of Markdown and the title of HTML are searched; a page of HTML is read in a process of its own."""
    markdown = "# Shop\n\n## Returns\n\nWithin thirty days.\n\n## Postage\n\nFour euros."
    html = "<html><head><title>Warranty</title></head><body><p>Two years.</p><script>x()</script></body></html>"
    config = settings(tmp_path, chunk_tokens=64)
    lib = await Library.open(config, WordEmbedder(), word_tokenizer(), SPECIAL_TOKENS)
    try:
        await lib.upsert("t", "c", document("shop.md", markdown))
        await lib.upsert("t", "c", document("warranty", html, source="https://shop/warranty.html"))
        for question, name in (("postage", "shop.md"), ("warranty", "warranty")):
            result = await lib.search("t", SearchRequest("c", question, mode=SearchMode.LEXICAL))
            assert [hit.chunk.document_id for hit in result.hits] == [name]
        stored = await lib.get_document("t", "c", "warranty")
        assert (stored.title, stored.source, stored.media_type) == (
            "Warranty",
            "https://shop/warranty.html",
            MediaType.HTML,
        )
        assert "x()" not in stored.text
        with pytest.raises(UnknownDocumentType):
            await lib.upsert("t", "c", Document("b", bytes(range(256)) * 8))
    finally:
        await lib.close()


@pytest.mark.parametrize("characters", [1, 2, 3, 7, 1000])
async def test_the_text_around_chunks(tmp_path, characters: int) -> None:
    """Whole characters, however many bytes they have, and none of a document that has changed."""
    text = "".join(f"word{n} é🫖 " for n in range(150))
    async with library(tmp_path) as lib:
        await lib.upsert("t", "c", document("d", text))
        await lib.upsert("t", "c", document("e", prose(WORDS, 20)))
        hits = (await lib.search("t", SearchRequest("c", "word1 word2", top_k=50, candidates=100))).hits
        chunks = [hit.chunk for hit in hits]
        assert {chunk.document_id for chunk in chunks} == {"d", "e"}
        around = await lib.surroundings("t", "c", chunks, characters)
        for chunk, sides in zip(chunks, around, strict=True):
            data = text.encode() if chunk.document_id == "d" else prose(WORDS, 20).encode()
            before, after = data[: chunk.byte_start].decode(), data[chunk.byte_end :].decode()
            assert sides == (before[-characters:], after[:characters])
        await lib.delete_documents("t", "c", ["e"])
        await lib.upsert("t", "c", document("d", "A" + text))
        assert set(await lib.surroundings("t", "c", chunks, characters)) == {None}
        with pytest.raises(CollectionNotFound):
            await lib.surroundings("u", "c", chunks, characters)
