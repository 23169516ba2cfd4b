"""Attention over a paged KV cache: the face of csrc/kernels/attention.cpp, for tests and measurements.

`millrace.kernels.reference.attention.attend` is the definition, up to the rounding that `attend` states. The runtime
calls the native kernels itself, its threads sharing each layer.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from millrace.kernels import _C

BLOCK_TOKENS, MAX_HEAD_DIM = 32, 256

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of one layer: csrc/include/millrace/kv_cache.h has the layout. Made by `kv_cache`."""

    head_dim: int
    keys: NDArray[Any]  # uint16 (bf16) or int8 [blocks, kv_heads, 32 * head_dim padded to 16]
    values: NDArray[Any]  # the same
    scales: Float32  # int8: [blocks, kv_heads, 2, 32]; else empty


def kv_cache(blocks: int, kv_heads: int, head_dim: int, dtype: Literal["bf16", "int8"] = "bf16") -> KVCache:
    """A cache of `blocks` blocks of 32 tokens, whose contents are anything.

    ValueError: blocks or kv_heads below 1, or a head_dim that is odd or outside [2, 256].
    """
    if blocks < 1 or kv_heads < 1:
        raise ValueError(f"blocks and kv_heads must be at least 1, not {blocks} and {kv_heads}")
    if not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise ValueError(f"head_dim must be even and in [2, {MAX_HEAD_DIM}], not {head_dim}")
    shape = (blocks, kv_heads, BLOCK_TOKENS * (-(-head_dim // 16) * 16))
    number: np.dtype[Any] = np.dtype(np.uint16 if dtype == "bf16" else np.int8)
    scales = (blocks, kv_heads, 2, BLOCK_TOKENS) if dtype == "int8" else (0,)
    return KVCache(head_dim, aligned(shape, number), aligned(shape, number), np.empty(scales, np.float32))


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array that begins on a page."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 4096, np.uint8)
    begin = -memory.ctypes.data % 4096
    return memory[begin : begin + size].view(dtype).reshape(shape)


def write(cache: KVCache, slots: Int64, keys: Float32, values: Float32) -> None:
    """Store keys and values [tokens, kv_heads x head_dim] in slots [tokens]: slot s is token s % 32 of block s // 32.

    Rounds to bf16, or to int8 with a scale for each token and head: the largest magnitude is 127.
    ValueError: a wrong dtype or shape, or a slot outside the cache; nothing was stored.
    """
    _C.write_kv(cache, slots, keys, values)


def attend(
    q: Float32,
    cache: KVCache,
    *,
    heads: int,
    offsets: Int32,
    context_lens: Int32,
    block_tables: Int32,
    scale: float,
    causal: bool = True,
    window: int = 0,
    threads: int = 1,
    out: Float32 | None = None,
) -> Float32:
    """Let each token see the keys and values of its row: float32 [tokens, heads x head_dim].

    q             float32 [tokens, heads x head_dim]; head h reads KV head h // (heads / kv_heads)
    offsets       [rows + 1]: row i has tokens offsets[i]:offsets[i + 1], which are the last of its context
    context_lens  [rows]: tokens of the row in the cache, those of this call included
    block_tables  [rows, blocks]: where position p of row i lies: block block_tables[i, p // 32]
    causal        a token sees positions up to its own; else all of its row's context
    window        it sees itself and window - 1 positions before it; 0: all
    threads       plan as for so many; all work runs on the calling thread

    Queries are rounded to bf16; scores, their exponentials and sums are float32; on avx512_bf16 the exponentials are
    rounded to bf16 where they meet the values. The result of a token depends on its row's context alone: not on the
    other rows, on how the row is cut into calls, nor on `threads`. Memory beyond a context may hold anything.
    ValueError: a wrong dtype, shape or value; nothing was computed. Runs without the GIL.
    """
    result = np.empty(q.shape, np.float32) if out is None else out
    _C.attend(
        q=q,
        cache=cache,
        heads=heads,
        offsets=offsets,
        context_lens=context_lens,
        block_tables=block_tables,
        scale=scale,
        causal=causal,
        window=window,
        threads=threads,
        out=result,
    )
    return result
