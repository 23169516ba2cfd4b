"""An engine whose every token and vector is known beforehand, for both ends of the engine link."""

import asyncio
import struct
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import numpy as np

from millrace.engine.v1.engine_pb2_grpc import add_EngineServiceServicer_to_server
from millrace.server.backends.token_stream import MergedStream
from millrace.server.engine.engine import StepOutput
from millrace.server.engine.sequence import SequenceFinished, SequenceRequest, SequenceToken
from millrace.server.engine.texts import TextRequest, TextVector
from millrace.server.errors import InternalError, InvalidRequest, QueueFull
from millrace.server.types import (
    BackendInfo,
    EmbedderInfo,
    EmbedRequest,
    EngineStats,
    FinishReason,
    Sampling,
    TokenDelta,
    TokenRequest,
)
from millrace.server.worker.engine_thread import EngineThread
from millrace.server.worker.listen import SERVER_OPTIONS, TLSFiles, bind
from millrace.server.worker.service import EngineService

INFO = BackendInfo(
    fingerprint="scripted-1",
    executor="scripted",
    architecture="ScriptedForCausalLM",
    parameters=7,
    vocab_size=10_000,
    max_model_len=100_000,
    kv_block_size=16,
    kv_total_blocks=64,
    max_num_seqs=256,
    max_num_batched_tokens=512,
    checkpoint_digest="scripted-digest",
)

EMBEDDER = EmbedderInfo("scripted-embedder", "scripted-revision", dimensions=3, max_tokens=64, vocab_size=10_000)

# First tokens with a meaning of their own.
INVALID, FAILS, HANGS, CRASHES = 9001, 9002, 9003, 9004


def script(prompt_ids: Sequence[int], choice: int, count: int) -> list[int]:
    """The first `count` tokens that a choice of this prompt yields."""
    return [(31 * prompt_ids[0] + 101 * choice + 7 * i) % 9000 for i in range(count)]


def token_request(first: int, count: int, n: int = 1, **values: object) -> TokenRequest:
    return TokenRequest(f"r{first}", "tenant", [first, 1, 2], Sampling(), count, n, **values)  # type: ignore[arg-type]


def embed_request(*firsts: int, **values: object) -> EmbedRequest:
    return EmbedRequest("e", "tenant", [[first, 7] for first in firsts], **values)  # type: ignore[arg-type]


def script_vector(first: int) -> bytes:
    """What `embed_request` gets for this text."""
    return struct.pack("<3f", first, 2, 1 / 3)


