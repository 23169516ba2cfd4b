"""The collections of tenants."""

import secrets
import sqlite3
from typing import NamedTuple

from millrace.retrieval.schema import create_fulltext, fulltext
from millrace.server.errors import CollectionNotFound, QuotaExceeded
from millrace.server.types import EmbedderInfo

MAX_COLLECTIONS = 1000  # of one tenant: each has tables of its own, and SQLite reads the names of all of them


class Collection(NamedTuple):
    """`embedder`: our number for `revision`, the one of `model` that its vectors are of or are to become."""

    id: int
    uid: str
    tenant: str
    name: str
    documents: int
    chunks: int
    snapshot: str | None
    embedder: int
    model: str
    revision: str
    dimensions: int


COLLECTION = (
    "SELECT c.id, c.uid, c.tenant, c.name, c.documents, c.chunks, c.snapshot, e.id, e.name, e.revision, e.dimensions "
    "FROM collections c JOIN embedders e ON e.id = c.embedder"
)


def find(db: sqlite3.Connection, tenant: str, name: str) -> Collection:
    """Raises CollectionNotFound, whether it is nobody's or another tenant's."""
    return _one(db.execute(f"{COLLECTION} WHERE c.tenant = ? AND c.name = ?", (tenant, name)), name)


def again(db: sqlite3.Connection, collection: Collection) -> Collection:
    """The same collection as it is now. Raises CollectionNotFound once it was deleted, even if another has its name."""
    found = db.execute(f"{COLLECTION} WHERE c.tenant = ? AND c.id = ?", (collection.tenant, collection.id))
    return _one(found, collection.name)


def page(db: sqlite3.Connection, tenant: str, after: str, limit: int) -> list[Collection]:
    """By name, those behind `after`."""
    rows = db.execute(f"{COLLECTION} WHERE c.tenant = ? AND c.name > ? ORDER BY c.name LIMIT ?", (tenant, after, limit))
    return [Collection._make(row) for row in rows]


def every_collection(db: sqlite3.Connection) -> list[Collection]:
    return [Collection._make(row) for row in db.execute(f"{COLLECTION} ORDER BY c.id")]


def tenant_chunks(db: sqlite3.Connection, tenant: str) -> int:
    (chunks,) = db.execute("SELECT total(chunks) FROM collections WHERE tenant = ?", (tenant,)).fetchone()
    return int(chunks)


def find_or_make(db: sqlite3.Connection, tenant: str, name: str, info: EmbedderInfo) -> Collection:
    try:
        return choose_embedder(db, find(db, tenant, name), info)
    except CollectionNotFound:
        (count,) = db.execute("SELECT count(*) FROM collections WHERE tenant = ?", (tenant,)).fetchone()
        if count >= MAX_COLLECTIONS:
            raise QuotaExceeded(
                f"tenant {tenant!r} has {count} collections, its limit; delete one, or use metadata and filters",
                metadata={"tenant": tenant, "limit": str(MAX_COLLECTIONS), "quota": "max_collections"},
            ) from None
    ((made,),) = db.execute(
        "INSERT INTO collections (uid, tenant, name, embedder) VALUES (?, ?, ?, ?) RETURNING id",
        (secrets.token_hex(16), tenant, name, _embedder(db, info)),
    )
    create_fulltext(db, made)
    return find(db, tenant, name)


def choose_embedder(db: sqlite3.Connection, collection: Collection, info: EmbedderInfo) -> Collection:
    """Say of which embedder the collection's vectors are to be."""
    if collection.revision == info.revision:
        return collection
    db.execute(
        "UPDATE collections SET embedder = ?, snapshot = NULL WHERE id = ?", (_embedder(db, info), collection.id)
    )
    return again(db, collection)


def delete_collection(db: sqlite3.Connection, tenant: str, name: str) -> Collection:
    """As it was. Raises CollectionNotFound."""
    collection = find(db, tenant, name)
    db.execute(f"DROP TABLE {fulltext(collection.id)}")
    for table in ("metadata", "chunks", "documents"):
        db.execute(f"DELETE FROM {table} WHERE collection = ?", (collection.id,))
    db.execute("DELETE FROM collections WHERE id = ?", (collection.id,))
    return collection


def no_embedder(db: sqlite3.Connection) -> int:
    """The number that a chunk has in place of its embedder's if its vector is damaged."""
    db.execute(
        "INSERT INTO embedders (name, revision, dimensions) VALUES ('', '', 0) ON CONFLICT (revision) DO NOTHING"
    )
    (number,) = db.execute("SELECT id FROM embedders WHERE revision = ''").fetchone()
    return int(number)


def set_snapshot(db: sqlite3.Connection, collection: Collection, token: str) -> None:
    """Name the image that goes with the collection; a transaction of its own."""
    db.execute("UPDATE collections SET snapshot = ? WHERE id = ?", (token, collection.id))


def count(db: sqlite3.Connection, collection: Collection, *, documents: int, chunks: int) -> None:
    db.execute(
        "UPDATE collections SET documents = documents + ?, chunks = chunks + ? WHERE id = ?",
        (documents, chunks, collection.id),
    )


def _one(found: sqlite3.Cursor, name: str) -> Collection:
    row = found.fetchone()
    if row is None:
        raise CollectionNotFound(
            f"collection {name!r} does not exist; it comes into being with its first document",
            resource_type="collection",
            resource_name=name,
        )
    return Collection._make(row)


def _embedder(db: sqlite3.Connection, info: EmbedderInfo) -> int:
    db.execute(
        "INSERT INTO embedders (name, revision, dimensions) VALUES (?, ?, ?) ON CONFLICT (revision) DO NOTHING",
        (info.name, info.revision, info.dimensions),
    )
    (number,) = db.execute("SELECT id FROM embedders WHERE revision = ?", (info.revision,)).fetchone()
    return int(number)
