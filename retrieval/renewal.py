"""Embeds again, in the background, what another model embedded, and what was damaged."""

import asyncio
import logging
import sqlite3
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter

from millrace.retrieval import catalog, chunks, documents
from millrace.retrieval.catalog import Collection
from millrace.retrieval.database import Database, transaction
from millrace.retrieval.embedding import Embedder
from millrace.retrieval.indexes import Indexes
from millrace.retrieval.passages import BATCH, embed_passages
from millrace.retrieval.preparation import Preparation, input_of
from millrace.server.errors import CollectionNotFound, FeatureUnsupported, RequestError
from millrace.server.types import EmbedderInfo

log = logging.getLogger(__name__)

PAUSE = 10.0  # seconds after a failure that names no other time


class Renewal:
    """`run` is a task of the library's. What is done is durable batch by batch, so it may end at any time."""

    def __init__(self, database: Database, indexes: Indexes, embedder: Embedder, preparation: Preparation):
        self._database, self._indexes = database, indexes
        self._embedder, self._preparation = embedder, preparation
        self._due = asyncio.Event()
        self._due.set()
        indexes.on_damaged = self.request

    def request(self) -> None:
        """Look for outdated vectors soon."""
        self._due.set()

    async def run(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                await self._renew_all()
            except FeatureUnsupported:
                pass  # nothing embeds here; searches by words go on
            except RequestError as error:
                if not error.retry_after:
                    log.warning("collections wait to be embedded again: %s", error)
                await asyncio.sleep(error.retry_after or PAUSE)
                self._due.set()
            except Exception:
                log.exception("collections wait to be embedded again")
                await asyncio.sleep(PAUSE)
                self._due.set()

    async def _renew_all(self) -> None:
        info = self._embedder.info()
        for collection in await self._database.read(catalog.every_collection):
            try:
                await self._renew(collection, info)
            except CollectionNotFound:
                continue

    async def _renew(self, collection: Collection, info: EmbedderInfo) -> None:
        if collection.revision != info.revision:
            log.info("a collection of %d chunks is embedded again with %s", collection.chunks, info.name)
            collection = await self._database.write(lambda db: self._choose(db, collection, info))
        while texts := await self._database.read(lambda db: self._batch(db, collection, info)):
            vectors, _ = await embed_passages(self._embedder, info, list(texts.values()), collection.tenant)
            renewed = list(zip(texts, map(input_of, texts.values()), vectors, strict=True))
            await self._database.write(partial(self._put, collection, renewed))

    def _batch(self, db: sqlite3.Connection, collection: Collection, info: EmbedderInfo) -> dict[int, str]:
        """What to embed for the next outdated labels; nothing if the embedder has changed once more."""
        if catalog.again(db, collection).embedder != collection.embedder:
            return {}
        texts: dict[int, str] = {}
        outdated = sorted(chunks.outdated(db, collection, BATCH), key=attrgetter("document"))
        for number, group in groupby(outdated, key=attrgetter("document")):
            of_document = list(group)
            parsed = documents.parsed(db, number)
            inputs = self._preparation.inputs(parsed, [chunk.span for chunk in of_document], info)
            texts |= {chunk.label: inputs[chunk.span.id] for chunk in of_document}
        return texts

    def _choose(self, db: sqlite3.Connection, collection: Collection, info: EmbedderInfo) -> Collection:
        with transaction(db):
            chosen = catalog.choose_embedder(db, catalog.again(db, collection), info)
        self._indexes.drop(collection)
        return chosen

    def _put(self, collection: Collection, renewed: Sequence[tuple[int, bytes, bytes]], db: sqlite3.Connection) -> None:
        with transaction(db):
            chunks.renew(db, collection, renewed)
        self._indexes.renew(db, collection, [label for label, _, _ in renewed])
