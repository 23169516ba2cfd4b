"""The worker end of the engine link, spoken to with bare messages."""

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from link_fakes import CRASHES, ScriptedEngine, Worker, script, worker

from millrace.engine.v1 import engine_pb2 as pb
from millrace.engine.v1.engine_pb2_grpc import EngineServiceStub
from millrace.server.worker import connection as connections
from millrace.server.worker import engine_thread
from millrace.server.worker.connection import merge


def submit(slots: list[int], first: int = 1, count: int = 5) -> pb.Submit:
    return pb.Submit(
        request_id=f"r{first}",
        prompt_ids_le32=struct.pack("<3I", first, 1, 2),
        choices=[pb.Choice(slot=slot, index=index) for index, slot in enumerate(slots)],
        max_output_tokens=count,
    )


@asynccontextmanager
async def stub_of(served: Worker) -> AsyncIterator[EngineServiceStub]:
    """Its receive window does not grow, so that a reader who stops is soon felt."""
    async with grpc.aio.insecure_channel(served.address, [("grpc.http2.bdp_probe", 0)]) as channel:
        yield EngineServiceStub(channel)


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (what is waited for happens on other threads and in C)
            await asyncio.sleep(0.005)


async def updates_until_finished(call: Any, slots: int) -> pb.StepUpdate:
    """All updates in one, up to the end of so many slots."""
    whole = pb.StepUpdate()
    while len(whole.finished) + len(whole.rejected) < slots:
        merge(whole, await call.read())
    return whole


async def test_info_waits_for_the_model_and_says_all_of_it() -> None:
    loading = threading.Event()

    class Slow(ScriptedEngine):
        @property
        def info(self) -> Any:
            loading.wait()
            return self.described

        @info.setter
        def info(self, value: Any) -> None:
            self.described = value

    async with worker(Slow()) as served, stub_of(served) as stub:
        call = stub.GetInfo(pb.GetInfoRequest())
        done, _ = await asyncio.wait({asyncio.ensure_future(call)}, timeout=0.1)
        assert not done
        loading.set()
        info = await call
        assert (info.fingerprint, info.vocab_size, info.kv_total_blocks) == ("scripted-1", 10_000, 64)
        assert info.checkpoint_digest == "scripted-digest"


async def test_each_gateway_hears_of_its_own_slots_only() -> None:
    async with worker(ScriptedEngine(step_seconds=0.002)) as served, stub_of(served) as stub:
        calls = [stub.Connect() for _ in range(3)]
        for i, call in enumerate(calls):
            await call.write(pb.Command(submits=[submit([7, 9], first=10 + i, count=20)]))  # the same slots
        for i, call in enumerate(calls):
            whole = await updates_until_finished(call, 2)
            assert sorted(item.slot for item in whole.admitted) == [7, 9]
            for choice, slot in enumerate((7, 9)):
                tokens = [t for s, t in zip(whole.slots, whole.token_ids, strict=True) if s == slot]
                assert tokens == script([10 + i], choice, 20)


