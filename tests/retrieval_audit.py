"""Is a data directory whole? Looks at the file itself, with SQLite alone, and works everything out again."""

import sqlite3
from pathlib import Path

import numpy as np
from retrieval_fakes import SPECIAL_TOKENS, TextParser, WordEmbedder, settings, word_tokenizer

from millrace.retrieval import filters
from millrace.retrieval.documents import parsed
from millrace.retrieval.preparation import Preparation, input_of
from millrace.retrieval.types import ChunkSpan

Stored = dict[tuple[str, str, str], tuple[str, dict]]  # (tenant, collection, document) -> (text, metadata)


def audit(directory: Path, embedder: WordEmbedder | None = None) -> Stored:
    """Everything that is stored. Fails unless rows, counts, full-text, metadata and vectors agree."""
    embedder = embedder or WordEmbedder()
    preparation = Preparation(settings(directory), TextParser(), word_tokenizer(), SPECIAL_TOKENS)
    db = sqlite3.connect(f"file:{directory / 'millrace.db'}?mode=ro", uri=True)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        found: Stored = {}
        tables = set()
        for collection, tenant, name, documents, chunks in db.execute(
            "SELECT id, tenant, name, documents, chunks FROM collections"
        ).fetchall():
            tables.add(f"fulltext_{collection}")
            rows = db.execute("SELECT id, name FROM documents WHERE collection = ?", (collection,)).fetchall()
            assert len(rows) == documents
            total = sum(_audit_document(db, collection, number, preparation, embedder) for number, _ in rows)
            assert total == chunks == _count(db, f"SELECT count(*) FROM fulltext_{collection}")
            assert total == _count(db, "SELECT count(*) FROM chunks WHERE collection = ?", collection)
            for number, document in rows:
                text, metadata = db.execute("SELECT text, metadata FROM documents WHERE id = ?", (number,)).fetchone()
                found[tenant, name, document] = text.decode(), filters.load(metadata)
        names = "SELECT name FROM sqlite_schema WHERE sql LIKE 'CREATE VIRTUAL TABLE%'"
        assert {name for (name,) in db.execute(names)} == tables
        for table in ("documents", "chunks", "metadata"):
            assert not _count(db, f"SELECT count(*) FROM {table} WHERE collection NOT IN (SELECT id FROM collections)")
        return found
    finally:
        db.close()


def _audit_document(
    db: sqlite3.Connection, collection: int, number: int, preparation: Preparation, embedder: WordEmbedder
) -> int:
    """The number of its chunks."""
    text, count, metadata = db.execute(
        "SELECT text, chunks, metadata FROM documents WHERE id = ?", (number,)
    ).fetchone()
    rows = db.execute(
        "SELECT k.id, byte_start, byte_end, f.text, tokens, label, input, vector FROM chunks k "
        f"JOIN fulltext_{collection} f ON f.rowid = k.label WHERE document = ? AND k.collection = ?",
        (number, collection),
    ).fetchall()
    assert len(rows) == count > 0
    spans = [ChunkSpan(*row[:5]) for row in rows]
    covered = set()
    inputs = preparation.inputs(parsed(db, number), spans, embedder.described)
    for span, (*_, label, digest, vector) in zip(spans, rows, strict=True):
        assert text[span.byte_start : span.byte_end].decode() == span.text
        covered.update(range(span.byte_start, span.byte_end))
        assert digest == input_of(inputs[span.id])
        assert np.array_equal(np.frombuffer(vector, "<f4"), embedder.vector(inputs[span.id]))
        words = span.text.replace('"', " ")
        query = f"SELECT count(*) FROM fulltext_{collection} WHERE fulltext_{collection} MATCH ? AND rowid = ?"
        if any(map(str.isalnum, words)):
            assert _count(db, query, f'"{words}"', label), span
    assert covered == set(range(len(text)))
    values = db.execute("SELECT key, kind, value FROM metadata WHERE document = ?", (number,)).fetchall()
    seen = {(key, kind, bool(value) if kind == "boolean" else value) for key, kind, value in values}
    assert seen == set(filters.typed_values(filters.load(metadata)))
    return len(rows)


def _count(db: sqlite3.Connection, query: str, *values: object) -> int:
    return int(db.execute(query, values).fetchone()[0])
