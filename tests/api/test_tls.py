"""TLS and client certificates on the public port."""

import datetime
import ipaddress
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from millrace.server.errors import ConfigError
from millrace.v1 import model_pb2, model_pb2_grpc


class Authority:
    """A CA that lives as long as a test."""

    def __init__(self, directory: Path, name: str):
        self.directory, self.key = directory, ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.path = directory / f"{name}.pem"
        self.path.write_bytes(self.sign(self.name, self.key.public_key(), is_ca=True))

    def sign(self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, *, is_ca: bool = False) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate = (
            x509.CertificateBuilder(self.name, subject, public_key, x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key of a leaf."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert_path, key_path = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        cert_path.write_bytes(self.sign(subject, key.public_key()))
        plain = serialization.NoEncryption()
        key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
        return cert_path, key_path


async def models(port: int, credentials: grpc.ChannelCredentials | None) -> int:
    """How many models a client with these credentials sees."""
    address = f"127.0.0.1:{port}"
    channel = grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
    async with channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        return len((await stub.ListModels(model_pb2.ListModelsRequest(), timeout=10)).models)


async def refused(port: int, credentials: grpc.ChannelCredentials | None) -> bool:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await models(port, credentials)
    return raised.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_tls(open_house, tmp_path: Path) -> None:
    ours, other = Authority(tmp_path, "ours"), Authority(tmp_path, "other")
    cert, key = ours.issue("server")
    async with open_house(tls_cert=cert, tls_key=key) as house:
        assert await models(house.port, grpc.ssl_channel_credentials(ours.path.read_bytes())) == 1
        assert await refused(house.port, grpc.ssl_channel_credentials(other.path.read_bytes()))
        assert await refused(house.port, None)


async def test_client_certificates(open_house, tmp_path: Path) -> None:
    ours, other = Authority(tmp_path, "ours"), Authority(tmp_path, "other")
    cert, key = ours.issue("server")

    def client(authority: Authority) -> grpc.ChannelCredentials:
        certificate, private = (path.read_bytes() for path in authority.issue("client"))
        return grpc.ssl_channel_credentials(ours.path.read_bytes(), private, certificate)

    async with open_house(tls_cert=cert, tls_key=key, tls_client_ca=ours.path) as house:
        assert await models(house.port, client(ours)) == 1
        assert await refused(house.port, client(other))
        assert await refused(house.port, grpc.ssl_channel_credentials(ours.path.read_bytes()))


async def test_a_key_of_another_certificate(open_house, tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")
    cert, _ = ours.issue("server")
    _, key = ours.issue("stranger")
    with pytest.raises(ConfigError, match="a pair"):
        async with open_house(tls_cert=cert, tls_key=key):
            pass
