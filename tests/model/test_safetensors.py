"""Our reader against the library's writer, and against files that lie."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from millrace.server.errors import CheckpointError
from millrace.server.model.safetensors import MAX_HEADER_BYTES, SafetensorsFile

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    written = {
        f"{name}{shape}": torch.ones(shape).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in ((), (3,), (2, 0), (5, 1, 7))
    }
    save_file(written, tmp_path / "model.safetensors", {"format": "pt"})
    file = SafetensorsFile.open(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in written.items()
    }
    values = np.array([1.0, -2.5, 3e-8])
    save_file({"x": torch.from_numpy(values.astype(np.float32))}, tmp_path / "x.safetensors")
    tensor = SafetensorsFile.open(tmp_path / "x.safetensors").tensors["x"]
    data = (tmp_path / "x.safetensors").read_bytes()[tensor.begin : tensor.end]
    np.testing.assert_array_equal(np.frombuffer(data, np.float32), values.astype(np.float32))


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


LIES: dict[str, tuple[Any, int, str]] = {
    "truncated data": ({"a": entry(0, 8)}, 7, "truncated"),
    "trailing data": ({"a": entry(0, 8)}, 9, "follow the last tensor"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor b overlaps"),
    "the same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "tensor b overlaps"),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "gap of 4 bytes before tensor b"),
    "backwards": ({"a": entry(8, 0, [2])}, 8, "data_offsets"),
    "negative": ({"a": entry(-4, 4, [2])}, 8, "data_offsets"),
    "shape against bytes": ({"a": entry(0, 8, [3])}, 8, "do not fit"),
    "product that overflows 64 bits": ({"a": entry(0, 0, [2**40, 2**40])}, 0, "do not fit"),
    "negative sizes": ({"a": entry(0, 8, [-1, -2])}, 8, "shape"),
    "shape of floats": ({"a": entry(0, 8, [1.5])}, 8, "shape"),
    "too many dimensions": ({"a": entry(0, 4, [1] * 9)}, 4, "9 dimensions"),
    "unknown dtype": ({"a": entry(0, 8, [2], "F33")}, 8, "tensor a: dtype 'F33' is unknown"),
    "dtype of another type": ({"a": entry(0, 8, [2], 32)}, 8, "dtype"),
    "no entry": ({"a": [1]}, 0, "no object"),
    "missing offsets": ({"a": {"dtype": "F32", "shape": [0]}}, 0, "do not fit"),
    "header of another kind": ([1], 0, "object"),
    "no JSON": (b"{" * 100_000, 0, "JSON"),
    "a name twice": (b'{"a": 1, "a": 2}', 0, "given twice"),
    "not UTF-8": (b'{"\xff": 1}', 0, "JSON"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_told_in_one_line(tmp_path: Path, lie: str) -> None:
    header, size, words = LIES[lie]
    path = write(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=words) as caught:
        SafetensorsFile.open(path)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_header_lengths(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for data, words in (
        (b"", "truncated"),
        (b"\1\0\0", "truncated"),
        ((2**63).to_bytes(8, "little") + b"{}", "truncated"),
    ):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=words):
            SafetensorsFile.open(path)
    with path.open("wb") as stream:
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match="over the"):
        SafetensorsFile.open(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "model.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}, path)
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 250))
def test_any_damage_is_a_checkpoint_error_or_harmless(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    damaged = bytearray(sound)
    damaged[position % len(sound)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(damaged[: len(damaged) - cut % len(sound)] if cut % 3 else damaged)
    damaged_size = path.stat().st_size
    try:
        file = SafetensorsFile.open(path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
        assert all(tensor.end <= damaged_size for tensor in file.tensors.values())
    assert "\n" not in message
