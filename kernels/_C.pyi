from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from millrace.kernels.attention import KVCache

def isa() -> str: ...
def available_isas() -> list[str]: ...
def write_kv(
    cache: KVCache, slots: NDArray[np.int64], keys: NDArray[np.float32], values: NDArray[np.float32]
) -> None: ...
def attend(
    *,
    q: NDArray[np.float32],
    cache: KVCache,
    heads: int,
    offsets: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    block_tables: NDArray[np.int32],
    scale: float,
    causal: bool,
    window: int,
    threads: int,
    out: NDArray[np.float32],
) -> None: ...
def roof_loops() -> list[tuple[str, str]]: ...
def roof_compute(*, arithmetic: str, isa: str, threads: int, seconds: float) -> float: ...
def pool_cost(*, what: str, threads: int, rounds: int) -> float: ...
def roof_read(*, bytes: int, threads: int, seconds: float) -> float: ...
def roof_read_weights(*, model: Model, threads: int, seconds: float) -> float: ...

Sampled = tuple[
    NDArray[np.int32], NDArray[np.float32], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]
]
Columns = Mapping[str, NDArray[Any]]
Masks = Sequence[tuple[int, NDArray[np.uint32]]]

def sample(logits: NDArray[np.float32], columns: Columns, masks: Masks) -> Sampled: ...
def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], eps: float, out: NDArray[np.float32]) -> None: ...
def layer_norm(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32], eps: float, out: NDArray[np.float32]
) -> None: ...
def rotary_turns(
    positions: NDArray[np.int32],
    frequencies: NDArray[np.float32],
    factor: float,
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
) -> None: ...
def rotate(x: NDArray[np.float32], dim: int, cosine: NDArray[np.float32], sine: NDArray[np.float32]) -> None: ...
def embed_rows(
    table: NDArray[Any], stored: str, ids: NDArray[np.int32], accumulate: bool, out: NDArray[np.float32]
) -> None: ...
def add_rows(x: NDArray[np.float32], out: NDArray[np.float32]) -> None: ...
def mean_rows(x: NDArray[np.float32], out: NDArray[np.float32]) -> None: ...
def normalize(x: NDArray[np.float32]) -> None: ...
def activate(x: NDArray[np.float32], kind: str, out: NDArray[np.float32]) -> None: ...
def exp(x: NDArray[np.float32], out: NDArray[np.float32]) -> None: ...

Int32 = NDArray[np.int32]
Number = TypeVar("Number", np.int32, np.float32)

def pack_tokens(
    lanes: Int32, starts: Int32, ends: Int32, tokens: Int32, blocks: Int32, block_size: int
) -> tuple[Int32, Int32, Int32, Int32, Int32]: ...
def gather(table: NDArray[Number], rows: Int32, lens: Int32) -> tuple[Int32, NDArray[Number]]: ...
def append(table: Int32, lens: Int32, rows: Int32, values: Int32) -> None: ...

BLOCK_TOKENS: int
MAX_HEAD_DIM: int
MAX_INPUTS: int  # of a matrix

Source = tuple[Buffer, str, int, int]

def available_cores() -> int: ...
def kv_block_bytes(type: str, kv_heads: int, head_dim: int) -> int: ...

class Pool:
    def __init__(self, threads: int, first_core: int = 0) -> None: ...
    @property
    def size(self) -> int: ...

class Vector: ...
class Matrix: ...

class Table:
    def __init__(self) -> None: ...

class Weights:
    def __init__(self, bytes: int, pool: Pool) -> None: ...
    @staticmethod
    def packed(width: str, group: int, n: int, k: int) -> int: ...
    def pack(self, sources: Sequence[Source], interleaved: bool, width: str, group: int) -> Matrix: ...
    def vector(self, sources: Sequence[Source], interleaved: bool = False) -> Vector: ...
    def table(self, source: Source) -> Table: ...

class Norm:
    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, layer: bool, eps: float, weight: Vector, bias: Vector | None) -> None: ...

class Linear:
    def __init__(self, weight: Matrix, bias: Vector | None) -> None: ...

class Rotary:
    def __init__(self, dim: int, factor: float, frequencies: Vector) -> None: ...

class Layer:
    post_norm: bool
    attention_norm: Norm
    mlp_norm: Norm
    q_norm: Norm
    k_norm: Norm
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary: int
    causal: bool
    window: int
    qkv: Linear
    o: Linear
    gated: bool
    activation: str
    mlp_size: int
    up: Linear
    down: Linear

class Network:
    vocab: int
    hidden: int
    embedding: Table
    positions: Table
    position_offset: int
    token_types: Table
    embedding_norm: Norm
    final_norm: Norm
    rotaries: list[Rotary]
    layers: list[Layer]
    head: Matrix
    pooling: str
    normalize: bool

class Model:
    def __init__(self, network: Network, weights: Weights, kv_type: str, kv_blocks: int, pool: Pool) -> None: ...
    def step(
        self,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        slots: NDArray[np.int32],
        offsets: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        draw_tokens: NDArray[np.int32],
        pooled_rows: NDArray[np.int32],
        embeddings: tuple[NDArray[np.int32], NDArray[np.float32]],
        columns: Columns,
        masks: Masks,
    ) -> tuple[Sampled, NDArray[np.float32]]: ...
    def logits(self) -> NDArray[np.float32]: ...
    @property
    def progress(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None: ...
    def export_blocks(self, blocks: Sequence[int]) -> bytes: ...
    def import_blocks(self, blocks: Sequence[int], data: bytes) -> None: ...

class PackedWeights:
    def __init__(self, weight: NDArray[Any], width: str, group: int) -> None: ...
    def unpack(self) -> NDArray[np.float32]: ...
    @property
    def scales(self) -> NDArray[np.float32]: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def blocks(self) -> int: ...

def matmul(
    *,
    x: NDArray[Any],
    weights: PackedWeights,
    bias: NDArray[np.float32] | None,
    epilogue: str,
    activation: str,
    out: NDArray[Any],
    rows: tuple[int, int] | None,
    blocks: tuple[int, int] | None,
) -> None: ...

class SequenceLoops:
    """Types are those of server/engine/loops.py, which this layer does not know."""

    def __init__(self, sequence: type, request: type, row: type, token: type, running: object) -> None: ...
    def sort_running(self, running: list[Any]) -> tuple[list[Any], list[Any], list[Any]]: ...
    def plan_decodes(
        self, step: int, decoding: list[Any]
    ) -> tuple[list[Any], int, list[Any], list[tuple[Any, int]]]: ...
    def commit_plain(self, rows: list[Any], tokens: list[int]) -> tuple[list[int], list[int]]: ...
    def tokens_of(self, rows: list[Any], accepted: list[int], tokens: list[int]) -> list[Any]: ...
    def running_tokens(
        self, rows: list[Any], accepted: list[int], tokens: list[int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
    def columns(
        self, rows: list[Any]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_], list[Any]]: ...
