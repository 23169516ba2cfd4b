"""`millrace.engine.v1.EngineService`: gateways on one side, the engine thread on the other."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import TypeVar

import grpc

from millrace.engine.v1 import engine_pb2 as pb
from millrace.engine.v1.engine_pb2_grpc import EngineServiceServicer
from millrace.server.engine.engine import StepOutput
from millrace.server.engine.sequence import SequenceRequest
from millrace.server.engine.texts import TextRequest
from millrace.server.errors import Draining, InvalidRequest
from millrace.server.worker import convert
from millrace.server.worker.connection import Connection, Ending
from millrace.server.worker.engine_thread import EngineThread, Report

log = logging.getLogger(__name__)
Part = TypeVar("Part", SequenceRequest, TextRequest)

PROGRESS_INTERVALS_MS = range(10, 10_001)

Context = grpc.aio.ServicerContext[pb.Command, pb.StepUpdate]
ProgressContext = grpc.aio.ServicerContext[pb.WatchProgressRequest, pb.Progress]


class ProtocolError(Exception):
    """A gateway said what no gateway may say; the text goes back to it."""


class EngineService(EngineServiceServicer):
    """Gives each choice and text of each gateway a number in the engine, and each gateway one update for each step."""

    def __init__(self, thread: EngineThread):
        self._thread = thread
        self._connections: set[Connection] = set()
        self._owners: dict[int, tuple[Connection, int]] = {}  # live sequence id -> its connection and slot
        self._sequence_ids = itertools.count(1)
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.EngineInfo:  # noqa: N802 (gRPC's name)
        return convert.engine_info(*await asyncio.shield(self._thread.ready))

    async def Connect(self, request_iterator: AsyncIterator[pb.Command], context: Context) -> None:  # noqa: N802
        await context.send_initial_metadata(())  # first of all: an abort that meets it half sent is never told
        connection = Connection()
        self._connections.add(connection)
        tasks = [
            asyncio.create_task(self._read(connection, request_iterator)),
            asyncio.create_task(self._write(connection, context)),
        ]
        try:
            ending = await connection.ended
        finally:
            connection.end(Ending())
            self._connections.remove(connection)
            self._cancel(connection, list(connection.slots))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if ending.code is not grpc.StatusCode.OK:
            log.error("ending a gateway's connection: %s", ending.details)
            await context.abort(ending.code, ending.details)

    async def WatchProgress(self, request: pb.WatchProgressRequest, context: ProgressContext) -> None:  # noqa: N802
        if request.interval_ms not in PROGRESS_INTERVALS_MS:
            details = f"interval_ms is {request.interval_ms}, must be in [10, 10000]"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, details)
        while True:
            pulse = self._thread.pulse()
            await context.write(pb.Progress(counter=pulse.counter, busy=pulse.busy, step=pulse.step))
            await asyncio.sleep(request.interval_ms / 1000)

    def deliver(self, report: Report) -> None:
        """Tell every gateway about one turn of the engine thread, in one update each."""
        updates = {connection: pb.StepUpdate() for connection in self._connections}
        for sequence_id, error in report.rejected:
            if owner := self._release(sequence_id):
                convert.add_rejected(updates[owner[0]], owner[1], error)
        if report.output is not None:
            self._add_step(updates, report.output)
        for connection, update in updates.items():
            if report.output is not None or update.ByteSize():
                connection.tell(update)

    async def drain(self, grace: float) -> None:
        """Refuse new requests and wait up to `grace` seconds for the live ones; connections end once all is told."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._idle.wait()
        for connection in self._connections:
            connection.finish()

    def _add_step(self, updates: dict[Connection, pb.StepUpdate], output: StepOutput) -> None:
        stats = convert.engine_stats(output.stats)
        for update in updates.values():
            update.step = output.step
            update.stats.CopyFrom(stats)
        for sequence_id in output.started:
            if owner := self._owners.get(sequence_id):
                updates[owner[0]].admitted.add(slot=owner[1])
        for token in output.tokens:
            if owner := self._owners.get(token.sequence_id):  # else: cancelled during the step
                convert.add_token(updates[owner[0]], owner[1], token)
        for embedded in output.embedded:
            if owner := self._release(embedded.sequence_id):
                convert.add_vector(updates[owner[0]], owner[1], embedded)
        for finished in output.finished:
            if owner := self._release(finished.sequence_id):
                convert.add_finished(updates[owner[0]], owner[1], finished)

    async def _read(self, connection: Connection, commands: AsyncIterator[pb.Command]) -> None:
        ending = Ending()
        try:
            async for command in commands:
                for submit in command.submits:
                    self._submit(connection, submit)
                for _, embeds in itertools.groupby(command.embeds, lambda embed: (embed.tenant, embed.request_id)):
                    self._embed(connection, list(embeds))
                self._cancel(connection, command.cancels)
                if command.seen_step:
                    self._thread.see(connection, command.seen_step)
        except ProtocolError as error:
            ending = Ending(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception:
            log.exception("reading from a gateway failed")
            ending = Ending(grpc.StatusCode.INTERNAL, "reading commands failed")
        finally:
            connection.end(ending)

    async def _write(self, connection: Connection, context: Context) -> None:
        try:
            while (update := await connection.next_update()) is not None:
                await context.write(update)
        finally:
            connection.end(Ending())  # all is said, or the gateway is gone

    def _submit(self, connection: Connection, submit: pb.Submit) -> None:
        slots = [choice.slot for choice in submit.choices]
        read = partial(convert.sequence_requests, submit, self._sequence_ids)
        self._accept(connection, submit.request_id, slots, read, self._thread.submit)
        if submit.watched:
            connection.watched |= connection.slots.keys() & set(slots)
            if connection.watched:
                self._thread.watch(connection)

    def _embed(self, connection: Connection, embeds: list[pb.Embed]) -> None:
        """Take the texts of one request."""
        slots = [embed.slot for embed in embeds]
        read = partial(convert.text_requests, embeds, self._sequence_ids)
        self._accept(connection, embeds[0].request_id, slots, read, self._thread.embed)

    def _accept(
        self,
        connection: Connection,
        request_id: str,
        slots: list[int],
        read: Callable[[], list[Part]],
        submit: Callable[[list[Part]], None],
    ) -> None:
        """Submit what `read` returns, one part for each slot; reject all of them if it cannot be."""
        if not slots or len({*slots}) < len(slots) or not connection.slots.keys().isdisjoint(slots):
            raise ProtocolError(f"request {request_id!r} has no slots or slots in use: {slots}")
        update = pb.StepUpdate()
        try:
            if self._draining:
                raise Draining("the worker is shutting down")
            parts = read()
        except (Draining, InvalidRequest) as error:
            for slot in slots:
                convert.add_rejected(update, slot, error)
            connection.tell(update)
            return
        for slot, part in zip(slots, parts, strict=True):
            connection.slots[slot] = part.sequence_id
            self._owners[part.sequence_id] = connection, slot
        self._idle.clear()
        submit(parts)

    def _cancel(self, connection: Connection, slots: Iterable[int]) -> None:
        sequence_ids = [connection.slots[slot] for slot in slots if slot in connection.slots]
        for sequence_id in sequence_ids:
            self._release(sequence_id)
        if sequence_ids:
            self._thread.cancel(sequence_ids)

    def _release(self, sequence_id: int) -> tuple[Connection, int] | None:
        owner = self._owners.pop(sequence_id, None)
        if owner is not None:
            connection, slot = owner
            del connection.slots[slot]
            connection.watched.discard(slot)
            if not connection.watched:
                self._thread.unwatch(connection)
        if not self._owners:
            self._idle.set()
        return owner
