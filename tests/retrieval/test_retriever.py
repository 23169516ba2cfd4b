"""Search against a brute-force search over everything that was stored."""

import asyncio
import math

import numpy as np
import pytest
from retrieval_fakes import DIMENSIONS, WordEmbedder, document, library, prose

from millrace.retrieval import lexical
from millrace.retrieval.types import Condition, SearchMode, SearchRequest
from millrace.server.errors import CollectionNotFound, FeatureUnsupported, InvalidRequest, InvalidVector

WORDS = [f"word{n}" for n in range(60)]
COLOURS = ["red", "green", "blue"]


def metadata_of(n: int) -> dict:
    """A bit of every kind; not every document has every key."""
    random = np.random.default_rng(n)
    values = {
        "colour": COLOURS[n % 3],
        "size": float(random.integers(0, 10)),
        "flag": bool(n % 2),
        "tags": tuple(map(str, random.choice(["a", "b", "c", "1"], random.integers(0, 3)))),
        "one": [1.0, True, "1"][n % 3],
    }
    return {key: value for key, value in values.items() if random.random() < 0.8}


def passes(metadata: dict, condition: Condition) -> bool:
    """What the words of Condition say, once more."""
    if condition.key not in metadata:
        return False
    value = metadata[condition.key]
    if condition.at_least is not None or condition.at_most is not None:
        if not isinstance(value, float):
            return False
        return (
            (-math.inf if condition.at_least is None else condition.at_least)
            <= value
            <= (math.inf if condition.at_most is None else condition.at_most)
        )
    wanted = condition.any_of if condition.equals is None else (condition.equals,)
    values = value if isinstance(value, tuple) else (value,)
    return any(type(a) is type(b) and a == b for a in values for b in wanted)


CONDITIONS = [
    Condition("colour", equals="red"),
    Condition("colour", any_of=("red", "blue", 5.0)),
    Condition("size", at_least=3.0),
    Condition("size", at_least=2.0, at_most=7.0),
    Condition("size", at_most=math.inf),
    Condition("flag", equals=True),
    Condition("flag", equals=False),
    Condition("flag", equals=1.0),  # no boolean is a number
    Condition("tags", equals="a"),
    Condition("tags", any_of=("b", "c")),
    Condition("one", equals=1.0),
    Condition("one", equals=True),
    Condition("one", equals="1"),
    Condition("one", at_least=0.0),
    Condition("absent", equals="red"),
]


@pytest.mark.parametrize("mode", SearchMode)
async def test_against_brute_force(tmp_path, mode: SearchMode) -> None:
    """Vectors: the nearest of all that pass. Words: all that pass and have one of the words, by our own BM25."""
    embedder = WordEmbedder()
    documents = {f"d{n}": (prose(WORDS, 12, seed=n), metadata_of(n)) for n in range(90)}
    random = np.random.default_rng(1)
    async with library(tmp_path, embedder) as lib:
        for name, (text, metadata) in documents.items():
            await lib.upsert("t", "c", document(name, text, metadata=metadata))
        for trial in range(60):
            question = " ".join(random.choice(WORDS, 3))
            conditions = tuple(random.choice(CONDITIONS, random.integers(0, 3)))
            request = SearchRequest("c", question, top_k=10, candidates=90, filter=conditions, mode=mode)
            result = await lib.search("t", request)
            allowed = {
                name for name, (_, metadata) in documents.items() if all(passes(metadata, c) for c in conditions)
            }
            texts = {name: documents[name][0] for name in allowed}
            by_vector = nearest(embedder, question, texts)
            by_words = {name for name, text in texts.items() if words_of(text) & set(question.split())}
            hits = [hit.chunk.document_id for hit in result.hits]
            match mode:
                case SearchMode.VECTOR:
                    assert hits == by_vector[:10], trial
                    assert all(hit.lexical is None and hit.vector.score == hit.score for hit in result.hits)
                case SearchMode.LEXICAL:
                    assert set(hits) <= by_words
                    assert len(hits) == min(10, len(by_words))
                    assert all(hit.vector is None and hit.lexical.score == hit.score for hit in result.hits)
                case SearchMode.HYBRID:
                    assert set(hits) <= allowed
                    assert len(hits) == min(10, len(allowed))
                    for hit in result.hits:
                        ranks = [stage.rank for stage in (hit.lexical, hit.vector) if stage]
                        assert hit.score == pytest.approx(sum(1 / (5 + rank) for rank in ranks))
                        assert hit.vector.rank == by_vector.index(hit.chunk.document_id) + 1
                        assert (hit.lexical is not None) == (hit.chunk.document_id in by_words)
            scores = [hit.score for hit in result.hits]
            assert scores == sorted(scores, reverse=True)