async def test_a_watched_request_holds_the_engine_back_until_its_gateway_has_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most two steps run beyond the one after the last that was seen; a cancel sets everybody else free."""
    monkeypatch.setattr(engine_thread, "PATIENCE", 60)
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        call = stub.Connect()
        watched = submit([1], count=10_000)
        watched.watched = True
        await call.write(pb.Command(submits=[watched, submit([2], first=5, count=300)]))
        await until(lambda: served.service._thread.pulse().step > 0)
        for _ in range(3):
            await asyncio.sleep(0.1)
            held = served.service._thread.pulse().step
            await asyncio.sleep(0.1)
            assert served.service._thread.pulse().step == held
            await call.write(pb.Command(seen_step=held - 1))
            await until(lambda held=held: served.service._thread.pulse().step == held + engine_thread.AHEAD)
        await call.write(pb.Command(cancels=[1]))
        whole = await updates_until_finished(call, 1)
        assert [item.slot for item in whole.finished] == [2]


async def test_a_gateway_that_sees_nothing_slows_the_engine_but_does_not_stop_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_thread, "PATIENCE", 0.001)
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        call = stub.Connect()
        watched = submit([1], count=50)
        watched.watched = True
        await call.write(pb.Command(submits=[watched]))
        assert [item.slot for item in (await updates_until_finished(call, 1)).finished] == [1]
        assert not served.service._thread._seen


@pytest.mark.parametrize(
    "commands",
    [
        [pb.Command(submits=[submit([])])],
        [pb.Command(submits=[submit([1, 1])])],
        [pb.Command(submits=[submit([1], count=50_000)]), pb.Command(submits=[submit([1])])],
    ],
    ids=["no slots", "a slot twice", "a slot in use"],
)
async def test_nonsense_ends_the_connection_and_frees_its_slots(commands: list[pb.Command]) -> None:
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        call = stub.Connect()
        for command in commands:
            await call.write(command)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "slots" in await call.details()
        await until(lambda: not served.engine.live and not served.service._owners)


async def test_a_crooked_prompt_is_rejected_and_nothing_else() -> None:
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        call = stub.Connect()
        crooked = submit([1])
        crooked.prompt_ids_le32 += b"!"
        await call.write(pb.Command(submits=[crooked, submit([2])], cancels=[77]))
        whole = await updates_until_finished(call, 2)
        assert [(item.slot, item.reason) for item in whole.rejected] == [(1, "FIELD_INVALID")]
        assert [item.slot for item in whole.finished] == [2]


async def test_rejections_between_steps_are_updates_of_no_step() -> None:
    async with worker(ScriptedEngine(capacity=1)) as served, stub_of(served) as stub:
        call = stub.Connect()
        await call.write(pb.Command(submits=[submit([1, 2])]))
        update = await call.read()
        assert (update.step, [item.reason for item in update.rejected]) == (0, ["QUEUE_FULL"] * 2)
        assert not update.HasField("stats")


async def test_a_gateway_that_goes_frees_its_slots() -> None:
    async with worker(ScriptedEngine(step_seconds=0.002)) as served, stub_of(served) as stub:
        for leave in ("cancel", "done"):
            call = stub.Connect()
            await call.write(pb.Command(submits=[submit([1, 2, 3], count=50_000)]))
            await until(lambda: len(served.engine.live) == 3)
            if leave == "cancel":
                call.cancel()
            else:
                await call.done_writing()
                [update async for update in call]  # a status comes after what was sent before it
                assert await call.code() is grpc.StatusCode.OK
            await until(lambda: not served.engine.live and not served.service._connections)


async def test_a_gateway_that_does_not_read_gets_merged_updates_and_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until the bound on what waits for it: then it is dropped, and its slots are freed."""
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        deaf, attentive = stub.Connect(), stub.Connect()
        many = submit(list(range(1, 65)), count=50_000)
        many.logprobs_top_n = 5
        await deaf.write(pb.Command(submits=[many]))
        await attentive.write(pb.Command(submits=[submit([1], first=3, count=300)]))
        whole = await updates_until_finished(attentive, 1)
        assert list(whole.token_ids) == script([3], 0, 300)
        [pending] = [c for c in served.service._connections if c.slots]
        await until(lambda: pending._pending is not None and len(pending._pending.slots) >= 640, 30)  # ten steps
        monkeypatch.setattr(connections, "MAX_PENDING_BYTES", 100_000)
        await until(lambda: not served.engine.live and not served.service._owners)
        with pytest.raises(grpc.aio.AioRpcError, match="does not read") as dropped:
            [update async for update in deaf]
        assert dropped.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_slow_reader_misses_nothing() -> None:
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        call = stub.Connect()
        await call.write(pb.Command(submits=[submit(list(range(1, 65)), count=1_500)]))
        await until(lambda: served.engine.steps > 1_500, 60)
        received, steps = pb.StepUpdate(), 0
        while len(received.finished) < 64:
            merge(received, await call.read())
            steps += 1
        assert steps < 1_500  # flow control held some back, and they were merged
        for choice in (0, 63):
            tokens = [t for s, t in zip(received.slots, received.token_ids, strict=True) if s == choice + 1]
            assert tokens == script([1], choice, 1_500)


