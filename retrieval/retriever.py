"""The way from a question to chunks."""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from millrace.retrieval import catalog, chunks, filters, lexical
from millrace.retrieval.catalog import Collection
from millrace.retrieval.database import Database
from millrace.retrieval.embedding import Embedder
from millrace.retrieval.fusion import reciprocal_rank_fusion
from millrace.retrieval.index.base import Float32, Labels, VectorIndex
from millrace.retrieval.indexes import Indexes, being_renewed
from millrace.retrieval.lexical import Ranked
from millrace.retrieval.types import Chunk, Hit, SearchMode, SearchRequest, SearchResult, SearchTimings, StageScore
from millrace.server.errors import InvalidRequest, InvalidVector, Unavailable

ATTEMPTS = 10  # where what the stages found is replaced before it can be read
NOTHING = Ranked([], [])


class Query(NamedTuple):
    """What the vector stage looks for; None: it has nothing to do. `tokens`: what embedding it took."""

    vector: Float32 | None
    tokens: int = 0
    microseconds: int = 0


class Found(NamedTuple):
    """What the stages found. `best`: chunks with scores, best first; `lost`: some candidate was gone by then."""

    lexical: Ranked
    vector: Ranked
    best: list[tuple[Chunk, float]]
    lost: bool
    lexical_us: int
    vector_us: int


class Retriever:
    """`on_outdated` is called when a search meets vectors of another model than the embedder's."""

    def __init__(self, database: Database, indexes: Indexes, embedder: Embedder, on_outdated: Callable[[], None]):
        self._database, self._indexes, self._embedder = database, indexes, embedder
        self._on_outdated = on_outdated

    async def search(self, tenant: str, request: SearchRequest) -> SearchResult:
        """The chunks that answer best, of those whose document passes the filter; fewer where there are fewer.

        A question longer than the embedding model takes is cut for the vector stage, and to 64 words for the other.
        Raises CollectionNotFound, InvalidRequest, InvalidVector, Unavailable, or as the embedder does.
        """
        began = time.perf_counter()
        mode = mode_of(request)
        collection = await self._database.read(lambda db: catalog.find(db, tenant, request.collection))
        where = filters.where(collection.id, request.filter)
        index = await self._index(collection) if mode is not SearchMode.LEXICAL else None
        query = asyncio.create_task(self._query(tenant, request, collection, mode))
        try:
            found = await self._stages(collection, request, mode, where, index, query)
            for _ in range(ATTEMPTS - 1):
                if not found.lost:
                    break
                found = await self._stages(collection, request, mode, where, index, query)
            return _result(found, await query, _since(began))
        finally:
            query.cancel()
            await asyncio.gather(query, return_exceptions=True)

    async def _stages(
        self,
        collection: Collection,
        request: SearchRequest,
        mode: SearchMode,
        where: filters.Where,
        index: VectorIndex | None,
        query: "asyncio.Task[Query]",
    ) -> Found:
        """Both stages, fused and read: the embedding of the question runs beside the lexical one."""
        by_words, allowed, lexical_us = await self._database.read(
            lambda db: _lexical_stage(db, collection, request, mode, where)
        )
        by_vector, vector_us = await _vector_stage(index, request, (await query).vector, allowed)
        if mode is SearchMode.HYBRID:
            scores = dict(reciprocal_rank_fusion([by_vector.labels, by_words.labels]))
        else:
            ranked = by_words if mode is SearchMode.LEXICAL else by_vector
            scores = dict(zip(ranked.labels, ranked.scores, strict=True))
        read, lost = await self._database.read(lambda db: _read(db, collection, list(scores), request.top_k))
        best = [(chunk, scores[chunk.label]) for chunk in read]
        return Found(by_words, by_vector, best, lost, lexical_us, vector_us)

    async def _query(self, tenant: str, request: SearchRequest, collection: Collection, mode: SearchMode) -> Query:
        if mode is SearchMode.LEXICAL:
            return Query(None)
        if request.vector is not None:
            return Query(_client_vector(request.vector, collection.dimensions))
        began = time.perf_counter()
        if self._embedder.info().revision != collection.revision:
            self._on_outdated()
            raise being_renewed(collection)
        embedded = await self._embedder.embed([request.text], tenant=tenant, truncate=True)
        return Query(embedded.vectors[0], embedded.tokens, _since(began))

    async def _index(self, collection: Collection) -> VectorIndex:
        try:
            return await self._indexes.get(collection)
        except Unavailable:
            self._on_outdated()
            raise


