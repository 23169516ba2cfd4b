"""Triton's attention in its interpreter against the definition, on ragged batches over a paged cache."""

import numpy as np
import pytest
import torch

from millrace.kernels.reference import attention as reference
from millrace.kernels.triton.attention import LEAST_SPAN, attend, span_of
from millrace.kernels.triton.kv_cache import KVPages

PAGE = 16


class Case:
    """Sequences of (queries, context) over a cache whose blocks lie anywhere; what is not theirs is not a number."""

    def __init__(self, shapes, heads, kv_heads, dim, dtype=torch.float32, seed=0):
        r = np.random.default_rng(seed)
        pages = [-(-context // PAGE) for _, context in shapes]
        blocks = r.permutation(sum(pages) + 2)
        self.cache = KVPages.empty(len(blocks), kv_heads, PAGE, dim, dtype, "cpu")
        if dtype.itemsize > 1:
            self.cache.keys.fill_(float("nan"))
            self.cache.values.fill_(float("nan"))
        self.tables = np.full((len(shapes), max(pages)), blocks[-1], np.int32)
        self.shapes = shapes
        self.keys, self.values = [], []
        for i, (_, context) in enumerate(shapes):
            self.tables[i, : pages[i]], blocks = blocks[: pages[i]], blocks[pages[i] :]
            self.keys.append(self._fill(self.cache.keys, self.cache.key_scales, i, context, r))
            self.values.append(self._fill(self.cache.values, self.cache.value_scales, i, context, r))
        self.q = torch.from_numpy(r.standard_normal((sum(n for n, _ in shapes), heads, dim)).astype(np.float32))

    def _fill(self, part, scales, sequence, context, r):
        kv_heads, dim = part.shape[1], part.shape[3]
        numbers = torch.from_numpy(r.standard_normal((context, kv_heads, dim)).astype(np.float32))
        kept = np.empty((context, kv_heads, dim))
        for position in range(context):
            block, place = self.tables[sequence, position // PAGE], position % PAGE
            if scales is None:
                part[block, :, place] = numbers[position].to(part.dtype)
                kept[position] = part[block, :, place].double()
            else:
                most = 127 if part.dtype == torch.int8 else 448
                scale = numbers[position].abs().amax(-1) / most
                scaled = numbers[position] / scale[:, None]
                part[block, :, place] = (scaled.round() if most == 127 else scaled).to(part.dtype)
                scales[block, :, place] = scale
                kept[position] = part[block, :, place].double() * scale[:, None].double()
        return kept

    def run(self, **options) -> torch.Tensor:
        offsets = np.cumsum([0, *(n for n, _ in self.shapes)]).astype(np.int32)
        return attend(
            self.q,
            self.cache,
            torch.from_numpy(self.tables),
            torch.from_numpy(offsets),
            torch.tensor([context for _, context in self.shapes], dtype=torch.int32),
            scale=0.3,
            most_queries=max(n for n, _ in self.shapes),
            **options,
        )

    def wanted(self, causal=True, window=0) -> np.ndarray:
        at, parts = 0, []
        for (n, _), keys, values in zip(self.shapes, self.keys, self.values, strict=True):
            q = self.q[at : at + n].double().numpy()
            at += n
            parts.append(reference.attend(q, keys, values, scale=0.3, causal=causal, window=window))
        return np.concatenate(parts)


def close(found: torch.Tensor, wanted: np.ndarray, tolerance: float = 1e-5) -> bool:
    assert not found.isnan().any()
    return bool(np.abs(found.double().numpy() - wanted).max() < tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_prompts_and_single_tokens_in_one_batch(dim: int, heads: int, kv_heads: int) -> None:
    case = Case([(1, 1), (5, 5), (1, 33), (17, 40)], heads, kv_heads, dim)
    assert close(case.run(), case.wanted())


@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (True, 1), (True, 7), (True, 20)])
def test_windows_and_both_directions(causal: bool, window: int) -> None:
    case = Case([(20, 50), (1, 3), (31, 31)], 4, 2, 64, seed=window)
    assert close(case.run(causal=causal, window=window), case.wanted(causal, window))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float8_e4m3fn])
def test_caches_of_few_bits(dtype: torch.dtype) -> None:
    case = Case([(1, 40), (9, 20)], 4, 2, 64, dtype)
    assert close(case.run(), case.wanted(), 1e-4)


@pytest.mark.parametrize("span", [32, 64, 256])
def test_splits_change_nothing(span: int) -> None:
    case = Case([(1, 1), (1, 31), (1, 32), (1, 33), (1, 150), (2, 65)], 8, 2, 64)
    assert close(case.run(span=span), case.wanted())
    assert close(case.run(span=span, window=40), case.wanted(window=40))


def test_what_runs_beside_a_sequence_changes_no_bit() -> None:
    together = Case([(1, 100), (1, 40), (3, 70)], 4, 2, 64)
    for i, (n, context) in enumerate(together.shapes):
        at = sum(m for m, _ in together.shapes[:i])
        alone = Case([(n, context)], 4, 2, 64)
        alone.cache, alone.tables, alone.q = together.cache, together.tables[i : i + 1], together.q[at : at + n]
        for span in (0, 32):
            assert torch.equal(alone.run(span=span), together.run(span=span)[at : at + n])


def test_splits_fill_the_processors_and_no_more() -> None:
    assert span_of(64, 8, 1, 4096, 132) == 0
    assert span_of(1, 8, 1, 100, 132) == 0
    assert span_of(1, 8, 1, 8192, 132) == LEAST_SPAN
    span = span_of(16, 8, 1, 32_768, 132)
    assert span % LEAST_SPAN == 0
    assert 16 * 8 * -(-32_768 // span) <= 2 * 132
