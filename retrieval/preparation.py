"""From a document as a client sent it to one that is ready to be stored: parsed, cut, and said what to embed."""

import asyncio
import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from tokenizers import Tokenizer

from millrace.retrieval import filters
from millrace.retrieval.chunking import Chunker, context_of
from millrace.retrieval.chunks import NewChunk
from millrace.retrieval.documents import NewDocument
from millrace.retrieval.parsing.base import Limits
from millrace.retrieval.parsing.encoding import seen
from millrace.retrieval.types import ChunkSpan, Document, ParsedDocument
from millrace.server.config import RetrievalConfig
from millrace.server.errors import EmptyDocument, InvalidRequest
from millrace.server.types import EmbedderInfo

log = logging.getLogger(__name__)

CONTEXT_SHARE = 16  # one token in so many is kept free for title and headings before what is embedded


class Parser(Protocol):
    async def parse(self, document: Document, limits: Limits) -> ParsedDocument:
        """Raises UnusableDocument."""

    async def close(self) -> None: ...


class Preparation:
    """Raises ConfigError where the settings leave a chunk too little text of its own."""

    def __init__(self, config: RetrievalConfig, parser: Parser, tokenizer: Tokenizer, special_tokens: int):
        self._config = config
        self._parser = parser
        self._limits = Limits(max_bytes=config.max_document_bytes)
        self._tokenizer, self._special_tokens = tokenizer, special_tokens
        self._chunkers = {config.chunk_tokens: self._chunker(config.chunk_tokens, config.chunk_overlap)}

    def digest(self, document: Document, info: EmbedderInfo) -> bytes:
        """SHA-256 of all that the stored document depends on. Raises InvalidRequest for what cannot be stored."""
        described = [
            *(document.id, document.source, document.title, document.media_type and document.media_type.value),
            *(filters.normalised(document.metadata), hashlib.sha256(document.content).hexdigest()),
            *(info.revision, self._config.chunk_tokens, self._config.chunk_overlap, self._special_tokens),
        ]
        try:
            return hashlib.sha256(json.dumps(described, ensure_ascii=False).encode()).digest()
        except UnicodeEncodeError as error:
            raise InvalidRequest.at(
                "document", f"id, source, title and metadata must be valid Unicode: {error}"
            ) from None

    async def prepare(
        self, document: Document, digest: bytes, info: EmbedderInfo
    ) -> tuple[NewDocument, dict[bytes, str]]:
        """Also returns the texts to embed, by input. Raises UnusableDocument."""
        source = document.source or document.id
        parsed = await self._parser.parse(replace(document, source=source), self._limits)
        title = source if parsed.title in ("", seen(source)) else parsed.title
        parsed = replace(parsed, title="" if title == source else title)
        chunks, texts = await asyncio.to_thread(self._cut, document.id, parsed, info)
        if not chunks:
            raise EmptyDocument.at("document.content", "has no text")
        metadata = filters.normalised(document.metadata)
        ready = NewDocument(document.id, digest, source, title, parsed.media_type, metadata, parsed.text, chunks)
        return ready, texts

    def inputs(self, parsed: ParsedDocument, spans: Sequence[ChunkSpan], info: EmbedderInfo) -> Mapping[str, str]:
        """The text to embed of each chunk id."""
        chunker = self._chunker_for(info)
        return {span.id: chunker.with_context(parsed, span) for span in spans}

    def _cut(
        self, document_id: str, parsed: ParsedDocument, info: EmbedderInfo
    ) -> tuple[list[NewChunk], dict[bytes, str]]:
        spans = self._chunker_for(info).split(document_id, parsed.text, parsed.media_type)
        texts = self.inputs(parsed, spans, info)
        chunks = [
            NewChunk(span, page_of(parsed, span), context_of(parsed, span), input_of(texts[span.id])) for span in spans
        ]
        return chunks, {chunk.input: texts[chunk.span.id] for chunk in chunks}

    def _chunker_for(self, info: EmbedderInfo) -> Chunker:
        """Chunks never have more tokens than the model reads."""
        tokens = min(self._config.chunk_tokens, info.max_tokens)
        if tokens not in self._chunkers:
            log.warning(
                "%s reads %d tokens, so chunks have that many, not %d", info.name, tokens, self._config.chunk_tokens
            )
            self._chunkers[tokens] = self._chunker(tokens, min(self._config.chunk_overlap, tokens // 4))
        return self._chunkers[tokens]

    def _chunker(self, tokens: int, overlap: int) -> Chunker:
        return Chunker(self._tokenizer, tokens, overlap, self._special_tokens, tokens // CONTEXT_SHARE)


def input_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def page_of(parsed: ParsedDocument, span: ChunkSpan) -> int | None:
    """On which page the chunk begins, from 1."""
    return max(1, bisect_right(parsed.pages, span.byte_start)) if parsed.pages else None
