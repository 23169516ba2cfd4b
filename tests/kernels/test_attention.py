"""Attention against its definition, and against itself: however a batch is cut, a token's result has the same bits."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.kernels import _C
from millrace.kernels.attention import BLOCK_TOKENS, KVCache, attend, kv_cache, write
from millrace.kernels.reference import attention as reference

Array = NDArray[Any]
DType = Literal["bf16", "int8"]


@pytest.fixture(params=[isa for isa in _C.available_isas() if isa != "baseline"], autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MILLRACE_ISA", request.param)
    return str(request.param)


@dataclass(frozen=True)
class Row:
    """Queries for every position of the context, so that any of them can be asked for."""

    q: Array  # float32 [context, heads x dim]
    keys: Array  # float32 [context, kv_heads x dim]
    values: Array


@dataclass
class Case:
    """Rows stored in a cache of poison, their blocks in random order."""

    heads: int
    kv_heads: int
    dim: int
    contexts: tuple[int, ...]
    dtype: DType = "bf16"
    scale: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.rows = [
            Row(*(normal(rng, context, heads * self.dim) for heads in (self.heads, self.kv_heads, self.kv_heads)))
            for context in self.contexts
        ]
        blocks = [-(-context // BLOCK_TOKENS) for context in self.contexts]
        order = rng.permutation(sum(blocks) + 3).astype(np.int32)
        self.tables = np.full((len(blocks), max(blocks) + 1), -1, np.int32)
        self.cache = poisoned(sum(blocks) + 3, self.kv_heads, self.dim, self.dtype)
        for i, (row, used) in enumerate(zip(self.rows, blocks, strict=True)):
            self.tables[i, :used], order = order[:used], order[used:]
            positions = np.arange(len(row.q))
            slots = self.tables[i, positions // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS
            write(self.cache, slots, row.keys, row.values)

    def run(self, steps: list[tuple[int, int, int]], **options: Any) -> list[Array]:
        """One call: steps are (row, first position, end position). Results of each step."""
        lengths = [end - begin for _, begin, end in steps]
        q = np.concatenate([self.rows[row].q[begin:end] for row, begin, end in steps])
        out = attend(
            q,
            self.cache,
            heads=self.heads,
            offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
            context_lens=np.array([end for _, _, end in steps], np.int32),
            block_tables=np.ascontiguousarray(self.tables[[row for row, _, _ in steps]]),
            scale=self.scale,
            out=np.full_like(q, np.nan),
            **options,
        )
        return np.split(out, np.cumsum(lengths)[:-1])

    def expected(self, row: int, begin: int, end: int, **options: Any) -> Array:
        r = self.rows[row]
        q = reference.from_bf16(reference.to_bf16(r.q[begin:end])).reshape(-1, self.heads, self.dim)
        keys, values = (
            reference.stored(x[:end].reshape(-1, self.kv_heads, self.dim), self.dtype) for x in (r.keys, r.values)
        )
        return reference.attend(q, keys, values, scale=self.scale, **options).reshape(end - begin, -1)


def normal(rng: np.random.Generator, rows: int, columns: int) -> Array:
    return rng.standard_normal((rows, columns)).astype(np.float32)


def poisoned(blocks: int, kv_heads: int, dim: int, dtype: DType) -> KVCache:
    """NaN in bf16, NaN for the scales of int8."""
    cache = kv_cache(blocks, kv_heads, dim, dtype)
    for array in (cache.keys, cache.values):
        array.fill(0x7FC0 if dtype == "bf16" else -128)
    cache.scales.fill(np.nan)
    return cache


def assert_close(got: Array, want: Array, isa: str, highest_score: float = 16) -> None:
    """Weights of values sum to one. Rounding them to bf16 moves the mix by at most 2^-9 of the largest value, an error
    of a score (sums in float32) by as much as itself."""
    largest = 4.5
    bf16 = 2.0**-9 if isa == "avx512_bf16" else 0
    np.testing.assert_allclose(got, want, rtol=0, atol=largest * (bf16 + highest_score * 2.0**-22))


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("dim", [8, 16, 24, 64, 80, 96, 128, 256])
def test_head_sizes(dim: int, dtype: DType, isa: str) -> None:
    case = Case(heads=4, kv_heads=2, dim=dim, contexts=(1, 33, 300), dtype=dtype, scale=dim**-0.5)
    steps = [(2, 290, 300), (0, 0, 1), (1, 10, 33)]
    for step, got in zip(steps, case.run(steps), strict=True):
        assert_close(got, case.expected(*step), isa)


@pytest.mark.parametrize("group", range(1, 9))
def test_grouped_queries(group: int, isa: str) -> None:
    case = Case(heads=2 * group, kv_heads=2, dim=16, contexts=(41,))
    (got,) = case.run([(0, 20, 41)])
    assert_close(got, case.expected(0, 20, 41), isa)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("window", [0, 1, 31, 300])
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_batch(causal: bool, window: int, dtype: DType, isa: str) -> None:
    """Prefills of many sizes and decodes together, over one span and over several."""
    contexts = (1, 7, 16, 17, 31, 33, 129, 255, 256, 257, 600)
    case = Case(heads=4, kv_heads=2, dim=16, contexts=contexts, dtype=dtype)
    steps = [(row, max(0, context - 1 - 13 * (row % 3)), context) for row, context in enumerate(contexts)]
    for step, got in zip(steps, case.run(steps, causal=causal, window=window), strict=True):
        assert_close(got, case.expected(*step, causal=causal, window=window), isa)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("window", [0, 70])
def test_same_bits_however_a_row_is_cut(window: int, dtype: DType) -> None:
    """A row alone, in chunks, token by token, beside others, and with spans shared by several threads."""
    case = Case(heads=6, kv_heads=2, dim=24, contexts=(700, 300, 45), dtype=dtype)
    (whole,) = case.run([(0, 0, 700)], window=window)
    for cuts in ([0, 1, 256, 257, 699, 700], [0, 33, 511, 600, 700], [*range(0, 700, 37), 700]):
        steps = [(0, begin, end) for begin, end in pairwise(cuts)]
        for step in steps:
            np.testing.assert_array_equal(case.run([step], window=window)[0], whole[step[1] : step[2]])
        beside = case.run([(1, 200, 300), *steps, (2, 44, 45)], window=window)[1:-1]
        np.testing.assert_array_equal(np.concatenate(beside), whole)
    for position in range(700):
        for threads in (1, 1 + position % 5):
            (token,) = case.run([(0, position, position + 1)], window=window, threads=threads)
            np.testing.assert_array_equal(token[0], whole[position])


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("step", [(0, 1499, 1500), (0, 1400, 1500), (0, 1490, 1495)])
def test_same_bits_for_any_number_of_threads(threads: int, step: tuple[int, int, int], isa: str) -> None:
    case = Case(heads=4, kv_heads=1, dim=16, contexts=(1500, 20))
    steps = [step, (1, 19, 20)]
    alone = [case.run([step])[0] for step in steps]
    for got, want in zip(case.run(steps, threads=threads), alone, strict=True):
        np.testing.assert_array_equal(got, want)
    assert_close(alone[0], case.expected(*step), isa)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("window", [1, 30, 31, 290])
def test_nothing_before_the_window_is_read(window: int, dtype: DType, isa: str) -> None:
    """Its blocks may have gone to others."""
    case = Case(heads=2, kv_heads=1, dim=16, contexts=(700,), dtype=dtype)
    begin, end = 640, 650
    expected = case.expected(0, begin, end, window=window)
    gone = np.arange(begin - window + 1)
    slots = case.tables[0, gone // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + gone % BLOCK_TOKENS
    poison = np.full((len(gone), 16), np.nan, np.float32)
    write(case.cache, slots, poison, poison)
    assert_close(case.run([(0, begin, end)], window=window)[0], expected, isa)


def test_encoder_of_many_short_texts(isa: str) -> None:
    case = Case(heads=3, kv_heads=3, dim=32, contexts=(25, 1, 31, 32, 64, 2, 25, 512))
    steps = [(row, 0, context) for row, context in enumerate(case.contexts)]
    got = case.run(steps, causal=False, threads=4)
    for step, out in zip(steps, got, strict=True):
        assert_close(out, case.expected(*step, causal=False), isa)
        np.testing.assert_array_equal(case.run([step], causal=False)[0], out)


def test_large_scores_do_not_overflow(isa: str) -> None:
    """The highest score differs from span to span by far more than float32's exponent holds."""
    case = Case(heads=1, kv_heads=1, dim=64, contexts=(1000,), scale=100.0)
    (got,) = case.run([(0, 950, 1000)])
    assert_close(got, case.expected(0, 950, 1000), isa, highest_score=100 * 8 * 5)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_write_stores_what_the_layout_says(dtype: DType) -> None:
    cache = poisoned(3, 2, 24, dtype)
    rng = np.random.default_rng(0)
    slots = rng.permutation(96)[:50].astype(np.int64)
    keys, values = normal(rng, 50, 48) * 3, normal(rng, 50, 48)
    keys[7] = 0
    write(cache, slots, keys, values)
    k = cache.keys.reshape(3, 2, 2, 16, 16, 2)  # half, pair of dims, token, dim
    v = cache.values.reshape(3, 2, 2, 16, 16, 2)  # dims / 16, pair of tokens, dim, token
    for slot, key, value in zip(slots, keys.reshape(50, 2, 24), values.reshape(50, 2, 24), strict=True):
        block, token = divmod(int(slot), 32)
        got_key = k[block, :, token // 16, :, token % 16].reshape(2, 32)
        got_value = v[block, :, :, token // 2, :, token % 2].reshape(2, 32)
        assert not got_key[:, 24:].any()
        assert not got_value[:, 24:].any()
        for i, (got, given) in enumerate(((got_key, key), (got_value, value))):
            if dtype == "bf16":
                np.testing.assert_array_equal(got[:, :24], reference.to_bf16(given))
                continue
            numbers, scale = reference.quantize(given)
            np.testing.assert_array_equal(got[:, :24], numbers)
            np.testing.assert_array_equal(cache.scales[block, :, i, token], scale)
    untouched = np.setdiff1d(np.arange(96), slots)
    poison = np.uint16(0x7FC0) if dtype == "bf16" else np.int8(-128)
    assert (k[untouched // 32, :, untouched % 32 // 16, :, untouched % 16] == poison).all()
    assert (v[untouched // 32, :, :, untouched % 32 // 2, :, untouched % 2] == poison).all()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"heads": 3}, "heads must be a multiple"),
    ({"window": -1}, "window"),
    ({"threads": 0}, "threads"),
    ({"q": np.zeros((1, 7), np.float32)}, "q must be float32"),
    ({"q": np.zeros((1, 8))}, "q must be float32"),
    ({"out": np.zeros((2, 8), np.float32)}, "out must be float32"),
    ({"offsets": np.array([0, 2], np.int32)}, "offsets must rise from 0 to 1"),
    ({"context_lens": np.array([0], np.int32)}, "less than the row has tokens"),
    ({"context_lens": np.array([33], np.int32)}, "more than the row's blocks hold"),
    ({"block_tables": np.array([[1]], np.int32)}, "there is no such block"),
    ({"block_tables": np.array([0], np.int32)}, "block_tables must be"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": np.zeros((1, 8), np.float32),
        "cache": kv_cache(1, 2, 4),
        "heads": 2,
        "offsets": np.array([0, 1], np.int32),
        "context_lens": np.array([1], np.int32),
        "block_tables": np.array([[0]], np.int32),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        attend(**arguments | change)


@pytest.mark.parametrize("slot", [-1, 32])
def test_slot_outside_the_cache(slot: int) -> None:
    with pytest.raises(ValueError, match="slots"):
        write(kv_cache(1, 1, 4), np.array([slot], np.int64), np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32))


@pytest.mark.parametrize("arguments", [(0, 1, 4), (1, 0, 4), (1, 1, 5), (1, 1, 0), (1, 1, 258)])
def test_bad_cache(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        kv_cache(*arguments)
