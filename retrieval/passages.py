"""Embedding of what is stored: behind every question, in batches, and believed only after a look at it."""

from collections.abc import Sequence

import numpy as np

from millrace.retrieval.embedding import Embedder
from millrace.server.errors import InternalError, Unavailable
from millrace.server.types import EmbedderInfo

BATCH = 32  # texts of one call


async def embed_passages(
    embedder: Embedder, info: EmbedderInfo, texts: Sequence[str], tenant: str
) -> tuple[list[bytes], int]:
    """The vector of each text, little-endian float32, and the tokens that it took.

    Texts longer than the model takes are cut: chunks that an older tokenizer counted may be. Raises Unavailable
    if the model is another than `info` says by the end.
    """
    vectors: list[bytes] = []
    tokens = 0
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        embedded = await embedder.embed(batch, tenant=tenant, background=True, truncate=True)
        found = np.ascontiguousarray(embedded.vectors, "<f4")
        if found.shape != (len(batch), info.dimensions) or not _usable(found):
            raise InternalError(f"the embedding model returned unusable vectors of shape {found.shape}")
        vectors += [row.tobytes() for row in found]
        tokens += embedded.tokens
    if embedder.info().revision != info.revision:
        raise Unavailable("the embedding model was exchanged meanwhile; nothing of this was stored", retry_after=1)
    return vectors, tokens


def _usable(vectors: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bool:
    return bool(np.isfinite(vectors).all() and vectors.any(axis=1).all())
