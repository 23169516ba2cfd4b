"""The client for threads and scripts."""

from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from millrace.retrieval.types import Document
from millrace.server.client.calls import (
    Calls,
    detokenize_request,
    first_model,
    health_name,
    health_request,
    new_text,
    render_request,
    tokenize_request,
)
from millrace.server.client.connection import CHANNEL_OPTIONS, DEFAULT_ADDRESS
from millrace.server.client.documents import (
    QueryOptions,
    collection_request,
    collections_request,
    delete_request,
    document_request,
    embed_request,
    query_request,
    upsert_requests,
    vectors,
)
from millrace.server.client.requests import Options, Prompt, generate_request
from millrace.server.client.upload import Requests
from millrace.server.types import Message
from millrace.v1 import generation_pb2 as pb
from millrace.v1 import model_pb2, retrieval_pb2


class Client(Calls):
    """Every method raises a `RequestError` as the server did. Safe to share between threads."""

    def __init__(self, address: str = DEFAULT_ADDRESS, **options: Any):
        super().__init__(address, **options)
        target, credentials = self.connection.target, self.connection.credentials
        self._channel = (
            grpc.secure_channel(target, credentials, CHANNEL_OPTIONS)
            if credentials
            else grpc.insecure_channel(target, CHANNEL_OPTIONS)
        )
        self._make_stubs(self._channel)

    def generate(self, prompt: Prompt, *, model: str | None = None, **options: Unpack[Options]) -> pb.GenerateResponse:
        """Run to completion."""
        request = generate_request(prompt, self._name(model), options)
        answer: pb.GenerateResponse = self._call(self._generation.Generate, request)
        return answer

    def stream(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[Options]
    ) -> Generator[pb.StreamGenerateResponse, None, None]:
        """Iterate over one `started`, `deltas`, one `completed`. Closing the generator cancels the request."""
        request = generate_request(prompt, self._name(model), options)
        call = self._generation.StreamGenerate(request, **self._call_options)
        try:
            yield from call
        except grpc.RpcError as failure:
            raise self._error(failure) from failure
        finally:
            call.cancel()

    def stream_text(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[Options]
    ) -> Generator[str, None, None]:
        """Iterate over the new text of the first choice."""
        with closing(self.stream(prompt, model=model, **options)) as events:
            yield from filter(None, map(new_text, events))

    def tokenize(self, text: str, *, model: str | None = None, add_special_tokens: bool = True) -> list[int]:
        request = tokenize_request(self._name(model), text, add_special_tokens)
        return list(self._call(self._tokenizer.Tokenize, request).results[0].token_ids.ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        request = detokenize_request(self._name(model), token_ids)
        return str(self._call(self._tokenizer.Detokenize, request).texts[0])

    def render_chat(self, messages: Sequence[Message], *, model: str | None = None) -> str:
        """The text that the model's chat template makes of a conversation."""
        return str(self._call(self._tokenizer.RenderChat, render_request(self._name(model), messages)).text)

    def upsert(
        self, collection: str, documents: Iterable[Document]
    ) -> Generator[retrieval_pb2.UpsertDocumentsResponse, None, None]:
        """Send documents and iterate over what became of each, in the order in which they end. `documents` is read,
        in another thread, no faster than the server takes them; what it raises is raised here, after the results of
        what it gave before. Closing the generator ends the call; a document without a result may be stored or not."""
        requests = Requests(upsert_requests(collection, documents))
        call = self._retrieval.UpsertDocuments(iter(requests), **self._call_options)
        try:
            yield from call
        except grpc.RpcError as failure:
            raise requests.error or self._error(failure) from failure
        finally:
            call.cancel()
        if requests.error:
            raise requests.error

    def delete_documents(self, collection: str, ids: Sequence[str]) -> int:
        """How many of them there were."""
        return int(self._call(self._retrieval.DeleteDocuments, delete_request(collection, ids)).deleted)

    def get_document(
        self, collection: str, document_id: str, byte_start: int | None = None, byte_end: int | None = None
    ) -> retrieval_pb2.StoredDocument:
        """A document's description and text, or the bytes [byte_start, byte_end) that a citation names."""
        request = document_request(collection, document_id, byte_start, byte_end)
        found: retrieval_pb2.StoredDocument = self._call(self._retrieval.GetDocument, request)
        return found

    def collections(self) -> list[retrieval_pb2.Collection]:
        """All of them, by name."""
        found: list[retrieval_pb2.Collection] = []
        token = ""
        while True:
            page = self._call(self._retrieval.ListCollections, collections_request(token))
            found += page.collections
            if not (token := page.next_page_token):
                return found

    def delete_collection(self, collection: str) -> int:
        """How many documents it had."""
        return int(self._call(self._retrieval.DeleteCollection, collection_request(collection)).documents)

    def query(
        self, collection: str, question: str | Sequence[float], **options: Unpack[QueryOptions]
    ) -> retrieval_pb2.QueryResponse:
        """The chunks that answer best, with what each stage of the search said of them."""
        answer: retrieval_pb2.QueryResponse = self._call(
            self._retrieval.Query, query_request(collection, question, options)
        )
        return answer

    def embed(self, texts: Sequence[str]) -> "list[array[float]]":
        """The vector of each text, float32."""
        return vectors(self._call(self._embedding.Embed, embed_request(texts)))

    def models(self) -> list[model_pb2.Model]:
        return list(self._call(self._models.ListModels, model_pb2.ListModelsRequest(page_size=1000)).models)

    def health(self, service: str = "") -> str:
        """`SERVING` or `NOT_SERVING`, of the whole server or of one service such as millrace.v1.GenerationService."""
        return health_name(self._call(self._health.Check, health_request(service)))

    def close(self) -> None:
        """End every call and the connection. Idempotent."""
        self._channel.close()

    def _name(self, model: str | None) -> str:
        if model is None and self.model is None:
            self.model = first_model(self.models())
        return model or self.model or ""

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return method(request, **self._call_options)
        except grpc.RpcError as failure:
            raise self._error(failure) from failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
