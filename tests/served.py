"""The real public server over fakes, for tests of clients."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import checkpoints
from fakes import EMBEDDER, FakeBackend, FakeLibrary

from millrace.server.api.server import ApiServer
from millrace.server.client import Client
from millrace.server.config import BUILTIN, ServerConfig
from millrace.server.gateway.embedding import TextEmbedder
from millrace.server.gateway.gateway import Gateway
from millrace.server.gateway.limits import Limits
from millrace.server.gateway.routing import ModelCard, Routes
from millrace.server.telemetry.metrics import Metrics
from millrace.server.text.embedding_tokenizer import EmbeddingTokenizer
from millrace.server.text.template import ChatTemplate
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import Caller, TokenRequest

ANSWER = " keeps what comes in order"
TOKENIZER = Tokenizer.load(BUILTIN)
TEMPLATE = ChatTemplate.load(BUILTIN, TOKENIZER)
IDS = TOKENIZER.encode(ANSWER, add_special_tokens=False)


@cache
def embedding_tokenizer() -> EmbeddingTokenizer:
    with TemporaryDirectory() as directory:
        checkpoints.write_wordpiece(Path(directory))
        return EmbeddingTokenizer.load(Path(directory))


class Backend(FakeBackend):
    def __init__(self) -> None:
        super().__init__(lambda request, choice: IDS * 100)  # never an end-of-sequence token
        self.attempts = 0

    async def generate(self, request: TokenRequest) -> Any:
        self.attempts += 1
        return await super().generate(request)


class Served:
    """A running server: its address, its backend, and the header that the last call carried."""

    def __init__(self) -> None:
        self.backend = Backend()
        self.authorization: str | None = None
        self.limit = 100
        card = ModelCard("small", TOKENIZER, self.backend, TEMPLATE)
        self.library = FakeLibrary()
        embedder = TextEmbedder(self.backend, embedding_tokenizer(), EMBEDDER)
        self.gateway = Gateway(Routes([card]), Limits(lambda tenant: self.limit), Metrics(), self.library, embedder)
        self.api = ApiServer(self.gateway, ServerConfig(port=0), self.authenticate, 256, self.library)

    def authenticate(self, authorization: str | None) -> Caller:
        self.authorization = authorization
        return Caller("default")


@asynccontextmanager
async def serving() -> AsyncIterator[Served]:
    served = Served()
    served.address = f"127.0.0.1:{await served.api.start()}"
    served.api.set_ready(True)
    try:
        yield served
    finally:
        await served.api.stop(0)
        served.gateway.close()


async def in_thread(served: Served, use: Callable[[Client], Any], **options: Any) -> Any:
    """What `use` makes of a sync client; the server shares this event loop."""

    def work() -> Any:
        with Client(served.address, **options) as client:
            return use(client)

    return await asyncio.to_thread(work)
