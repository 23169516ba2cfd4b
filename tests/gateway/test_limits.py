"""Live-request limits and the drain."""

import asyncio
from contextlib import aclosing

import pytest

from millrace.server.errors import Drained, Draining, QuotaExceeded
from millrace.server.types import Caller, Completed, Started

ACME, OTHER = Caller("acme"), Caller("other")


async def start(house, caller, request):
    """Take a request as far as Started."""
    stream = house.gateway.generate(caller, request)
    assert isinstance(await anext(stream), Started)
    return stream


async def test_tenants_have_limits_of_their_own(house, ask) -> None:
    house.say("something to say")
    house.limit = 2
    streams = [await start(house, ACME, ask()) for _ in range(2)]
    with pytest.raises(QuotaExceeded) as caught:
        await start(house, ACME, ask())
    assert (caught.value.metadata["tenant"], caught.value.metadata["limit"]) == ("acme", "2")
    assert caught.value.retry_after
    streams.append(await start(house, OTHER, ask()))
    await streams.pop(0).aclose()
    streams.append(await start(house, ACME, ask()))
    for stream in streams:
        await stream.aclose()
    house.check_idle()


async def test_a_request_without_an_id_gets_one_of_its_own(house, ask) -> None:
    house.say("something to say")
    picked = {(await house.run(ask())).started.request_id for _ in range(10)}
    assert len(picked) == 10


async def test_drain_lets_live_requests_finish(house, ask) -> None:
    house.say("something to say")
    live = await start(house, ACME, ask())
    drain = asyncio.create_task(house.gateway.drain(10))
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await start(house, ACME, ask())
    assert not drain.done()
    events = [event async for event in live]
    assert isinstance(events[-1], Completed)
    await drain


async def test_drain_ends_the_rest(house, ask) -> None:
    house.say("something to say")
    house.backend.resumed.clear()

    started = asyncio.Event()

    async def consume() -> None:
        async with aclosing(house.gateway.generate(ACME, ask())) as events:
            async for _ in events:
                started.set()

    stuck = asyncio.create_task(consume())
    await started.wait()
    await house.gateway.drain(0.01)
    with pytest.raises(Drained):
        await stuck
    house.check_idle()


async def test_abort_reaches_a_request_that_has_not_begun(house) -> None:
    with house.limits.admit("acme") as live:
        house.limits.abort(Draining("first"))
        house.limits.abort(Draining("second"))
        stopped = []
        live.on_abort(lambda: stopped.append(True))
        assert stopped == [True]
        with pytest.raises(Draining, match="first"):
            live.check()
