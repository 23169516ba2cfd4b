"""One vector index per collection, in memory; SQLite's vectors are the truth, an image on disk saves the time.

An index is loaded when it is first asked for, and then equals what SQLite holds after every write: it is changed on
the writer's thread alone. Labels are never reused and a label's vector changes with the embedder only, so an image
of some earlier moment differs from SQLite by sets of labels, whatever happened in between.
"""

import asyncio
import logging
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from millrace.retrieval import catalog, chunks
from millrace.retrieval.catalog import Collection
from millrace.retrieval.database import Database, transaction
from millrace.retrieval.documents import Change
from millrace.retrieval.index.auto import FLAT_UNTIL, AutoIndex
from millrace.server.errors import Draining, IndexDamaged, Unavailable

log = logging.getLogger(__name__)

Read = Callable[[Callable[[sqlite3.Connection], Any]], Any]

LOADS = 2  # at once
BATCH = 4096  # vectors read at once
LEAST_CHANGES = 1000  # and a fifth of the index, before its image is written again
RENEWAL_SECONDS = 5.0  # after which to ask again for a collection that is being embedded anew


@dataclass(slots=True)
class _Loaded:
    """`collection`: as it was when the index was loaded; `unsaved`: labels by which the index and its image differ."""

    collection: Collection
    index: AutoIndex
    unsaved: int


