"""The client end of the engine link against the real service, over a scripted engine."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from link_fakes import (
    FAILS,
    INVALID,
    ScriptedEngine,
    collect,
    script,
    token_request,
    worker,
)

from millrace.engine.v1 import engine_pb2 as pb
from millrace.server.backends import engine_link
from millrace.server.backends.engine_link import EngineLink
from millrace.server.backends.worker_client import EngineClient
from millrace.server.errors import (
    Draining,
    EngineLost,
    EngineRestarting,
    FieldViolation,
    InternalError,
    InvalidRequest,
    ModelLoading,
    QueueFull,
    Unavailable,
)
from millrace.server.types import FinishReason, Logprobs


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (what is waited for happens on other threads and in C)
            await asyncio.sleep(0.005)


def permits(count: int = 0) -> threading.Semaphore:
    return threading.Semaphore(count)


class Tap:
    """Sees every update and command of a link."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.updates: list[pb.StepUpdate] = []
        self.commands: list[pb.Command] = []
        handle, next_command = EngineLink._handle, EngineLink._next_command

        def tapped_handle(link: EngineLink, update: pb.StepUpdate) -> None:
            self.updates.append(update)
            handle(link, update)

        def tapped_command(link: EngineLink) -> pb.Command:
            self.commands.append(next_command(link))
            return self.commands[-1]

        monkeypatch.setattr(EngineLink, "_handle", tapped_handle)
        monkeypatch.setattr(EngineLink, "_next_command", tapped_command)


async def test_many_streams_share_one_message_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    tap, counts = Tap(monkeypatch), [5 + i % 37 for i in range(64)]
    async with worker(ScriptedEngine(step_seconds=0.005)) as served:
        client = EngineClient()
        await client.connect(served.address)

        async def answer(i: int) -> list[int]:
            stream = await client.generate(token_request(i, counts[i]))
            return (await collect(stream))[0][0]

        answers = await asyncio.gather(*(answer(i) for i in range(64)))
        assert answers == [script([i], 0, counts[i]) for i in range(64)]
        steps = [update.step for update in tap.updates]
        assert steps == sorted(set(steps))
        assert len(steps) <= max(counts)  # for 64 streams; fewer where steps merged, on a busy machine
        assert client.messages == len(steps)
        assert len(tap.commands) == 1  # submitted in one turn of the loop, so sent as one
        assert len(tap.commands[0].submits) == 64
        assert client.stats().step == steps[-1]
        assert client.stats().total_blocks == 64
        await client.close()


async def test_updates_carry_every_word_of_the_engine() -> None:
    async with worker(ScriptedEngine()) as served:
        client = EngineClient()
        await client.connect(served.address)
        stop = script([5], 1, 4)[3]
        request = token_request(5, 6, n=3, stop_token_ids=frozenset({stop}), logprobs_top_n=2)
        tokens, last, _ = await collect(await client.generate(request))
        assert tokens == {0: script([5], 0, 6), 1: script([5], 1, 4), 2: script([5], 2, 6)}
        assert last[1].finish is not None
        assert (last[1].finish.reason, last[1].finish.stop_token_id) == (FinishReason.STOP, stop)
        assert last[0].finish is not None
        assert (last[0].finish.reason, last[0].finish.stop_token_id) == (FinishReason.MAX_TOKENS, None)
        assert (last[0].queue_us, last[0].preemptions, last[0].cached_prompt_tokens) == (11, 2, 3)
        assert client.info() == served.engine.info
        [first, *_] = served.engine.seen[1:]  # after the warm-up
        assert (first.request_id, first.tenant, first.choice, list(first.prompt_ids)) == ("r5", "tenant", 0, [5, 1, 2])
        await client.close()


async def test_logprobs_stay_with_their_tokens() -> None:
    async with worker(ScriptedEngine()) as served:
        client = EngineClient()
        await client.connect(served.address)
        stream = await client.generate(token_request(5, 40, logprobs_top_n=2))
        expected, got = script([5], 0, 40), Logprobs(2)
        async for [delta] in stream:
            assert delta.logprobs is not None
            got.extend(delta.logprobs)
            assert len(delta.logprobs.sampled) == len(delta.token_ids)
        assert got.sampled == [-float(token) for token in expected]
        assert got.top_token_ids == [token + i for token in expected for i in range(2)]
        assert got.top_logprobs == [-0.5] * 80
        await client.close()


