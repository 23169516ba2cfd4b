"""Where the server may listen, with which credentials, and why it cannot."""

import errno
import ipaddress
import socket
from pathlib import Path

import grpc

from millrace.server.config import ServerConfig
from millrace.server.errors import AddressInUse, ConfigError, StartupError


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def target(config: ServerConfig) -> str:
    """The address as gRPC writes it."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{host}:{config.port}"


def check_exposure(config: ServerConfig) -> None:
    """Raise ConfigError if strangers could reach the port without a key, or keys would cross a network in the clear."""
    if is_loopback(config.host):
        return
    if config.api_keys is None:
        raise ConfigError(
            f"--host {config.host} opens the port to other machines, which needs --api-keys FILE; "
            "`millrace keys --help` makes one"
        )
    if config.tls_cert is None and not config.allow_plaintext:
        raise ConfigError(
            f"--host {config.host} would send keys in the clear: give --tls-cert and --tls-key, "
            "or --allow-plaintext where a mesh adds TLS"
        )


def credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """TLS, with client certificates if a CA for them is given; None is plaintext. Raises ConfigError."""
    if config.tls_cert is None and config.tls_key is None:
        if config.tls_client_ca:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
        return None
    if config.tls_cert is None or config.tls_key is None:
        raise ConfigError("--tls-cert and --tls-key come together")
    pair = (_read("--tls-key", config.tls_key), _read("--tls-cert", config.tls_cert))
    ca = _read("--tls-client-ca", config.tls_client_ca) if config.tls_client_ca else None
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from None


def why_not(config: ServerConfig) -> StartupError:
    """The reason that gRPC failed to bind: it says so only in its own log."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen(1)
    except socket.gaierror as error:
        return ConfigError(f"--host {config.host}: {error.strerror}")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return AddressInUse(
                f"port {config.port} on {config.host} is in use; stop what listens there, or choose another with "
                "--port (0 picks a free one)"
            )
        return ConfigError(f"cannot listen on {target(config)}: {error.strerror}")
    return ConfigError(f"cannot listen on {target(config)} with this certificate and key: are they PEM, and a pair?")
