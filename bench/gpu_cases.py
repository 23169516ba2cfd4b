"""What `bench/gpu.py` runs: each kernel on the shapes of models that are served, with its bound and its peers.

A dry run has the same cases in shapes that Triton's interpreter manages.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.triton.attention import attend, span_of
from millrace.kernels.triton.kv_cache import KVPages, rotate_and_write
from millrace.kernels.triton.matmul import int4_matmul, pack_int4, scaled_matmul
from millrace.kernels.triton.rows import add_rms_norm, gate

Run = Callable[[], Tensor]
PAGE = 64


@dataclass(frozen=True)
class Case:
    """`wanted`: in float64. `bytes` and `operations`: the least that must be moved and computed."""

    name: str
    ours: Run
    wanted: Run
    bytes: float
    operations: float = 0.0
    is_eight_bit: bool = False
    peers: Mapping[str, Callable[[], object]] = field(default_factory=dict)


def number(device: str) -> torch.dtype:
    """What activations are: the interpreter knows no products of bf16."""
    return torch.float16 if device == "cpu" else torch.bfloat16


def normal(device: str, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(number(device))


def row_cases(device: str, small: bool) -> Iterator[Case]:
    for rows, size in [(3, 96)] if small else [(8, 4096), (2048, 4096), (8192, 8192)]:
        x, weight = normal(device, rows, size), normal(device, size)
        yield Case(
            f"rms_norm {rows} x {size}",
            lambda x=x, weight=weight: add_rms_norm(x, weight, 1e-5)[0],  # type: ignore[misc]
            lambda x=x, weight=weight: F.rms_norm(x.double(), x.shape[1:], weight.double(), 1e-5),  # type: ignore[misc]
            bytes=4 * rows * size,
            peers={"rms_norm": lambda x=x, weight=weight: F.rms_norm(x, x.shape[1:], weight, 1e-5)},  # type: ignore[misc]
        )
        both = normal(device, rows, 2 * size)
        yield Case(
            f"silu gate {rows} x {size}",
            lambda both=both: gate(both, "silu")[0],  # type: ignore[misc]
            lambda both=both, n=size: F.silu(both[:, :n].double()) * both[:, n:].double(),  # type: ignore[misc]
            bytes=6 * rows * size,
            peers={"silu, times": lambda both=both, n=size: F.silu(both[:, :n]) * both[:, n:]},  # type: ignore[misc]
        )


def scaled_case(device: str, m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    if dtype == torch.int8:
        x, w = (torch.randint(-127, 128, (rows, k), device=device, dtype=torch.int8) for rows in (m, n))
    else:
        x, w = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    xs, ws = (torch.rand(size, device=device) * 0.02 + 0.001 for size in (m, n))
    half = x.to(number(device)), w.to(number(device)).t()
    peers: dict[str, Callable[[], object]] = {"bf16 cuBLAS": lambda: half[0] @ half[1]}
    if dtype != torch.int8:
        peers["scaled_mm"] = lambda: torch._scaled_mm(
            x, w.t(), xs[:, None], ws[None, :], out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return Case(
        f"{'int8' if dtype == torch.int8 else 'fp8'} product {m} x {n} x {k}",
        lambda: scaled_matmul(x, w, xs, ws, number(device)),
        lambda: x.double() @ w.double().t() * xs.double()[:, None] * ws.double(),
        bytes=m * k + n * k + 2 * m * n,
        operations=2.0 * m * n * k,
        is_eight_bit=True,
        peers=peers,
    )


def int4_case(device: str, m: int, n: int, k: int, group: int) -> Case:
    x = normal(device, m, k)
    numbers = torch.randint(0, 16, (n, k), device=device)
    scales = (torch.rand(k // group, n, device=device) * 0.02 + 0.01).to(x.dtype)
    zeros = torch.randint(0, 16, (k // group, n), device=device).to(x.dtype)
    packed = pack_int4(numbers)
    of = torch.arange(k, device=device) // group
    plain = ((numbers.t().to(x.dtype) - zeros[of]) * scales[of]).contiguous()
    return Case(
        f"int4 product {m} x {n} x {k}, groups of {group}",
        lambda: int4_matmul(x, packed, scales, zeros, group),
        lambda: x.double() @ plain.double(),
        bytes=n * k / 2 + 4 * n * k / group + 2 * m * k + 2 * m * n,
        operations=2.0 * m * n * k,
        peers={"bf16 cuBLAS": lambda: x @ plain},
    )


def matmul_cases(device: str, small: bool) -> Iterator[Case]:
    fp8, int8 = torch.float8_e4m3fn, torch.int8
    for m, n, k in [(3, 34, 64)] if small else [(1, 28672, 8192), (16, 28672, 8192), (64, 14336, 4096)]:
        for group in (32, 64) if small else (32, 64, 128):
            yield int4_case(device, m, n, k, group)
    for m, n, k in [(3, 33, 64)] if small else [(16, 28672, 8192), (2048, 8192, 8192), (8192, 8192, 8192)]:
        for dtype in (fp8, int8):
            yield scaled_case(device, m, n, k, dtype)


def attention_case(
    device: str, sequences: int, queries: int, context: int, heads: int, kv_heads: int, dim: int
) -> Case:
    pages = -(-context // PAGE)
    cache = KVPages.empty(sequences * pages, kv_heads, PAGE, dim, number(device), device)
    cache.keys.normal_()
    cache.values.normal_()
    tables = torch.randperm(sequences * pages, device=device).int().view(sequences, pages)
    q = normal(device, sequences * queries, heads, dim)
    offsets = torch.arange(sequences + 1, device=device, dtype=torch.int32) * queries
    lens = torch.full((sequences,), context, device=device, dtype=torch.int32)
    processors = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 4
    span = span_of(sequences, kv_heads, 1, context, processors) if queries == 1 else 0
    scale = dim**-0.5

    def gathered(part: Tensor) -> Tensor:
        """[sequences, kv_heads, context, dim]."""
        return part[tables.long()].transpose(1, 2).flatten(2, 3)[:, :, :context]

    keys, values = gathered(cache.keys).contiguous(), gathered(cache.values).contiguous()
    rows = q.view(sequences, queries, heads, dim).transpose(1, 2)

    def plain(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """With the queries as the last of the context."""
        if queries == 1:
            return F.scaled_dot_product_attention(q, keys, values, scale=scale, enable_gqa=True)
        return F.scaled_dot_product_attention(q, keys, values, scale=scale, is_causal=True, enable_gqa=True)

    def wanted() -> Tensor:
        """Sequence by sequence: float64 scores of long contexts are large."""
        parts = [
            plain(rows[i : i + 1].double(), keys[i : i + 1].double(), values[i : i + 1].double())
            for i in range(sequences)
        ]
        return torch.cat(parts).transpose(1, 2).reshape(sequences * queries, heads, dim)

    looked_at = sequences * (context if queries == 1 else queries * (queries + 1) / 2)
    return Case(
        f"attention {sequences} x {queries} of {context}, {heads}/{kv_heads} x {dim}",
        lambda: attend(q, cache, tables, offsets, lens, scale=scale, most_queries=queries, span=span),
        wanted,
        bytes=4 * sequences * context * kv_heads * dim + 4 * q.numel(),
        operations=4.0 * heads * dim * looked_at,
        peers={"SDPA, not paged": lambda: plain(rows, keys, values)},
    )


def attention_cases(device: str, small: bool) -> Iterator[Case]:
    shapes = [(2, 1, 70, 4, 2, 64), (1, 33, 33, 4, 2, 80)]
    large = [(16, 1, 1024), (64, 1, 4096), (1, 1, 32768), (1, 8192, 8192), (8, 2048, 2048)]
    for shape in shapes if small else [(*one, 32, 8, 128) for one in large]:
        yield attention_case(device, *shape)


def cache_cases(device: str, small: bool) -> Iterator[Case]:
    for tokens in [3] if small else [64, 8192]:
        heads, kv_heads, dim = (4, 2, 64) if small else (32, 8, 128)
        qkv = normal(device, tokens, heads + 2 * kv_heads, dim)
        cache = KVPages.empty(-(-tokens // PAGE), kv_heads, PAGE, dim, number(device), device)
        angles = torch.arange(tokens, device=device)[:, None] * 1e4 ** (-torch.arange(0, dim, 2, device=device) / dim)
        cosine, sine = angles.cos().float().contiguous(), angles.sin().float().contiguous()
        positions = torch.arange(tokens, device=device, dtype=torch.int32)

        def wanted(qkv: Tensor = qkv, cosine: Tensor = cosine, sine: Tensor = sine, heads: int = heads) -> Tensor:
            first, second = qkv[:, :heads].double().chunk(2, -1)
            c, s = cosine.double()[:, None], sine.double()[:, None]
            return torch.cat((first * c - second * s, second * c + first * s), -1)

        yield Case(
            f"rotate and write {tokens} tokens",
            lambda qkv=qkv, c=cosine, s=sine, p=positions, cache=cache: rotate_and_write(qkv, c, s, p, p, cache),  # type: ignore[misc]
            wanted,
            bytes=4 * qkv.numel(),
        )


CASES = (matmul_cases, attention_cases, row_cases, cache_cases)
