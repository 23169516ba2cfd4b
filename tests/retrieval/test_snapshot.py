"""Images that are damaged, foreign or cannot be written."""

import errno
import hashlib
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest

from millrace.retrieval import snapshot
from millrace.retrieval.index.auto import AutoIndex
from millrace.retrieval.index.flat import FlatIndex
from millrace.retrieval.index.hnsw import HnswIndex
from millrace.server.errors import IndexDamaged

COUNT, DIMENSIONS = 220, 16
VECTORS = np.random.default_rng(0).standard_normal((COUNT, DIMENSIONS)).astype(np.float32)
VECTORS[200:] = VECTORS[:20]
QUERIES = VECTORS[:5] + 0.1
PAGE = 4096


def new(kind: str) -> FlatIndex | HnswIndex:
    return FlatIndex(DIMENSIONS) if kind == "flat" else HnswIndex(DIMENSIONS, ef_search=8)


def filled(kind: str) -> FlatIndex | HnswIndex:
    index = new(kind)
    index.add(range(COUNT), VECTORS)
    index.remove(range(0, 40, 2))
    return index


def neighbours(index: FlatIndex | HnswIndex | AutoIndex) -> bytes:
    found = [index.search(query, 4) for query in QUERIES]
    return b"".join(part.tobytes() for pair in found for part in pair)


