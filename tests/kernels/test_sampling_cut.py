"""Where top-p and min-p cut a row, to the token: the native sampler looks for the cut in a bracket that may miss.

Survivors are laid out before all others, the one at the cut last, and the draw is the highest there is: it yields the
token at the cut, the one before if the sampler cuts too early, one after it if too late.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.kernels.reference import sampling as reference
from millrace.kernels.sampling import sample

Make = Callable[..., dict[str, Any]]
Logits = NDArray[np.float32]

VOCAB = 9001  # more than one stretch of the sampler, the last block short
BLOCK, SAMPLED = 128, 4  # the sampler looks at SAMPLED tokens of each block of BLOCK
LAST_DRAW = 34408659  # the seed whose draw at choice 0 and position 0 is 1 - 2^-26 at least

TOP_PS = (1e-9, 0.01, 0.3, 0.5, 0.9, 0.99, 0.9999, 0.9999999)
MIN_PS = (1e-9, 1e-4, 0.03, 0.5, 1.0)


def shapes(vocab: int) -> dict[str, Logits]:
    rng = np.random.default_rng(17)
    normal = rng.standard_normal(vocab)
    heavy_tail = np.full(vocab, -9.0) + normal * 1e-3
    heavy_tail[0] = 0.1
    masked = normal * 3
    masked[1:][rng.random(vocab - 1) < 0.95] = -np.inf
    rows = {
        "flat": normal * 0.01,
        "normal": normal,
        "peaked": normal * 4,
        "one takes all": normal * 1e30,
        "equal": np.zeros(vocab),
        "equal and huge": np.full(vocab, -1e30),
        "two values": np.where(normal > 0, 1, 0),
        "many ties": np.round(normal),
        "ties of bfloat16": np.round(normal * 3 * 16) / 16,
        "light tokens, heavy together": heavy_tail,
        "cauchy": np.minimum(rng.standard_cauchy(vocab), 20),
        "power law": -1.1 * np.log(rng.permutation(vocab) + 1),
        "mostly -inf": masked,
        "neighbours": 1 + rng.integers(0, 4, vocab) * np.finfo(np.float32).eps,
        "denormal": rng.integers(0, 9, vocab) * 1e-45,
    }
    return {name: np.asarray(row, np.float32) for name, row in rows.items()}


def survivors(logits: Logits, top_p: float, min_p: float) -> NDArray[Any]:
    """Those the definition keeps, at temperature 1, preferred ones first."""
    preferred = np.argsort(-logits, kind="stable")
    weights = reference.weights_of(logits, np.float32(1))
    least = np.ceil(np.float32(min_p) * reference.ONE)
    if np.float32(top_p) < 1:
        mass = np.cumsum(weights[preferred])
        need = np.ceil(float(np.float32(top_p)) * float(mass[-1]))
        preferred = preferred[: int(np.searchsorted(mass, need)) + 1]
    return preferred[weights[preferred] >= least]


def laid_out(logits: Logits, kept: NDArray[Any], rng: np.random.Generator) -> Logits:
    """The same row with what is kept first, in any order but for the last, then the others in any order."""
    others = np.setdiff1d(np.arange(logits.size), kept)
    return logits[np.concatenate((rng.permutation(kept[:-1]), kept[-1:], rng.permutation(others)))]


@cache  # the same for every instruction set
def cut_cases(shape: str, vocab: int) -> tuple[Logits, NDArray[np.float32], NDArray[np.float32], list[int], list[int]]:
    """Rows, their top-p and min-p, and the tokens of the last draw and of the draw whose seed is the row's number."""
    pairs = [(top_p, 0.0) for top_p in TOP_PS] + [(1.0, min_p) for min_p in MIN_PS]
    pairs += [(top_p, min_p) for top_p in TOP_PS[2:6] for min_p in MIN_PS[1:4]]
    row, rng = shapes(vocab)[shape], np.random.default_rng(4)
    top_p, min_p = np.array(pairs, np.float32).T
    kept = [survivors(row, *pair) for pair in pairs]
    logits = np.stack([laid_out(row, keep, rng) for keep in kept])
    last, some = (
        [
            reference.choose(logits[i], np.float32(1), 0, top_p[i], min_p[i], reference.draw_bits(seed, 0, 0))
            for i, seed in enumerate(seeds)
        ]
        for seeds in ([LAST_DRAW] * len(pairs), range(len(pairs)))
    )
    assert all(token < keep.size for token, keep in zip(last, kept, strict=True))
    return logits, top_p, min_p, last, some


