"""Documents: stored whole, replaced whole, deleted whole. Functions over a connection.

Those that write expect a transaction around them. Whatever is read for a tenant has the tenant in its SQL.
"""

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from millrace.retrieval import catalog, chunks, filters
from millrace.retrieval.catalog import Collection
from millrace.retrieval.chunks import NewChunk
from millrace.retrieval.index.base import Float32
from millrace.retrieval.types import Chunk, MediaType, Metadata, ParsedDocument, StoredDocument
from millrace.server.errors import DocumentNotFound, InvalidRequest, QuotaExceeded
from millrace.server.types import EmbedderInfo

MAX_TEXT_BYTES = 1 << 20  # of one answer to GetDocument
UTF8_BYTES = 4  # that a character may have


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A document ready to be stored. `digest`: SHA-256 of all that it was made from."""

    id: str
    digest: bytes
    source: str
    title: str
    media_type: MediaType
    metadata: Metadata
    text: str
    chunks: Sequence[NewChunk]


@dataclass(frozen=True, slots=True)
class Change:
    """What a write means for the index. `vectors`: [added, dimensions]; `created`: the document was not there."""

    collection: Collection
    added: Sequence[int]
    vectors: Float32
    removed: Sequence[int]
    created: bool = False


class VectorMissing(Exception):
    """A chunk that was to keep its vector is gone: the document was deleted meanwhile."""


class _Stored(NamedTuple):
    """What is there of a document. `reusable`: labels by id and input, of chunks whose vector can stay."""

    number: int | None
    labels: list[int]
    reusable: dict[tuple[str, bytes], int]


def chunks_if_unchanged(db: sqlite3.Connection, tenant: str, name: str, document: str, digest: bytes) -> int | None:
    """How many chunks the document has if it was made from just this; None: it was not, or is not there."""
    row = db.execute(
        "SELECT d.chunks FROM documents d JOIN collections c ON c.id = d.collection "
        "WHERE c.tenant = ? AND c.name = ? AND d.name = ? AND d.digest = ?",
        (tenant, name, document, digest),
    ).fetchone()
    return row[0] if row else None


def embedded(db: sqlite3.Connection, tenant: str, name: str, document: str, revision: str) -> set[tuple[str, bytes]]:
    """Id and input of the document's chunks that have a vector of this embedder."""
    rows = db.execute(
        "SELECT k.id, k.input FROM chunks k JOIN documents d ON d.id = k.document "
        "JOIN collections c ON c.id = d.collection JOIN embedders e ON e.id = k.embedder "
        "WHERE c.tenant = ? AND c.name = ? AND d.name = ? AND e.revision = ?",
        (tenant, name, document, revision),
    )
    return set(rows)


def chunks_beside(db: sqlite3.Connection, tenant: str, name: str, document: str) -> int:
    """How many chunks the tenant has, those of the document left out."""
    ((chunks_of_document,),) = db.execute(
        "SELECT total(d.chunks) FROM documents d JOIN collections c ON c.id = d.collection "
        "WHERE c.tenant = ? AND c.name = ? AND d.name = ?",
        (tenant, name, document),
    )
    return catalog.tenant_chunks(db, tenant) - int(chunks_of_document)


def replace(
    db: sqlite3.Connection,
    tenant: str,
    name: str,
    info: EmbedderInfo,
    document: NewDocument,
    vectors: Mapping[bytes, bytes],
    max_chunks: int,
) -> Change:
    """Store a document in place of the one of its id; the collection is made if it is not there.

    Chunks of the same id and input keep label and vector; `vectors` has those of the others, by input. Raises
    VectorMissing, QuotaExceeded.
    """
    collection = catalog.find_or_make(db, tenant, name, info)
    old = _stored(db, collection, document.id)
    labels = [old.reusable.get((chunk.span.id, chunk.input)) for chunk in document.chunks]
    new = [chunk for chunk, label in zip(document.chunks, labels, strict=True) if label is None]
    if any(chunk.input not in vectors for chunk in new):
        raise VectorMissing
    created = old.number is None
    number = _put(db, collection, old.number, document)
    removed = sorted(set(old.labels) - set(labels))
    chunks.delete(db, collection, removed)
    for chunk, label in zip(document.chunks, labels, strict=True):
        if label is not None:
            chunks.move(db, collection, label, chunk)
    added = [chunks.insert(db, collection, number, chunk, vectors[chunk.input]) for chunk in new]
    catalog.count(db, collection, documents=int(created), chunks=len(document.chunks) - len(old.labels))
    if (total := catalog.tenant_chunks(db, tenant)) > max_chunks:
        raise over_quota(tenant, total, max_chunks)
    of_new = chunks.matrix([vectors[chunk.input] for chunk in new], collection.dimensions)
    return Change(collection, added, of_new, removed, created)


def over_quota(tenant: str, total: int, limit: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"tenant {tenant!r} would have {total} chunks, its limit is {limit}; delete documents, or ask for more",
        metadata={"tenant": tenant, "limit": str(limit), "quota": "max_chunks"},
    )


def delete(db: sqlite3.Connection, tenant: str, name: str, ids: Iterable[str]) -> tuple[int, Change]:
    """How many were there. Raises CollectionNotFound."""
    collection = catalog.find(db, tenant, name)
    removed: list[int] = []
    found = 0
    for document in set(ids):
        old = _stored(db, collection, document)
        if old.number is not None:
            chunks.delete(db, collection, old.labels)
            db.execute("DELETE FROM metadata WHERE document = ?", (old.number,))
            db.execute("DELETE FROM documents WHERE id = ?", (old.number,))
            removed += old.labels
            found += 1
    catalog.count(db, collection, documents=-found, chunks=-len(removed))
    return found, Change(collection, (), chunks.matrix((), collection.dimensions), removed)


