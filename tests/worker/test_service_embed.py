"""Texts at the worker end of the engine link, spoken to with bare messages."""

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from link_fakes import EMBEDDER, FAILS, INVALID, ScriptedEngine, Worker, script_vector, worker

from millrace.engine.v1 import engine_pb2 as pb
from millrace.engine.v1.engine_pb2_grpc import EngineServiceStub
from millrace.server.errors import StartupError
from millrace.server.worker.connection import merge


def embed(slot: int, first: int = 1, request_id: str = "e", background: bool = False) -> pb.Embed:
    ids = struct.pack("<2I", first, 7)
    return pb.Embed(slot=slot, request_id=request_id, tenant="t", token_ids_le32=ids, background=background)


def submit(slot: int, count: int) -> pb.Submit:
    return pb.Submit(
        request_id="g",
        prompt_ids_le32=struct.pack("<3I", 1, 1, 2),
        choices=[pb.Choice(slot=slot)],
        max_output_tokens=count,
    )


@asynccontextmanager
async def stub_of(served: Worker) -> AsyncIterator[EngineServiceStub]:
    async with grpc.aio.insecure_channel(served.address) as channel:
        yield EngineServiceStub(channel)


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (what is waited for happens on other threads and in C)
            await asyncio.sleep(0.005)


async def last_words(call: Any, slots: int) -> pb.StepUpdate:
    """All updates in one, up to the last word of so many slots."""
    whole = pb.StepUpdate()
    while len(whole.embedded) + len(whole.finished) + len(whole.rejected) < slots:
        merge(whole, await call.read())
    return whole


async def test_info_tells_what_embeds() -> None:
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        told = (await stub.GetInfo(pb.GetInfoRequest())).embedder
        assert (told.name, told.revision) == (EMBEDDER.name, EMBEDDER.revision)
        assert (told.dimensions, told.max_tokens, told.vocab_size) == (3, 64, 10_000)
    engine = ScriptedEngine()
    engine.embedder = None
    async with worker(engine) as served, stub_of(served) as stub:
        assert not (await stub.GetInfo(pb.GetInfoRequest())).HasField("embedder")


async def test_tokens_and_vectors_of_a_step_are_one_update() -> None:
    gate = threading.Semaphore(0)
    async with worker(ScriptedEngine(permits=gate)) as served, stub_of(served) as stub:
        call = stub.Connect()
        await call.write(pb.Command(submits=[submit(1, 3)], embeds=[embed(2, 20), embed(3, 30), embed(4, 40)]))
        await until(lambda: len(served.engine.texts) == 3)
        updates = []
        for _ in range(3):
            gate.release()
            updates.append(await call.read())
        assert [list(update.slots) for update in updates] == [[1], [1], [1]]
        embedded = [[(item.slot, item.vector_f32le) for item in update.embedded] for update in updates]
        assert embedded == [[(2, script_vector(20)), (3, script_vector(30))], [(4, script_vector(40))], []]
        assert [item.slot for item in updates[0].admitted] == [1]
        seen = served.engine.seen_texts[1:]  # after the warm-up
        assert [(text.request_id, text.tenant, list(text.token_ids)) for text in seen[:1]] == [("e", "t", [20, 7])]
        assert not served.service._owners


async def test_each_gateway_hears_of_its_own_texts_only() -> None:
    async with worker(ScriptedEngine(step_seconds=0.002)) as served, stub_of(served) as stub:
        calls = [stub.Connect() for _ in range(3)]
        for i, call in enumerate(calls):
            await call.write(pb.Command(embeds=[embed(slot, 100 * i + slot) for slot in range(10)]))  # the same slots
        for i, call in enumerate(calls):
            whole = await last_words(call, 10)
            assert {item.slot: item.vector_f32le for item in whole.embedded} == {
                slot: script_vector(100 * i + slot) for slot in range(10)
            }


async def test_the_texts_of_a_request_are_admitted_together_and_those_of_others_apart() -> None:
    async with worker(ScriptedEngine(capacity=3)) as served, stub_of(served) as stub:
        call = stub.Connect()
        crowd = [embed(slot, slot, request_id="crowd") for slot in range(1, 5)]
        await call.write(pb.Command(embeds=[*crowd, embed(5, 50, request_id="single", background=True)]))
        whole = await last_words(call, 5)
        assert [(item.slot, item.reason) for item in whole.rejected] == [(slot, "QUEUE_FULL") for slot in range(1, 5)]
        assert [item.slot for item in whole.embedded] == [5]
        assert served.engine.seen_texts[-1].background