def test_merged_updates_keep_the_last_state_even_where_it_is_zero() -> None:
    whole = pb.StepUpdate(step=1, slots=[1], token_ids=[5], stats=pb.EngineStats(running=3, waiting=2))
    merge(whole, pb.StepUpdate(step=2, slots=[1], token_ids=[6], stats=pb.EngineStats(running=0, waiting=1)))
    merge(whole, pb.StepUpdate(rejected=[pb.Rejected(slot=4)]))
    assert (whole.step, whole.stats.running, whole.stats.waiting) == (2, 0, 1)
    assert (list(whole.slots), list(whole.token_ids)) == ([1, 1], [5, 6])


async def test_draining_refuses_the_new_and_finishes_the_old() -> None:
    async with worker(ScriptedEngine(step_seconds=0.005)) as served, stub_of(served) as stub:
        call = stub.Connect()
        await call.write(pb.Command(submits=[submit([1], count=30)]))
        await call.read()
        drained = asyncio.create_task(served.service.drain(grace=20))
        await asyncio.sleep(0)
        await call.write(pb.Command(submits=[submit([2])]))
        whole = await updates_until_finished(call, 2)
        assert [(item.slot, item.reason) for item in whole.rejected] == [(2, "DRAINING")]
        assert [item.slot for item in whole.finished] == [1]
        await drained
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_progress_is_told_while_a_step_stands_still() -> None:
    gate = threading.Semaphore(0)
    async with worker(ScriptedEngine(permits=gate)) as served, stub_of(served) as stub:
        watch = stub.WatchProgress(pb.WatchProgressRequest(interval_ms=10))
        idle = [await watch.read() for _ in range(3)]
        assert {(p.counter, p.busy) for p in idle} == {(3, False)}
        call = stub.Connect()
        await call.write(pb.Command(submits=[submit([1], count=3)]))
        while not (progress := await watch.read()).busy:
            pass
        held = [await watch.read() for _ in range(3)]
        assert {(p.counter, p.busy) for p in held} == {(progress.counter, True)}
        gate.release(3)
        await updates_until_finished(call, 1)
        while (after := await watch.read()).busy:
            pass
        assert after.counter > progress.counter
        assert after.step == 4


@pytest.mark.parametrize("interval", [0, 9, 10_001])
async def test_progress_intervals_are_bounded(interval: int) -> None:
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        call = stub.WatchProgress(pb.WatchProgressRequest(interval_ms=interval))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_refusal_waits_for_no_step() -> None:
    gate = threading.Semaphore(0)
    async with worker(ScriptedEngine(capacity=1, permits=gate)) as served, stub_of(served) as stub:
        call = stub.Connect()
        await call.write(pb.Command(submits=[submit([1])]))
        await until(lambda: served.engine.live and served.thread.pulse().busy)
        await call.write(pb.Command(submits=[submit([2])]))  # while a step waits for its permit
        update = await call.read()
        assert [(item.slot, item.reason) for item in update.rejected] == [(2, "QUEUE_FULL")]
        gate.release(100)


async def test_the_engine_lives_on_one_thread_that_sleeps_when_idle() -> None:
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        call = stub.Connect()
        await call.write(pb.Command(submits=[submit([1])]))
        await updates_until_finished(call, 1)
        await until(lambda: not served.thread.pulse().busy)
        checks = served.engine.checks
        assert checks > 0  # the accounting is checked before each sleep
        await asyncio.sleep(0.2)
        assert served.engine.checks == checks
        assert served.engine.threads == {served.thread._thread.ident}
    assert served.engine.closed


async def test_an_engine_that_fails_is_told() -> None:
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        call = stub.Connect()
        await call.write(pb.Command(submits=[submit([1], first=CRASHES)]))
        with pytest.raises(RuntimeError, match="the executor is broken"):
            await served.thread.ended
