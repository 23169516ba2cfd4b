"""Where a worker listens: a Unix socket that only its user may open, or TCP with mutual TLS."""

import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

import grpc

from millrace.server.errors import AddressInUse, ConfigError

MAX_MESSAGE_BYTES = 64 << 20

SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # two workers must not share a port unnoticed
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Gateways ping every 10 s to notice a host that is gone; by default a server takes that for abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """PEM files: the worker's chain and key, and the CA whose gateways may connect."""

    cert: Path
    key: Path
    ca: Path

    def credentials(self) -> grpc.ServerCredentials:
        """Raises ConfigError."""
        try:
            pair = self.key.read_bytes(), self.cert.read_bytes()
            return grpc.ssl_server_credentials([pair], self.ca.read_bytes(), require_client_auth=True)
        except OSError as error:
            raise ConfigError(f"--tls-cert, --tls-key, --tls-ca: {error}") from error


def bind(server: grpc.aio.Server, listen: str, tls: TLSFiles | None) -> str:
    """Bind `unix:PATH` or `HOST:PORT` (0: a free port) and return the address to connect to.

    Raises ConfigError and AddressInUse.
    """
    if listen.startswith("unix:"):
        bind_unix(server, Path(listen.removeprefix("unix:")))
        return listen
    host, colon, port = listen.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) <= 65_535):
        raise ConfigError(f"--listen {listen}: write unix:PATH or HOST:PORT")
    if tls is None:
        raise ConfigError("--listen HOST:PORT needs --tls-cert, --tls-key and --tls-ca; on one host use unix:PATH")
    credentials = tls.credentials()
    try:
        return f"{host}:{server.add_secure_port(listen, credentials)}"
    except RuntimeError as error:
        raise AddressInUse(f"--listen {listen}: cannot listen there, or the TLS files do not fit together") from error


def bind_unix(server: grpc.aio.Server, path: Path) -> None:
    """gRPC replaces whatever socket it finds, so one that somebody answers on is looked for first."""
    if not path.parent.is_dir():
        raise ConfigError(f"--listen unix:{path}: there is no directory {path.parent}")
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise AddressInUse(f"--listen unix:{path}: the file exists and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            pass  # free, or left behind
        except OSError as error:
            raise ConfigError(f"--listen unix:{path}: {error}") from error
        else:
            raise AddressInUse(f"--listen unix:{path}: another worker answers there")
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise ConfigError(f"--listen unix:{path}: cannot make a socket there") from error
    finally:
        os.umask(mask)
