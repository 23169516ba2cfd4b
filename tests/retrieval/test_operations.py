"""Random operations by three tenants against a dict: never a foreign chunk, always exactly what should be visible."""

import asyncio
from dataclasses import dataclass, field

import numpy as np
import pytest
from retrieval_audit import audit
from retrieval_fakes import WordEmbedder, document, open_library

from millrace.retrieval import indexes
from millrace.retrieval.library import Library
from millrace.retrieval.types import Condition, SearchMode, SearchRequest, UpsertStatus
from millrace.server.errors import CollectionNotFound, DocumentNotFound

TENANTS = ("acme", "other", "third")
COLLECTIONS = ("manuals", "notes")  # of the same name with every tenant
NAMES = [f"d{n}" for n in range(8)]  # as are their documents
WORDS = [f"word{n}" for n in range(40)]
COLOURS = ("red", "green", "blue")
WEIGHTS = {"upsert": 40, "metadata": 10, "delete": 12, "delete collection": 2, "query": 30, "read": 5, "reopen": 1}
EVERYTHING = 1000


@dataclass
class World:
    """The library, and what it should hold: (tenant, collection) -> document -> (text, colour, size)."""

    directory: object
    random: np.random.Generator
    library: Library | None = None
    embedder: WordEmbedder = field(default_factory=WordEmbedder)
    model: dict[tuple[str, str], dict[str, tuple[str, str, float]]] = field(default_factory=dict)

    async def open(self) -> None:
        self.library = await open_library(self.directory, self.embedder, chunk_overlap=2)

    async def step(self) -> None:
        kinds, weights = list(WEIGHTS), np.array(list(WEIGHTS.values()), float)
        kind = str(self.random.choice(kinds, p=weights / weights.sum()))
        tenant, collection = str(self.random.choice(TENANTS)), str(self.random.choice(COLLECTIONS))
        name = str(self.random.choice(NAMES))
        match kind:
            case "upsert":
                await self.upsert(tenant, collection, name, self.text(tenant))
            case "metadata":
                old = self.model.get((tenant, collection), {}).get(name)
                await self.upsert(tenant, collection, name, old[0] if old else self.text(tenant))
            case "delete":
                await self.delete(tenant, collection, name)
            case "delete collection":
                await self.delete_collection(tenant, collection)
            case "query":
                await self.query(tenant, collection)
            case "read":
                await self.read(tenant, collection, name)
            case "reopen":
                await self.library.close()
                await self.open()

    def text(self, tenant: str) -> str:
        """Words that everybody has, one that only the tenant has, and one that nobody had before."""
        words = [str(word) for word in self.random.choice(WORDS, self.random.integers(1, 100))]
        return " ".join([f"of{tenant}", f"unique{self.random.integers(1 << 40)}", *words])

    async def upsert(self, tenant: str, collection: str, name: str, text: str) -> None:
        held = self.model.setdefault((tenant, collection), {})
        new = text, str(self.random.choice(COLOURS)), float(self.random.integers(0, 5))
        metadata = {"colour": new[1], "size": new[2], "tags": (new[1], tenant)}
        done = await self.library.upsert(tenant, collection, document(name, text, metadata=metadata))
        expected = UpsertStatus.CREATED if name not in held else UpsertStatus.UPDATED
        assert done.status is (UpsertStatus.UNCHANGED if held.get(name) == new else expected)
        if name in held and held[name][0] == text:
            assert done.chunks_embedded == 0
        held[name] = new

    async def delete(self, tenant: str, collection: str, name: str) -> None:
        held = self.model.get((tenant, collection))
        if held is None:
            await self.absent(self.library.delete_documents(tenant, collection, [name]))
        else:
            assert await self.library.delete_documents(tenant, collection, [name]) == (held.pop(name, None) is not None)

    async def delete_collection(self, tenant: str, collection: str) -> None:
        held = self.model.pop((tenant, collection), None)
        if held is None:
            await self.absent(self.library.delete_collection(tenant, collection))
        else:
            assert await self.library.delete_collection(tenant, collection) == len(held)

    async def read(self, tenant: str, collection: str, name: str) -> None:
        held = self.model.get((tenant, collection), {}).get(name)
        if held is None:
            with pytest.raises((CollectionNotFound, DocumentNotFound)):
                await self.library.get_document(tenant, collection, name)
        else:
            found = await self.library.get_document(tenant, collection, name)
            assert (found.text, found.metadata["colour"], found.metadata["size"]) == held
        listed = await self.library.list_collections(tenant)
        assert {c.name: c.documents for c in listed} == {
            name: len(documents) for (of, name), documents in self.model.items() if of == tenant
        }

    async def query(self, tenant: str, collection: str) -> None:
        held = self.model.get((tenant, collection))
        word = str(self.random.choice([*WORDS, "ofacme", "ofother", "ofthird"]))
        colour, size = str(self.random.choice(COLOURS)), float(self.random.integers(0, 5))
        filters = {
            (): lambda d: True,
            (Condition("colour", equals=colour),): lambda d: d[1] == colour,
            (Condition("size", at_least=size), Condition("tags", any_of=(colour,))): lambda d: (
                d[1] == colour and d[2] >= size
            ),
        }
        filter_ = list(filters)[self.random.integers(len(filters))]
        mode = list(SearchMode)[self.random.integers(3)]
        request = SearchRequest(collection, word, None, EVERYTHING, EVERYTHING, filter_, mode)
        if held is None:
            await self.absent(self.library.search(tenant, request))
            return
        hits = (await self.library.search(tenant, request)).hits
        visible = {name: d[0] for name, d in held.items() if filters[filter_](d)}
        for hit in hits:
            assert hit.chunk.text in visible[hit.chunk.document_id]
        expected = {name for name, text in visible.items() if mode is not SearchMode.LEXICAL or word in text.split()}
        assert {hit.chunk.document_id for hit in hits} == expected

    async def absent(self, call) -> None:
        with pytest.raises(CollectionNotFound):
            await call


