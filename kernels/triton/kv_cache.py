"""Queries and keys turned by their positions, keys and values written to the paged cache, in one pass.

The cache of a layer is [2, blocks, kv_heads, page, dim]: keys, then values; `slots` say where a token goes (slot s is
token s % page of block s // page; -1: nowhere). Rotary embedding: Su et al. 2021, arXiv:2104.09864, with halves in
place of neighbours, of the first `rotary` elements of a head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import triton
import triton.language as tl
from millrace.kernels.triton.numbers import quantize_row


@triton.jit
def rotate_and_write_kernel(
    qkv,
    cosine,
    sine,
    positions,
    slots,
    q_out,
    keys,
    values,
    key_scales,
    value_scales,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    dim: tl.constexpr,
    rotary: tl.constexpr,
    page: tl.constexpr,
    QUANTIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token, head): of `heads` queries, `kv_heads` keys and as many values in a row of `qkv`.

    `cosine` and `sine`: float32 [positions, rotary / 2]. QUANTIZES: the cache is int8 or fp8, and scales [blocks,
    kv_heads, page] give back what it was.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = qkv + token * (heads + 2 * kv_heads) * dim + head * dim
    elements = tl.arange(0, BLOCK)
    inside = elements < dim
    x = tl.load(row + elements, inside, 0.0).to(tl.float32)
    if head < heads + kv_heads:
        half: tl.constexpr = rotary // 2
        turns = elements < rotary
        position = tl.load(positions + token).to(tl.int64)
        pair = tl.where(elements < half, elements + half, elements - half)
        other = tl.load(row + pair, turns, 0.0).to(tl.float32)
        angle = position * half + tl.where(elements < half, elements, elements - half)
        c = tl.load(cosine + angle, turns, 1.0)
        s = tl.load(sine + angle, turns, 0.0)
        x = x * c + tl.where(elements < half, -other, other) * s
    if head < heads:
        tl.store(q_out + token * heads * dim + head * dim + elements, x.to(q_out.dtype.element_ty), inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        is_value = head >= heads + kv_heads
        kv_head = head - heads - tl.where(is_value, kv_heads, 0)
        place = (slot // page * kv_heads + kv_head) * page + slot % page
        if QUANTIZES:
            x, scale = quantize_row(x, keys.dtype.element_ty)
            tl.store(key_scales + place, scale, (slot >= 0) & (not is_value))
            tl.store(value_scales + place, scale, (slot >= 0) & is_value)
        kept = x.to(keys.dtype.element_ty)
        tl.store(keys + place * dim + elements, kept, inside & (slot >= 0) & (not is_value))
        tl.store(values + place * dim + elements, kept, inside & (slot >= 0) & is_value)


@dataclass(frozen=True, slots=True)
class KVPages:
    """Of a layer, [blocks, kv_heads, page, dim]; of int8 and fp8, with scales float32 [blocks, kv_heads, page]."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @classmethod
    def empty(
        cls, blocks: int, kv_heads: int, page: int, dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> "KVPages":
        shape = (blocks, kv_heads, page, dim)
        keys, values = (torch.zeros(shape, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
        if dtype.itemsize > 1:
            return cls(keys, values)
        return cls(keys, values, *(torch.zeros(shape[:3], dtype=torch.float32, device=device) for _ in range(2)))

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Something to point at where there are none."""
        return (
            self.keys if self.key_scales is None else self.key_scales,
            self.values if self.value_scales is None else self.value_scales,
        )


def rotate_and_write(
    qkv: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor, slots: Tensor, cache: KVPages
) -> Tensor:
    """Queries [tokens, heads, dim] of `qkv` [tokens, heads + 2 x kv_heads, dim], turned; keys and values are written.

    `cosine`, `sine`: float32 [positions, rotary / 2], rotary at most dim. `positions`, `slots`: int32 [tokens]; slot -1
    writes nothing.
    """
    tokens, together, dim = qkv.shape
    _, kv_heads, page, _ = cache.keys.shape
    heads = together - 2 * kv_heads
    q = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
    if tokens:
        rotate_and_write_kernel[(tokens, together)](
            qkv, cosine, sine, positions, slots, q, cache.keys, cache.values, *cache.scales,
            heads=heads, kv_heads=kv_heads, dim=dim, rotary=2 * cosine.shape[1], page=page,
            QUANTIZES=cache.key_scales is not None, BLOCK=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
    return q