def mode_of(request: SearchRequest) -> SearchMode:
    """How to search; a vector is searched by alone. Raises InvalidRequest."""
    if not 1 <= request.top_k <= request.candidates:
        raise InvalidRequest.at("top_k", f"is {request.top_k}; must be at least 1 and at most candidates")
    if (request.vector is None) == (not request.text):
        raise InvalidRequest.at("query", "needs exactly one of text and vector_f32le")
    if request.vector is None:
        return request.mode
    if request.mode is SearchMode.LEXICAL:
        raise InvalidRequest.at("mode", "a search by words needs a text, not a vector")
    return SearchMode.VECTOR


def _client_vector(data: bytes, dimensions: int) -> Float32:
    if len(data) != 4 * dimensions:
        fault = f"has {len(data)} bytes; the collection's {dimensions} dimensions are {4 * dimensions}"
        raise InvalidVector.at("vector_f32le", fault)
    vector = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(vector).all() or not vector.any():
        raise InvalidVector.at("vector_f32le", "must have finite values that are not all zero")
    return vector


def _lexical_stage(
    db: sqlite3.Connection, collection: Collection, request: SearchRequest, mode: SearchMode, where: filters.Where
) -> tuple[Ranked, Labels | None, int]:
    """Also returns the labels that the filter allows, for the vector stage, and the microseconds it took."""
    began = time.perf_counter()
    catalog.again(db, collection)
    allowed = None if mode is SearchMode.LEXICAL else chunks.allowed_labels(db, where)
    if mode is SearchMode.VECTOR:
        return NOTHING, allowed, _since(began)
    ranked = lexical.search(db, collection.id, request.text, request.candidates, where)
    return ranked, allowed, _since(began)


async def _vector_stage(
    index: VectorIndex | None, request: SearchRequest, vector: Float32 | None, allowed: Labels | None
) -> tuple[Ranked, int]:
    """Also returns the microseconds it took."""
    if index is None or vector is None or (allowed is not None and not len(allowed)):
        return NOTHING, 0
    began = time.perf_counter()
    near = await asyncio.to_thread(
        index.search, vector, request.candidates, allowed=allowed, ef_search=request.ef_search, exact=request.exact
    )
    return Ranked(near.labels.tolist(), near.scores.tolist()), _since(began)


def _read(db: sqlite3.Connection, collection: Collection, labels: list[int], top_k: int) -> tuple[list[Chunk], bool]:
    """The first chunks that are there, and whether others of `labels` are not."""
    present = chunks.present(db, collection, labels)
    best = present[:top_k]
    read = chunks.hydrate(db, collection, best)
    return [read[label] for label in best], len(present) < len(labels)


def _result(found: Found, query: Query, total_us: int) -> SearchResult:
    by_words, by_vector = _stage_scores(found.lexical), _stage_scores(found.vector)
    hits = tuple(
        Hit(chunk, score, by_words.get(chunk.label), by_vector.get(chunk.label)) for chunk, score in found.best
    )
    timings = SearchTimings(query.microseconds, found.lexical_us, found.vector_us, total_us)
    return SearchResult(hits, timings, query.tokens)


def _stage_scores(ranked: Ranked) -> dict[int, StageScore]:
    return {
        label: StageScore(rank, score)
        for rank, (label, score) in enumerate(zip(ranked.labels, ranked.scores, strict=True), start=1)
    }


def _since(began: float) -> int:
    return round((time.perf_counter() - began) * 1e6)
