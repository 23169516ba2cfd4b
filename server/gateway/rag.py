"""From a question to what its answer is made from: search, choose, judge whether it is enough."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from millrace.retrieval.embedding import Embedder
from millrace.retrieval.types import Chunk, Hit, SearchRequest, SearchResult
from millrace.server.errors import InvalidRequest
from millrace.server.gateway.context import build_context
from millrace.server.gateway.effective import either
from millrace.server.gateway.extractive import Quotation, forges, quote
from millrace.server.gateway.guardrails.base import Guard
from millrace.server.gateway.outcome import Outcome
from millrace.server.gateway.prompt import LONG, run_beside
from millrace.server.gateway.question import answer_mode, query_of
from millrace.server.gateway.routing import ModelCard
from millrace.server.gateway.sources import MARGIN, Found, masked_hits, numbered
from millrace.server.gateway.support import Candidate, Quote, best_of, candidates, preselect, supports
from millrace.server.telemetry.metrics import Metrics
from millrace.server.types import AnswerMode, BackendInfo, GenerateRequest, RetrievalOptions, Source

Vector = NDArray[np.float32]

TOP_K, CANDIDATES, MAX_SENTENCES = 5, 20, 3


class Searcher(Protocol):
    """What a `Library` is to this file."""

    async def search(self, tenant: str, request: SearchRequest) -> SearchResult:
        """Raises CollectionNotFound, InvalidRequest."""

    async def surroundings(
        self, tenant: str, collection: str, chunks: Sequence[Chunk], characters: int
    ) -> list[tuple[str, str] | None]:
        """The text before and after each chunk, at most so many characters; None: it is no longer stored.

        Raises CollectionNotFound.
        """


@dataclass(frozen=True, slots=True)
class Grounds:
    """What an answer is made from. `request` has the prompt to run, unless the answer is a `quotation` already.

    Without retrieval there is nothing but the request.
    """

    request: GenerateRequest
    mode: AnswerMode | None = None
    sources: tuple[Source, ...] = ()
    max_context_tokens: int | None = None
    embedding_tokens: int = 0
    quotation: Quotation | None = None


class Rag:
    """`min_support`: what an answer needs unless the request says otherwise, [0, 1]."""

    def __init__(
        self, searcher: Searcher, embedder: Embedder, min_support: float, metrics: Metrics, executor: Executor
    ):
        self._searcher, self._embedder, self._min_support = searcher, embedder, min_support
        self._metrics, self._executor = metrics, executor

    async def ground(
        self,
        card: ModelCard,
        request: GenerateRequest,
        options: RetrievalOptions,
        info: BackendInfo,
        tenant: str,
        guard: Guard | None,
    ) -> Grounds:
        """Search, and find the sentences that support an answer; without any the answer is the refusal.

        With `guard`, sources are shown to client and model without personal data. Raises FeatureUnsupported,
        InvalidRequest, PromptTooLong, CollectionNotFound, and what searching and embedding raise.
        """
        with self._measured() as outcome:
            mode, query = answer_mode(card, request, options), query_of(request, options)
            result = await self._searcher.search(tenant, search_request(options, query))
            found = await self._shown(tenant, options.collection, result.hits, guard)
            if mode is AnswerMode.GENERATIVE:
                build = partial(build_context, card, request, options, info, found.shown)
                context = await run_beside(self._executor, LONG + 1, build)
                sources, max_tokens, readable = context.sources, context.max_tokens, context.sources
                request = replace(request, prompt=context.prompt)
            else:
                sources, max_tokens, readable = numbered(found.shown), None, numbered(found.hits)
            quotes, tokens = await self._supported(query, readable, options, tenant, mode)
            tokens += result.embedding_tokens
            quotation = None
            if not quotes:
                outcome.good = "refused"
                quotation = Quotation.refusal(card.tokenizer, request, tokens)
            elif mode is AnswerMode.EXTRACTIVE:
                best = [found.show(one) for one in best_of(quotes, either(options.max_sentences, MAX_SENTENCES))]
                join = partial(quote, card.tokenizer, request, best, guard, tokens)
                quotation = await run_beside(self._executor, LONG + 1, join)
            return Grounds(request, mode, sources, max_tokens, tokens, quotation)

    async def _shown(self, tenant: str, collection: str, hits: Sequence[Hit], guard: Guard | None) -> Found:
        """With `guard`, without hits that have been deleted or replaced since the search."""
        if guard is None:
            return Found(hits, hits)
        around = await self._searcher.surroundings(tenant, collection, [hit.chunk for hit in hits], MARGIN)
        size = sum(len(hit.chunk.text) + 2 * MARGIN for hit in hits)
        return await run_beside(self._executor, size, lambda: masked_hits(hits, around, guard))

    async def _supported(
        self, query: str, sources: Sequence[Source], options: RetrievalOptions, tenant: str, mode: AnswerMode
    ) -> tuple[list[Quote], int]:
        """The sentences with enough support, best first, and the tokens that embedding them took."""

        def chosen() -> list[Candidate]:
            found = candidates(sources)
            if mode is AnswerMode.EXTRACTIVE:
                found = [one for one in found if not forges(one.text, len(sources))]
            return preselect(query, found)

        size = sum(len(source.hit.chunk.text) for source in sources)
        found = await run_beside(self._executor, size, chosen)
        if not found:
            return [], 0
        texts = [query, *(candidate.readable for candidate in found)]
        vectors, tokens = await self._embedder.embed(texts, tenant=tenant, truncate=True)
        scores = supports(query, found, cosines(vectors[0], vectors[1:]))
        enough = either(options.min_support, self._min_support)
        quotes = [Quote(one, score) for one, score in zip(found, scores, strict=True) if score >= enough]
        return sorted(quotes, key=lambda quote: -quote.score), tokens

    @contextmanager
    def _measured(self) -> Iterator[Outcome]:
        began, outcome = time.monotonic(), Outcome("answered")
        try:
            with outcome.watch():
                yield outcome
        finally:
            self._metrics.retrieval_requests.labels(outcome.word).inc()
            self._metrics.retrieval_time.observe(time.monotonic() - began)


def search_request(options: RetrievalOptions, query: str) -> SearchRequest:
    """Raises InvalidRequest if there are fewer candidates than chunks to return."""
    top_k = either(options.top_k, TOP_K)
    candidates = either(options.candidates, max(CANDIDATES, top_k))
    if candidates < top_k:
        raise InvalidRequest.at("retrieval.candidates", f"{candidates} are fewer than the top_k of {top_k}")
    return SearchRequest(
        options.collection, query, top_k=top_k, candidates=candidates, filter=options.filter, mode=options.mode
    )


def cosines(vector: Vector, others: Vector) -> list[float]:
    """Cosine similarity of [dimensions] with each of [texts, dimensions]; 0 where a vector is 0."""
    norms = np.linalg.norm(others, axis=1) * np.linalg.norm(vector)
    similarities: list[float] = (others @ vector / np.where(norms > 0, norms, 1)).tolist()
    return similarities
