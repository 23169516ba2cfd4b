"""One call of UpsertDocuments: messages in, whole documents to the library, an answer for each.

What is wrong with a document fails that one alone; the rest of it is read and dropped. Messages that make no
documents end the call, after every document that had come whole before.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from io import BytesIO
from typing import NamedTuple

from millrace.retrieval.types import Document, Upserted
from millrace.server.api import bounds
from millrace.server.api import retrieval_convert as convert
from millrace.server.api.endpoint import Stream
from millrace.server.api.status import public
from millrace.server.errors import DeadlineExceeded, DocumentTooLarge, Draining, InvalidRequest, RequestError
from millrace.server.telemetry.logs import get_logger
from millrace.v1 import retrieval_pb2 as pb

AT_ONCE = 4  # documents of one call in memory, so that embedding never waits for parsing
PART_TIMEOUT = 60.0  # seconds from one part of a document to the next
# Without these nobody could say which document failed, or where the next one begins.
FRAMING = frozenset({"document.id", "document.content_size"})
MAX_CONTENT = int(bounds.bounds_of(pb.Document.DESCRIPTOR.fields_by_name["content_size"]).maximum)
MAX_DROPPED = 1 << 30  # bytes of documents above MAX_CONTENT that a call may bring for nothing

log = get_logger()

Upsert = Callable[[str, Document], Awaitable[Upserted]]


class Whole(NamedTuple):
    """A document of which every byte has come; with a `fault`, why it fails, its content is dropped."""

    head: pb.Document
    content: bytes
    fault: RequestError | None


class Upload:
    """`upsert` stores a document in a collection; `large` has the places of documents that come in parts.

    From when `draining` says so, documents that begin fail.
    """

    def __init__(
        self,
        requests: AsyncIterator[pb.UpsertDocumentsRequest],
        stream: Stream,
        upsert: Upsert,
        large: asyncio.Semaphore,
        draining: Callable[[], bool],
    ):
        self._requests, self._stream, self._upsert, self._large = requests, stream, upsert, large
        self._draining = draining
        self._reading, self._writing = asyncio.Lock(), asyncio.Lock()
        self._workers: list[asyncio.Task[None]] = []
        self._collection = ""
        self._fault: RequestError | None = None
        self._dropped = 0
        self.answers = 0

    async def run(self) -> None:
        """Return when every document is answered. Raises InvalidRequest where the messages make no documents,
        DeadlineExceeded if a part is late, SlowReader."""
        try:
            async with asyncio.TaskGroup() as group:
                self._workers = [group.create_task(self._work()) for _ in range(AT_ONCE)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        if self._fault:
            raise self._fault

    def stop(self) -> None:
        """End `run` with what has been answered."""
        for worker in self._workers:
            worker.cancel()

    async def _work(self) -> None:
        """Take one document after the other, each as soon as all of it has come."""
        while True:
            async with AsyncExitStack() as held:
                async with self._reading:
                    whole = await self._next(held)
                if whole is None:
                    return
                answer = await self._store(whole)
                async with self._writing:  # gRPC takes one message at a time
                    await self._stream.write(answer)
                    self.answers += 1

    async def _next(self, held: AsyncExitStack) -> Whole | None:
        """The next document; None at the end of the call, or of what can be understood of it."""
        if self._fault:
            return None
        try:
            message = await anext(self._requests, None)
            if message is None:
                return None
            fault = self._check(message)
            head = message.document
            if not head.HasField("content_size"):
                return Whole(head, head.content, fault)
            if fault:
                return Whole(head, await self._content(head, keep=False), fault)
            await held.enter_async_context(self._large)
            return Whole(head, await self._content(head, keep=True), None)
        except (InvalidRequest, DeadlineExceeded) as error:
            self._fault = error
            return None

    def _check(self, message: pb.UpsertDocumentsRequest) -> RequestError | None:
        """Why the document that a message begins fails. Raises InvalidRequest if it begins none that can be read."""
        fault: RequestError | None = None
        try:
            bounds.check(message)
        except InvalidRequest as error:
            fields = {violation.field for violation in error.violations}
            if too_large := message.document.content_size > MAX_CONTENT:
                fields.discard("document.content_size")
            if fields & FRAMING or not all(field.split(".")[0] == "document" for field in fields):
                raise
            fault = self._too_large(message.document) if too_large else error
        self._check_collection(message)
        if message.WhichOneof("item") != "document":
            raise InvalidRequest.at("content_part", "no document is open: its content was complete, or none was begun")
        if self._draining():
            return Draining("the server is shutting down; use another replica")
        return fault

    def _too_large(self, head: pb.Document) -> InvalidRequest:
        """The fault of a document that is read only to be dropped; raised if a call brings too much of that."""
        size = head.content_size
        text = f"document {head.id!r} has {size} bytes, {MAX_CONTENT} at most; split it"
        self._dropped += size
        if self._dropped > MAX_DROPPED:
            text += f"; the call ends, because it would bring {self._dropped} bytes of such documents"
            raise DocumentTooLarge.at("document.content_size", text, document=head.id)
        return DocumentTooLarge.at("document.content_size", text, document=head.id)

    def _check_collection(self, message: pb.UpsertDocumentsRequest) -> None:
        self._collection = self._collection or message.collection
        if message.collection != self._collection:
            text = f"is {message.collection!r} after {self._collection!r}: a call is about one collection"
            raise InvalidRequest.at("collection", text)

    async def _content(self, head: pb.Document, *, keep: bool) -> bytes:
        """All the bytes of a document that comes in parts; none of them, once they have come, if not to `keep`."""
        content = BytesIO()  # its value is its buffer: joined pieces would be there twice
        piece, missing = head.content, head.content_size
        while True:
            missing -= len(piece)
            if keep:
                content.write(piece)
            if missing <= 0:
                break
            piece = await self._part(head, missing)
        if missing < 0:
            text = f"document {head.id!r} has {-missing} bytes more than its content_size says"
            raise InvalidRequest.at("document.content_size", text, document=head.id)
        return content.getvalue()

    async def _part(self, head: pb.Document, missing: int) -> bytes:
        try:
            async with asyncio.timeout(PART_TIMEOUT):
                message = await anext(self._requests, None)
        except TimeoutError:
            raise DeadlineExceeded(f"no more of document {head.id!r} came within {PART_TIMEOUT:g} seconds") from None
        if message is None or message.WhichOneof("item") == "document":
            text = f"document {head.id!r} lacks {missing} of its bytes"
            raise InvalidRequest.at("content_part", text, document=head.id)
        bounds.check(message)
        self._check_collection(message)
        return message.content_part

    async def _store(self, whole: Whole) -> pb.UpsertDocumentsResponse:
        try:
            if whole.fault:
                raise whole.fault
            document = convert.document(whole.head, whole.content)
            return convert.upserted(await self._upsert(self._collection, document))
        except Exception as error:
            shown = public(error)
            if shown is not error:
                log.error("a document failed", exc_info=error, **shown.metadata)
            return pb.UpsertDocumentsResponse(
                document_id=whole.head.id,
                status=pb.UPSERT_STATUS_FAILED,
                error_reason=shown.reason,
                error_message=shown.message,
            )
