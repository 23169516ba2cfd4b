"""`grpc.health.v1`: one entry for the process, one per service, one per model.

Written here rather than taken from grpcio-health-checking, whose `Watch` holds a lock while it writes: one
client that does not read would keep every other client, and the server itself, from seeing a change.
"""

import asyncio
from collections.abc import Iterable

from grpc_health.v1 import health_pb2 as pb

from millrace.server.api.endpoint import Stream
from millrace.server.errors import Draining, NotFound
from millrace.server.types import Caller

Status = int  # of HealthCheckResponse.ServingStatus


class HealthServicer:
    """NOT_SERVING until told otherwise. Belongs to one event loop."""

    def __init__(self, names: Iterable[str]):
        self._statuses: dict[str, Status] = dict.fromkeys(["", *names], pb.HealthCheckResponse.NOT_SERVING)
        self._changed = asyncio.Event()
        self._closed = False

    def set(self, name: str, serving: bool) -> None:
        """Say how `name` is; every watcher of it hears of a change."""
        self._statuses[name] = pb.HealthCheckResponse.SERVING if serving else pb.HealthCheckResponse.NOT_SERVING
        self._wake()

    def set_all(self, serving: bool) -> None:
        for name in self._statuses:
            self.set(name, serving)

    def close(self) -> None:
        """Tell everyone NOT_SERVING and end every watch, which would otherwise outlive any grace."""
        self._closed = True
        self.set_all(False)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def check(self, request: pb.HealthCheckRequest, _: Caller) -> pb.HealthCheckResponse:
        if request.service not in self._statuses:
            raise NotFound(
                "there is no such health entry; use an empty name, a service or model/NAME",
                resource_type="health",
                resource_name=request.service,
            )
        return pb.HealthCheckResponse(status=self._statuses[request.service])

    async def list(self, _: pb.HealthListRequest, __: Caller) -> pb.HealthListResponse:
        statuses = {name: pb.HealthCheckResponse(status=status) for name, status in self._statuses.items()}
        return pb.HealthListResponse(statuses=statuses)

    async def watch(self, request: pb.HealthCheckRequest, _: Caller, stream: Stream) -> None:
        last: Status | None = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, pb.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != last:
                await stream.write(pb.HealthCheckResponse(status=status))
                last = status
            elif self._closed:
                raise Draining("the server is shutting down")
            else:
                await changed.wait()
