"""A gateway over the fake backend and the built-in model's tokenizer."""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeBackend
from structlog.testing import capture_logs

from millrace.server.config import BUILTIN
from millrace.server.gateway.collect import Collected, collect
from millrace.server.gateway.gateway import Gateway
from millrace.server.gateway.limits import Limits
from millrace.server.gateway.routing import ModelCard, Routes
from millrace.server.model.checkpoint import read_config, read_generation
from millrace.server.telemetry.metrics import Metrics
from millrace.server.text.template import ChatTemplate
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import Caller, GenerateEvent, GenerateRequest

CALLER = Caller("acme", "key1")


class House:
    """A gateway whose fake backend answers every choice with `script`, then the end-of-sequence token."""

    def __init__(self, card: ModelCard):
        self.tokenizer = card.tokenizer
        self.script: list[int] = []
        self.eos = next(iter(card.stop_token_ids))
        self.backend = FakeBackend(lambda request, choice: [*self.script, self.eos])
        self.metrics = Metrics()
        self.limit = 4
        self.limits = Limits(lambda tenant: self.limit)
        self.gateway = Gateway(Routes([replace(card, backend=self.backend)]), self.limits, self.metrics)

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
def ask() -> Callable[..., GenerateRequest]:
    """A request whose parts can be overridden."""
    return lambda prompt="Hello there", **fields: GenerateRequest(model="builtin", prompt=prompt, **fields)
