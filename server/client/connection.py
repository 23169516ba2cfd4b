"""Reaching a server: addresses, credentials, channel options."""

import json
from dataclasses import dataclass
from pathlib import Path

import grpc

from millrace.server.errors import ConfigError

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # of an answer; log-probabilities of long outputs are large

# A rejection comes before the first message, so that gRPC itself can repeat the call; the server's pushback
# says when, or forbids it. It repeats nothing above its buffer of 256 KiB, so also no request that is larger than
# the server takes, which is RESOURCE_EXHAUSTED too. No health check here: it would turn a typed error into a bare
# "unhealthy".
SERVICES = ("Generation", "Retrieval", "Embedding", "Tokenizer", "Model")
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": f"millrace.v1.{name}Service"} for name in SERVICES],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
    "loadBalancingConfig": [{"round_robin": {}}],
}
CHANNEL_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]


@dataclass(frozen=True, slots=True)
class TLS:
    """PEM files. `ca`: whom to trust (default: the public authorities); `cert` and `key`: who we are (mTLS)."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises ConfigError for a file that cannot be read and for a certificate without its key."""
        if (self.cert is None) != (self.key is None):
            raise ConfigError("a client certificate needs its key, and a key its certificate")
        return grpc.ssl_channel_credentials(*(_read(path) for path in (self.ca, self.key, self.cert)))


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the server is and who calls it. `address`: HOST:PORT or unix:PATH, `grpc://` before it or not,
    or `grpcs://HOST:PORT` for TLS with the public authorities."""

    address: str = DEFAULT_ADDRESS
    api_key: str | None = None
    tls: TLS | None = None

    @property
    def target(self) -> str:
        return self.address.removeprefix("grpc://").removeprefix("grpcs://")

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: no TLS."""
        tls = self.tls or (TLS() if self.address.startswith("grpcs://") else None)
        return tls.credentials() if tls else None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()
