"""A gateway over the fake backend and the built-in model's tokenizer."""

import asyncio
import re
import zlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from fakes import EMBEDDER, FakeBackend
from structlog.testing import capture_logs

from millrace.retrieval.types import Chunk, Hit, SearchRequest, SearchResult
from millrace.server.config import BUILTIN
from millrace.server.errors import CollectionNotFound
from millrace.server.gateway.collect import Collected, collect
from millrace.server.gateway.embedding import TextEmbedder
from millrace.server.gateway.gateway import Gateway
from millrace.server.gateway.limits import Limits
from millrace.server.gateway.routing import ModelCard, Routes
from millrace.server.model.checkpoint import read_config, read_generation
from millrace.server.telemetry.metrics import Metrics
from millrace.server.text.template import ChatTemplate
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import Caller, GenerateEvent, GenerateRequest

CALLER = Caller("acme", "key1")


class Words:
    """Stands in for an EmbeddingTokenizer: a token is a word, whatever its case."""

    special_tokens = 2

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        words = [re.findall(r"\w+", text.lower()) for text in texts]
        return [[1, *(1000 + zlib.crc32(word.encode()) % 29_000 for word in line), 2] for line in words]


class Shelf:
    """Stands in for a library of one tenant and one collection, `shop`: all its chunks with a word of the query."""

    def __init__(self) -> None:
        self.documents: dict[str, bytes] = {}
        self.chunks: list[Chunk] = []
        self.requests: list[SearchRequest] = []
        self.opened = asyncio.Event()
        self.opened.set()

    def add(self, document_id: str, text: str, edges: Sequence[int] = (), page: int | None = None) -> None:
        """Cut a document at these characters."""
        self.documents[document_id] = text.encode()
        for start, end in zip([0, *edges], [*edges, len(text)], strict=True):
            label, first = len(self.chunks), len(text[:start].encode())
            piece = text[start:end]
            last = first + len(piece.encode())
            id = f"chunk{label}"
            self.chunks.append(Chunk(label, id, document_id, f"{document_id}.md", "", first, last, piece, 0, page))

    async def search(self, tenant: str, request: SearchRequest) -> SearchResult:
        self.requests.append(request)
        await self.opened.wait()
        if (tenant, request.collection) != ("acme", "shop"):
            raise CollectionNotFound("none", resource_type="millrace.v1.Collection", resource_name=request.collection)
        asked = set(re.findall(r"\w+", request.text.lower()))
        shared = [(len(asked & set(re.findall(r"\w+", chunk.text.lower()))), -chunk.label) for chunk in self.chunks]
        best = [self.chunks[-label] for score, label in sorted(shared, reverse=True) if score]
        return SearchResult(
            tuple(Hit(chunk, 1 / rank) for rank, chunk in enumerate(best[: request.top_k], 1)), embedding_tokens=7
        )

    async def surroundings(
        self, tenant: str, collection: str, chunks: Sequence[Chunk], characters: int
    ) -> list[tuple[str, str] | None]:
        around: list[tuple[str, str] | None] = []
        for chunk in chunks:
            data = self.documents.get(chunk.document_id, b"")
            sides = data[: chunk.byte_start].decode()[-characters:], data[chunk.byte_end :].decode()[:characters]
            around.append(sides if data[chunk.byte_start : chunk.byte_end] == chunk.text.encode() else None)
        return around


class House:
    """A gateway whose fake backend answers every choice with `script`, then the end-of-sequence token.

    Its `shelf` is empty.
    """

    def __init__(self, card: ModelCard):
        self.tokenizer = card.tokenizer
        self.script: list[int] = []
        self.eos = next(iter(card.stop_token_ids))
        self.backend = FakeBackend(lambda request, choice: [*self.script, self.eos])
        self.metrics = Metrics()
        self.limit = 4
        self.limits = Limits(lambda tenant: self.limit)
        self.shelf = Shelf()
        self.embedder = TextEmbedder(self.backend, Words(), EMBEDDER)
        self.gateway = self.build(card)

    def build(self, card: ModelCard, **options: Any) -> Gateway:
        routes = Routes([replace(card, backend=self.backend)])
        return Gateway(routes, self.limits, self.metrics, self.shelf, self.embedder, **options)

    def say(self, text: str) -> list[int]:
        """Let the backend answer with this text; returns its tokens."""
        self.script = self.tokenizer.encode(text, add_special_tokens=False)
        return self.script

    async def events(self, request: GenerateRequest) -> list[GenerateEvent]:
        async with aclosing(self.gateway.generate(CALLER, request)) as stream:
            events = [event async for event in stream]
        self.check_idle()
        return events

    async def run(self, request: GenerateRequest) -> Collected:
        return collect(await self.events(request))

    def check_idle(self) -> None:
        assert not self.backend.live
        assert self.limits.live == 0

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """What was logged, in place of the log."""
    with capture_logs() as entries:
        yield entries


@pytest.fixture(scope="session")
def builtin_card() -> ModelCard:
    tokenizer = Tokenizer.load(BUILTIN)
    defaults = read_generation(BUILTIN, read_config(BUILTIN))
    return ModelCard(
        name="builtin",
        aliases=("default",),
        tokenizer=tokenizer,
        template=ChatTemplate.load(BUILTIN, tokenizer),
        backend=FakeBackend(lambda request, choice: []),
        default_sampling=defaults.sampling,
        stop_token_ids=frozenset(defaults.eos_token_ids),
    )


@pytest.fixture
def house(builtin_card: ModelCard) -> Iterator[House]:
    house = House(builtin_card)
    yield house
    house.gateway.close()


@pytest.fixture
def roomy(house: House) -> None:
    """A context that sources fit into."""
    house.backend.described = replace(house.backend.described, max_model_len=4096)


@pytest.fixture
def ask() -> Callable[..., GenerateRequest]:
    """A request whose parts can be overridden."""
    return lambda prompt="Hello there", **fields: GenerateRequest(model="builtin", prompt=prompt, **fields)
