"""The safetensors format, read with suspicion: a header is checked whole before any of its offsets is used.

Format: 8 bytes of little-endian header length, a JSON header `name -> {dtype, shape, data_offsets}`, then the
data that the offsets divide without gap or overlap (https://github.com/huggingface/safetensors#format).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.server.errors import CheckpointError
from millrace.server.model.fields import Fields, parse_object
from millrace.server.model.spec import Shape

MAX_HEADER_BYTES = 100_000_000  # the cap of the public implementation
MAX_DIMENSIONS, MAX_SIZE = 8, 1 << 48
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """`begin`, `end`: bytes from the start of the file."""

    dtype: str
    shape: Shape
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    path: Path
    size: int
    data_start: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Read and check the header. Raises CheckpointError naming file and tensor."""
        try:
            with path.open("rb") as stream:
                size = path.stat().st_size
                length = int.from_bytes(stream.read(8), "little")
                if size < 8 or length > size - 8:
                    raise CheckpointError(f"{path}: is truncated: {size} bytes cannot hold its header")
                if length > MAX_HEADER_BYTES:
                    raise CheckpointError(f"{path}: header of {length} bytes is over the {MAX_HEADER_BYTES} allowed")
                header = parse_object(stream.read(length), f"{path}: header")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        header.pop("__metadata__", None)
        start = 8 + length
        tensors = {name: _tensor(f"{path}: tensor {name}", entry, start) for name, entry in header.items()}
        _check_layout(path, tensors, start, size)
        return cls(path, size, start, tensors)


def _tensor(origin: str, entry: Any, start: int) -> Tensor:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{origin}: its header entry is no object")
    fields = Fields(entry, origin)
    dtype = fields.string("dtype")
    if dtype not in ITEM_BYTES:
        raise fields.error("dtype", f"{dtype!r} is unknown")
    shape, offsets = fields.integers("shape", 0, MAX_SIZE), fields.integers("data_offsets", 0, MAX_SIZE)
    if len(shape) > MAX_DIMENSIONS:
        raise fields.error("shape", f"has {len(shape)} dimensions; {MAX_DIMENSIONS} are allowed")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise fields.error("data_offsets", f"{offsets} do not fit {dtype} of shape {shape}")
    return Tensor(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _check_layout(path: Path, tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin < end:
            raise CheckpointError(f"{path}: tensor {name} overlaps the one before it")
        if tensor.begin > end:
            raise CheckpointError(f"{path}: a gap of {tensor.begin - end} bytes before tensor {name}")
        end = tensor.end
    if end > size:
        raise CheckpointError(f"{path}: is truncated: its tensors end at byte {end}, the file at {size}")
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes follow the last tensor")
