"""Chunks: their rows, texts and vectors. Functions over a connection."""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from millrace.retrieval import catalog, filters
from millrace.retrieval.catalog import Collection
from millrace.retrieval.index.base import Float32, Labels
from millrace.retrieval.schema import fulltext
from millrace.retrieval.types import Chunk, ChunkSpan


class NewChunk(NamedTuple):
    """`context`: title and headings, for the full-text table; `input`: SHA-256 of the text to embed."""

    span: ChunkSpan
    page: int | None
    context: str
    input: bytes


class Outdated(NamedTuple):
    """`document`: our number for it."""

    label: int
    document: int
    span: ChunkSpan


def present(db: sqlite3.Connection, collection: Collection, labels: Sequence[int]) -> list[int]:
    """Those of `labels` that are, still, of this collection, in their order."""
    query = "SELECT label FROM chunks WHERE label IN (SELECT value FROM json_each(?)) AND collection = ?"
    found = {label for (label,) in db.execute(query, (json.dumps(labels), collection.id))}
    return [label for label in labels if label in found]


def hydrate(db: sqlite3.Connection, collection: Collection, labels: Sequence[int]) -> dict[int, Chunk]:
    """The chunks behind labels; those that are not, or no longer, of this collection are left out."""
    collection = catalog.again(db, collection)
    rows = db.execute(
        "SELECT k.label, k.id, d.name, d.source, d.title, k.byte_start, k.byte_end, f.text, k.tokens, k.page, "
        "d.metadata FROM chunks k JOIN documents d ON d.id = k.document "
        f"JOIN {fulltext(collection.id)} f ON f.rowid = k.label "
        "WHERE k.label IN (SELECT value FROM json_each(?)) AND k.collection = ?",
        (json.dumps(labels), collection.id),
    )
    return {row[0]: Chunk(*(*row[:-1], filters.load(row[-1]))) for row in rows}


def allowed_labels(db: sqlite3.Connection, where: filters.Where) -> Labels | None:
    """Those that pass a filter, ascending; None: there is no filter."""
    return _ascending(db.execute(where.labels, where.values)) if where.labels else None


def labels_of(db: sqlite3.Connection, collection: Collection) -> Labels:
    """Those with a vector of the collection's embedder, ascending."""
    query = "SELECT label FROM chunks WHERE collection = ? AND embedder = ?"
    return _ascending(db.execute(query, (collection.id, collection.embedder)))


def vectors_of(db: sqlite3.Connection, collection: Collection, labels: Labels) -> tuple[Labels, Float32, list[int]]:
    """Those of `labels` that have a vector of the collection's embedder, with their vectors; and those where it is
    damaged: not of its size, not finite, or all zeros."""
    rows = db.execute(
        "SELECT label, vector FROM chunks WHERE label IN (SELECT value FROM json_each(?)) "
        "AND collection = ? AND embedder = ?",
        (json.dumps(labels.tolist()), collection.id, collection.embedder),
    ).fetchall()
    whole = [(label, vector) for label, vector in rows if len(vector) == 4 * collection.dimensions]
    found = np.array([label for label, _ in whole], np.uint64)
    vectors = matrix([vector for _, vector in whole], collection.dimensions)
    good = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    damaged = {label for label, _ in rows} - set(found[good].tolist())
    return found[good], vectors[good], sorted(damaged)


def insert(db: sqlite3.Connection, collection: Collection, document: int, chunk: NewChunk, vector: bytes) -> int:
    """Its label."""
    span = chunk.span
    ((label,),) = db.execute(
        "INSERT INTO chunks (collection, document, id, input, byte_start, byte_end, tokens, page, embedder, vector) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING label",
        (
            *(collection.id, document, span.id, chunk.input, span.byte_start, span.byte_end),
            *(span.tokens, chunk.page, collection.embedder, vector),
        ),
    )
    table = fulltext(collection.id)
    db.execute(f"INSERT INTO {table} (rowid, text, context) VALUES (?, ?, ?)", (label, span.text, chunk.context))
    return int(label)


def move(db: sqlite3.Connection, collection: Collection, label: int, chunk: NewChunk) -> None:
    """Say where a chunk that stays is in its document now."""
    span = chunk.span
    db.execute(
        "UPDATE chunks SET byte_start = ?, byte_end = ?, tokens = ?, page = ? WHERE label = ?",
        (span.byte_start, span.byte_end, span.tokens, chunk.page, label),
    )
    db.execute(
        f"UPDATE {fulltext(collection.id)} SET context = :context WHERE rowid = :label AND context <> :context",
        {"context": chunk.context, "label": label},
    )


def delete(db: sqlite3.Connection, collection: Collection, labels: Iterable[int]) -> None:
    rows = [(label,) for label in labels]
    db.executemany(f"DELETE FROM {fulltext(collection.id)} WHERE rowid = ?", rows)
    db.executemany("DELETE FROM chunks WHERE label = ?", rows)


def outdated(db: sqlite3.Connection, collection: Collection, limit: int) -> list[Outdated]:
    """Chunks whose vector is of another embedder than the collection's or of none, `limit` at most."""
    catalog.again(db, collection)
    rows = db.execute(
        "SELECT k.label, k.document, k.id, k.byte_start, k.byte_end, f.text, k.tokens "
        f"FROM chunks k JOIN {fulltext(collection.id)} f ON f.rowid = k.label "
        "WHERE k.collection = :id AND (k.embedder < :embedder OR k.embedder > :embedder) LIMIT :limit",
        {"id": collection.id, "embedder": collection.embedder, "limit": limit},
    )
    return [Outdated(label, document, ChunkSpan(*span)) for label, document, *span in rows]


def of_others(db: sqlite3.Connection, collection: Collection) -> bool:
    """Whether some vectors are of another embedder than the collection's; damaged ones are of none."""
    rows = db.execute(
        "SELECT 1 FROM chunks k JOIN embedders e ON e.id = k.embedder "
        "WHERE k.collection = :id AND (k.embedder < :embedder OR k.embedder > :embedder) AND e.revision <> '' LIMIT 1",
        {"id": collection.id, "embedder": collection.embedder},
    )
    return rows.fetchone() is not None


def mark_damaged(db: sqlite3.Connection, labels: Sequence[int]) -> None:
    """Say that their vectors are of no embedder, and so outdated."""
    none = catalog.no_embedder(db)
    db.executemany("UPDATE chunks SET embedder = ? WHERE label = ?", [(none, label) for label in labels])


def renew(db: sqlite3.Connection, collection: Collection, renewed: Iterable[tuple[int, bytes, bytes]]) -> None:
    """Put (label, input, vector) in place.

    Labels that are gone are ignored; so is everything if the collection has another embedder by now.
    """
    db.executemany(
        "UPDATE chunks SET embedder = ?, input = ?, vector = ? WHERE label = ? "
        "AND EXISTS (SELECT 1 FROM collections c WHERE c.id = chunks.collection AND c.embedder = ?)",
        [(collection.embedder, text, vector, label, collection.embedder) for label, text, vector in renewed],
    )


def matrix(vectors: Sequence[bytes], dimensions: int) -> Float32:
    """[n, dimensions] from little-endian float32."""
    return np.frombuffer(b"".join(vectors), "<f4").astype(np.float32).reshape(len(vectors), dimensions)


def _ascending(rows: sqlite3.Cursor) -> Labels:
    return np.sort(np.fromiter((label for (label,) in rows), np.uint64))
