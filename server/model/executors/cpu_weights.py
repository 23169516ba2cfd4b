"""From a checkpoint's files to the cpu executor's network: which tensors make which matrix, what that takes, loading.

Tensors are packed straight from where the files are mapped; what has been packed is given back to the system at once.
"""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from millrace.kernels import _C
from millrace.server.errors import CheckpointError
from millrace.server.model.executors.precision import BF16, Packing, Precision
from millrace.server.model.executors.read_ahead import ReadAhead
from millrace.server.model.rotary import frequencies
from millrace.server.model.safetensors import ITEM_BYTES, Tensor
from millrace.server.model.spec import LayerSpec, ModelSpec, NormSpec, RotarySpec, Shape, Weight
from millrace.server.model.weights import STORED, Found, Progress

LINE, TURN, BLOCK = 64, 16, 32
BF16_INFINITY = (2 - 2**-8) * 2.0**127  # what is rounded to it
TABLES = {"embedding": "embedding", "position_embedding": "positions", "token_type_embedding": "token_types"}
_Source = tuple[memoryview, str, int, int]  # numbers, dtype, rows, columns
Parts = dict[str, Any]  # handles of the runtime, by its names: matrices, vectors, tables


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of `roles` that are kept as one: a packed matrix, a vector of float32, or a table as it is stored."""

    kind: Literal["matrix", "vector", "table"]
    roles: tuple[str, ...]
    interleaved: bool = False
    packing: Packing = BF16


def layer_parts(layer: LayerSpec, packing: Packing) -> dict[str, Part]:
    """By the name that the runtime has for each."""
    roles = {weight.role for weight in layer.weights}
    gated = layer.mlp.kind == "gated"
    joined = {
        "qkv": (("q", "k", "v"), False),
        "o": (("o",), False),
        "up": (("gate", "up") if gated else ("up",), gated),
        "down": (("down",), False),
    }
    parts = {}
    for name, (sources, interleaved) in joined.items():
        parts[name] = Part("matrix", sources, interleaved, packing)
        biases = tuple(f"{role}_bias" for role in sources)
        if biases[0] in roles:
            parts[f"{name}_bias"] = Part("vector", biases, interleaved)
    vectors = ("attention_norm", "mlp_norm", "q_norm", "k_norm", "attention_norm_bias", "mlp_norm_bias")
    return parts | {role: Part("vector", (role,)) for role in vectors if role in roles}


def outer_parts(spec: ModelSpec, packing: Packing) -> dict[str, Part]:
    """The same of what is outside the layers. A tied embedding has no table of its own."""
    parts = {}
    for weight in spec.weights:
        if weight.role == "head" or (spec.tied and weight.role == "embedding"):
            parts["head"] = Part("matrix", (weight.role,), packing=packing)
        elif len(weight.shape) == 2:
            parts[weight.role] = Part("table", (weight.role,))
        else:
            parts[weight.role] = Part("vector", (weight.role,))
    return parts


def packed_bytes(spec: ModelSpec, precision: Precision, item_bytes: Mapping[str, int]) -> int:
    """Memory of all weights. `item_bytes`: by tensor name, of a number as the checkpoint stores it."""
    total = 0
    for weights, parts in _groups(spec, precision):
        by_role = {weight.role: weight for weight in weights}
        for part in parts.values():
            total += _part_bytes(part, [by_role[role] for role in part.roles], item_bytes)
    for rotary in _rotaries(spec):
        total += _lines(BLOCK * -(-rotary.dim // 2 // BLOCK) * 4)
    return total


def _part_bytes(part: Part, weights: Sequence[Weight], item_bytes: Mapping[str, int]) -> int:
    sizes = [weight.shape[0] for weight in weights]
    channels = -(-sizes[0] // TURN) * TURN * 2 if part.interleaved else sum(sizes)
    if part.kind == "matrix":
        return _C.Weights.packed(part.packing.width, part.packing.group, channels, weights[0].shape[1])
    if part.kind == "vector":
        return _lines(-(-channels // BLOCK) * BLOCK * 4)
    return _lines(weights[0].shape[0] * weights[0].shape[1] * item_bytes[weights[0].name])


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE


def _groups(spec: ModelSpec, precision: Precision) -> Iterator[tuple[Sequence[Weight], dict[str, Part]]]:
    yield spec.weights, outer_parts(spec, precision.head)
    for layer in spec.layers:
        yield layer.weights, layer_parts(layer, precision.layers)


def _rotaries(spec: ModelSpec) -> list[RotarySpec]:
    return list(dict.fromkeys(layer.attention.position for layer in spec.layers if layer.attention.position))


class Loader:
    """Packs the parts of a checkpoint. `progress(done, total)` counts bytes read."""

    def __init__(self, found: Sequence[Found], weights: _C.Weights, progress: Progress):
        self._found = {weight.name: (file.path, tensor) for weight, file, tensor in found}
        self._weights = weights
        self._progress = progress
        self._total = sum(tensor.end - tensor.begin for _, _, tensor in found)
        self._done = 0
        self._files: dict[Path, mmap.mmap] = {}
        # In the order of use, which is that of packing.
        self._ahead = ReadAhead([(file.path, tensor.begin, tensor.end) for _, file, tensor in found])

    def network(self, spec: ModelSpec, precision: Precision) -> _C.Network:
        """Raises CheckpointError for a number that is not finite."""
        with ExitStack() as stack:
            stack.enter_context(self._ahead)
            for path in {path for path, _ in self._found.values()}:
                try:
                    with path.open("rb") as stream:
                        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
                self._files[path] = stack.enter_context(mapped)
            return self._build(spec, precision)

    def _build(self, spec: ModelSpec, precision: Precision) -> _C.Network:
        network = _C.Network()
        network.vocab, network.hidden = spec.vocab_size, spec.hidden_size
        outer = self._load(spec.weights, outer_parts(spec, precision.head))
        for role, name in TABLES.items():
            if role in outer:
                setattr(network, name, outer[role])
        if "head" in outer:
            network.head = outer["head"]
        network.position_offset = spec.embedding.position_offset
        network.embedding_norm = _norm(spec.embedding.norm, outer, "embedding_norm")
        network.final_norm = _norm(spec.final_norm, outer, "final_norm")
        if spec.pooling is not None:
            network.pooling, network.normalize = spec.pooling.kind, spec.pooling.normalize
        rotaries = _rotaries(spec)
        network.rotaries = [self._rotary(rotary) for rotary in rotaries]
        network.layers = [self._layer(layer, precision, rotaries) for layer in spec.layers]
        return network

    def _layer(self, spec: LayerSpec, precision: Precision, rotaries: Sequence[RotarySpec]) -> _C.Layer:
        parts = self._load(spec.weights, layer_parts(spec, precision.layers))
        layer, attention = _C.Layer(), spec.attention
        layer.post_norm = spec.norm.place == "post"
        layer.attention_norm = _norm(spec.norm, parts, "attention_norm")
        layer.mlp_norm = _norm(spec.norm, parts, "mlp_norm")
        layer.q_norm, layer.k_norm = _norm(spec.norm, parts, "q_norm"), _norm(spec.norm, parts, "k_norm")
        layer.heads, layer.kv_heads, layer.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        layer.scale, layer.causal, layer.window = attention.scale, attention.causal, attention.window or 0
        layer.rotary = -1 if attention.position is None else rotaries.index(attention.position)
        layer.gated, layer.mlp_size = spec.mlp.kind == "gated", spec.mlp.size
        layer.activation = spec.mlp.activation
        for name in ("qkv", "o", "up", "down"):
            setattr(layer, name, _C.Linear(parts[name], parts.get(f"{name}_bias")))
        return layer

    def _rotary(self, spec: RotarySpec) -> _C.Rotary:
        radians, factor = frequencies(spec)
        source = (radians.data.cast("B"), "F32", 1, len(radians))
        return _C.Rotary(spec.dim, factor, self._weights.vector([source]))

    def _load(self, weights: Sequence[Weight], parts: Mapping[str, Part]) -> Parts:
        by_role = {weight.role: weight for weight in weights}
        return {name: self._pack(part, [by_role[role] for role in part.roles]) for name, part in parts.items()}

    def _pack(self, part: Part, weights: Sequence[Weight]) -> Any:
        places = [self._found[weight.name] for weight in weights]
        if len({tensor.dtype for _, tensor in places}) > 1:
            names = ", ".join(weight.name for weight in weights)
            raise CheckpointError(f"{places[0][0]}: tensors {names} have different dtypes: save them with one")
        with ExitStack() as stack:
            sources: list[_Source] = []
            for path, tensor in places:
                view = stack.enter_context(memoryview(self._files[path]))
                data = stack.enter_context(view[tensor.begin : tensor.end])
                sources.append((data, tensor.dtype, *_rows_columns(tensor.shape)))
            try:
                result: Any
                if part.kind == "matrix":
                    packing = part.packing
                    result = self._weights.pack(sources, part.interleaved, packing.width, packing.group)
                elif part.kind == "vector":
                    result = self._weights.vector(sources, part.interleaved)
                else:
                    result = self._weights.table(sources[0])
            except ValueError as error:
                for check in (_not_finite, _beyond_bf16):
                    for (path, _), weight, (data, dtype, *_) in zip(places, weights, sources, strict=True):
                        if fault := check(data, dtype):
                            raise CheckpointError(f"{path}: tensor {weight.name} holds {fault}") from None
                raise CheckpointError(f"{places[0][0]}: tensor {weights[0].name} {error}") from None
            finally:
                sources.clear()
        for path, tensor in places:
            self._release(path, tensor)
            self._done += tensor.end - tensor.begin
            self._ahead.use(tensor.end - tensor.begin)
        self._progress(self._done, self._total)
        return result

    def _release(self, path: Path, tensor: Tensor) -> None:
        """Let go of the pages that lie wholly within a tensor that is packed."""
        begin, end = (-(-tensor.begin // mmap.PAGESIZE) * mmap.PAGESIZE, tensor.end // mmap.PAGESIZE * mmap.PAGESIZE)
        if end > begin:
            self._files[path].madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _not_finite(data: memoryview, dtype: str) -> str:
    """What the numbers hold that no precision takes; empty: nothing."""
    if dtype == "BF16":
        finite = not ((np.frombuffer(data, "<u2") & 0x7F80) == 0x7F80).any()
    else:
        finite = bool(np.isfinite(np.frombuffer(data, STORED[dtype])).all())
    return "" if finite else "NaN or infinity"


def _beyond_bf16(data: memoryview, dtype: str) -> str:
    """What the numbers, which are finite, hold that bfloat16 does not take; empty: nothing."""
    if dtype != "F32":
        return ""
    largest = float(np.abs(np.frombuffer(data, STORED[dtype])).max(initial=0))
    return f"{largest:g}, which bfloat16 cannot: rescale it, or quantize it" if largest >= BF16_INFINITY else ""


def _rows_columns(shape: Shape) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _norm(spec: NormSpec | None, parts: Parts, role: str) -> _C.Norm:
    if spec is None or role not in parts:
        return _C.Norm()
    return _C.Norm(spec.kind == "layer", spec.eps, parts[role], parts.get(f"{role}_bias"))


def stored_bytes(found: Sequence[Found]) -> dict[str, int]:
    """Bytes of a number, by tensor name."""
    return {weight.name: ITEM_BYTES[tensor.dtype] for weight, _, tensor in found}