async def run(directory, operations: int, seed: int, monkeypatch) -> None:
    monkeypatch.setattr(indexes, "LEAST_CHANGES", 30)
    world = World(directory, np.random.default_rng(seed))
    await world.open()
    try:
        for _ in range(operations):
            await world.step()
    finally:
        await world.library.close()
    stored = {key: (text, metadata["colour"], metadata["size"]) for key, (text, metadata) in audit(directory).items()}
    assert stored == {(*key, name): d for key, held in world.model.items() for name, d in held.items()}


async def test_a_few(tmp_path, monkeypatch) -> None:
    await run(tmp_path, 1500, 1, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_twenty_thousand(tmp_path, monkeypatch) -> None:
    await run(tmp_path, 20_000, 2, monkeypatch)


async def test_three_tenants_at_once(tmp_path) -> None:
    """All in parallel: errors are typed, and what anybody finds is their own."""
    random = np.random.default_rng(3)
    world = World(tmp_path, random)
    await world.open()

    async def tenant_at_work(tenant: str) -> None:
        for _ in range(80):
            collection, name = str(random.choice(COLLECTIONS)), str(random.choice(NAMES))
            kind = random.integers(8)
            try:
                if kind < 4:
                    await world.library.upsert(tenant, collection, document(name, world.text(tenant)))
                elif kind == 4:
                    await world.library.delete_documents(tenant, collection, [name])
                elif kind == 5 and random.random() < 0.3:
                    await world.library.delete_collection(tenant, collection)
                else:
                    request = SearchRequest(collection, "word1 ofacme ofother ofthird", top_k=20)
                    for hit in (await world.library.search(tenant, request)).hits:
                        assert not any(f"of{other}" in hit.chunk.text for other in TENANTS if other != tenant)
            except CollectionNotFound:
                pass

    await asyncio.gather(*(tenant_at_work(tenant) for tenant in TENANTS for _ in range(3)))
    await world.library.close()
    for (tenant, _, _), (text, _) in audit(tmp_path).items():
        assert f"of{tenant}" in text
