"""A repeated request_id: joined while it is answered, told again afterwards, never computed twice."""

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from millrace.server.errors import Drained, Draining, EngineLost, QueueFull, QuotaExceeded, RequestIdInUse
from millrace.server.gateway import told
from millrace.server.types import Caller, Completed, OutputOptions, Started

ACME, OTHER = Caller("acme"), Caller("other")


@pytest.fixture
def job(house, ask):
    house.say("The mill turns slowly past the old stone bridge.")
    return ask(request_id="job-1", digest=b"1", output=OutputOptions(token_ids=True, prompt_token_ids=True))


async def read(house, request, caller=ACME) -> list:
    async with aclosing(house.gateway.generate(caller, request)) as events:
        return [event async for event in events]


async def begin(house, request, caller=ACME):
    """Read as far as Started."""
    events = house.gateway.generate(caller, request)
    assert isinstance(await anext(events), Started)
    return events


async def test_one_that_runs_is_joined_from_its_beginning(house, job) -> None:
    first = house.gateway.generate(ACME, job)
    seen = [await anext(first) for _ in range(4)]
    second = asyncio.create_task(read(house, job))
    third = asyncio.create_task(read(house, job))
    seen += [event async for event in first]
    assert await second == await third == seen
    assert isinstance(seen[-1], Completed)
    assert len(house.backend.requests) == 1
    assert house.metric("millrace_requests_repeated_total", answer="joined") == 2
    assert house.metric("millrace_generation_tokens_total") == seen[-1].usage.output_tokens, "billed once"
    assert house.metric("millrace_request_success_total", finished_reason="stop") == 1
    house.check_idle()


async def test_whoever_stays_gets_it_whole(house, job) -> None:
    wanted = await read(house, replace(job, request_id="", digest=b""))
    first = await begin(house, job)
    second = await begin(house, job)
    await first.aclose()
    assert house.backend.live, "somebody still reads it"
    rest = [event async for event in second]
    assert rest[:-1] == wanted[1:-1]
    house.check_idle()


async def test_a_reader_that_leaves_while_it_drives_stops_nobody(house, job) -> None:
    house.backend.resumed.clear()
    driver = asyncio.create_task(read(house, job))
    await asyncio.sleep(0.01)
    follower = asyncio.create_task(read(house, job))
    await asyncio.sleep(0.01)
    assert len(house.backend.requests) == 1
    driver.cancel()
    await asyncio.wait({driver})
    house.backend.resumed.set()
    assert isinstance((await follower)[-1], Completed)
    house.check_idle()


async def test_what_nobody_reads_ends(house, job) -> None:
    first, second = await begin(house, job), await begin(house, job)
    await first.aclose()
    await second.aclose()
    house.check_idle()
    again = await read(house, job)
    assert isinstance(again[-1], Completed)
    assert len(house.backend.requests) == 2, "what was cut short is not kept"


async def test_one_that_ended_is_told_again(house, job) -> None:
    first = await read(house, job)
    assert await read(house, job) == await read(house, job) == first
    assert len(house.backend.requests) == 1
    assert house.metric("millrace_requests_repeated_total", answer="told again") == 2
    assert house.metric("millrace_request_success_total", finished_reason="stop") == 1
    house.check_idle()
    await read(house, job, OTHER)
    assert len(house.backend.requests) == 2, "an id is a tenant's own"


async def test_who_leaves_with_the_last_word_has_had_all(house, job, logs) -> None:
    events = house.gateway.generate(ACME, job)
    while not isinstance(await anext(events), Completed):
        pass
    await events.aclose()
    assert [entry["outcome"] for entry in logs if entry["event"] == "request"] == ["OK"]
    await read(house, job)
    assert len(house.backend.requests) == 1


async def test_it_is_told_for_a_while_only(house, job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "SECONDS", 0.05)
    await read(house, job)
    await read(house, job)
    assert len(house.backend.requests) == 1
    await asyncio.sleep(0.06)
    await read(house, job)
    assert len(house.backend.requests) == 2