def words_of(text: str) -> set[str]:
    return set(text.replace(".", "").split())


def nearest(embedder: WordEmbedder, question: str, texts: dict[str, str]) -> list[str]:
    def unit(text: str) -> np.ndarray:
        vector = embedder.vector(text).astype(np.float64)
        return vector / np.linalg.norm(vector)

    query = unit(question)
    return sorted(texts, key=lambda name: -float(unit(texts[name]) @ query))


async def test_provenance_and_timings(tmp_path) -> None:
    text = "Parcels leave on Monday. Naïve letters leave later."
    async with library(tmp_path) as lib:
        stored = document("d", text, source="shop/shipping.txt", title="Shipping", metadata={"n": 3})
        await lib.upsert("t", "c", stored)
        result = await lib.search("t", SearchRequest("c", "when do parcels leave"))
    (hit,) = result.hits
    assert (hit.chunk.document_id, hit.chunk.source, hit.chunk.title) == ("d", "shop/shipping.txt", "Shipping")
    assert hit.chunk.text.encode() == text.encode()[hit.chunk.byte_start : hit.chunk.byte_end]
    assert hit.chunk.metadata == {"n": 3.0}
    assert (hit.lexical.rank, hit.vector.rank) == (1, 1)
    assert result.embedding_tokens == 4
    assert min(result.timings.embed_us, result.timings.lexical_us, result.timings.vector_us) > 0
    assert result.timings.total_us >= max(result.timings.embed_us, result.timings.lexical_us)


async def test_words_of_title_are_found(tmp_path) -> None:
    async with library(tmp_path) as lib:
        await lib.upsert("t", "c", document("d", "Nothing of it here.", title="Warranty"))
        await lib.upsert("t", "c", document("e", "Something else altogether."))
        result = await lib.search("t", SearchRequest("c", "warranty", mode=SearchMode.LEXICAL))
    assert [hit.chunk.document_id for hit in result.hits] == ["d"]


async def test_by_vector(tmp_path) -> None:
    embedder = WordEmbedder()
    async with library(tmp_path, embedder) as lib:
        for name in WORDS[:5]:
            await lib.upsert("t", "c", document(name, name))
        embedder.texts.clear()
        vector = embedder.vector(WORDS[3]).astype("<f4").tobytes()
        result = await lib.search("t", SearchRequest("c", vector=vector))
        assert result.hits[0].chunk.document_id == WORDS[3]
        assert result.hits[0].score == pytest.approx(1)
        assert embedder.texts == []
        zeros, short = np.zeros(DIMENSIONS, "<f4"), np.ones(DIMENSIONS - 1, "<f4")
        nan = np.full(DIMENSIONS, np.nan, "<f4")
        for wrong in (zeros.tobytes(), short.tobytes(), nan.tobytes(), b"", b"\1" * 63):
            with pytest.raises(InvalidVector):
                await lib.search("t", SearchRequest("c", vector=wrong))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": "x", "top_k": 0}, "top_k"),
        ({"text": "x", "top_k": 21}, "top_k"),
        ({}, "query"),
        ({"text": "x", "vector": b"1234"}, "query"),
        ({"vector": b"1234", "mode": SearchMode.LEXICAL}, "mode"),
        ({"text": "x", "filter": (Condition("k"),)}, "filter[0]"),
        ({"text": "x", "filter": (Condition("k", equals="a"), Condition("k", equals="a", at_least=1.0))}, "filter[1]"),
        ({"text": "x", "filter": (Condition("k", at_least=math.nan),)}, "filter[0].range"),
        ({"text": "x", "filter": (Condition("k", equals=math.nan),)}, "filter[0]"),
    ],
)
async def test_bad_requests(tmp_path, fields: dict, field: str) -> None:
    async with library(tmp_path) as lib:
        await lib.upsert("t", "c", document("d", "text"))
        with pytest.raises(InvalidRequest) as caught:
            await lib.search("t", SearchRequest("c", **fields))
        assert [violation.field for violation in caught.value.violations] == [field]


async def test_many_values_in_a_filter(tmp_path) -> None:
    async with library(tmp_path) as lib:
        await lib.upsert("t", "c", document("d", "text", metadata={"k": "v1999"}))
        many = tuple(Condition("k", any_of=tuple(f"v{n}" for n in range(2000))) for _ in range(16))
        assert len((await lib.search("t", SearchRequest("c", "text", filter=many))).hits) == 1