async def test_a_slow_reader_gets_fewer_and_longer_deltas() -> None:
    async with worker(ScriptedEngine()) as served:
        client = EngineClient()
        await client.connect(served.address)
        slow, fast = await asyncio.gather(*(client.generate(token_request(i, 50)) for i in (1, 2)))
        first = await anext(slow)
        tokens, _, messages = await collect(fast)
        assert len(tokens[0]) == 50
        assert messages > 2
        [rest] = [delta async for [delta] in slow]  # everything since then, merged
        assert first[0].token_ids + rest.token_ids == script([1], 0, 50)
        assert rest.finish is not None
        await client.close()


async def test_stop_and_close_free_their_slots_before_the_next_step() -> None:
    gate = permits()
    async with worker(ScriptedEngine(permits=gate)) as served:
        engine, client = served.engine, EngineClient()
        await client.connect(served.address)
        waiting = asyncio.gather(client.generate(token_request(1, 900, n=3)), client.generate(token_request(2, 900)))
        await until(lambda: len(engine.live) == 4)
        gate.release()
        several, single = await waiting
        await anext(several)
        several.stop(1)
        several.stop(1)
        await single.aclose()
        await single.aclose()
        await until(lambda: len(served.service._owners) == 2)
        gate.release(2)  # the step that runs already, and the next one
        await until(lambda: len(engine.live) == 2)
        assert engine.steps <= 4  # warm-up, first step, those two
        gate.release(3)
        deltas = await anext(several)
        assert {delta.choice for delta in deltas} <= {0, 2}
        assert [deltas async for deltas in single] == []
        await several.aclose()
        gate.release(2)
        await until(lambda: not engine.live)
        assert len(engine.cancelled) == 4  # each choice once
        await client.close()


async def test_late_tokens_of_a_closed_slot_are_ignored() -> None:
    gate = permits()
    async with worker(ScriptedEngine(permits=gate)) as served:
        client = EngineClient()
        link = await client.connect(served.address)
        waiting = asyncio.ensure_future(client.generate(token_request(1, 900)))
        await until(lambda: len(served.engine.live) == 1)
        gate.release()
        stream = await waiting
        slots = list(link._slots)
        await stream.aclose()
        link._handle(pb.StepUpdate(step=9, slots=slots * 3, token_ids=[1, 2, 3], finished=[pb.Finished(slot=slots[0])]))
        again = asyncio.ensure_future(client.generate(token_request(2, 1)))
        await until(lambda: bool(link._slots))
        assert not set(slots) & set(link._slots)
        gate.release(9)
        assert (await collect(await again))[0] == {0: script([2], 0, 1)}
        await client.close()


async def test_slots_wrap_around_the_live_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_link, "SLOTS", 8)
    async with worker(ScriptedEngine()) as served:
        client = EngineClient()
        await client.connect(served.address)
        for i in range(20):
            tokens, _, _ = await collect(await client.generate(token_request(i, 3, n=3)))
            assert tokens == {c: script([i], c, 3) for c in range(3)}
        await client.close()


@pytest.mark.parametrize("n", [1, 3])
async def test_rejections_keep_their_class_and_words(n: int) -> None:
    async with worker(ScriptedEngine(capacity=2)) as served:
        client = EngineClient()
        await client.connect(served.address)
        with pytest.raises(InvalidRequest, match="is cursed") as invalid:
            await client.generate(token_request(INVALID, 5, n=n))
        assert invalid.value.violations == (FieldViolation("prompt", "is cursed"),)
        assert invalid.value.metadata == {"bound": "3"}
        with pytest.raises(QueueFull) as full:
            await client.generate(token_request(1, 50_000, n=3))  # only two fit, so none may stay
        assert full.value.metadata == {"limit": "2"}
        assert full.value.retry_after == 7
        assert not served.service._owners
        assert (await collect(await client.generate(token_request(2, 5, n=2))))[0][1] == script([2], 1, 5)
        await client.close()


async def test_a_failed_choice_fails_its_request_and_no_other() -> None:
    async with worker(ScriptedEngine(step_seconds=0.002)) as served:
        client = EngineClient()
        await client.connect(served.address)
        poisoned, healthy = await asyncio.gather(
            client.generate(token_request(FAILS, 5, n=2)), client.generate(token_request(1, 20))
        )
        with pytest.raises(InternalError, match="poisoned"):
            await collect(poisoned)
        assert [deltas async for deltas in poisoned] == []
        assert (await collect(healthy))[0] == {0: script([1], 0, 20)}
        await client.close()


