"""The client for asyncio."""

import asyncio
from array import array
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

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
    vectors,
)
from millrace.server.client.requests import Options, Prompt, generate_request
from millrace.server.client.sync import Client
from millrace.server.types import Message
from millrace.v1 import generation_pb2 as pb
from millrace.v1 import model_pb2, retrieval_pb2


class AsyncClient(Calls):
    """`Client` for one event loop: made and used inside it."""

    def __init__(self, address: str = DEFAULT_ADDRESS, **options: Any):
        super().__init__(address, **options)
        target, credentials = self.connection.target, self.connection.credentials
        self._channel = (
            grpc.aio.secure_channel(target, credentials, CHANNEL_OPTIONS)
            if credentials
            else grpc.aio.insecure_channel(target, CHANNEL_OPTIONS)
        )
        self._make_stubs(self._channel)

    async def generate(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[Options]
    ) -> pb.GenerateResponse:
        """Run to completion."""
        request = generate_request(prompt, await self._name(model), options)
        answer: pb.GenerateResponse = await self._call(self._generation.Generate, request)
        return answer

    async def stream(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        """Iterate over one `started`, `deltas`, one `completed`. Closing the generator cancels the request;
        hold it in `contextlib.aclosing` to close it promptly."""
        request = generate_request(prompt, await self._name(model), options)
        call: Any = self._generation.StreamGenerate(request, **self._call_options)
        try:
            async for event in call:
                yield event
        except grpc.RpcError as failure:
            raise self._error(failure) from failure
        finally:
            call.cancel()

    async def stream_text(
        self, prompt: Prompt, *, model: str | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[str, None]:
        """Iterate over the new text of the first choice."""
        async with aclosing(self.stream(prompt, model=model, **options)) as events:
            async for event in events:
                if text := new_text(event):
                    yield text

    async def tokenize(self, text: str, *, model: str | None = None, add_special_tokens: bool = True) -> list[int]:
        request = tokenize_request(await self._name(model), text, add_special_tokens)
        return list((await self._call(self._tokenizer.Tokenize, request)).results[0].token_ids.ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        request = detokenize_request(await self._name(model), token_ids)
        return str((await self._call(self._tokenizer.Detokenize, request)).texts[0])

    async def render_chat(self, messages: Sequence[Message], *, model: str | None = None) -> str:
        """The text that the model's chat template makes of a conversation."""
        request = render_request(await self._name(model), messages)
        return str((await self._call(self._tokenizer.RenderChat, request)).text)

    async def upsert(
        self, collection: str, documents: Iterable[Document]
    ) -> AsyncGenerator[retrieval_pb2.UpsertDocumentsResponse, None]:
        """As in `Client`, whose method this is, in threads and over a connection of its own: `documents` may read
        files, and the error with which a server ends an upload arrives, which grpc.aio replaces by INTERNAL when it
        was writing (https://github.com/grpc/grpc/issues/36066). Closing the generator ends the call; hold it in
        `contextlib.aclosing` to close it promptly."""
        address, api_key, tls = self.connection.address, self.connection.api_key, self.connection.tls
        with Client(address, api_key=api_key, tls=tls, timeout=self.timeout) as client:
            results = client.upsert(collection, documents)
            while (result := await asyncio.to_thread(next, results, None)) is not None:
                yield result

    async def delete_documents(self, collection: str, ids: Sequence[str]) -> int:
        """How many of them there were."""
        request = delete_request(collection, ids)
        return int((await self._call(self._retrieval.DeleteDocuments, request)).deleted)

    async def get_document(
        self, collection: str, document_id: str, byte_start: int | None = None, byte_end: int | None = None
    ) -> retrieval_pb2.StoredDocument:
        """A document's description and text, or the bytes [byte_start, byte_end) that a citation names."""
        request = document_request(collection, document_id, byte_start, byte_end)
        found: retrieval_pb2.StoredDocument = await self._call(self._retrieval.GetDocument, request)
        return found

    async def collections(self) -> list[retrieval_pb2.Collection]:
        """All of them, by name."""
        found: list[retrieval_pb2.Collection] = []
        token = ""
        while True:
            page = await self._call(self._retrieval.ListCollections, collections_request(token))
            found += page.collections
            if not (token := page.next_page_token):
                return found

    async def delete_collection(self, collection: str) -> int:
        """How many documents it had."""
        request = collection_request(collection)
        return int((await self._call(self._retrieval.DeleteCollection, request)).documents)

    async def query(
        self, collection: str, question: str | Sequence[float], **options: Unpack[QueryOptions]
    ) -> retrieval_pb2.QueryResponse:
        """The chunks that answer best, with what each stage of the search said of them."""
        request = query_request(collection, question, options)
        answer: retrieval_pb2.QueryResponse = await self._call(self._retrieval.Query, request)
        return answer

    async def embed(self, texts: Sequence[str]) -> "list[array[float]]":
        """The vector of each text, float32."""
        return vectors(await self._call(self._embedding.Embed, embed_request(texts)))

    async def models(self) -> list[model_pb2.Model]:
        request = model_pb2.ListModelsRequest(page_size=1000)
        return list((await self._call(self._models.ListModels, request)).models)

    async def health(self, service: str = "") -> str:
        """`SERVING` or `NOT_SERVING`, of the whole server or of one service such as millrace.v1.GenerationService."""
        return health_name(await self._call(self._health.Check, health_request(service)))

    async def close(self) -> None:
        """End every call and the connection. Idempotent."""
        await self._channel.close()

    async def _name(self, model: str | None) -> str:
        if model is None and self.model is None:
            self.model = first_model(await self.models())
        return model or self.model or ""

    async def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return await method(request, **self._call_options)
        except grpc.RpcError as failure:
            raise self._error(failure) from failure

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
