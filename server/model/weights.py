"""Streams the tensors of a checkpoint as float32, one at a time."""

from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray

from millrace.server.errors import CheckpointError
from millrace.server.model.checkpoint import Checkpoint
from millrace.server.model.safetensors import SafetensorsFile, Tensor
from millrace.server.model.spec import Weight

Float32 = NDArray[np.float32]
Progress = Callable[[int, int], None]  # bytes done, bytes in all

STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
CHUNK = 4 * 1024 * 1024  # numbers read at once: bounds memory, paces progress


Found = tuple[Weight, SafetensorsFile, Tensor]


def find_weights(checkpoint: Checkpoint) -> list[Found]:
    """Match what the model needs with what the files hold; reads no data.

    CheckpointError for a tensor that is missing, has another shape or a dtype that is not supported, and for
    one that the model has no place for: it would be computed wrongly without a word.
    """
    spec, found = checkpoint.spec, []
    for weight in spec.all_weights:
        file = checkpoint.shards.get(weight.name)
        if file is None:
            raise CheckpointError(
                f"{checkpoint.directory}: tensor {weight.name} is missing; {spec.architecture} needs it"
            )
        tensor = file.tensors[weight.name]
        if tensor.shape != weight.shape:
            raise CheckpointError(
                f"{file.path}: tensor {weight.name} has shape {list(tensor.shape)}, "
                f"config.json says {list(weight.shape)}"
            )
        if tensor.dtype not in STORED:
            raise CheckpointError(
                f"{file.path}: tensor {weight.name} has dtype {tensor.dtype}; supported are {', '.join(STORED)}"
            )
        found.append((weight, file, tensor))
    known = {weight.name for weight in spec.all_weights}
    for name, file in checkpoint.shards.items():
        if name not in known and not name.endswith(spec.ignored):
            raise CheckpointError(f"{file.path}: tensor {name} has no place in {spec.architecture}")
    return found


def stream_weights(found: Sequence[Found], progress: Progress) -> Iterator[tuple[Weight, Float32]]:
    """Yield each weight, float32 of its shape, owned by the caller.

    CheckpointError for a number that is not finite.
    """
    total = sum(tensor.end - tensor.begin for _, _, tensor in found)
    done = 0
    for weight, file, tensor in found:
        values = np.empty(tensor.shape, np.float32)
        flat = values.reshape(-1)
        try:
            with file.path.open("rb") as stream:
                stream.seek(tensor.begin)
                for start in range(0, flat.size, CHUNK):
                    part = flat[start : start + CHUNK]
                    _read(stream, tensor.dtype, part)
                    if not np.isfinite(part).all():
                        raise CheckpointError(f"{file.path}: tensor {weight.name} holds NaN or infinity")
                    done += part.size * STORED[tensor.dtype].itemsize
                    progress(done, total)
        except OSError as error:
            raise CheckpointError(f"{file.path}: cannot be read: {error.strerror}") from None
        yield weight, values


def _read(stream: BufferedReader, dtype: str, out: Float32) -> None:
    """Fill `out` with the next numbers of the stream."""
    stored = np.empty(out.size, STORED[dtype])
    if stream.readinto(stored.data.cast("B")) != stored.nbytes:
        raise CheckpointError(f"{stream.name}: became shorter while it was read")
    if dtype == "BF16":
        out.view(np.uint32)[:] = stored.astype(np.uint32) << 16
    else:
        out[:] = stored