def get(
    db: sqlite3.Connection, tenant: str, name: str, document: str, byte_start: int | None, byte_end: int | None
) -> StoredDocument:
    """A document with bytes [byte_start, byte_end) of its text; None: from the beginning, to the end, at most 1 MiB.

    Raises CollectionNotFound, DocumentNotFound, and InvalidRequest for a range that cuts a code point, lies
    outside the text or is longer than 1 MiB.
    """
    collection = catalog.find(db, tenant, name)
    row = db.execute(
        "SELECT id, source, title, media_type, metadata, chunks, length(text) FROM documents "
        "WHERE collection = ? AND name = ?",
        (collection.id, document),
    ).fetchone()
    if row is None:
        raise DocumentNotFound(
            f"collection {name!r} has no document {document!r}", resource_type="document", resource_name=document
        )
    number, source, title, media_type, metadata, count, size = row
    start = byte_start or 0
    text = _piece(db, number, size, start, byte_end)
    return StoredDocument(
        document, source, title, MediaType(media_type), filters.load(metadata), count, size, text, start
    )


def surroundings(
    db: sqlite3.Connection, tenant: str, name: str, chunks: Iterable[Chunk], characters: int
) -> list[tuple[str, str] | None]:
    """The text before and after each chunk, at most so many characters; None: the document is gone or another text.

    Raises CollectionNotFound.
    """
    collection = catalog.find(db, tenant, name)
    return [_around(db, collection, chunk, characters) for chunk in chunks]


def _around(db: sqlite3.Connection, collection: Collection, chunk: Chunk, characters: int) -> tuple[str, str] | None:
    margin = UTF8_BYTES * characters
    first = max(0, chunk.byte_start - margin)
    row = db.execute(
        "SELECT substr(text, ?, ?) FROM documents WHERE collection = ? AND name = ?",
        (first + 1, chunk.byte_end + margin - first, collection.id, chunk.document_id),
    ).fetchone()
    data = row[0] if row else b""
    before, text = data[: chunk.byte_start - first], data[chunk.byte_start - first : chunk.byte_end - first]
    if text != chunk.text.encode():
        return None
    after = data[chunk.byte_end - first :]
    # Of the outermost code points, pieces may have been read.
    return before.decode(errors="ignore")[-characters:], after.decode(errors="ignore")[:characters]


def parsed(db: sqlite3.Connection, number: int) -> ParsedDocument:
    """What was parsed, but for the pages; a title that only is the source is none."""
    ((text, title, media_type),) = db.execute(
        "SELECT text, iif(title = source, '', title), media_type FROM documents WHERE id = ?", (number,)
    )
    return ParsedDocument(text.decode(), title, MediaType(media_type))


def _stored(db: sqlite3.Connection, collection: Collection, document: str) -> _Stored:
    found = db.execute(
        "SELECT id FROM documents WHERE collection = ? AND name = ?", (collection.id, document)
    ).fetchone()
    if found is None:
        return _Stored(None, [], {})
    rows = db.execute("SELECT label, id, input, embedder FROM chunks WHERE document = ?", found).fetchall()
    reusable = {(chunk, text): label for label, chunk, text, embedder in rows if embedder == collection.embedder}
    return _Stored(found[0], [label for label, *_ in rows], reusable)


def _put(db: sqlite3.Connection, collection: Collection, number: int | None, document: NewDocument) -> int:
    """Insert or, if it has a number, update the row and what filters see of it."""
    values = (
        *(document.digest, document.source, document.title, document.media_type.value),
        *(filters.dump(document.metadata), len(document.chunks), document.text.encode()),
    )
    if number is None:
        ((number,),) = db.execute(
            "INSERT INTO documents (digest, source, title, media_type, metadata, chunks, text, collection, name) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
            (*values, collection.id, document.id),
        )
    else:
        db.execute(
            "UPDATE documents SET digest = ?, source = ?, title = ?, media_type = ?, metadata = ?, chunks = ?, "
            "text = ? WHERE id = ?",
            (*values, number),
        )
        db.execute("DELETE FROM metadata WHERE document = ?", (number,))
    db.executemany(
        "INSERT INTO metadata (collection, key, kind, value, document) VALUES (?, ?, ?, ?, ?)",
        [(collection.id, *typed, number) for typed in filters.typed_values(document.metadata)],
    )
    return int(number)


def _piece(db: sqlite3.Connection, number: int, size: int, start: int, byte_end: int | None) -> str:
    """Bytes [start, byte_end) of a document's text of `size` bytes."""
    end = min(size, start + MAX_TEXT_BYTES) if byte_end is None else byte_end
    if not start <= end <= size or end - start > MAX_TEXT_BYTES:
        fault = f"[{start}, {end}) must lie within the text of {size} bytes and be at most {MAX_TEXT_BYTES} bytes long"
        raise InvalidRequest.at("byte_start" if start > size else "byte_end", fault)
    # One byte more than asked for tells whether the end lies inside a code point.
    query = "SELECT substr(text, ?, ?) FROM documents WHERE id = ?"
    ((data,),) = db.execute(query, (start + 1, end - start + 1, number))
    length = end - start
    while byte_end is None and _cuts(data, length):
        length -= 1
    for field, place in (("byte_start", 0), ("byte_end", length)):
        if _cuts(data, place):
            raise InvalidRequest.at(field, f"{start + place} lies inside a code point")
    return str(data[:length], "utf-8")


def _cuts(data: bytes, place: int) -> bool:
    """Whether the place is inside a code point of UTF-8."""
    return place < len(data) and data[place] & 0xC0 == 0x80
