"""Attention over a paged KV cache: prompts and single tokens alike, the queries of a KV head packed into one tile.

Online softmax after Dao 2023, arXiv:2307.08691; long contexts are split as in Flash-Decoding and merged by the
logarithms of their sums. A split is a fixed span of positions, so that what a sequence yields depends on the span alone
and on nothing that runs beside it.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from millrace.kernels.triton.kv_cache import KVPages
from millrace.kernels.triton.numbers import INTERPRETED

LEAST_SPAN = 256  # positions of a split; a longer one is a multiple of it
WAVES = 2  # programs for each multiprocessor that splitting aims at
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    block_tables,
    offsets,
    context_lens,
    out,
    sums,
    scale,
    window,
    table_width,
    tokens,
    splits,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    page: tl.constexpr,
    SPAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
    UPCASTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (tile of queries and split, KV head, sequence); those beyond a sequence's queries or context do nothing.

    q [tokens, heads, dim]; offsets [sequences + 1] into tokens; the last query of a sequence is the last token of its
    context. Cache: see kv_cache.py. block_tables [sequences, table_width]. window 0: none.
    SPAN 0: out [tokens, heads, dim]. Else out float32 [splits, tokens, heads, dim] and sums [splits, tokens, heads],
    the base-2 logarithms of the softmax's denominators, -inf where a split sees nothing. BLOCK_N divides page and SPAN.
    """
    group: tl.constexpr = heads // kv_heads
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    first = tl.load(offsets + sequence)
    count = tl.load(offsets + sequence + 1) - first
    if tile * BLOCK_M >= count * group:
        return
    context = tl.load(context_lens + sequence)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = rows // group
    head = kv_head * group + rows % group
    live = query < count
    position = context - count + query
    elements, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = elements < dim
    at = (first + query).to(tl.int64) * heads + head
    queries = tl.load(q + at[:, None] * dim + elements[None, :], live[:, None] & inside[None, :], 0.0)

    begin, end = 0, context
    if CAUSAL:
        end = tl.minimum(context, context - count + (tile * BLOCK_M + BLOCK_M - 1) // group + 1)
    if window > 0:
        begin = tl.maximum(0, context - count + tile * BLOCK_M // group - window + 1)
    if SPAN > 0:
        begin, end = tl.maximum(begin, split * SPAN), tl.minimum(end, (split + 1) * SPAN)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
        block = tl.load(block_tables + sequence * table_width + start // page).to(tl.int64)
        place = (block * kv_heads + kv_head) * page + start % page + columns
        there = start + columns < end
        k = tl.load(keys + place[:, None] * dim + elements[None, :], there[:, None] & inside[None, :], 0.0)
        v = tl.load(values + place[:, None] * dim + elements[None, :], there[:, None] & inside[None, :], 0.0)
        if UPCASTS:
            scores = tl.dot(queries.to(tl.float32), tl.trans(k.to(tl.float32))) * (scale * LOG2_E)
        else:
            scores = tl.dot(queries, tl.trans(k.to(queries.dtype))) * (scale * LOG2_E)
        if QUANTIZED:
            scores *= tl.load(key_scales + place, there, 0.0)[None, :]
        seen = there[None, :] & live[:, None]
        if CAUSAL:
            seen &= start + columns[None, :] <= position[:, None]
        if window > 0:
            seen &= start + columns[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that sees nothing yet
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        if QUANTIZED:
            weights *= tl.load(value_scales + place, there, 0.0)[None, :]
        if UPCASTS:
            mixed = mixed * fade[:, None] + tl.dot(weights, v.to(tl.float32))
        else:
            mixed = mixed * fade[:, None] + tl.dot(weights.to(queries.dtype), v.to(queries.dtype))
        top = highest

    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    kept = live[:, None] & inside[None, :]
    if SPAN > 0:
        at += split.to(tl.int64) * tokens * heads
        tl.store(
            sums + at, tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf")), live
        )
    tl.store(out + at[:, None] * dim + elements[None, :], mixed.to(out.dtype.element_ty), kept)


@triton.jit
def merge_kernel(
    parts,
    sums,
    out,
    tokens,
    splits,
    heads: tl.constexpr,
    dim: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (token, head): out [tokens, heads, dim] of what `attend_kernel` made of each split; SPLITS >= splits."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    some, elements = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    at = some.to(tl.int64) * tokens * heads + token * heads + head
    logs = tl.load(sums + at, some < splits, float("-inf"))
    highest = tl.max(logs, 0)
    shares = tl.exp2(logs - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(shares, 0)
    # A split that saw nothing left what was in its memory.
    used = (shares > 0.0)[:, None] & (elements < dim)[None, :]
    pieces = tl.load(parts + at[:, None] * dim + elements[None, :], used, 0.0)
    mixed = tl.sum(pieces * shares[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    place = (token * heads + head) * dim + elements
    tl.store(out + place, mixed.to(out.dtype.element_ty), elements < dim)


def span_of(sequences: int, kv_heads: int, tiles: int, longest: int, processors: int) -> int:
    """Positions of a split for contexts of at most `longest`; 0: none, where there are programs enough without."""
    programs = sequences * kv_heads * tiles
    wanted = min(WAVES * processors // max(1, programs), -(-longest // LEAST_SPAN))
    if wanted <= 1:
        return 0
    return -(-longest // (wanted * LEAST_SPAN)) * LEAST_SPAN


def attend(
    q: Tensor,
    cache: KVPages,
    block_tables: Tensor,
    offsets: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    most_queries: int,
    causal: bool = True,
    window: int = 0,
    span: int = 0,
) -> Tensor:
    """Attention of q [tokens, heads, dim]: sequence i has queries offsets[i] to offsets[i + 1], the last tokens of its
    context of context_lens[i]. block_tables int32 [sequences, width]; 0 <= window; `span`: see `span_of`.

    `most_queries`: of one sequence; it and the width of the tables fix the grid, so that a graph may be replayed.
    """
    tokens, heads, dim = q.shape
    _, kv_heads, page, _ = cache.keys.shape
    sequences, width = block_tables.shape
    group = heads // kv_heads
    rows = most_queries * group
    block_m = 16 if rows <= 16 else 64 if dim > 128 or rows <= 64 else 128
    tiles = triton.cdiv(rows, block_m)
    splits = triton.cdiv(width * page, span) if span else 1
    out = torch.empty_like(q)
    shape = (splits, tokens, heads)
    parts = torch.empty((*shape, dim), dtype=torch.float32, device=q.device) if span else out
    sums = torch.full(shape, float("-inf"), dtype=torch.float32, device=q.device) if span else out
    if not tokens:
        return out
    attend_kernel[(tiles * splits, kv_heads, sequences)](
        q, cache.keys, cache.values, *cache.scales, block_tables, offsets, context_lens, parts, sums,
        scale, window, width, tokens, splits,
        heads=heads, kv_heads=kv_heads, dim=dim, page=page, SPAN=span, CAUSAL=causal,
        QUANTIZED=cache.key_scales is not None, UPCASTS=INTERPRETED, BLOCK_M=block_m,
        BLOCK_N=min(page, 64), BLOCK_D=triton.next_power_of_2(dim), num_warps=4 if block_m < 128 else 8, num_stages=2,
    )  # fmt: skip
    if span:
        merge_kernel[(tokens, heads)](
            parts, sums, out, tokens, splits, heads=heads, dim=dim,
            SPLITS=triton.next_power_of_2(splits), BLOCK_D=triton.next_power_of_2(dim), num_warps=4,
        )  # fmt: skip
    return out
