"""The tables of a library, and how a file of an older version becomes one of this.

What decides equality with the outside is kept as it came: a client's document id, the names of tenants and
collections. Everything inside is a number that SQLite never gives twice (AUTOINCREMENT): a collection's names its
full-text table, a chunk's is its label in the vector index.
"""

import sqlite3

APPLICATION_ID = 0x4D494C4C  # "MILL", in the file's header: told from other programs' files

# `text` comes last: SQLite reads the columns before a long value without reading the value.
TABLES = """
CREATE TABLE embedders (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL,
  revision TEXT NOT NULL UNIQUE,
  dimensions INTEGER NOT NULL
) STRICT;

-- embedder: of its vectors, or of those that they are to become; documents, chunks: how many it has;
-- snapshot: the image of the index that goes with this history of the file, or NULL.
CREATE TABLE collections (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  uid TEXT NOT NULL UNIQUE,
  tenant TEXT NOT NULL,
  name TEXT NOT NULL,
  embedder INTEGER NOT NULL REFERENCES embedders,
  documents INTEGER NOT NULL DEFAULT 0,
  chunks INTEGER NOT NULL DEFAULT 0,
  snapshot TEXT,
  UNIQUE (tenant, name)
) STRICT;

-- digest: SHA-256 of all that the chunks and what is shown of them depend on; metadata: JSON; text: UTF-8.
CREATE TABLE documents (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  collection INTEGER NOT NULL REFERENCES collections,
  name TEXT NOT NULL,
  digest BLOB NOT NULL,
  source TEXT NOT NULL,
  title TEXT NOT NULL,
  media_type TEXT NOT NULL,
  metadata TEXT NOT NULL,
  chunks INTEGER NOT NULL,
  text BLOB NOT NULL,
  UNIQUE (collection, name)
) STRICT;

-- input: SHA-256 of the text that was embedded; vector: little-endian float32. The chunk's own text and its context
-- (title and headings) are in the collection's full-text table, under the same number.
CREATE TABLE chunks (
  label INTEGER PRIMARY KEY AUTOINCREMENT,
  collection INTEGER NOT NULL REFERENCES collections,
  document INTEGER NOT NULL REFERENCES documents,
  id TEXT NOT NULL,
  input BLOB NOT NULL,
  byte_start INTEGER NOT NULL,
  byte_end INTEGER NOT NULL,
  tokens INTEGER NOT NULL,
  page INTEGER,
  embedder INTEGER NOT NULL REFERENCES embedders,
  vector BLOB NOT NULL,
  UNIQUE (document, id)
) STRICT;
CREATE INDEX chunks_of_collection ON chunks (collection, embedder);

-- One row for each value of a document's metadata, each of a list. kind: "string", "number" or "boolean".
CREATE TABLE metadata (
  collection INTEGER NOT NULL REFERENCES collections,
  key TEXT NOT NULL,
  kind TEXT NOT NULL,
  value ANY NOT NULL,
  document INTEGER NOT NULL REFERENCES documents,
  PRIMARY KEY (collection, key, kind, value, document)
) STRICT, WITHOUT ROWID;
CREATE INDEX metadata_of_document ON metadata (document);
"""

# MIGRATIONS[v] takes a file of version v to v + 1; a new file has version 0.
MIGRATIONS = (TABLES,)
VERSION = len(MIGRATIONS)


def fulltext(collection: int) -> str:
    """The full-text table of a collection: each has its own, lest BM25 weighs one tenant's words by another's."""
    return f"fulltext_{collection:d}"


def create_fulltext(db: sqlite3.Connection, collection: int) -> None:
    db.execute(
        f"CREATE VIRTUAL TABLE {fulltext(collection)} "
        "USING fts5(text, context, tokenize = 'porter unicode61 remove_diacritics 2')"
    )


def migrate(db: sqlite3.Connection) -> None:
    """Bring an open file to this version, in one transaction. Raises ValueError for one that is newer or not ours."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application != APPLICATION_ID and (version or tables):
        raise ValueError("it is a database of another program")
    if version > VERSION:
        raise ValueError(f"it was written by a newer Millrace (version {version} of the tables, not {VERSION})")
    if version == VERSION:
        return
    steps = "\n".join(MIGRATIONS[version:])
    try:
        db.executescript(
            f"BEGIN IMMEDIATE;\n{steps}\n"
            f"PRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {VERSION};\nCOMMIT;"
        )
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
