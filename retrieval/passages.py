"""Embedding of what is stored: behind every question, in batches, and believed only after a look at it."""

import asyncio
from collections.abc import Sequence

import numpy as np

from millrace.retrieval.embedding import Embedded, Embedder
from millrace.server.errors import EngineRestarting, InternalError, ModelLoading, QueueFull, Unavailable
from millrace.server.types import EmbedderInfo

BATCH = 32  # texts of one call
PATIENCE = 120.0  # seconds of waiting for the model, in all batches together
LONGEST_PAUSE = 10.0  # seconds, as long as any before a worker is started again


async def embed_passages(
    embedder: Embedder, info: EmbedderInfo, texts: Sequence[str], tenant: str
) -> tuple[list[bytes], int]:
    """The vector of each text, little-endian float32, and the tokens that it took.

    Texts longer than the model takes are cut: chunks that an older tokenizer counted may be. A model that is loaded,
    restarted or has a full queue is waited for, PATIENCE at most; then its error is raised, any other at once.
    Raises Unavailable if the model is another than `info` says by the end.
    """
    vectors: list[bytes] = []
    tokens = 0
    patient = _Patient(embedder, tenant)
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        embedded = await patient.embed(batch)
        found = np.ascontiguousarray(embedded.vectors, "<f4")
        if found.shape != (len(batch), info.dimensions) or not _usable(found):
            raise InternalError(f"the embedding model returned unusable vectors of shape {found.shape}")
        vectors += [row.tobytes() for row in found]
        tokens += embedded.tokens
    if embedder.info().revision != info.revision:
        raise Unavailable("the embedding model was exchanged meanwhile; nothing of this was stored", retry_after=1)
    return vectors, tokens


class _Patient:
    """Waits for an embedder as long as its patience lasts."""

    def __init__(self, embedder: Embedder, tenant: str):
        self._embedder, self._tenant = embedder, tenant
        self._patience = PATIENCE

    async def embed(self, texts: Sequence[str]) -> Embedded:
        pause = 0.0
        while True:
            try:
                return await self._embedder.embed(texts, tenant=self._tenant, background=True, truncate=True)
            except (EngineRestarting, ModelLoading, QueueFull) as error:
                # Doubled, because it may be these very texts that end the worker each time.
                pause = min(max(error.retry_after or 1, 2 * pause), LONGEST_PAUSE, self._patience)
                if not pause:
                    raise
            self._patience -= pause
            await asyncio.sleep(pause)


def _usable(vectors: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bool:
    return bool(np.isfinite(vectors).all() and vectors.any(axis=1).all())
