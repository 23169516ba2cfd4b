"""One connection to one worker, from its handshake to its end."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from functools import partial

import grpc

from millrace.engine.v1 import engine_pb2 as pb
from millrace.engine.v1.engine_pb2_grpc import EngineServiceStub
from millrace.server.backends import convert
from millrace.server.backends.pending_vectors import PendingVectors
from millrace.server.backends.token_stream import MergedStream
from millrace.server.errors import ConfigError, Unavailable, from_reason
from millrace.server.types import BackendInfo, EmbedderInfo, EmbedRequest, EngineStats, TokenRequest

log = logging.getLogger(__name__)

Check = Callable[[BackendInfo, EmbedderInfo | None], None]

MAX_MESSAGE_BYTES = 64 << 20
MAX_COMMAND_BYTES = MAX_MESSAGE_BYTES // 4  # what is beyond it goes in the next command
SLOTS = 1 << 32
HANDSHAKE = 10.0  # seconds
GOODBYE = 2.0  # seconds for reads and writes of a lost worker, which may swallow their cancellation, to end
ACTING = 3  # turns of the loop until a request's task has read its tokens and cancelled what they end
TLS_FAILURE = "TSI_PROTOCOL_FAILURE"  # gRPC's word for a peer whose TLS this side does not accept

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Notice a host that is gone without a word.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new worker does not inherit the back-off of the last one
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)


class EngineLink:
    """Carries requests as slots, one for each choice or text: commands of one turn of the loop together, updates to
    each slot's stream or vectors.

    Slots are numbered upwards and wrap at 2^32: when a number comes back, the worker has long said its
    last word on it.
    """

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None):
        """Without credentials the address must be a Unix socket."""
        self._address = address
        self._channel = (
            grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, CHANNEL_OPTIONS)
        )
        self.stub = EngineServiceStub(self._channel)
        self.stats = EngineStats()
        self.messages = 0  # updates received
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # why
        self._on_end: Callable[[EngineLink], None] = lambda link: None
        self._slots: dict[int, tuple[MergedStream, int]] = {}  # of choices
        self._texts: dict[int, tuple[PendingVectors, int]] = {}
        self._last_slot = 0
        self._watched: set[int] = set()  # slots that their tokens may end
        self._seen_step = 0  # to be told
        self._outbox: deque[pb.Submit | pb.Embed | int] = deque()
        self._work = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, on_end: Callable[["EngineLink"], None], check: Check) -> None:
        """Shake hands. `on_end` is called once, at once when the link ends.

        Raises Unavailable, ConfigError if TLS does not trust the worker, and what `check` raises to refuse it;
        `close` is the caller's all the same.
        """
        try:
            async with asyncio.timeout(HANDSHAKE):
                info = await self.stub.GetInfo(pb.GetInfoRequest())
                self.info, self.embedder = convert.backend_info(info), convert.embedder_info(info)
                check(self.info, self.embedder)
                call = self.stub.Connect()
                await call.initial_metadata()
        except TimeoutError:
            raise Unavailable(f"the worker at {self._address} did not answer for {HANDSHAKE:g} s") from None
        except grpc.aio.AioRpcError as error:
            if TLS_FAILURE in (error.details() or ""):
                raise ConfigError(
                    f"TLS with the worker at {self._address} fails, see --worker-ca: {error.details()}"
                ) from error
            raise Unavailable(f"cannot reach the worker at {self._address}: {error.details()}") from error
        self._on_end = on_end
        self._tasks = [asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))]

    def submit(self, request: TokenRequest) -> MergedStream:
        """Send a request; its stream says whether it is admitted."""
        slots = {choice: self._new_slot() for choice in request.choices}
        stream = MergedStream(slots, partial(self._cancel, slots))
        self._slots |= {slot: (stream, choice) for choice, slot in slots.items()}
        if request.watched:
            self._watched.update(slots.values())
        self._outbox.append(convert.link_submit(request, slots))
        self._work.set()
        return stream

    def embed(self, request: EmbedRequest) -> PendingVectors:
        """Send texts, all that fit in one command."""
        slots = [self._new_slot() for _ in request.texts]
        pending = PendingVectors(len(slots), partial(self._cancel_texts, slots))
        self._texts |= {slot: (pending, text) for text, slot in enumerate(slots)}
        self._outbox.extend(convert.link_embeds(request, slots))
        self._work.set()
        return pending

    async def close(self, why: str = "the gateway closed the link") -> None:
        """End every stream and free the connection. Idempotent."""
        self._end(why)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=GOODBYE)
        await self._channel.close()

    def _new_slot(self) -> int:
        self._last_slot = (self._last_slot + 1) % SLOTS
        while self._last_slot in self._slots or self._last_slot in self._texts:
            self._last_slot = (self._last_slot + 1) % SLOTS
        return self._last_slot

    def _cancel(self, slots: dict[int, int], choices: list[int]) -> None:
        """A command for the slots that the worker has not ended itself."""
        live = [slots[choice] for choice in choices if self._slots.pop(slots[choice], None)]
        self._outbox.extend(live)
        self._work.set()

    def _cancel_texts(self, slots: list[int]) -> None:
        self._outbox.extend([slot for slot in slots if self._texts.pop(slot, None)])
        self._work.set()

    def _end(self, why: str) -> None:
        if self.ended.done():
            return
        self.ended.set_result(why)
        self._work.set()
        self._on_end(self)
        parts: list[tuple[MergedStream | PendingVectors, int]] = [*self._slots.values(), *self._texts.values()]
        requests = {id(request): request for request, _ in parts}
        self._slots.clear()
        self._texts.clear()
        for request in requests.values():
            request.lose(why)

    async def _write(self, call: "grpc.aio.StreamStreamCall[pb.Command, pb.StepUpdate]") -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the reader tells why
            while not self.ended.done():  # a write to a lost worker may swallow the cancellation of this task
                await self._work.wait()
                while (self._outbox or self._seen_step) and not self.ended.done():
                    await call.write(self._next_command())
                self._work.clear()

    def _next_command(self) -> pb.Command:
        """As much of the outbox as fits. A cancel never overtakes its submit: they leave in order."""
        command, size = pb.Command(seen_step=self._seen_step), 0
        self._seen_step = 0
        while self._outbox and size < MAX_COMMAND_BYTES:
            item = self._outbox.popleft()
            if isinstance(item, int):
                command.cancels.append(item)
                continue
            size += item.ByteSize()
            if isinstance(item, pb.Embed):
                command.embeds.append(item)
            else:
                command.submits.append(item)
        return command

    async def _read(self, call: "grpc.aio.StreamStreamCall[pb.Command, pb.StepUpdate]") -> None:
        why = "the worker closed the link"
        try:
            async for update in call:
                self._handle(update)
        except grpc.aio.AioRpcError as error:
            why = "the worker is gone"
            log.warning("link to %s: %s %s", self._address, error.code().name, error.details())
        except Exception:
            why = "the link to the worker failed"
            log.exception("link to %s", self._address)
        self._end(why)

    def _handle(self, update: pb.StepUpdate) -> None:
        self.messages += 1
        if update.HasField("stats"):
            self.stats = convert.engine_stats(update.step, update.stats)
        for admitted in update.admitted:
            if entry := self._slots.get(admitted.slot):
                entry[0].admit()
        for slot, token_id in zip(update.slots, update.token_ids, strict=True):
            if entry := self._slots.get(slot):
                entry[0].push(entry[1], token_id)
        for logprobs in update.logprobs:
            if entry := self._slots.get(logprobs.slot):
                entry[0].push_logprobs(entry[1], convert.token_logprobs(logprobs))
        for embedded in update.embedded:
            if text := self._texts.pop(embedded.slot, None):
                text[0].put(text[1], embedded.vector_f32le)
        for finished in update.finished:
            if entry := self._slots.pop(finished.slot, None):
                self._finish(*entry, finished)
            elif text := self._texts.pop(finished.slot, None):
                text[0].fail(from_reason(finished.error_reason, finished.error_message))
        rejected = [
            (self._slots.pop(item.slot, None) or self._texts.pop(item.slot, None), item) for item in update.rejected
        ]
        for part, item in rejected:
            if part:
                part[0].fail(convert.rejection(item))
        self._watched &= self._slots.keys()
        if self._watched and update.step:
            self._see(update.step, ACTING)

    def _see(self, step: int, turns: int) -> None:
        """Tell the worker once the tasks that the update woke have run."""
        if turns:
            asyncio.get_running_loop().call_soon(self._see, step, turns - 1)
            return
        self._seen_step = max(step, self._seen_step)
        self._work.set()

    def _finish(self, stream: MergedStream, choice: int, finished: pb.Finished) -> None:
        if finished.error_reason:
            stream.fail(from_reason(finished.error_reason, finished.error_message))
            return
        stream.finish(
            choice,
            convert.token_finish(finished),
            queue_us=finished.queue_us,
            cached_prompt_tokens=finished.cached_prompt_tokens,
            preemptions=finished.preemptions,
        )