@pytest.fixture(params=["flat", "hnsw"])
def kind(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


def flip_bits(image: bytearray, draw: Random) -> None:
    for _ in range(draw.choice([1, 1, 2, 8])):
        image[draw.randrange(len(image))] ^= 1 << draw.randrange(8)


def flip_a_bit_of_the_header(image: bytearray, draw: Random) -> None:
    image[draw.randrange(200)] ^= 1 << draw.randrange(8)


def cut(image: bytearray, draw: Random) -> None:
    del image[draw.randrange(len(image)) :]


def append(image: bytearray, draw: Random) -> None:
    image += draw.randbytes(draw.randrange(1, 100))


def zero_a_page(image: bytearray, draw: Random) -> None:
    start = PAGE * draw.randrange(len(image) // PAGE)
    image[start : start + PAGE] = bytes(len(image[start : start + PAGE]))


def swap_pages(image: bytearray, draw: Random) -> None:
    a, b = (PAGE * draw.randrange(len(image) // PAGE) for _ in range(2))
    image[a : a + PAGE], image[b : b + PAGE] = image[b : b + PAGE], image[a : a + PAGE]


def drop_a_page(image: bytearray, draw: Random) -> None:
    start = PAGE * draw.randrange(len(image) // PAGE)
    del image[start : start + PAGE]


def overwrite_a_word(image: bytearray, draw: Random) -> None:
    start = draw.randrange(len(image) - 8)
    image[start : start + 8] = draw.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]).to_bytes(8, "little")


DAMAGES = [
    flip_bits,
    flip_a_bit_of_the_header,
    cut,
    append,
    zero_a_page,
    swap_pages,
    drop_a_page,
    overwrite_a_word,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_five_thousand_damaged_images(kind: str, damage: Callable[[bytearray, Random], None], tmp_path: Path) -> None:
    """In all: never a crash, never a wrong neighbour."""
    index = filled(kind)
    index.save(tmp_path / "whole", "model")
    whole, before = (tmp_path / "whole").read_bytes(), neighbours(index)
    assert len(whole) > 3 * PAGE
    draw, path, other = Random(damage.__name__), tmp_path / "index", AutoIndex(DIMENSIONS)
    refused = 0
    for turn in range(5000 // (2 * len(DAMAGES)) + 1):
        image = bytearray(whole)
        damage(image, draw)
        path.write_bytes(image)
        try:
            (index if turn % 2 else other).load(path, "model")
        except IndexDamaged:
            refused += 1
            assert image != whole
        else:
            assert image == whole
            assert len(other if turn % 2 == 0 else index) == COUNT - 20
        assert neighbours(index) == before
    assert refused > 200


def test_a_whole_image_is_believed(kind: str, tmp_path: Path) -> None:
    index = filled(kind)
    index.save(tmp_path / "index", "model")
    again = new(kind)
    again.load(tmp_path / "index", "model")
    assert neighbours(again) == neighbours(index)


def envelope(image: bytes) -> dict[str, object]:
    length = int.from_bytes(image[12:16], "little")
    fields = json.loads(image[16 : 16 + length])
    assert isinstance(fields, dict)
    return fields


def with_header(image: bytes, header: bytes, version: int = snapshot.VERSION) -> bytes:
    """Another header under a checksum that holds."""
    payload = image[16 + int.from_bytes(image[12:16], "little") : -32]
    data = snapshot.PREFIX.pack(snapshot.MAGIC, version, len(header)) + header + payload
    return data + hashlib.sha256(data).digest()


def test_headers_that_lie(kind: str, tmp_path: Path) -> None:
    """A program that knows the format wrote them: the checksum holds."""
    index, path = filled(kind), tmp_path / "index"
    index.save(path, "model")
    image = path.read_bytes()
    fields = envelope(image)
    changed: list[dict[str, object]] = [
        {"dimensions": DIMENSIONS + 1},
        {"dimensions": str(DIMENSIONS)},
        {"count": COUNT},
        {"count": COUNT - 21},
        {"count": -1},
        {"count": 2**62},
        {"count": "200"},
        {"count": None},
        {"model": "other"},
        {"model": None},
        {"space": "l2"},
        {"kind": "flat" if kind == "hnsw" else "hnsw"},
        {"kind": "other"},
        {"kind": [1]},
        {"payload_bytes": 1},
        {"payload_bytes": None},
        {"more": 1},
    ]
    headers = [json.dumps(fields | change).encode() for change in changed]
    headers += [b"", b"{", b"[]", b"null", b"{}", b"\xff", b"[" * 60_000, b'{"kind": "flat"}', b" " * (1 << 17)]
    images = [with_header(image, header) for header in headers]
    images.append(with_header(image, json.dumps(fields).encode(), version=2))
    for lie in images:
        path.write_bytes(lie)
        for victim in (index, AutoIndex(DIMENSIONS)):
            with pytest.raises(IndexDamaged):
                victim.load(path, "model")
    path.write_bytes(with_header(image, json.dumps(fields).encode()))
    index.load(path, "model")


def test_what_is_no_image(kind: str, tmp_path: Path) -> None:
    index = filled(kind)
    index.save(tmp_path / "whole", "model")
    whole = (tmp_path / "whole").read_bytes()
    paths = {name: tmp_path / name for name in ("empty", "text", "prefix", "four-gigabytes", "sparse")}
    paths["empty"].write_bytes(b"")
    paths["text"].write_text("not an index\n" * 1000)
    paths["prefix"].write_bytes(whole[:16])
    paths["four-gigabytes"].write_bytes(whole[:12] + b"\xff" * 4 + whole[16:])
    with paths["sparse"].open("wb") as sparse:
        sparse.truncate(1 << 40)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
    names = ("fifo", "loop", "directory", "socket", "missing", "missing/too")
    for path in [*paths.values(), *(tmp_path / name for name in names), Path("/dev/zero"), Path("/dev/null")]:
        with pytest.raises(IndexDamaged, match=str(path)):
            index.load(path, "model")
    paths["text"].write_bytes(whole[:12] + (1 << 20).to_bytes(4, "little") + bytes(2 << 20))
    with pytest.raises(IndexDamaged, match="header of 1048576 bytes lies"):
        index.load(paths["text"], "model")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(IndexDamaged, match="no regular file"):
            index.load(path, "model")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a full disk does: writes beyond `size` fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_failed_save(path: Path, kind: str, old: bytes) -> None:
    """The old image is there, and nothing else."""
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
    new(kind).load(path, "model")


@pytest.mark.parametrize("missing", [1, 50, PAGE, 20_000])
def test_a_full_disk_leaves_the_old_image(kind: str, tmp_path: Path, missing: int) -> None:
    """Of the graph, hnswlib itself would not notice: it writes through a file in memory."""
    index, path = filled(kind), tmp_path / "index"
    index.remove(range(100))
    index.save(path, "model")
    old = path.read_bytes()
    index.add(range(COUNT), VECTORS)
    index.save(tmp_path / "larger", "model")
    needed = (tmp_path / "larger").stat().st_size
    (tmp_path / "larger").unlink()
    with largest_file(max(0, needed - missing)), pytest.raises(OSError):  # noqa: PT011
        index.save(path, "model")
    check_failed_save(path, kind, old)


@pytest.mark.parametrize("call", ["fsync", "replace", "posix_fadvise"])
def test_a_failing_call_leaves_the_old_image(
    kind: str, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, path = filled(kind), tmp_path / "index"
    index.save(path, "model")
    old = path.read_bytes()
    index.remove([1])

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="broken"):
            index.save(path, "model")
    check_failed_save(path, kind, old)


def test_a_disk_that_writes_something_else(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, path = filled(kind), tmp_path / "index"
    index.save(path, "model")
    old = path.read_bytes()
    sync = os.fsync

    def corrupt(descriptor: int) -> None:
        sync(descriptor)
        os.pwrite(descriptor, b"\x55", 3000)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", corrupt)
        with pytest.raises(OSError, match="read back"):
            index.save(path, "model")
    check_failed_save(path, kind, old)


def test_nowhere_to_write(kind: str, tmp_path: Path) -> None:
    index = filled(kind)
    with pytest.raises(FileNotFoundError):
        index.save(tmp_path / "missing" / "index", "model")
    (tmp_path / "index").mkdir()
    with pytest.raises(OSError):  # noqa: PT011
        index.save(tmp_path / "index", "model")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_what_a_killed_process_left_is_overwritten(kind: str, tmp_path: Path) -> None:
    index, path = filled(kind), tmp_path / "index"
    path.with_name("index.tmp").write_bytes(b"half" * 100_000)
    index.save(path, "model")
    assert list(tmp_path.iterdir()) == [path]
    new(kind).load(path, "model")
    assert path.stat().st_mode & 0o777 == 0o600