def test_the_last_draw_is_almost_1() -> None:
    assert reference.draw_bits(LAST_DRAW, 0, 0) >= 2**64 - 2**38


def test_the_layout_tells_one_token_more_or_less() -> None:
    row = shapes(VOCAB)["normal"]
    kept = survivors(row, 0.9, 0)
    bits = reference.draw_bits(LAST_DRAW, 0, 0)
    for cut in (kept.size - 1, kept.size, kept.size + 1):
        lowered = laid_out(row, kept, np.random.default_rng(4))
        lowered[cut:] = -np.inf
        drawn = reference.choose(lowered, np.float32(1), 0, np.float32(1), np.float32(0), bits)
        assert drawn == cut - 1


@pytest.mark.parametrize("shape", shapes(1))
@pytest.mark.parametrize("vocab", [1, 300, VOCAB])
def test_top_p_and_min_p_cut_where_the_definition_does(shape: str, vocab: int, isa: str, columns: Make) -> None:
    logits, top_p, min_p, last, some = cut_cases(shape, vocab)
    rows = len(logits)
    assert sample(logits, **columns(rows, top_p=top_p, min_p=min_p, seed=LAST_DRAW)).token_ids.tolist() == last
    assert sample(logits, **columns(rows, top_p=top_p, min_p=min_p, seed=range(rows))).token_ids.tolist() == some


@pytest.mark.parametrize(("where_looked_at", "elsewhere"), [(-20, 0), (0, -20), (-3, 0), (0, -3), (-0.02, 0)])
def test_a_bracket_that_misses_costs_time_alone(
    where_looked_at: float, elsewhere: float, isa: str, columns: Make
) -> None:
    """Rows whose sample says nothing true about the rest; laid out by hand, as their order is the point."""
    rng = np.random.default_rng(8)
    token = np.arange(VOCAB)
    looked_at = token % BLOCK // SAMPLED == token // BLOCK * 5 % (BLOCK // SAMPLED)
    row = np.where(looked_at, where_looked_at, elsewhere) + rng.standard_normal(VOCAB) * 1e-3
    row[rng.integers(BLOCK, size=VOCAB // BLOCK) + np.arange(0, VOCAB - BLOCK, BLOCK)] = (
        0.1  # the highest of each block
    )
    logits = np.tile(np.asarray(row, np.float32), (64, 1))
    case = columns(
        64,
        top_p=np.tile(TOP_PS, 8),
        min_p=np.repeat([0, 0, 0, 0, 0, 0.9, 0.95, 0.99], 8),
        seed=np.append(np.arange(63), LAST_DRAW),
    )
    tokens = sample(logits, **case).token_ids
    for i in range(64):
        bits = reference.draw_bits(int(case["seed"][i]), 0, 0)
        assert tokens[i] == reference.choose(logits[i], np.float32(1), 0, case["top_p"][i], case["min_p"][i], bits)


@pytest.mark.parametrize("temperature", [1e-42, 1e-3, 50.0, 3e38])
def test_cuts_hold_at_any_temperature(temperature: float, isa: str, columns: Make) -> None:
    rows = [row for row in shapes(VOCAB).values() for _ in range(4)]
    case = columns(
        len(rows),
        temperature=temperature,
        top_p=[1, 0.9, 0.5, 0.5] * (len(rows) // 4),
        min_p=[0.5, 0, 0.7, 0] * (len(rows) // 4),
        seed=np.arange(len(rows)),
    )
    tokens = sample(np.stack(rows), **case).token_ids
    for i, row in enumerate(rows):
        bits = reference.draw_bits(i, 0, 0)
        options = [np.float32(temperature), 0, case["top_p"][i], case["min_p"][i]]
        assert tokens[i] == reference.choose(row, *options, bits)
