"""Messages of `retrieval.proto` and `embedding.proto` from plain values."""

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from struct import pack
from typing import Any, TypedDict

from google.protobuf.struct_pb2 import ListValue, Struct, Value

from millrace.retrieval.types import Document, MediaType
from millrace.server.client.fields import check_list, field, set_fields
from millrace.server.errors import InvalidRequest
from millrace.v1 import embedding_pb2 as embedding_pb
from millrace.v1 import retrieval_pb2 as pb

PART_BYTES = 128 * 1024  # of a document in one message; every server takes that
PAGE = 1000  # collections in one answer
MEDIA_TYPES = {
    None: pb.MEDIA_TYPE_UNSPECIFIED,
    MediaType.TEXT: pb.MEDIA_TYPE_TEXT,
    MediaType.MARKDOWN: pb.MEDIA_TYPE_MARKDOWN,
    MediaType.HTML: pb.MEDIA_TYPE_HTML,
    MediaType.PDF: pb.MEDIA_TYPE_PDF,
}


class QueryOptions(TypedDict, total=False):
    """Fields of `QueryRequest`: ranges and defaults there, but `filter` is as `conditions` takes it and `mode` is
    "hybrid", "lexical" or "vector"."""

    top_k: int
    candidates: int
    filter: Mapping[str, Any]
    mode: str
    ef_search: int
    exact: bool
    without_text: bool


def upsert_requests(collection: str, documents: Iterable[Document]) -> Iterator[pb.UpsertDocumentsRequest]:
    """The messages of an UpsertDocuments call, a long document in several. Raises InvalidRequest."""
    for document in documents:
        yield _first(collection, document)
        for begin in range(PART_BYTES, len(document.content), PART_BYTES):
            part = document.content[begin : begin + PART_BYTES]
            yield pb.UpsertDocumentsRequest(collection=collection, content_part=part)


def _first(collection: str, document: Document) -> pb.UpsertDocumentsRequest:
    with field("collection"):
        request = pb.UpsertDocumentsRequest(collection=collection)
    with field("document"):
        head = pb.Document(
            id=document.id,
            source=document.source,
            title=document.title,
            media_type=MEDIA_TYPES[document.media_type],
            content=document.content[:PART_BYTES],
            content_size=len(document.content) if len(document.content) > PART_BYTES else None,
            metadata=struct(document.metadata),
        )
        request.document.CopyFrom(head)
    return request


def struct(values: Mapping[str, Any]) -> Struct | None:
    if not values:
        return None
    message = Struct()
    message.update({key: list(value) if isinstance(value, tuple) else value for key, value in values.items()})
    return message


def conditions(tests: Mapping[str, Any]) -> list[pb.Condition]:
    """`{"year": {"at_least": 2020}, "language": "en", "topic": ["returns", "refunds"]}`: all must hold. A list
    means one of these."""
    return [_condition(key, test) for key, test in tests.items()]


def _condition(key: str, test: Any) -> pb.Condition:
    with field(f"filter.{key}"):
        if isinstance(test, Mapping):
            return pb.Condition(key=key, range=pb.NumberRange(**test))
        if isinstance(test, list | tuple):
            return pb.Condition(key=key, any_of=ListValue(values=[_value(key, one) for one in test]))
        return pb.Condition(key=key, equals=_value(key, test))


def _value(key: str, plain: Any) -> Value:
    if isinstance(plain, bool):
        return Value(bool_value=plain)
    if isinstance(plain, int | float):
        return Value(number_value=plain)
    if isinstance(plain, str):
        return Value(string_value=plain)
    raise InvalidRequest.at(f"filter.{key}", "must be a string, a number, a boolean, a list of these, or a range")


def delete_request(collection: str, ids: Sequence[str]) -> pb.DeleteDocumentsRequest:
    with field("ids"):
        return pb.DeleteDocumentsRequest(collection=collection, ids=check_list("ids", ids))


def document_request(
    collection: str, document_id: str, byte_start: int | None, byte_end: int | None
) -> pb.GetDocumentRequest:
    with field("document"):
        return pb.GetDocumentRequest(collection=collection, id=document_id, byte_start=byte_start, byte_end=byte_end)


def collections_request(page_token: str) -> pb.ListCollectionsRequest:
    return pb.ListCollectionsRequest(page_size=PAGE, page_token=page_token)


def collection_request(collection: str) -> pb.DeleteCollectionRequest:
    with field("collection"):
        return pb.DeleteCollectionRequest(collection=collection)


def query_request(collection: str, question: str | Sequence[float], options: QueryOptions) -> pb.QueryRequest:
    """`question`: a text, or a vector to compare with.

    Raises TypeError for an option that there is not, InvalidRequest for a value that its field cannot hold.
    """
    with field("collection"):
        request = pb.QueryRequest(collection=collection)
    with field("question"):
        if isinstance(question, str):
            request.text = question
        else:
            request.vector_f32le = pack(f"<{len(question)}f", *question)
    plain = {name: value for name, value in options.items() if name != "filter"}
    set_fields(request, plain, QueryOptions.__annotations__)
    request.filter.extend(conditions(options.get("filter", {})))
    return request


def embed_request(texts: Sequence[str]) -> embedding_pb.EmbedRequest:
    with field("texts"):
        inputs = [embedding_pb.EmbedInput(text=text) for text in check_list("texts", texts)]
        return embedding_pb.EmbedRequest(inputs=inputs)


def vectors(response: embedding_pb.EmbedResponse) -> "list[array[float]]":
    """The float32 vectors of a response, one for each input."""
    numbers = array("f", response.vectors)
    if sys.byteorder == "big":
        numbers.byteswap()
    size = response.dimensions
    return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]