async def test_words_need_no_embedder(tmp_path) -> None:
    embedder = WordEmbedder()
    async with library(tmp_path, embedder) as lib:
        await lib.upsert("t", "c", document("d", "parcels leave"))
        embedder.fault = FeatureUnsupported("nothing embeds here")
        result = await lib.search("t", SearchRequest("c", "parcels", mode=SearchMode.LEXICAL))
        assert len(result.hits) == 1
        with pytest.raises(FeatureUnsupported):
            await lib.search("t", SearchRequest("c", "parcels"))


async def test_a_tenant_sees_no_other(tmp_path) -> None:
    """Nor can it tell another's collection from one that does not exist."""
    async with library(tmp_path) as lib:
        await lib.upsert("acme", "theirs", document("d", "secret plans"))
        await lib.upsert("other", "mine", document("d", "my plans"))
        for name in ("theirs", "nothing"):
            for call in (
                lib.search("other", SearchRequest(name, "plans")),
                lib.get_document("other", name, "d"),
                lib.delete_documents("other", name, ["d"]),
                lib.delete_collection("other", name),
            ):
                with pytest.raises(CollectionNotFound) as caught:
                    await call
                expected = f"collection {name!r} does not exist; it comes into being with its first document"
                assert str(caught.value) == expected
        assert [c.name for c in await lib.list_collections("other")] == ["mine"]


async def test_word_statistics_are_a_tenants_own(tmp_path) -> None:
    """What others store changes no score of ours."""
    async with library(tmp_path) as lib:
        for n in range(4):
            await lib.upsert("acme", "c", document(f"d{n}", f"parcels {WORDS[n]} letters" if n else "rare words"))
        request = SearchRequest("c", "rare parcels", mode=SearchMode.LEXICAL)
        before = await lib.search("acme", request)
        for n in range(30):
            await lib.upsert("other", "c", document(f"d{n}", "rare rare rare"))
        assert (await lib.search("acme", request)).hits == before.hits


async def test_a_document_is_found_while_it_is_replaced(tmp_path) -> None:
    """Searches beside replacements find it before or after, never not at all."""
    async with library(tmp_path) as lib:
        await lib.upsert("t", "c", document("d", "parcels 0"))
        await lib.upsert("t", "c", document("e", "letters"))
        stop = asyncio.Event()

        async def replace() -> None:
            for n in range(60):
                await lib.upsert("t", "c", document("d", f"parcels {n + 1}"))
            stop.set()

        writer = asyncio.create_task(replace())
        searches = 0
        while not stop.is_set():
            for mode in SearchMode:
                result = await lib.search("t", SearchRequest("c", "parcels", top_k=1, candidates=2, mode=mode))
                assert [hit.chunk.document_id for hit in result.hits] == ["d"]
                searches += 1
        await writer
        assert searches > 10


async def test_cancelling_a_search_cancels_its_embedding(tmp_path) -> None:
    embedder = WordEmbedder()
    async with library(tmp_path, embedder) as lib:
        await lib.upsert("t", "c", document("d", "parcels"))
        embedder.gate.clear()
        before = asyncio.all_tasks()
        search = asyncio.create_task(lib.search("t", SearchRequest("c", "parcels")))
        await asyncio.sleep(0.05)
        assert not search.done()
        search.cancel()
        with pytest.raises(asyncio.CancelledError):
            await search
        assert asyncio.all_tasks() == before


async def test_a_failure_beside_the_embedding_ends_it(tmp_path, monkeypatch) -> None:
    embedder = WordEmbedder()
    async with library(tmp_path, embedder) as lib:
        await lib.upsert("t", "c", document("d", "parcels"))
        monkeypatch.setattr(lexical, "search", lambda *_: 1 / 0)
        embedder.gate.clear()
        async with asyncio.timeout(5):
            with pytest.raises(ZeroDivisionError):
                await lib.search("t", SearchRequest("c", "parcels"))


async def test_a_collection_deleted_during_the_search(tmp_path, monkeypatch) -> None:
    async with library(tmp_path) as lib:
        index = lib._retriever._index

        async def deleting(collection):
            found = await index(collection)
            await lib.delete_collection("t", "c")
            return found

        monkeypatch.setattr(lib._retriever, "_index", deleting)
        for again in (False, True):
            await lib.upsert("t", "c", document("d", "parcels"))
            if again:
                monkeypatch.undo()
                monkeypatch.setattr(lib._embedder, "embed", _deleting_first(lib))
            with pytest.raises(CollectionNotFound):
                await lib.search("t", SearchRequest("c", "parcels"))


def _deleting_first(lib):
    embed = lib._embedder.embed

    async def deleting(*args, **kwargs):
        embedded = await embed(*args, **kwargs)
        await asyncio.sleep(0.05)  # the lexical stage has answered
        await lib.delete_collection("t", "c")
        return embedded

    return deleting
