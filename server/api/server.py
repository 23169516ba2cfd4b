"""The public gRPC server."""

import asyncio

import grpc
from prometheus_client import Counter

from millrace.server.api import methods
from millrace.server.api.embedding import EmbeddingServicer
from millrace.server.api.endpoint import Authenticate, Endpoint, Strangers
from millrace.server.api.health import HealthServicer
from millrace.server.api.listen import check_exposure, credentials, target, why_not
from millrace.server.api.retrieval import Library, RetrievalServicer
from millrace.server.api.servicers import GenerationServicer, ModelServicer, TokenizerServicer
from millrace.server.config import ServerConfig
from millrace.server.gateway.gateway import Gateway

KIB = 1024
MIN_PING_MS = 10_000  # a client that pings more often is cut off
STOP_MARGIN = 5.0  # seconds beyond the grace before a server that does not stop is given up


def max_request_bytes(max_context: int) -> int:
    """The cap of one request message for a context of so many tokens: 4 bytes each, and room for the rest."""
    return max(256 * KIB, 4 * max_context + 64 * KIB)


def options(config: ServerConfig, request_bytes: int) -> list[tuple[str, int]]:
    """Arguments of gRPC core. It ignores names that it does not know, so tests show each to act."""
    return [
        ("grpc.max_receive_message_length", request_bytes),
        ("grpc.max_send_message_length", -1),  # bounded by the output
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        # Uploads are bounded by Endpoint, so streams need no tight limit; clients queue silently above it.
        ("grpc.max_concurrent_streams", 1024),
        ("grpc.max_metadata_size", 8 * KIB),
        ("grpc.absolute_max_metadata_size", 16 * KIB),
        # By default a stream's window grows to many MiB, whether or not anyone reads the stream: what is not
        # read would pile up here. Without probing, 64 KiB wait per stream until Endpoint reads it.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 64 * KIB),
        # Other servers set `min_recv_ping_interval_without_data_ms`, which does not exist.
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 300_000),
        ("grpc.max_connection_age_ms", 1_800_000),
        ("grpc.max_connection_age_grace_ms", 3_600_000),
        # On by default; two servers on one port would share its connections by chance.
        ("grpc.so_reuseport", 0),
    ]


class ApiServer:
    """Serves a gateway. NOT_SERVING until `set_ready(True)`. One per process, on the gateway's event loop."""

    def __init__(
        self,
        gateway: Gateway,
        config: ServerConfig,
        authenticate: Authenticate,
        max_context: int,
        library: Library | None = None,
    ):
        """`max_context`: tokens of the largest context of any model, which sizes the largest request.

        Raises StartupError if an RPC has no policy.
        """
        self._config = config
        self.max_request_bytes = max_request_bytes(max_context)
        names = [service.full_name for service in methods.SERVICES]
        self.health = HealthServicer([*names, *(f"model/{card.name}" for card in gateway.models())])
        rpcs = Counter(
            "millrace_rpcs",
            "RPCs that ended, by method and code.",
            ["method", "code"],
            registry=gateway.metrics.registry,
        )
        servicers = {
            methods.GENERATION: GenerationServicer(gateway),
            methods.RETRIEVAL: RetrievalServicer(library, gateway.limits),
            methods.EMBEDDING: EmbeddingServicer(gateway),
            methods.TOKENIZER: TokenizerServicer(gateway),
            methods.MODEL: ModelServicer(gateway, self.max_request_bytes),
            methods.HEALTH: self.health,
            methods.REFLECTION: methods.ReflectionServicer(),
        }
        self._strangers = Strangers()
        # Not by the generated functions: those would also read a body before its handler runs.
        self._handlers = [
            grpc.method_handlers_generic_handler(
                service.full_name,
                {
                    method.name: grpc.stream_stream_rpc_method_handler(
                        Endpoint(method, authenticate, config.slow_reader_timeout, rpcs, self._strangers).serve
                    )
                    for method in methods.methods(service, servicer)
                },
            )
            for service, servicer in servicers.items()
        ]
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listen and return the port. Raises ConfigError or AddressInUse."""
        check_exposure(self._config)
        tls = credentials(self._config)
        server = grpc.aio.server(options=options(self._config, self.max_request_bytes))
        server.add_generic_rpc_handlers(self._handlers)
        address = target(self._config)
        try:
            port = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if not port:
            raise why_not(self._config)
        await server.start()
        self._server = server
        return port

    def set_ready(self, ready: bool) -> None:
        """Tell every health check and watcher."""
        self.health.set_all(ready)

    async def stop(self, grace: float) -> None:
        """Health says NOT_SERVING, no RPC is accepted any more, running ones get `grace` seconds. Idempotent."""
        self.health.close()
        self._strangers.close()
        server, self._server = self._server, None
        if server:
            # `stop` of grpc.aio has been seen to hang after its grace; the process exits all the same.
            await asyncio.wait([asyncio.ensure_future(server.stop(grace))], timeout=grace + STOP_MARGIN)
