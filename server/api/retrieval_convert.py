"""Between the messages of `retrieval.proto` and the words of `retrieval/types.py`. Pure functions.

Requests have passed `bounds.check`; only what it cannot see is checked here.
"""

from collections.abc import Iterable
from math import isfinite

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from millrace.retrieval.types import (
    CollectionInfo,
    Condition,
    Document,
    Filter,
    Hit,
    MediaType,
    Metadata,
    MetadataValue,
    SearchMode,
    SearchRequest,
    SearchResult,
    StageScore,
    StoredDocument,
    Upserted,
    UpsertStatus,
)
from millrace.server.errors import InvalidRequest
from millrace.v1 import retrieval_pb2 as pb

MAX_METADATA_KEYS = 64
MAX_KEY_BYTES = 128
DEFAULT_TOP_K, DEFAULT_CANDIDATES = 5, 20
MEDIA_TYPES = {
    pb.MEDIA_TYPE_TEXT: MediaType.TEXT,
    pb.MEDIA_TYPE_MARKDOWN: MediaType.MARKDOWN,
    pb.MEDIA_TYPE_HTML: MediaType.HTML,
    pb.MEDIA_TYPE_PDF: MediaType.PDF,
}
MEDIA_TYPE_NUMBERS = {media_type: number for number, media_type in MEDIA_TYPES.items()}
STATUSES = {status: f"UPSERT_STATUS_{status.name}" for status in UpsertStatus}
MODES = {
    pb.SEARCH_MODE_UNSPECIFIED: SearchMode.HYBRID,
    pb.SEARCH_MODE_HYBRID: SearchMode.HYBRID,
    pb.SEARCH_MODE_LEXICAL: SearchMode.LEXICAL,
    pb.SEARCH_MODE_VECTOR: SearchMode.VECTOR,
}


def document(message: pb.Document, content: bytes) -> Document:
    """`content` is all of it. Raises InvalidRequest for metadata that no filter could test."""
    return Document(
        id=message.id,
        content=content,
        source=message.source,
        title=message.title,
        media_type=MEDIA_TYPES.get(message.media_type),
        metadata=metadata(message.metadata),
    )


def metadata(struct: Struct) -> Metadata:
    if len(struct.fields) > MAX_METADATA_KEYS:
        raise InvalidRequest.at(
            "document.metadata", f"has {len(struct.fields)} keys, at most {MAX_METADATA_KEYS} may be"
        )
    return {key: _metadata_value(key, value) for key, value in MessageToDict(struct).items()}


def _metadata_value(key: str, value: object) -> MetadataValue:
    path = f"document.metadata.{key[:MAX_KEY_BYTES]}"
    if not 1 <= len(key.encode()) <= MAX_KEY_BYTES:
        raise InvalidRequest.at(path, f"a key has 1 to {MAX_KEY_BYTES} bytes")
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if isinstance(value, str | bool):
        return value
    if isinstance(value, float) and isfinite(value):
        return value
    raise InvalidRequest.at(path, "must be a string, a finite number, a boolean or a list of strings")


def conditions(messages: Iterable[pb.Condition], path: str) -> Filter:
    return tuple(_condition(message, f"{path}[{index}]") for index, message in enumerate(messages))


def _condition(message: pb.Condition, path: str) -> Condition:
    match message.WhichOneof("test"):
        case "equals":
            return Condition(message.key, equals=_scalar(message.equals, f"{path}.equals"))
        case "any_of":
            return Condition(message.key, any_of=_scalars(message.any_of, f"{path}.any_of"))
        case "range":
            span = message.range
            at_least = span.at_least if span.HasField("at_least") else None
            at_most = span.at_most if span.HasField("at_most") else None
            if at_least is None and at_most is None:
                raise InvalidRequest.at(f"{path}.range", "set at_least or at_most")
            return Condition(message.key, at_least=at_least, at_most=at_most)
    raise InvalidRequest.at(path, "set one of equals, any_of and range")


def _scalar(value: Value, path: str) -> str | float | bool:
    plain = MessageToDict(value)
    if isinstance(plain, str | bool) or (isinstance(plain, float) and isfinite(plain)):
        return plain
    raise InvalidRequest.at(path, "must be a string, a finite number or a boolean")


