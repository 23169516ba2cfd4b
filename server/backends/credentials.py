"""Who a gateway is to a worker on another host."""

import grpc

from millrace.server.config import SupervisorConfig
from millrace.server.errors import ConfigError


def channel_credentials(config: SupervisorConfig) -> grpc.ChannelCredentials | None:
    """Mutual TLS for a worker on TCP, None for a Unix socket. Raises ConfigError."""
    if config.worker is None or config.worker.startswith("unix:"):
        return None
    if not (config.worker_ca and config.worker_cert and config.worker_key):
        raise ConfigError(
            f"--worker {config.worker} needs --worker-ca, --worker-cert and --worker-key: "
            "links between hosts take mutual TLS only"
        )
    try:
        return grpc.ssl_channel_credentials(
            config.worker_ca.read_bytes(), config.worker_key.read_bytes(), config.worker_cert.read_bytes()
        )
    except OSError as error:
        raise ConfigError(f"--worker-ca, --worker-cert, --worker-key: {error}") from error
