"""Triton's rotation and writing of keys and values in its interpreter."""

import numpy as np
import pytest
import torch
from fp8 import trusted

from millrace.kernels.reference import rows as reference
from millrace.kernels.triton.kv_cache import KVPages, rotate_and_write


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 80), (96, 48), (8, 2), (128, 128)])
def test_queries_turn_and_keys_and_values_lie_where_they_should(dim: int, rotary: int, dtype: torch.dtype) -> None:
    heads, kv_heads, page, blocks, tokens = 4, 2, 16, 5, 7
    r = torch.Generator().manual_seed(dim)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=r)
    positions = torch.randint(0, 50, (tokens,), generator=r, dtype=torch.int32)
    slots = torch.randperm(blocks * page, generator=r)[:tokens].int()
    slots[3] = -1
    frequencies = (10_000 ** -(np.arange(0, rotary, 2) / rotary)).astype(np.float32)
    cosine, sine = reference.rotary_turns(np.arange(50), frequencies, 1.0)
    cache = KVPages.empty(blocks, kv_heads, page, dim, dtype, "cpu")
    q = rotate_and_write(qkv, torch.from_numpy(cosine).float(), torch.from_numpy(sine).float(), positions, slots, cache)
    at = positions.numpy()
    turned = qkv.double().numpy()
    for head in range(heads + kv_heads):
        turned[:, head, :rotary] = reference.rotate(turned[:, head, :rotary], rotary, cosine[at], sine[at])
    assert np.allclose(q.numpy(), turned[:, :heads], atol=1e-5)
    rtol = {torch.float32: 1e-5, torch.float16: 1e-3, torch.int8: 0, torch.float8_e4m3fn: 0.0626}[dtype]
    atol = {torch.float32: 1e-6, torch.float16: 1e-6, torch.int8: 0.02, torch.float8_e4m3fn: 1e-3}[dtype]
    written = set()
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        written.add(slot)
        block, place = divmod(slot, page)
        for part, scales, first in (
            (cache.keys, cache.key_scales, heads),
            (cache.values, cache.value_scales, heads + kv_heads),
        ):
            found = part[block, :, place].double()
            if scales is not None:
                found *= scales[block, :, place, None].double()
            wanted = turned[token, first : first + kv_heads]
            right = np.isclose(found.numpy(), wanted, rtol=rtol, atol=atol)
            if dtype == torch.float8_e4m3fn:
                right |= ~trusted(torch.from_numpy(wanted) / scales[block, :, place, None]).numpy()
            assert right.all(), (token, first)
    for slot in set(range(blocks * page)) - written:
        assert not cache.keys[slot // page, :, slot % page].float().any(), "nothing else is written"