def _scalars(values: ListValue, path: str) -> tuple[str | float | bool, ...]:
    if not values.values:
        raise InvalidRequest.at(path, "is empty; name at least one value")
    return tuple(_scalar(value, f"{path}[{index}]") for index, value in enumerate(values.values))


def search_request(message: pb.QueryRequest) -> SearchRequest:
    by_vector = message.WhichOneof("query") == "vector_f32le"
    if by_vector and message.mode not in (pb.SEARCH_MODE_UNSPECIFIED, pb.SEARCH_MODE_VECTOR):
        raise InvalidRequest.at("mode", "a vector is compared with vectors alone; leave mode unset, or send a text")
    top_k = message.top_k if message.HasField("top_k") else DEFAULT_TOP_K
    return SearchRequest(
        collection=message.collection,
        text="" if by_vector else message.text,
        vector=message.vector_f32le if by_vector else None,
        top_k=top_k,
        candidates=candidates(message.candidates if message.HasField("candidates") else None, top_k, "candidates"),
        filter=conditions(message.filter, "filter"),
        mode=SearchMode.VECTOR if by_vector else MODES[message.mode],
        ef_search=message.ef_search if message.HasField("ef_search") else None,
        exact=message.exact,
    )


def candidates(given: int | None, top_k: int, path: str) -> int:
    if given is not None and given < top_k:
        raise InvalidRequest.at(path, f"is {given}, fewer than the {top_k} chunks of top_k")
    return max(DEFAULT_CANDIDATES, top_k) if given is None else given


def query_response(result: SearchResult, *, with_text: bool) -> pb.QueryResponse:
    timings = result.timings
    return pb.QueryResponse(
        chunks=[retrieved_chunk(hit, with_text=with_text) for hit in result.hits],
        timings=pb.QueryTimings(
            embed_us=timings.embed_us,
            lexical_us=timings.lexical_us,
            vector_us=timings.vector_us,
            total_us=timings.total_us,
        ),
        embedding_tokens=result.embedding_tokens,
    )


def retrieved_chunk(hit: Hit, *, with_text: bool = True) -> pb.RetrievedChunk:
    chunk = hit.chunk
    return pb.RetrievedChunk(
        chunk_id=chunk.id,
        document_id=chunk.document_id,
        source=chunk.source,
        title=chunk.title,
        byte_start=chunk.byte_start,
        byte_end=chunk.byte_end,
        text=chunk.text if with_text else "",
        page=chunk.page,
        metadata=struct(chunk.metadata),
        score=hit.score,
        lexical=_stage_score(hit.lexical),
        vector=_stage_score(hit.vector),
    )


def _stage_score(stage: StageScore | None) -> pb.StageScore | None:
    return None if stage is None else pb.StageScore(rank=stage.rank, score=stage.score)


def struct(values: Metadata) -> Struct | None:
    if not values:
        return None
    message = Struct()
    message.update({key: list(value) if isinstance(value, tuple) else value for key, value in values.items()})
    return message


def upserted(result: Upserted) -> pb.UpsertDocumentsResponse:
    return pb.UpsertDocumentsResponse(
        document_id=result.document_id,
        status=STATUSES[result.status],
        chunks=result.chunks,
        chunks_embedded=result.chunks_embedded,
        embedding_tokens=result.embedding_tokens,
    )


def stored_document(found: StoredDocument) -> pb.StoredDocument:
    return pb.StoredDocument(
        id=found.id,
        source=found.source,
        title=found.title,
        media_type=MEDIA_TYPE_NUMBERS[found.media_type],
        metadata=struct(found.metadata),
        chunks=found.chunks,
        text_size=found.text_size,
        text=found.text,
        byte_start=found.byte_start,
    )


def collection(info: CollectionInfo) -> pb.Collection:
    return pb.Collection(
        name=info.name,
        documents=info.documents,
        chunks=info.chunks,
        embedding_model=info.embedding_model,
        dimensions=info.dimensions,
        index=info.index,
    )
