"""The real server on a real port, over a real gateway whose backend is a fake."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from fakes import EMBEDDER, FakeBackend, FakeLibrary
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from served import embedding_tokenizer

from millrace.server.api.server import ApiServer
from millrace.server.config import BUILTIN, ServerConfig
from millrace.server.errors import Unauthenticated
from millrace.server.gateway.embedding import TextEmbedder
from millrace.server.gateway.gateway import Gateway
from millrace.server.gateway.limits import Limits
from millrace.server.gateway.routing import ModelCard, Routes
from millrace.server.telemetry.metrics import Metrics
from millrace.server.text.template import ChatTemplate
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import Caller
from millrace.v1 import (
    embedding_pb2_grpc,
    generation_pb2_grpc,
    model_pb2_grpc,
    retrieval_pb2_grpc,
    tokenizer_pb2_grpc,
)

KEY = (("authorization", "Bearer good"),)


def authenticate(authorization: str | None) -> Caller:
    if authorization != "Bearer good":
        raise Unauthenticated("this server needs a key")
    return Caller("acme", "key1")


def anyone(_: str | None) -> Caller:
    return Caller("default")


class House:
    """A server and a client of it. Every answer is `script`, then the end-of-sequence token.

    `library` None: a server without an embedding model.
    """

    def __init__(
        self,
        card: ModelCard,
        config: ServerConfig,
        library: FakeLibrary | None,
        *,
        keys: bool,
        max_context: int,
    ):
        self.tokenizer = card.tokenizer
        self.eos = next(iter(card.stop_token_ids))
        self.script = self.tokenizer.encode("one two three four five", add_special_tokens=False)
        self.backend = FakeBackend(lambda request, choice: [*self.script, self.eos])
        self.limit = 1000
        self.limits = Limits(lambda tenant: self.limit)
        self.metrics = Metrics()
        self.library = library
        embedder = TextEmbedder(self.backend, embedding_tokenizer(), EMBEDDER) if library else None
        routes = Routes([replace(card, backend=self.backend)])
        self.gateway = Gateway(routes, self.limits, self.metrics, library, embedder)
        self.server = ApiServer(self.gateway, config, authenticate if keys else anyone, max_context, library)

    async def open(self) -> None:
        self.port = await self.server.start()
        self.server.set_ready(True)
        self.channel = self.connect()
        self.generation = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)
        self.tokens = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)
        self.retrieval = retrieval_pb2_grpc.RetrievalServiceStub(self.channel)
        self.embedding = embedding_pb2_grpc.EmbeddingServiceStub(self.channel)

    def connect(self, *options: tuple[str, int]) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(
            f"127.0.0.1:{self.port}", options=[("grpc.use_local_subchannel_pool", 1), *options]
        )

    async def close(self) -> None:
        await self.channel.close()
        await self.server.stop(0)
        self.gateway.close()


@pytest.fixture(scope="session")
def card() -> ModelCard:
    tokenizer = Tokenizer.load(BUILTIN)
    assert tokenizer.eos_id is not None
    return ModelCard(
        name="builtin",
        tokenizer=tokenizer,
        backend=FakeBackend(lambda request, choice: []),
        template=ChatTemplate.load(BUILTIN, tokenizer),
        aliases=("default",),
        stop_token_ids=frozenset({tokenizer.eos_id}),
    )


@pytest.fixture
def open_house(card: ModelCard):  # type: ignore[no-untyped-def]  # the type of a context manager factory says nothing
    @asynccontextmanager
    async def factory(
        *,
        keys: bool = False,
        max_context: int = 256,
        library: Callable[[], FakeLibrary | None] = FakeLibrary,
        **settings: object,
    ) -> AsyncIterator[House]:
        config = ServerConfig.model_validate({"host": "127.0.0.1", "port": 0, **settings})
        house = House(card, config, library(), keys=keys, max_context=max_context)
        await house.open()
        try:
            yield house
        finally:
            await house.close()

    return factory


@pytest.fixture
async def house(open_house) -> AsyncIterator[House]:  # type: ignore[no-untyped-def]  # as above
    async with open_house() as opened:
        yield opened


@pytest.fixture
def details_of():  # type: ignore[no-untyped-def]  # as above
    """Decode the details of a failed call: {message name: message}. At most one of each kind, under 4 KiB."""

    def decode(error: grpc.aio.AioRpcError) -> dict[str, Any]:
        raw = dict(error.trailing_metadata())["grpc-status-details-bin"]
        assert len(raw) < 4096
        status = Status.FromString(raw)
        assert status.code == error.code().value[0]
        assert status.message == error.details()
        found: dict[str, Any] = {}
        for packed in status.details:
            name = packed.type_url.rpartition(".")[2]
            assert name not in found
            found[name] = getattr(error_details_pb2, name)()
            packed.Unpack(found[name])
        assert found["ErrorInfo"].domain == "millrace"
        return found

    return decode


@pytest.fixture
def reason_of(details_of):  # type: ignore[no-untyped-def]  # as above
    return lambda error: details_of(error)["ErrorInfo"]
