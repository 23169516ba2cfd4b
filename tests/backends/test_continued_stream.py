"""Streams that go on, over links that die when the test says so."""

import asyncio

import pytest
from link_fakes import INFO, collect, token_request

from millrace.server.backends.continued_stream import ContinuedStream
from millrace.server.backends.token_stream import MergedStream
from millrace.server.errors import EngineLost, EngineRestarting, QueueFull, QueueTimeout, RequestError
from millrace.server.types import Finish, FinishReason, TokenRequest

STOP = Finish(FinishReason.STOP)


class Link:
    """Hands out streams that the test fills."""

    def __init__(self) -> None:
        self.fingerprint = INFO.fingerprint
        self.here = asyncio.Event()
        self.here.set()
        self.requests: list[TokenRequest] = []
        self.streams: list[MergedStream] = []

    def info(self):
        return INFO.__class__(**{**{n: getattr(INFO, n) for n in INFO.__slots__}, "fingerprint": self.fingerprint})

    def begin(self, request: TokenRequest) -> MergedStream:
        self.requests.append(request)
        self.streams.append(MergedStream(request.choices, lambda choices: None))
        return self.streams[-1]

    async def present(self) -> None:
        await self.here.wait()

    def die(self) -> None:
        self.here.clear()
        self.streams[-1].lose("killed")


async def begun(link: Link, request: TokenRequest, patience: float = 5) -> ContinuedStream:
    stream = ContinuedStream(link, request, patience)
    link.streams[-1].admit()
    await stream.start()
    return stream


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_it_goes_on_with_what_it_has() -> None:
    link = Link()
    stream = await begun(link, token_request(1, 9, n=2, deadline=60.0, queue_timeout=9.0))
    link.streams[0].push(0, 5)
    link.streams[0].push(1, 6)
    link.streams[0].finish(1, STOP, 0, 0, 0)
    assert len(await anext(stream)) == 2
    link.streams[0].push(0, 7)
    rest = asyncio.create_task(collect(stream))
    link.die()
    await asyncio.sleep(0.05)
    assert len(link.requests) == 1
    link.here.set()
    await turns()
    again = link.requests[1]
    assert again.outputs == {0: (5, 7)}, "what waited in the mailbox was delivered"
    assert again.queue_timeout is None
    assert again.resumes
    assert again.deadline is not None
    assert 59 < again.deadline < 59.96
    link.streams[1].admit()
    link.streams[1].push(0, 8)
    link.streams[1].finish(0, STOP, 0, 0, 0)
    assert (await rest)[0] == {0: [7, 8]}


async def test_what_a_client_continued_goes_on_from_all_that_is_known() -> None:
    link = Link()
    stream = await begun(link, token_request(1, 9, n=3, outputs={0: (7, 8), 2: ()}))
    link.streams[0].push(0, 5)
    await anext(stream)
    link.die()
    waiting = asyncio.create_task(anext(stream))
    await turns()
    link.here.set()
    await turns()
    assert link.requests[1].outputs == {0: (7, 8, 5), 2: ()}
    waiting.cancel()


async def test_a_place_in_the_next_workers_queue_is_not_lost_for_want_of_patience() -> None:
    link = Link()
    stream = await begun(link, token_request(1, 9), patience=0.05)
    rest = asyncio.create_task(collect(stream))
    link.die()
    link.here.set()
    await asyncio.sleep(0.2)
    link.streams[1].admit()
    link.streams[1].finish(0, STOP, 0, 0, 0)
    assert (await rest)[1][0].finish == STOP


@pytest.mark.parametrize("tokens", [0, 3])
async def test_patience_ends(tokens: int) -> None:
    link = Link()
    stream = await begun(link, token_request(1, 9), patience=0.05)
    for token in range(tokens):
        link.streams[0].push(0, token)
        await anext(stream)
    link.die()
    with pytest.raises(EngineLost if tokens else EngineRestarting):
        await anext(stream)


async def test_another_fingerprint_is_another_model() -> None:
    link = Link()
    stream = await begun(link, token_request(1, 9))
    link.streams[0].push(0, 1)
    await anext(stream)
    link.die()
    link.fingerprint = "other"
    link.here.set()
    with pytest.raises(EngineLost):
        await anext(stream)


async def test_what_waits_for_its_turn_keeps_its_queue_timeout() -> None:
    link = Link()
    stream = ContinuedStream(link, token_request(1, 9, queue_timeout=0.1), patience=5)
    link.die()
    with pytest.raises(QueueTimeout):
        await stream.start()


@pytest.mark.parametrize("error", [QueueFull("full", retry_after=0.01), EngineRestarting("again")])
async def test_a_worker_that_refuses_is_asked_again(error: RequestError) -> None:
    link = Link()
    stream = await begun(link, token_request(1, 9))
    rest = asyncio.create_task(collect(stream))
    link.die()
    link.here.set()
    await turns()
    link.streams[1].fail(error)
    await asyncio.sleep(0.05)
    link.streams[2].admit()
    link.streams[2].finish(0, STOP, 0, 0, 0)
    assert (await rest)[1][0].finish == STOP


async def test_a_stop_when_patience_is_just_over_harms_nobody() -> None:
    link = Link()
    stream = await begun(link, token_request(1, 9), patience=0.02)
    waiting = asyncio.create_task(collect(stream))
    link.die()
    await turns()
    loop = asyncio.get_running_loop()
    assert stream._wait is not None
    stream._wait.reschedule(loop.time())
    while stream._wait is not None and not stream._wait.expired():  # noqa: ASYNC110 (no event tells of it)
        await asyncio.sleep(0)
    stream.stop(0)
    await asyncio.wait([waiting])