class Indexes:
    def __init__(self, database: Database, directory: Path):
        self._database = database
        self._directory = directory
        self._loaded: dict[int, _Loaded] = {}  # by the collection's id
        self._loading: dict[tuple[int, int], asyncio.Task[AutoIndex]] = {}  # by collection and embedder
        self._places = asyncio.Semaphore(LOADS)
        self._closing = False
        self.on_damaged: Callable[[], None] = lambda: None  # called when vectors were found that must be made anew

    async def get(self, collection: Collection) -> AutoIndex:
        """The index over all vectors of the collection.

        Raises Unavailable while some are of another embedder than the collection's, CollectionNotFound if it is gone.
        """
        loaded = self._loaded.get(collection.id)
        if loaded and loaded.collection.embedder == collection.embedder:
            return loaded.index
        key = collection.id, collection.embedder
        if not (task := self._loading.get(key)):
            task = self._loading[key] = asyncio.create_task(self._load(collection))
            task.add_done_callback(lambda task: (self._loading.pop(key), task.cancelled() or task.exception()))
        return await asyncio.shield(task)

    def kind(self, collection: Collection) -> str:
        """ "flat" or "hnsw": what its index is, or would be."""
        if loaded := self._loaded.get(collection.id):
            return loaded.index.kind
        return "flat" if collection.chunks <= FLAT_UNTIL else "hnsw"

    async def close(self) -> None:
        """Write the images that are missing. Writes must have ended."""
        self._closing = True
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        for loaded in list(self._loaded.values()):
            await self._database.write(partial(self.save, collection=loaded.collection))

    async def _load(self, collection: Collection) -> AutoIndex:
        async with self._places:
            loaded = await self._database.run(lambda: self._build(collection))
        if await self._database.write(lambda db: self._publish(db, loaded)):
            self.on_damaged()
        return loaded.index

    def _build(self, collection: Collection) -> _Loaded:
        """From the image if there is one, else from the vectors."""
        loaded = _Loaded(collection, AutoIndex(collection.dimensions), 0)
        if collection.snapshot:
            try:
                loaded.index.load(self._path(collection), _model(collection, collection.snapshot))
            except IndexDamaged as error:
                log.warning("the index of a collection is rebuilt from its vectors: %s", error)
        self._reconcile(loaded, self._database.read_here)
        return loaded

    def _reconcile(self, loaded: _Loaded, read: Read) -> list[int]:
        """Make the index hold just the labels that SQLite has, but for those returned: their vectors are damaged."""
        collection, index = loaded.collection, loaded.index
        wanted = read(lambda db: chunks.labels_of(db, collection))
        here = index.labels()
        surplus, missing = np.setdiff1d(here, wanted), np.setdiff1d(wanted, here)
        index.remove(surplus)
        damaged: list[int] = []
        for start in range(0, len(missing), BATCH):
            if self._closing:
                raise Draining("the server is shutting down; use another replica")
            some = missing[start : start + BATCH]
            labels, vectors, useless = read(partial(chunks.vectors_of, collection=collection, labels=some))
            index.add(labels, vectors)
            damaged += useless
        loaded.unsaved += len(surplus) + len(missing) - len(damaged)
        return damaged

    # The rest runs on the writer's thread.

    def _publish(self, db: sqlite3.Connection, loaded: _Loaded) -> int:
        """From here on every write changes the index too. How many vectors are damaged, and left out."""
        now = catalog.again(db, loaded.collection)
        if now.embedder != loaded.collection.embedder or chunks.of_others(db, now):
            raise being_renewed(now)
        if damaged := self._reconcile(loaded, lambda function: function(db)):
            log.warning("%d vectors of a collection are damaged: they are left out and made anew", len(damaged))
            with transaction(db):
                chunks.mark_damaged(db, damaged)
        self._loaded[now.id] = loaded
        return len(damaged)

    def renew(self, db: sqlite3.Connection, collection: Collection, labels: Sequence[int]) -> None:
        """Take up the new vectors of labels whose vectors were damaged."""
        loaded = self._loaded.get(collection.id)
        if loaded and loaded.collection.embedder == collection.embedder:
            found, vectors, _ = chunks.vectors_of(db, collection, np.array(labels, np.uint64))
            loaded.index.add(found, vectors)
            loaded.unsaved += len(found)

    def add(self, change: Change) -> None:
        """Before the transaction ends: new vectors are found from here on, and answered with once it has."""
        if loaded := self._at(change):
            loaded.index.add(change.added, change.vectors)
            loaded.unsaved += len(change.added)

    def remove(self, change: Change, labels: Sequence[int]) -> None:
        if loaded := self._at(change):
            loaded.index.remove(labels)
            loaded.unsaved += len(labels)

    def drop(self, collection: Collection) -> None:
        """Forget the index and its image: the collection is gone, or is to have other vectors."""
        self._loaded.pop(collection.id, None)
        with suppress(OSError):  # an image that stays has no collection, or is not the one that its collection names
            self._path(collection).unlink(missing_ok=True)

    def wants_saving(self, collection: Collection) -> bool:
        loaded = self._loaded.get(collection.id)
        return loaded is not None and loaded.unsaved >= max(LEAST_CHANGES, len(loaded.index) / 5)

    def save(self, db: sqlite3.Connection, collection: Collection) -> None:
        """Write an image, and note in the database which one goes with it: a restored backup names another."""
        loaded = self._loaded.get(collection.id)
        if loaded is None or not loaded.unsaved:
            return
        token = secrets.token_hex(16)
        try:
            loaded.index.save(self._path(collection), _model(loaded.collection, token))
            catalog.set_snapshot(db, collection, token)
        except (OSError, sqlite3.OperationalError) as error:
            log.warning("the index of a collection was not saved, it may have to be rebuilt: %s", error)
        loaded.unsaved = 0

    def clean(self, db: sqlite3.Connection) -> None:
        """Delete the files that belong to no collection."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        known = {self._path(collection) for collection in catalog.every_collection(db)}
        for path in set(self._directory.iterdir()) - known:
            path.unlink()

    def _at(self, change: Change) -> _Loaded | None:
        """What is loaded for the collection, unless the change is the first with another embedder."""
        loaded = self._loaded.get(change.collection.id)
        if loaded and loaded.collection.embedder != change.collection.embedder:
            self.drop(change.collection)
            return None
        return loaded

    def _path(self, collection: Collection) -> Path:
        return self._directory / f"{collection.uid}.index"


def being_renewed(collection: Collection) -> Unavailable:
    return Unavailable(
        f"collection {collection.name!r} is being embedded again, with another model; until then it can be searched "
        "by words alone",
        metadata={"collection": collection.name},
        retry_after=RENEWAL_SECONDS,
    )


def _model(collection: Collection, token: str) -> str:
    """What an image must have been made of."""
    return f"{collection.revision}:{token}"