async def test_the_memory_of_answers_is_bounded(house, job, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(map(told.size_of, await read(house, replace(job, request_id="job-1"), OTHER)))
    monkeypatch.setattr(told, "BYTES", size * 4)

    async def is_told(number: int, caller: Caller = ACME) -> bool:
        asked = len(house.backend.requests)
        await read(house, replace(job, request_id=f"job-{number}"), caller)
        return len(house.backend.requests) == asked

    for number in range(2, 9):
        assert not await is_told(number)
    assert await is_told(8)
    assert await is_told(6)
    assert not await is_told(5), "the oldest went"
    assert await is_told(1, OTHER), "another tenant's stays"
    monkeypatch.setattr(told, "BYTES_OF_ONE", size - 1)
    assert not await is_told(20)
    assert not await is_told(20)


async def test_a_long_answer_keeps_only_what_somebody_has_yet_to_read(house, job, monkeypatch) -> None:
    monkeypatch.setattr(told, "BYTES_OF_ONE", 3000)
    house.say("The mill turns slowly past the old stone bridge. " * 8)
    wanted = await read(house, replace(job, request_id="", digest=b""))
    fast, slow = await begin(house, job), await begin(house, job)
    (answer,) = house.gateway._answers._made.values()
    seen = [await anext(fast) for _ in range(40)]
    assert len(answer.events) == 40, "the slow one has yet to read them"
    with pytest.raises(RequestIdInUse, match="too long"):
        await begin(house, job)
    late = [event async for event in slow]
    assert len(answer.events) < len(wanted) - 39
    assert late[:-1] == [*seen, *[event async for event in fast]][:-1] == wanted[1:-1]
    house.check_idle()
    await read(house, job)
    assert len(house.backend.requests) == 3, "it is not told again"


async def test_another_request_under_the_same_id(house, job) -> None:
    other = replace(job, digest=b"2")
    first = await begin(house, job)
    with pytest.raises(RequestIdInUse):
        await begin(house, other)
    async for _ in first:
        pass
    with pytest.raises(RequestIdInUse, match="job-1"):
        await begin(house, other)
    await read(house, other, OTHER)


async def test_one_that_failed_may_be_repeated(house, job) -> None:
    house.backend.error, house.backend.fail_after = QueueFull("full"), 0
    results = await asyncio.gather(*(read(house, job) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [QueueFull] * 3
    house.backend.error, house.backend.fail_after = EngineLost("gone"), 2
    first, second = await begin(house, job), await begin(house, job)
    for events in (first, second):
        with pytest.raises(EngineLost):
            async for _ in events:
                pass
    house.backend.error = None
    assert isinstance((await read(house, job))[-1], Completed)
    house.check_idle()


async def test_while_one_still_hears_of_a_failure_another_begins_anew(house, job) -> None:
    house.backend.error, house.backend.fail_after = EngineLost("gone"), 2
    first, slow = await begin(house, job), await begin(house, job)
    with pytest.raises(EngineLost):
        async for _ in first:
            pass
    house.backend.error = None
    assert isinstance((await read(house, job))[-1], Completed)
    with pytest.raises(EngineLost):
        async for _ in slow:
            pass
    assert len(house.backend.requests) == 2
    await read(house, job)
    assert len(house.backend.requests) == 2, "the one that failed took nothing with it"


async def test_who_repeats_has_a_place_of_the_tenant(house, job) -> None:
    house.limit = 2
    first, second = await begin(house, job), await begin(house, job)
    with pytest.raises(QuotaExceeded):
        await begin(house, job)
    for events in (first, second):
        await events.aclose()
    house.check_idle()


async def test_a_drain_ends_all_readers(house, job) -> None:
    house.backend.resumed.clear()
    readers = [await begin(house, job) for _ in range(2)]
    waiting = [asyncio.create_task(anext(events)) for events in readers]
    await asyncio.sleep(0)
    await house.gateway.drain(0.01)
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [Drained, Drained], "each has seen Started"
    for events in readers:
        await events.aclose()
    house.check_idle()
    with pytest.raises(Draining):
        await begin(house, job)


async def test_a_drain_ends_what_is_told_again(house, job) -> None:
    await read(house, job)
    events = await begin(house, job)
    house.limits.abort(Draining("now"))
    with pytest.raises(Drained):
        await anext(events)
