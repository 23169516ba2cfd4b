"""Stand-ins for the seams that tests share."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from millrace.retrieval.types import (
    Chunk,
    CollectionInfo,
    Document,
    Hit,
    MediaType,
    SearchRequest,
    SearchResult,
    StageScore,
    StoredDocument,
    Upserted,
    UpsertStatus,
)
from millrace.server.errors import (
    CollectionNotFound,
    DocumentNotFound,
    FeatureUnsupported,
    PromptTooLong,
    RequestError,
)
from millrace.server.types import (
    BackendInfo,
    EmbedderInfo,
    EmbedRequest,
    EngineStats,
    Finish,
    FinishReason,
    Logprobs,
    TokenDelta,
    TokenRequest,
)

INFO = BackendInfo(
    fingerprint="fake-1",
    executor="fake",
    architecture="FakeForCausalLM",
    parameters=0,
    vocab_size=8192,
    max_model_len=256,
    kv_block_size=16,
    kv_total_blocks=64,
)
EMBEDDER = EmbedderInfo(name="fake-embedder", revision="fa4e" * 16, dimensions=128, max_tokens=256, vocab_size=30_522)

Answer = Callable[[TokenRequest, int], Iterable[int]]


def bag_vector(token_ids: Sequence[int], dimensions: int) -> bytes:
    """A unit vector that is the nearer to another one the more tokens both texts have, in whatever order.

    The first and the last token of a text do not count where there are others: they are special ones.
    """
    words = sorted(set(token_ids[1:-1] or token_ids))
    vector = sum(np.random.default_rng(token).standard_normal(dimensions) for token in words)
    return (vector / np.linalg.norm(vector)).astype("<f4").tobytes()


class FakeBackend:
    """Answers choice `c` of a request with `answer(request, c)`, `tokens_per_step` tokens a step.

    The log-probability of token t is -t. `fail_after` steps raise `error`, 0 of them at admission. Texts become
    `bag_vector`s, or `embed_error`; with `embedding` None it embeds nothing. While `resumed` is clear, no step comes.
    """

    def __init__(self, answer: Answer, tokens_per_step: int = 1, info: BackendInfo = INFO):
        self.answer, self.tokens_per_step, self.described = answer, tokens_per_step, info
        self.embedding: EmbedderInfo | None = EMBEDDER
        self.error: RequestError | None = None
        self.embed_error: RequestError | None = None
        self.fail_after = 0
        self.resumed = asyncio.Event()
        self.resumed.set()
        self.ready = True
        self.requests: list[TokenRequest] = []
        self.embed_requests: list[EmbedRequest] = []
        self.live: set[FakeStream] = set()
        self.callbacks: list[Callable[[bool], None]] = []
        self.closed = False

    async def generate(self, request: TokenRequest) -> "FakeStream":
        await asyncio.sleep(0)
        if self.error and self.fail_after == 0:
            raise self.error
        self.requests.append(request)
        stream = FakeStream(self, request)
        self.live.add(stream)
        return stream

    async def embed(self, request: EmbedRequest) -> list[bytes]:
        info = self.embedder()
        self.embed_requests.append(request)
        await asyncio.sleep(0)
        await self.resumed.wait()
        if self.embed_error:
            raise self.embed_error
        for text in request.texts:
            assert text, "a text has a token at least"
            assert 0 <= min(text) <= max(text) < info.vocab_size
            if len(text) > info.max_tokens:
                raise PromptTooLong(f"the text has {len(text)} tokens, the model takes {info.max_tokens}")
        return [bag_vector(text, info.dimensions) for text in request.texts]

    def embedder(self) -> EmbedderInfo:
        if self.embedding is None:
            raise FeatureUnsupported("this backend embeds nothing")
        return self.embedding

    def info(self) -> BackendInfo:
        return self.described

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.live), total_blocks=self.described.kv_total_blocks)

    def on_ready(self, callback: Callable[[bool], None]) -> None:
        self.callbacks.append(callback)
        callback(self.ready)

    def set_ready(self, ready: bool) -> None:
        self.ready = ready
        for callback in self.callbacks:
            callback(ready)

    async def close(self) -> None:
        self.closed = True
        for stream in list(self.live):
            await stream.aclose()


class FakeStream:
    """A running request. Every step yields one delta for each choice that still runs."""

    def __init__(self, backend: FakeBackend, request: TokenRequest):
        self.backend, self.request, self.steps = backend, request, 0
        begun = request.outputs or {}
        self.made = {c: len(begun.get(c, ())) for c in request.choices}
        self.running: dict[int, Iterator[int]] = {
            c: islice(backend.answer(request, c), made, None) for c, made in self.made.items()
        }
        self.stopped = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        await asyncio.sleep(0)
        while self.running and not self.backend.resumed.is_set():
            waits = [asyncio.create_task(event.wait()) for event in (self.backend.resumed, self.stopped)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            self.stopped.clear()
        if self.backend.error and self.backend.fail_after <= self.steps:
            raise self.backend.error
        self.steps += 1
        if not self.running:
            self.backend.live.discard(self)
            raise StopAsyncIteration
        return [self.advance(choice) for choice in list(self.running)]

    def advance(self, choice: int) -> TokenDelta:
        delta = TokenDelta(choice, cached_prompt_tokens=1, queue_us=5)
        for token in islice(self.running[choice], self.backend.tokens_per_step):
            delta.token_ids.append(token)
            self.made[choice] += 1
            if token in self.request.stop_token_ids and self.made[choice] > self.request.min_output_tokens:
                delta.finish = Finish(FinishReason.STOP, stop_token_id=token)
            elif self.made[choice] == self.request.max_output_tokens:
                delta.finish = Finish(FinishReason.MAX_TOKENS)
            if delta.finish:
                del self.running[choice]
                break
        else:
            assert delta.token_ids, "an answer must end with a stop token or be long enough"
        if (top_n := self.request.logprobs_top_n) is not None:
            values = [-float(t) for t in delta.token_ids]
            delta.logprobs = Logprobs(
                top_n,
                values,
                [t + k for t in delta.token_ids for k in range(top_n)],
                [v - k for v in values for k in range(top_n)],
            )
        return delta

    def stop(self, choice: int) -> None:
        self.running.pop(choice, None)
        self.stopped.set()

    async def aclose(self) -> None:
        self.running.clear()
        self.stopped.set()
        self.backend.live.discard(self)


class FakeLibrary:
    """Documents in memory, their content their text, one chunk each. `errors`: what fails, by document id.

    A document lasts until `resumed` is set. A search finds what has a word of the question, most of them first.
    """

    def __init__(self) -> None:
        self.documents: dict[tuple[str, str], dict[str, Document]] = {}
        self.errors: dict[str, Exception] = {}
        self.searches: list[tuple[str, SearchRequest]] = []
        self.resumed = asyncio.Event()
        self.resumed.set()
        self.live, self.most = 0, 0

    async def upsert(self, tenant: str, collection: str, document: Document) -> Upserted:
        self.live += 1
        self.most = max(self.most, self.live)
        try:
            await asyncio.sleep(0)
            await self.resumed.wait()
        finally:
            self.live -= 1
        if error := self.errors.get(document.id):
            raise error
        stored = self.documents.setdefault((tenant, collection), {})
        before = stored.get(document.id)
        stored[document.id] = document
        if before == document:
            return Upserted(document.id, UpsertStatus.UNCHANGED, chunks=1, chunks_embedded=0)
        status = UpsertStatus.UPDATED if before else UpsertStatus.CREATED
        return Upserted(document.id, status, 1, 1, embedding_tokens=len(document.content.split()))

    async def delete_documents(self, tenant: str, collection: str, ids: Sequence[str]) -> int:
        stored = self.collection(tenant, collection)
        return sum(stored.pop(one, None) is not None for one in dict.fromkeys(ids))

    async def delete_collection(self, tenant: str, collection: str) -> int:
        self.collection(tenant, collection)
        return len(self.documents.pop((tenant, collection)))

    async def list_collections(self, tenant: str, after: str, limit: int) -> list[CollectionInfo]:
        found = sorted((name, d) for (owner, name), d in self.documents.items() if owner == tenant and name > after)
        return [CollectionInfo(name, len(d), len(d), EMBEDDER.name, EMBEDDER.dimensions, "flat") for name, d in found][
            :limit
        ]

    async def get_document(
        self, tenant: str, collection: str, document: str, byte_start: int | None, byte_end: int | None
    ) -> StoredDocument:
        if (found := self.collection(tenant, collection).get(document)) is None:
            raise DocumentNotFound(f"there is no document {document!r}", resource_type="", resource_name=document)
        text = found.content[byte_start or 0 : byte_end].decode()
        kind = found.media_type or MediaType.TEXT
        size = len(found.content)
        return StoredDocument(found.id, found.source, found.title, kind, found.metadata, 1, size, text, byte_start or 0)

    async def search(self, tenant: str, request: SearchRequest) -> SearchResult:
        self.searches.append((tenant, request))
        hits = []
        for label, found in enumerate(self.collection(tenant, request.collection).values()):
            text = found.content.decode()
            count = len(set(request.text.split()) & set(text.split()))
            chunk = Chunk(
                label, f"c{label}", found.id, found.source or found.id, found.title, 0, len(found.content), text, 1
            )
            hits.append(Hit(replace(chunk, metadata=found.metadata), count, lexical=StageScore(1, count)))
        best = sorted((hit for hit in hits if hit.score), key=lambda hit: -hit.score)
        return SearchResult(tuple(best[: request.top_k]), embedding_tokens=len(request.text.split()))

    async def surroundings(
        self, tenant: str, collection: str, chunks: Sequence[Chunk], characters: int
    ) -> list[tuple[str, str] | None]:
        return [("", "")] * len(chunks)

    def collection(self, tenant: str, name: str) -> dict[str, Document]:
        if (tenant, name) not in self.documents:
            raise CollectionNotFound(f"there is no collection {name!r}", resource_type="", resource_name=name)
        return self.documents[tenant, name]
