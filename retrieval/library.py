"""A server's documents: the collections of all tenants, from upload to search."""

import asyncio
import logging
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Self

from tokenizers import Tokenizer

from millrace.retrieval import catalog, documents
from millrace.retrieval.catalog import Collection
from millrace.retrieval.database import Database, transaction
from millrace.retrieval.documents import Change, NewDocument, VectorMissing
from millrace.retrieval.embedding import Embedder
from millrace.retrieval.indexes import Indexes
from millrace.retrieval.parsing.parser import Parser as DocumentParser
from millrace.retrieval.passages import embed_passages
from millrace.retrieval.preparation import Parser, Preparation
from millrace.retrieval.renewal import Renewal
from millrace.retrieval.retriever import Retriever
from millrace.retrieval.turns import Turns
from millrace.retrieval.types import (
    Chunk,
    CollectionInfo,
    Document,
    SearchRequest,
    SearchResult,
    StoredDocument,
    Upserted,
    UpsertStatus,
)
from millrace.server.config import RetrievalConfig
from millrace.server.types import EmbedderInfo

log = logging.getLogger(__name__)


class Library:
    """Belongs to one event loop. Every method raises Draining once it is closed, Unavailable if the disk is full."""

    def __init__(
        self,
        max_chunks: int,
        database: Database,
        indexes: Indexes,
        embedder: Embedder,
        parser: Parser,
        preparation: Preparation,
    ):
        self._max_chunks = max_chunks
        self._database, self._indexes = database, indexes
        self._embedder, self._parser, self._preparation = embedder, parser, preparation
        self._renewal = Renewal(database, indexes, embedder, preparation)
        self._retriever = Retriever(database, indexes, embedder, on_outdated=self._renewal.request)
        self._turns = Turns()
        self._tasks = {asyncio.create_task(self._renewal.run())}
        self._saving: set[int] = set()  # ids of collections

    @classmethod
    async def open(
        cls,
        config: RetrievalConfig,
        embedder: Embedder,
        tokenizer: Tokenizer,
        special_tokens: int,
        parser: Parser | None = None,
    ) -> Self:
        """`tokenizer`: the embedding model's, which adds `special_tokens` to a text. Raises ConfigError."""
        parser = parser or DocumentParser()
        preparation = Preparation(config, parser, tokenizer, special_tokens)
        database = await asyncio.to_thread(Database.open, config.data_dir)
        indexes = Indexes(database, config.data_dir / "indexes")
        await database.write(indexes.clean)
        return cls(config.max_chunks, database, indexes, embedder, parser, preparation)

    async def upsert(self, tenant: str, collection: str, document: Document) -> Upserted:
        """Store a document in place of the one of its id. Returns when it is durable and every search sees it.

        Of two at once the one that came last stays. Nothing of it is stored if this raises UnusableDocument,
        InvalidRequest, QuotaExceeded, Unavailable or as the embedder does, or is cancelled before the very end.
        """
        async with self._turns.of((tenant, collection, document.id)):
            info = self._embedder.info()
            digest = await asyncio.to_thread(self._preparation.digest, document, info)
            same = await self._database.read(
                lambda db: documents.chunks_if_unchanged(db, tenant, collection, document.id, digest)
            )
            if same is not None:
                return Upserted(document.id, UpsertStatus.UNCHANGED, chunks=same, chunks_embedded=0)
            ready, texts = await self._preparation.prepare(document, digest, info)
            return await self._embed_and_store(tenant, collection, info, ready, texts)

    async def delete_documents(self, tenant: str, collection: str, ids: Iterable[str]) -> int:
        """How many were there. Raises CollectionNotFound."""
        count, change = await self._database.write(lambda db: self._delete(db, tenant, collection, ids))
        self._save_later(change.collection)
        return count

    async def get_document(
        self, tenant: str, collection: str, document: str, byte_start: int | None = None, byte_end: int | None = None
    ) -> StoredDocument:
        """With bytes [byte_start, byte_end) of its text; None: from the beginning, to the end, at most 1 MiB.

        Raises CollectionNotFound, DocumentNotFound, and InvalidRequest for a range that cannot be had.
        """
        return await self._database.read(
            lambda db: documents.get(db, tenant, collection, document, byte_start, byte_end)
        )

    async def list_collections(self, tenant: str, after: str = "", limit: int = 100) -> list[CollectionInfo]:
        """By name, those behind `after`."""
        found = await self._database.read(lambda db: catalog.page(db, tenant, after, limit))
        return [
            CollectionInfo(c.name, c.documents, c.chunks, c.model, c.dimensions, self._indexes.kind(c)) for c in found
        ]

    async def delete_collection(self, tenant: str, collection: str) -> int:
        """How many documents were in it. Raises CollectionNotFound."""
        deleted = await self._database.write(lambda db: self._delete_collection(db, tenant, collection))
        return deleted.documents

    async def search(self, tenant: str, request: SearchRequest) -> SearchResult:
        """See Retriever.search."""
        return await self._retriever.search(tenant, request)

    async def surroundings(
        self, tenant: str, collection: str, chunks: Sequence[Chunk], characters: int
    ) -> list[tuple[str, str] | None]:
        """The text before and after each chunk, at most so many characters; None: it is no longer stored.

        Raises CollectionNotFound.
        """
        return await self._database.read(lambda db: documents.surroundings(db, tenant, collection, chunks, characters))

    async def close(self) -> None:
        """Write the images of the indexes and release the data directory. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._parser.close()
        await self._indexes.close()
        await self._database.close()

    async def _embed_and_store(
        self, tenant: str, collection: str, info: EmbedderInfo, ready: NewDocument, texts: Mapping[bytes, str]
    ) -> Upserted:
        """Embed what has no vector yet, once more if it was deleted meanwhile, then store everything at once."""
        vectors: dict[bytes, bytes] = {}
        tokens = 0
        change = None
        while change is None:
            known, before = await self._database.read(
                lambda db: (
                    documents.embedded(db, tenant, collection, ready.id, info.revision),
                    documents.chunks_beside(db, tenant, collection, ready.id),
                )
            )
            if before + len(ready.chunks) > self._max_chunks:
                raise documents.over_quota(tenant, before + len(ready.chunks), self._max_chunks)
            unknown = {c.input for c in ready.chunks if (c.span.id, c.input) not in known} - vectors.keys()
            wanted = sorted(unknown)
            found, spent = await embed_passages(self._embedder, info, [texts[key] for key in wanted], tenant)
            vectors.update(zip(wanted, found, strict=True))
            tokens += spent
            change = await self._database.write(partial(self._store, tenant, collection, info, ready, vectors))
        self._save_later(change.collection)
        status = UpsertStatus.CREATED if change.created else UpsertStatus.UPDATED
        return Upserted(ready.id, status, len(ready.chunks), len(change.added), tokens)

    def _save_later(self, collection: Collection) -> None:
        """Write the image of its index in the background if much has changed."""
        if self._indexes.wants_saving(collection) and collection.id not in self._saving:
            self._saving.add(collection.id)
            task = asyncio.create_task(self._database.write(partial(self._indexes.save, collection=collection)))
            self._tasks.add(task)
            task.add_done_callback(lambda task: self._saved(collection, task))

    def _saved(self, collection: Collection, task: "asyncio.Task[None]") -> None:
        self._saving.discard(collection.id)
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("the image of an index was not written", exc_info=error)

    # On the writer's thread.

    def _store(
        self,
        tenant: str,
        collection: str,
        info: EmbedderInfo,
        ready: NewDocument,
        vectors: Mapping[bytes, bytes],
        db: sqlite3.Connection,
    ) -> Change | None:
        """None, and nothing is stored, if a vector is missing.

        New vectors are in the index before the transaction ends and old ones leave it after, so that a search beside
        it finds the document before or after the change, never none.
        """
        change = None
        try:
            with transaction(db):
                change = documents.replace(db, tenant, collection, info, ready, vectors, self._max_chunks)
                self._indexes.add(change)
        except VectorMissing:
            return None
        except BaseException:
            if change:
                self._indexes.remove(change, change.added)
            raise
        self._indexes.remove(change, change.removed)
        return change

    def _delete(self, db: sqlite3.Connection, tenant: str, collection: str, ids: Iterable[str]) -> tuple[int, Change]:
        with transaction(db):
            count, change = documents.delete(db, tenant, collection, ids)
        self._indexes.remove(change, change.removed)
        return count, change

    def _delete_collection(self, db: sqlite3.Connection, tenant: str, collection: str) -> Collection:
        with transaction(db):
            deleted = catalog.delete_collection(db, tenant, collection)
        self._indexes.drop(deleted)
        return deleted
