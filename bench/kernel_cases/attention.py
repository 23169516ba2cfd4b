"""Attention beside PyTorch's, which is spared the pages.

Decodes are bound by reading keys and values (`bytes`), prefills by multiplying (`operations`, of what is seen only).
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from millrace.bench.kernel_cases.case import Case, Run
from millrace.kernels.attention import BLOCK_TOKENS, attend, kv_cache, write

DType = Literal["bf16", "int8"]


class Shape(NamedTuple):
    name: str
    rows: int
    tokens: int  # of each row
    context: int
    heads: int
    kv_heads: int
    dim: int
    causal: bool = True
    threads: int = 1  # rows are divided among them


THREADS = len(os.sched_getaffinity(0))
SHAPES = (
    Shape("decode 8 x 4096", 8, 1, 4096, 32, 8, 64),
    Shape(f"decode 8 x 4096, {THREADS} threads", 8, 1, 4096, 32, 8, 64, threads=THREADS),
    Shape("decode 256 x 100", 256, 1, 100, 32, 8, 64),
    Shape("prefill 2048", 1, 2048, 2048, 32, 8, 64),
    Shape("prefill 1024, 128", 1, 1024, 1024, 32, 8, 128),
    Shape("encoder 64 x 25", 64, 25, 25, 12, 12, 32, causal=False),
    Shape("encoder 4 x 512", 4, 512, 512, 12, 12, 32, causal=False),
)


def cases() -> Iterator[Case]:
    for dtype in ("bf16", "int8"):
        for shape in SHAPES:
            yield case(shape, dtype)


def case(shape: Shape, dtype: DType) -> Case:
    rng = np.random.default_rng(0)
    blocks = -(-shape.context // BLOCK_TOKENS)
    tables = rng.permutation(shape.rows * blocks).astype(np.int32).reshape(shape.rows, blocks)
    cache = kv_cache(tables.size, shape.kv_heads, shape.dim, dtype)
    positions = np.arange(shape.context)
    keys, values = (
        rng.standard_normal((shape.context, shape.kv_heads * shape.dim)).astype(np.float32) for _ in range(2)
    )
    for table in tables:
        slots = table[positions // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS
        write(cache, slots, keys, values)
    q = rng.standard_normal((shape.rows * shape.tokens, shape.heads * shape.dim)).astype(np.float32)
    out = np.empty_like(q)

    def attend_rows(first: int, last: int) -> None:
        tokens = slice(first * shape.tokens, last * shape.tokens)
        attend(
            q[tokens],
            cache,
            heads=shape.heads,
            offsets=np.arange(last - first + 1, dtype=np.int32) * np.int32(shape.tokens),
            context_lens=np.full(last - first, shape.context, np.int32),
            block_tables=tables[first:last],
            scale=shape.dim**-0.5,
            causal=shape.causal,
            out=out[tokens],
        )

    ours: Run = partial(attend_rows, 0, shape.rows)
    if shape.threads > 1:
        pool = ThreadPoolExecutor(shape.threads)
        ends = np.linspace(0, shape.rows, shape.threads + 1).astype(int).tolist()
        ours = partial(divided, pool, attend_rows, ends)
    seen = shape.tokens * shape.context - (shape.tokens * (shape.tokens - 1) // 2 if shape.causal else 0)
    return Case(
        kernel="attention",
        case=f"{shape.name} {dtype}",
        ours=[ours],
        peer=[peer(shape, q, keys, values)],
        bytes=cache.keys.nbytes + cache.values.nbytes + cache.scales.nbytes,
        operations=4 * shape.rows * shape.heads * shape.dim * seen,
        threads=shape.threads,
    )


def divided(pool: ThreadPoolExecutor, run: Callable[[int, int], None], ends: list[int]) -> None:
    """The parts between the ends, each on a thread."""
    list(pool.map(run, ends, ends[1:]))  # which raises what one of them raised


def peer(shape: Shape, q: NDArray[np.float32], *kv: NDArray[np.float32]) -> Run:
    def heads(x: torch.Tensor, tokens: int, count: int) -> torch.Tensor:
        return x.view(-1, tokens, count, shape.dim).transpose(1, 2).contiguous().bfloat16()

    keys, values = (heads(torch.from_numpy(x), shape.context, shape.kv_heads) for x in kv)
    keys, values = (x.repeat(shape.rows, 1, 1, 1) for x in (keys, values))
    return partial(
        F.scaled_dot_product_attention,
        heads(torch.from_numpy(q), shape.tokens, shape.heads),
        keys,
        values,
        is_causal=shape.causal and shape.tokens > 1,
        enable_gqa=shape.heads != shape.kv_heads,
    )
