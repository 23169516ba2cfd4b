"""The envelope of an index image: written whole or not at all, and believed only if its checksum holds.

    magic (8 bytes) | version u32 | length of the header u32 | header, JSON | payload | SHA-256 of all before it

Numbers are little-endian. The header names the kind of index, its dimensions, its space, how many vectors it
holds, the digest of the model that made them and the length of the payload.
"""

import errno
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from millrace.server.errors import IndexDamaged

MAGIC, VERSION = b"MILLRACE", 1
PREFIX = struct.Struct("<8sII")
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 64 << 10
COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Envelope:
    """`model`: digest of what made the vectors."""

    kind: str
    dimensions: int
    count: int
    model: str
    space: str = "cosine"


FIELD_TYPES = {field.name: field.type for field in fields(Envelope)}


@dataclass(frozen=True, slots=True)
class Image:
    """`payload`: a file in memory, at its start; nobody else can change it. `size`: its bytes."""

    envelope: Envelope
    payload: BinaryIO
    size: int


def memory_file() -> BinaryIO:
    """A file without a name or a disk, for libraries that insist on files."""
    return open(os.memfd_create("millrace-index", os.MFD_CLOEXEC), "w+b")  # the caller closes it


def path_of(file: BinaryIO) -> str:
    """A path under which this process can open a file in memory."""
    return f"/proc/self/fd/{file.fileno()}"


def write(path: Path, envelope: Envelope, parts: Sequence[memoryview]) -> None:
    """Replace the image at `path`, durably. Raises OSError, and then the image that was there still is."""
    payload_bytes = sum(part.nbytes for part in parts)
    header = json.dumps({**asdict(envelope), "payload_bytes": payload_bytes}).encode()
    blocks: list[bytes | memoryview] = [PREFIX.pack(MAGIC, VERSION, len(header)), header, *parts]
    temporary = path.with_name(path.name + ".tmp")  # one name, so that a killed process leaves at most one behind
    temporary.unlink(missing_ok=True)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
            digest = hashlib.sha256()
            for block in blocks:
                out.write(block)
                digest.update(block)
            out.write(digest.digest())
            out.flush()
            os.fsync(out.fileno())
            # What is read back below shall come from the disk, not from the memory that was written.
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        _check_written(temporary)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def read(path: Path, dimensions: int, model: str) -> Iterator[Image]:
    """The image at `path`. Raises IndexDamaged unless it is whole and of these dimensions and this model."""
    with memory_file() as payload:
        try:
            header, size = _verify(path, payload)
            envelope = _parse(header, size)
        except (OSError, ValueError) as error:
            raise IndexDamaged(f"{path}: {error}") from None
        for name, found, wanted in (
            ("dimensions", envelope.dimensions, dimensions),
            ("model", envelope.model, model),
            ("space", envelope.space, "cosine"),
        ):
            if found != wanted:
                raise IndexDamaged(f"{path}: {name} is {found!r}, not {wanted!r}")
        payload.seek(0)
        yield Image(envelope, payload, size)


def _verify(path: Path, payload: BinaryIO | None) -> tuple[bytes, int]:
    """Copy the payload; return the header and the payload's size. Raises OSError or ValueError."""
    # A FIFO without a writer would make a blocking open wait for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is no regular file")
        prefix = _read_exactly(file, PREFIX.size)
        magic, version, header_bytes = PREFIX.unpack(prefix)
        size = status.st_size - PREFIX.size - header_bytes - DIGEST_BYTES
        if magic != MAGIC or version != VERSION:
            raise ValueError(f"is no index image of version {VERSION}")
        if header_bytes > MAX_HEADER_BYTES or size < 0:
            raise ValueError(f"is truncated, or its header of {header_bytes} bytes lies")
        header = _read_exactly(file, header_bytes)
        digest = hashlib.sha256(prefix + header)
        left = size
        while left:
            block = _read_exactly(file, min(left, COPY_BYTES))
            digest.update(block)
            if payload:
                payload.write(block)
            left -= len(block)
        if _read_exactly(file, DIGEST_BYTES) != digest.digest():
            raise ValueError("its checksum does not hold")
        if payload:
            payload.flush()
    return header, size


def _read_exactly(file: Any, count: int) -> bytes:
    data = b""
    while len(data) < count:
        block = file.read(count - len(data))
        if not block:
            raise ValueError("is truncated")
        data += block
    return data


def _parse(header: bytes, size: int) -> Envelope:
    """Raises ValueError."""
    try:
        found = json.loads(header)
    except RecursionError:
        raise ValueError("its header is nested") from None
    if not isinstance(found, dict) or found.pop("payload_bytes", None) != size:
        raise ValueError("its header does not fit its payload")
    if {name: type(value) for name, value in found.items()} != FIELD_TYPES or found["count"] < 0:
        raise ValueError("its header has other fields than expected")
    return Envelope(**found)


def _check_written(path: Path) -> None:
    try:
        _verify(path, None)
    except ValueError as error:
        raise OSError(errno.EIO, f"what was written cannot be read back: {error}", str(path)) from None


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
