"""A small library for tests: a real database and index, an embedder and a tokenizer of our own."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from millrace.retrieval.embedding import Embedded
from millrace.retrieval.library import Library
from millrace.retrieval.parsing.base import Limits
from millrace.retrieval.types import Document, MediaType, ParsedDocument
from millrace.server.config import RetrievalConfig
from millrace.server.errors import EmptyDocument, RequestError
from millrace.server.types import EmbedderInfo

DIMENSIONS = 16
SPECIAL_TOKENS = 2


class WordEmbedder:
    """A text's vector is the sum of its words', so that texts with common words are near each other.

    `gate`: cleared, embedding waits; `fault`: raised by what embeds; `texts`: all that were embedded.
    """

    def __init__(self, name: str = "words", dimensions: int = DIMENSIONS):
        self.described = EmbedderInfo(name, f"revision of {name}", dimensions, max_tokens=256, vocab_size=1)
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault: RequestError | None = None
        self.texts: list[str] = []

    def info(self) -> EmbedderInfo:
        if isinstance(self.fault, RequestError):
            raise self.fault
        return self.described

    def vector(self, text: str) -> np.ndarray:
        dimensions = self.described.dimensions
        total = np.full(dimensions, 0.01, np.float32)
        for word in text.lower().split():
            seed = hashlib.sha256(f"{self.described.name} {word}".encode()).digest()
            total += np.frombuffer(hashlib.shake_128(seed).digest(dimensions), np.int8) / np.float32(128)
        return total

    async def embed(
        self, texts: Sequence[str], *, tenant: str, background: bool = False, truncate: bool = False
    ) -> Embedded:
        await self.gate.wait()
        if self.fault:
            raise self.fault
        self.texts += texts
        return Embedded(np.stack([self.vector(text) for text in texts]), sum(len(text.split()) for text in texts))


class TextParser:
    """Reads everything as text, in this process."""

    async def parse(self, document: Document, limits: Limits) -> ParsedDocument:
        if not document.content.strip():
            raise EmptyDocument("the document is empty; send its text, or leave it out")
        return ParsedDocument(document.content.decode(), document.title or document.source, MediaType.TEXT)

    async def close(self) -> None:
        pass


def word_tokenizer() -> Tokenizer:
    """One token for each word."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def settings(directory: Path, **overrides: Any) -> RetrievalConfig:
    return RetrievalConfig(data_dir=directory, **{"chunk_tokens": 48, "chunk_overlap": 4, **overrides})


async def open_library(
    directory: Path, embedder: WordEmbedder | None = None, parser: Any = None, **overrides: Any
) -> Library:
    config = settings(directory, **overrides)
    return await Library.open(
        config, embedder or WordEmbedder(), word_tokenizer(), SPECIAL_TOKENS, parser or TextParser()
    )


@asynccontextmanager
async def library(directory: Path, embedder: WordEmbedder | None = None, **overrides: Any) -> AsyncIterator[Library]:
    opened = await open_library(directory, embedder, **overrides)
    try:
        yield opened
    finally:
        await opened.close()


def document(name: str, text: str, **fields: Any) -> Document:
    return Document(name, text.encode(), **fields)


def prose(words: Sequence[str], count: int, seed: int = 0) -> str:
    """`count` words in sentences of ten."""
    random = np.random.default_rng(seed)
    picked = random.choice(words, count)
    return " ".join(word + ("." if place % 10 == 9 else "") for place, word in enumerate(picked))