@pytest.mark.parametrize(
    "commands",
    [
        [pb.Command(embeds=[embed(1), embed(1)])],
        [pb.Command(submits=[submit(1, 50_000)]), pb.Command(embeds=[embed(1)])],
        [pb.Command(submits=[submit(1, 50_000)], embeds=[embed(1)])],
    ],
    ids=["a slot twice", "a slot in use", "a slot of both kinds"],
)
async def test_nonsense_ends_the_connection_and_frees_its_slots(commands: list[pb.Command]) -> None:
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        call = stub.Connect()
        for command in commands:
            await call.write(command)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "slots" in await call.details()
        await until(lambda: not served.engine.has_work and not served.service._owners)


async def test_crooked_refused_and_failed_texts_are_told_apart() -> None:
    async with worker(ScriptedEngine()) as served, stub_of(served) as stub:
        call = stub.Connect()
        crooked = embed(1, request_id="crooked")
        crooked.token_ids_le32 += b"!"
        texts = [crooked, embed(2, INVALID, "refused"), embed(3, FAILS, "failed"), embed(4, 4, "good")]
        await call.write(pb.Command(embeds=texts, cancels=[77]))
        whole = await last_words(call, 4)
        assert sorted((item.slot, item.message) for item in whole.rejected) == [
            (1, "token_ids_le32: 9 bytes are no array of uint32"),
            (2, "prompt: is cursed"),
        ]
        assert [(item.slot, item.error_reason) for item in whole.finished] == [(3, "INTERNAL")]
        assert [item.slot for item in whole.embedded] == [4]


async def test_cancels_and_gateways_that_go_free_their_texts() -> None:
    gate = threading.Semaphore(0)
    async with worker(ScriptedEngine(permits=gate)) as served, stub_of(served) as stub:
        call = stub.Connect()
        await call.write(pb.Command(submits=[submit(1, 50_000)]))
        await until(lambda: served.engine.entered > served.engine.steps)
        await call.write(pb.Command(embeds=[embed(slot) for slot in range(2, 8)], cancels=[2, 3]))
        await until(lambda: len(served.service._owners) == 5)
        gate.release(2)  # the step that runs already, and the next one
        await until(lambda: len(served.engine.seen_texts) == 7)
        await until(lambda: len(served.engine.texts) == 2)
        assert len(served.engine.cancelled) == 2
        call.cancel()
        await until(lambda: not served.service._owners)
        gate.release(2)
        await until(lambda: not served.engine.has_work)


async def test_draining_refuses_new_texts_and_embeds_the_old() -> None:
    async with worker(ScriptedEngine(step_seconds=0.02)) as served, stub_of(served) as stub:
        call = stub.Connect()
        await call.write(pb.Command(embeds=[embed(slot, slot) for slot in range(10)]))
        received = await call.read()
        drained = asyncio.create_task(served.service.drain(grace=20))
        await asyncio.sleep(0)
        await call.write(pb.Command(embeds=[embed(20)]))
        merge(received, await last_words(call, 11 - len(received.embedded)))
        assert [(item.slot, item.reason) for item in received.rejected] == [(20, "DRAINING")]
        assert [item.slot for item in received.embedded] == list(range(10))
        await drained
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_texts_alone_keep_the_thread_busy_until_the_last() -> None:
    async with worker(ScriptedEngine(step_seconds=0.002)) as served, stub_of(served) as stub:
        call = stub.Connect()
        await call.write(pb.Command(embeds=[embed(slot, slot) for slot in range(9)]))
        await last_words(call, 9)
        await until(lambda: not served.thread.pulse().busy)
        assert served.engine.checks > 0


async def test_a_failed_warm_up_of_the_embedder_is_a_failed_start() -> None:
    class Poisoned(ScriptedEngine):
        def _embed(self, text: Any, output: Any) -> None:
            super()._embed(replace(text, token_ids=(FAILS,)), output)

    async with worker(Poisoned()) as served:
        with pytest.raises(StartupError, match="the warm-up failed: a poisoned text"):
            await served.thread.ready