async def test_a_cancelled_admission_leaves_nothing_behind() -> None:
    gate = permits()
    async with worker(ScriptedEngine(permits=gate)) as served:
        client = EngineClient()
        link = await client.connect(served.address)
        first = asyncio.create_task(client.generate(token_request(1, 500)))
        await until(lambda: len(served.engine.live) == 1)
        unborn = asyncio.create_task(client.generate(token_request(2, 500)))  # its commands never leave
        await asyncio.sleep(0)
        for task in (first, unborn):
            task.cancel()
        await asyncio.gather(first, unborn, return_exceptions=True)
        assert not link._slots
        await until(lambda: not served.service._owners)  # the worker knows before the engine takes another step
        gate.release()
        await until(lambda: not served.engine.live)
        assert served.engine.steps == 2  # the warm-up, and the one that ran already
        await client.close()


async def test_a_lost_worker_ends_each_stream_once_and_says_what_was_delivered() -> None:
    ready: list[bool] = []
    gate = permits()
    async with worker(ScriptedEngine(permits=gate)) as served:
        client = EngineClient()
        client.on_ready(ready.append)
        with pytest.raises(ModelLoading):
            client.info()
        await client.connect(served.address)
        waiting = asyncio.gather(*(client.generate(token_request(i, 900)) for i in range(2)))
        await until(lambda: len(served.engine.live) == 2)
        gate.release(3)
        started, unread = await waiting
        delivered = len((await anext(started))[0].token_ids)
        unadmitted = asyncio.create_task(client.generate(token_request(3, 9)))
        await until(lambda: len(served.service._owners) == 3)
        await served.kill()
        lost = None
        try:
            async for [delta] in started:
                delivered += len(delta.token_ids)
        except EngineLost as error:
            lost = error
        assert lost is not None
        assert lost.metadata == {"tokens_delivered": str(delivered)}
        for end in (anext(unread), unadmitted, client.generate(token_request(4, 1))):
            with pytest.raises(EngineRestarting):
                await end
        for stream in (started, unread):
            assert [deltas async for deltas in stream] == []
        with pytest.raises(EngineRestarting):
            client.info()
        assert ready == [False, True, False]
        with pytest.raises(Unavailable):
            await client.connect(served.address)

    async with worker(ScriptedEngine()) as replacement:
        await client.connect(replacement.address)
        assert (await collect(await client.generate(token_request(7, 9))))[0] == {0: script([7], 0, 9)}
        assert ready == [False, True, False, True]
    await client.close()
    with pytest.raises(Draining):
        client.info()


async def test_a_complete_answer_survives_the_worker() -> None:
    async with worker(ScriptedEngine()) as served:
        client = EngineClient()
        link = await client.connect(served.address)
        stream = await client.generate(token_request(1, 5))
        await until(lambda: not link._slots)
        await served.kill()
        await link.ended
        assert (await collect(stream))[0] == {0: script([1], 0, 5)}
        await client.close()


async def test_commands_beyond_a_message_wait_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    tap = Tap(monkeypatch)
    monkeypatch.setattr(engine_link, "MAX_COMMAND_BYTES", 100)
    async with worker(ScriptedEngine()) as served:
        client = EngineClient()
        await client.connect(served.address)
        streams = await asyncio.gather(*(client.generate(token_request(i, 3)) for i in range(10)))
        assert [(await collect(stream))[0][0] for stream in streams] == [script([i], 0, 3) for i in range(10)]
        assert 1 < len(tap.commands) <= 10
        await client.close()


async def test_closing_the_gateway_cancels_everything_it_had() -> None:
    gate = permits()
    async with worker(ScriptedEngine(permits=gate)) as served:
        first, second = EngineClient(), EngineClient()
        for client in (first, second):
            await client.connect(served.address)
        requests: list[Any] = [client.generate(token_request(1, 900, n=2)) for client in (first, second)]
        waiting = asyncio.gather(*requests)
        await until(lambda: len(served.service._owners) == 4)
        gate.release(2)  # the second one may have come during a step
        await waiting
        await first.close()
        await until(lambda: len(served.service._owners) == 2)
        gate.release(2)
        await until(lambda: len(served.engine.live) == 2)
        assert len(served.engine.cancelled) == 2
        await second.close()
