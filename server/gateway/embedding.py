"""Texts to vectors, over whatever backend embeds."""

import secrets
from collections.abc import Iterator, Sequence

import numpy as np

from millrace.retrieval.embedding import Embedded
from millrace.server.backends.base import Backend
from millrace.server.errors import InvalidRequest, PromptTooLong
from millrace.server.gateway.prompt import check_vocabulary, run_beside
from millrace.server.text.embedding_tokenizer import EmbeddingTokenizer
from millrace.server.types import EmbedderInfo, EmbedRequest

BATCH_TEXTS = 64  # of one request to the backend
BATCH_TOKENS = 16_384  # likewise, unless one text has more


class TextEmbedder:
    """An Embedder. `info`: the model that tokenizer and backend have, whether that is loaded yet or not."""

    def __init__(self, backend: Backend, tokenizer: EmbeddingTokenizer, info: EmbedderInfo):
        self._backend, self._tokenizer, self._info = backend, tokenizer, info

    def info(self) -> EmbedderInfo:
        return self._info

    async def embed(
        self, texts: Sequence[str], *, tenant: str, background: bool = False, truncate: bool = False
    ) -> Embedded:
        keep = self._info.max_tokens if truncate else None
        return await self.embed_inputs(texts, tenant=tenant, background=background, keep=keep, field="texts")

    async def embed_inputs(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        tenant: str,
        background: bool = False,
        keep: int | None = None,
        field: str = "inputs",
    ) -> Embedded:
        """Texts, or token ids that are taken as they are; more than `keep` tokens are cut to so many.

        Raises InvalidRequest or PromptTooLong at `field[i]`, and what the backend raises.
        """
        info = self._info
        texts = [text for text in inputs if isinstance(text, str)]
        encoded = iter(await run_beside(None, sum(map(len, texts)), lambda: self._tokenizer.encode_batch(texts)))
        ids = [self._cut(next(encoded), keep) if isinstance(one, str) else list(one)[:keep] for one in inputs]
        for index, (one, tokens) in enumerate(zip(inputs, ids, strict=True)):
            check(f"{field}[{index}].{'text' if isinstance(one, str) else 'token_ids'}", tokens, info)
        vectors = [
            vector
            for batch in batches(ids)
            for vector in await self._backend.embed(
                EmbedRequest(f"embed-{secrets.token_hex(12)}", tenant, batch, background)
            )
        ]
        matrix = np.frombuffer(b"".join(vectors), "<f4").reshape(len(ids), info.dimensions)
        return Embedded(matrix.astype(np.float32, copy=False), sum(map(len, ids)))

    def _cut(self, ids: list[int], keep: int | None) -> list[int]:
        """At most `keep` ids of a text, the special one at its end included."""
        if keep is None or len(ids) <= keep:
            return ids
        last = 1 if self._tokenizer.special_tokens > 1 and keep > 1 else 0
        return ids[: keep - last] + ids[len(ids) - last :]


def check(field: str, ids: Sequence[int], info: EmbedderInfo) -> None:
    """Raise InvalidRequest or PromptTooLong for what the model cannot read."""
    if not ids:
        raise InvalidRequest.at(field, "has no tokens")
    check_vocabulary(field, ids, info.vocab_size)
    if len(ids) > info.max_tokens:
        raise PromptTooLong.at(
            field,
            f"has {len(ids)} tokens, and {info.name} takes {info.max_tokens}; shorten it or set truncate_tokens",
            prompt_tokens=str(len(ids)),
            limit=str(info.max_tokens),
        )


def batches(texts: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """The texts in order, in runs of at most BATCH_TEXTS with BATCH_TOKENS together."""
    batch: list[Sequence[int]] = []
    tokens = 0
    for text in texts:
        if batch and (len(batch) == BATCH_TEXTS or tokens + len(text) > BATCH_TOKENS):
            yield batch
            batch, tokens = [], 0
        batch.append(text)
        tokens += len(text)
    if batch:
        yield batch
