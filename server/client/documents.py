"""Messages of `retrieval.proto` and `embedding.proto` from plain values."""

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from google.protobuf.struct_pb2 import ListValue, Struct, Value

from millrace.retrieval.types import Document, MediaType
from millrace.server.client.fields import field
from millrace.server.errors import InvalidRequest
from millrace.v1 import embedding_pb2 as embedding_pb
from millrace.v1 import retrieval_pb2 as pb

PART_BYTES = 128 * 1024  # of a document in one message; every server takes that
MEDIA_TYPES = {
    None: pb.MEDIA_TYPE_UNSPECIFIED,
    MediaType.TEXT: pb.MEDIA_TYPE_TEXT,
    MediaType.MARKDOWN: pb.MEDIA_TYPE_MARKDOWN,
    MediaType.HTML: pb.MEDIA_TYPE_HTML,
    MediaType.PDF: pb.MEDIA_TYPE_PDF,
}


def upsert_requests(collection: str, documents: Iterable[Document]) -> Iterator[pb.UpsertDocumentsRequest]:
    """The messages of an UpsertDocuments call, a long document in several."""
    for document in documents:
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
            yield pb.UpsertDocumentsRequest(collection=collection, document=head)
        for begin in range(PART_BYTES, len(document.content), PART_BYTES):
            part = document.content[begin : begin + PART_BYTES]
            yield pb.UpsertDocumentsRequest(collection=collection, content_part=part)


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
    if isinstance(test, Mapping):
        with field(f"filter.{key}"):
            return pb.Condition(key=key, range=pb.NumberRange(**test))
    if isinstance(test, list | tuple):
        values = ListValue()
        values.extend(test)
        return pb.Condition(key=key, any_of=values)
    return pb.Condition(key=key, equals=_value(key, test))


def _value(key: str, plain: Any) -> Value:
    if isinstance(plain, bool):
        return Value(bool_value=plain)
    if isinstance(plain, int | float):
        return Value(number_value=plain)
    if isinstance(plain, str):
        return Value(string_value=plain)
    raise InvalidRequest.at(f"filter.{key}", "must be a string, a number, a boolean, a list of these, or a range")


def query_request(collection: str, text: str, options: Mapping[str, Any]) -> pb.QueryRequest:
    """`options`: fields of QueryRequest; `filter` as `conditions` takes it, `mode` "hybrid", "lexical", "vector"."""
    plain = {name: value for name, value in options.items() if name not in ("filter", "mode")}
    with field("query"):
        message = pb.QueryRequest(
            collection=collection, text=text, filter=conditions(options.get("filter", {})), **plain
        )
        if options.get("mode"):
            message.MergeFrom(pb.QueryRequest(mode=f"SEARCH_MODE_{options['mode'].upper()}"))
    return message


def embed_request(texts: Sequence[str]) -> embedding_pb.EmbedRequest:
    with field("texts"):
        return embedding_pb.EmbedRequest(inputs=[embedding_pb.EmbedInput(text=text) for text in texts])


def vectors(response: embedding_pb.EmbedResponse) -> "list[array[float]]":
    """The float32 vectors of a response, one for each input."""
    numbers = array("f", response.vectors)
    if sys.byteorder == "big":
        numbers.byteswap()
    size = response.dimensions
    return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]
