"""The words of retrieval. Standard library only.

A tenant has collections; a collection has documents; a document is cut into chunks. A search returns hits:
chunks with the score and the rank that each stage gave them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

MetadataValue = str | float | bool | tuple[str, ...]
Metadata = Mapping[str, MetadataValue]


class MediaType(Enum):
    """What can be ingested. Values are the IANA media types."""

    TEXT = "text/plain"
    MARKDOWN = "text/markdown"
    HTML = "text/html"
    PDF = "application/pdf"


@dataclass(frozen=True, slots=True)
class Document:
    """What a client uploads. `id` is the client's, unique in the collection; `source` is what a citation shows.

    `media_type` None: told from `source` and the content. `title` empty: the text's own, else `source`.
    """

    id: str
    content: bytes
    source: str = ""
    title: str = ""
    media_type: MediaType | None = None
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParsedDocument:
    """The text of a document: of text and Markdown the content itself, of HTML and PDF what a reader sees.

    `pages`: byte offset in `text` (UTF-8) at which each page begins; empty where there are no pages.
    """

    text: str
    title: str
    media_type: MediaType
    pages: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """A piece of a document's text: bytes [byte_start, byte_end) of its UTF-8, `tokens` of the embedding model."""

    id: str
    byte_start: int
    byte_end: int
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stored chunk. `label` is its number in the indexes, never reused; `id` is derived from its contents."""

    label: int
    id: str
    document_id: str
    source: str
    title: str
    byte_start: int
    byte_end: int
    text: str
    tokens: int
    page: int | None = None  # from 1; None: the document has no pages
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Condition:
    """A test on one key of a document's metadata; exactly one of the three is set.

    `equals`: the value is this one (or a list that contains it). `any_of`: it is one of these. `at_least`,
    `at_most`: a number within, inclusive. A document without the key fails.
    """

    key: str
    equals: str | float | bool | None = None
    any_of: tuple[str | float | bool, ...] = ()
    at_least: float | None = None
    at_most: float | None = None


Filter = Sequence[Condition]  # all of them must hold


class SearchMode(Enum):
    HYBRID = "hybrid"
    LEXICAL = "lexical"
    VECTOR = "vector"


@dataclass(frozen=True, slots=True)
class StageScore:
    """What one stage said of a chunk: its rank from 1 and its own score (higher is better)."""

    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk with its provenance. `score`: reciprocal rank fusion, or the one stage's own in the other modes.

    `lexical`: BM25; `vector`: cosine similarity in [-1, 1]. None: not among that stage's candidates.
    """

    chunk: Chunk
    score: float
    lexical: StageScore | None = None
    vector: StageScore | None = None


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """Ranges: retrieval.proto. Exactly one of `text` and `vector` (float32 little-endian bytes) is set."""

    collection: str
    text: str = ""
    vector: bytes | None = None
    top_k: int = 5
    candidates: int = 20
    filter: Filter = ()
    mode: SearchMode = SearchMode.HYBRID
    ef_search: int | None = None
    exact: bool = False


@dataclass(frozen=True, slots=True)
class SearchTimings:
    """Microseconds."""

    embed_us: int = 0
    lexical_us: int = 0
    vector_us: int = 0
    total_us: int = 0


@dataclass(frozen=True, slots=True)
class SearchResult:
    """`embedding_tokens`: what embedding the query cost."""

    hits: tuple[Hit, ...]
    timings: SearchTimings = SearchTimings()
    embedding_tokens: int = 0


class UpsertStatus(Enum):
    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Upserted:
    """What became of a document that is now stored, durably and visible to searches."""

    document_id: str
    status: UpsertStatus
    chunks: int
    chunks_embedded: int  # of these, how many were not known before
    embedding_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A stored document and a piece of its text; `text_size` is bytes of all of it."""

    id: str
    source: str
    title: str
    media_type: MediaType
    metadata: Metadata
    chunks: int
    text_size: int
    text: str
    byte_start: int


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    name: str
    documents: int
    chunks: int
    embedding_model: str
    dimensions: int
    index: str  # "flat" or "hnsw"