class ScriptedEngine:
    """Yields one token of each sequence and the vectors of two texts a step.

    `permits` set: a step takes one of them, or waits for it.
    """

    embedder: EmbedderInfo | None = EMBEDDER

    def __init__(self, capacity: int = 1000, permits: threading.Semaphore | None = None, step_seconds: float = 0):
        self.info, self.capacity, self.permits, self.step_seconds = INFO, capacity, permits, step_seconds
        self.live: dict[int, tuple[SequenceRequest, list[int]]] = {}
        self.seen: list[SequenceRequest] = []
        self.waiting: list[int] = []  # until the next step begins
        self.lock = threading.Lock()  # requests come from another thread
        self.texts: dict[int, TextRequest] = {}
        self.seen_texts: list[TextRequest] = []
        self.cancelled: list[int] = []
        self.steps = self.entered = self.progress = self.checks = 0
        self.threads: set[int] = set()
        self.closed = False

    @property
    def has_work(self) -> bool:
        return bool(self.live or self.texts)

    def submit(self, *requests: SequenceRequest) -> None:
        self.check_arrivals(requests[0].prompt_ids[0], len(self.live) + len(requests))
        self.seen += requests
        for request in requests:
            whole = script(request.prompt_ids, request.choice, request.max_output_tokens)
            tokens = whole[len(request.output_ids) :]
            assert whole[: len(request.output_ids)] == list(request.output_ids)
            with self.lock:
                self.live[request.sequence_id] = request, tokens
                self.waiting.append(request.sequence_id)

    def embed(self, *texts: TextRequest) -> None:
        self.check_arrivals(texts[0].token_ids[0], len(self.texts) + len(texts))
        self.seen_texts += texts
        self.texts |= {text.sequence_id: text for text in texts}

    def check_arrivals(self, first: int, waiting: int) -> None:
        if first == INVALID:
            raise InvalidRequest.at("prompt", "is cursed", bound="3")
        if waiting > self.capacity:
            raise QueueFull(f"{self.capacity} wait", metadata={"limit": str(self.capacity)}, retry_after=7)

    def cancel(self, sequence_id: int) -> None:
        self.cancelled.append(sequence_id)
        self.live.pop(sequence_id, None)
        self.texts.pop(sequence_id, None)

    def step(self) -> StepOutput:
        self.threads.add(threading.get_ident())
        self.entered += 1
        if self.permits and self.steps:
            self.permits.acquire()
        time.sleep(self.step_seconds)
        self.steps += 1
        self.progress += 3
        with self.lock:
            output = StepOutput(self.steps, started=[one for one in self.waiting if one in self.live])
            self.waiting.clear()
            live = list(self.live.items())
        for sequence_id, (request, tokens) in live:
            first = request.prompt_ids[0]
            if first == HANGS:
                time.sleep(3600)
            if first == CRASHES:
                raise RuntimeError("the executor is broken")
            if first == FAILS:
                output.finished.append(SequenceFinished(sequence_id, None, error=InternalError("a poisoned request")))
                del self.live[sequence_id]
                continue
            self._advance(request, tokens, output)
        for text in list(self.texts.values())[:2]:
            self._embed(text, output)
        output.stats = EngineStats(self.steps, len(self.live), 0, 0, 60, 64, 0, len(output.tokens), 5, 0)
        return output

    def _advance(self, request: SequenceRequest, tokens: list[int], output: StepOutput) -> None:
        token = tokens.pop(0)
        if (top_n := request.logprobs_top_n) is None:
            output.tokens.append(SequenceToken(request.sequence_id, token))
        else:
            top = [token + i for i in range(top_n)]
            output.tokens.append(SequenceToken(request.sequence_id, token, -float(token), top, [-0.5] * top_n))
        stopped = token in request.stop_token_ids
        if stopped or not tokens:
            reason = FinishReason.STOP if stopped else FinishReason.MAX_TOKENS
            output.finished.append(
                SequenceFinished(request.sequence_id, reason, token if stopped else None, None, 11, 2, 3)
            )
            del self.live[request.sequence_id]

    def _embed(self, text: TextRequest, output: StepOutput) -> None:
        del self.texts[text.sequence_id]
        first = text.token_ids[0]
        if first == HANGS:
            time.sleep(3600)
        if first == FAILS:
            error = InternalError("a poisoned text")
            output.finished.append(SequenceFinished(text.sequence_id, None, error=error))
            return
        vector = np.array([first, len(text.token_ids), 1 / 3], np.float32)
        output.embedded.append(TextVector(text.sequence_id, vector))

    def check(self) -> None:
        self.checks += 1
        assert not self.has_work

    def close(self) -> None:
        self.closed = True


@dataclass
class Worker:
    """A worker inside the test's own process: the real service on a real socket."""

    engine: ScriptedEngine
    thread: EngineThread
    service: EngineService
    server: grpc.aio.Server
    address: str

    async def kill(self) -> None:
        await self.server.stop(0)


@asynccontextmanager
async def worker(engine: ScriptedEngine, listen: str = "", tls: TLSFiles | None = None) -> AsyncIterator[Worker]:
    with tempfile.TemporaryDirectory() as directory:
        thread = EngineThread(lambda: engine)
        service = EngineService(thread)
        server = grpc.aio.server(options=SERVER_OPTIONS)
        address = bind(server, listen or f"unix:{directory}/worker", tls)
        add_EngineServiceServicer_to_server(service, server)
        thread.start(service.deliver)
        await server.start()
        try:
            yield Worker(engine, thread, service, server, address)
        finally:
            await server.stop(0)
            thread.close()
            if permits := getattr(engine, "permits", None):
                permits.release(1_000_000)
            if thread.ready.done() and not thread.ready.exception():
                await asyncio.wait({thread.ended})
                thread.ended.exception()  # a test that expects one has seen it


async def collect(stream: MergedStream) -> tuple[dict[int, list[int]], dict[int, TokenDelta], int]:
    """Tokens of each choice, its last delta, and how many deltas there were."""
    tokens: dict[int, list[int]] = {}
    last: dict[int, TokenDelta] = {}
    messages = 0
    async for deltas in stream:
        messages += 1
        for delta in deltas:
            tokens.setdefault(delta.choice, []).extend(delta.token_ids)
            last[delta.choice] = delta
    return tokens, last, messages
