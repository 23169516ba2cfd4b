"""The plain definition of every kernel, in NumPy: clear before fast, and equal to the native kernels bit for bit.

Sampling. Probabilities are integers: a token's *weight* is exp((logit - highest) / temperature) in units of
2^-30, rounded to the nearest. Sums of integers do not depend on their order, so neither do draws; what is lost
is tokens less than 2^-31 as likely as the most likely one. Tokens are *preferred* by logit, then by lowest id;
top-k, top-p and min-p keep the first ones of that order.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NOT_FINITE = "the logits hold NaN or infinity"
NO_TOKEN = "no token is allowed: every logit is masked or -infinity"

ONE = np.float32(2**30)
LOG2_E = np.float32(1.4426950408889634)
# 2^f = 1 + f (c[0] + c[1] f + ...), least maximal relative error over |f| <= 1/2, rounded to float32.
EXP2 = tuple(
    np.float32(float.fromhex(c))
    for c in ("0x1.62e42ap-1", "0x1.ebf9bcp-3", "0x1.c6b752p-5", "0x1.3cea88p-7", "0x1.5bba14p-10")
)


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def draw_bits(seed: int, choice: int, position: int) -> int:
    """64 random bits of the draw (seed, choice, position); as a uniform number in [0, 1) they mean bits / 2^64."""
    low, high, _, _ = philox4x32((position, choice, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return high << 32 | low


def exp2_nonpositive(t: Array) -> Array:
    """2^t in float32 for float32 t <= 0, relative error below 2e-7, exactly 1 at 0; 2^-100 below -100."""
    t = np.maximum(t, np.float32(-100))
    n = np.trunc(t - np.float32(0.5))
    f = t - n
    p = np.full_like(f, EXP2[-1])
    for c in EXP2[-2::-1]:
        p = p * f + c
    p = p * f + np.float32(1)
    return np.asarray(np.ldexp(p, n.astype(np.int32)))


def weights_of(logits: Array, temperature: np.float32) -> NDArray[np.int64]:
    """[V] int64 in [0, 2^30]; the highest logit has 2^30."""
    with np.errstate(divide="ignore", over="ignore"):
        log2_per_logit = np.minimum(LOG2_E / temperature, np.finfo(np.float32).max)
        t = (logits - logits.max()) * log2_per_logit
    return np.asarray(np.trunc(exp2_nonpositive(t) * ONE + np.float32(0.5)), np.int64)


def logprobs_of(logits: Array, tokens: Sequence[int]) -> list[float]:
    """Log-softmax at some tokens, in float64 of exps in float32 that are summed exactly, in units of 2^-54."""
    highest = logits.max()
    with np.errstate(over="ignore"):
        scaled = exp2_nonpositive((logits - highest) * LOG2_E) * ONE
    high = np.trunc(scaled)
    low = np.trunc((scaled - high) * np.float32(2**24))
    total = float(high.astype(np.int64).sum()) * 2.0**-30 + float(low.astype(np.int64).sum()) * 2.0**-54
    return [float(logits[token]) - float(highest) - math.log(total) for token in tokens]


def processed(
    logits: Array,
    bias: Sequence[tuple[int, np.float32]],
    prompt: Array,
    output: Array,
    repetition_penalty: np.float32,
    presence_penalty: np.float32,
    frequency_penalty: np.float32,
    allowed: Array | None,
) -> Array:
    """Logit bias, then penalties, then the mask [V] of bool."""
    z = logits.copy()
    with np.errstate(over="ignore"):
        for token, value in bias:
            z[token] += value
        seen = np.union1d(prompt, output)
        z[seen] = np.where(z[seen] > 0, z[seen] / repetition_penalty, z[seen] * repetition_penalty)
        used, counts = np.unique(output, return_counts=True)
        z[used] = z[used] - frequency_penalty * counts.astype(np.float32) - presence_penalty
    if allowed is not None:
        z[~allowed] = -np.inf
    return z


def choose(z: Array, temperature: np.float32, top_k: int, top_p: np.float32, min_p: np.float32, bits: int) -> int:
    """The token drawn from processed logits [V], of which one at least is finite and none NaN or +inf."""
    preferred = np.argsort(-z, kind="stable")
    if temperature == 0:
        return int(preferred[0])
    if top_k > 0:
        preferred = preferred[:top_k]
    weights = weights_of(z, temperature)
    if top_p < 1:
        mass = np.cumsum(weights[preferred])
        need = math.ceil(float(top_p) * float(mass[-1]))
        preferred = preferred[: int(np.searchsorted(mass, need)) + 1]
    survivors = np.sort(preferred[weights[preferred] >= math.ceil(min_p * ONE)])
    mass = np.cumsum(weights[survivors])
    target = bits * int(mass[-1]) >> 64
    return int(survivors[np.searchsorted(mass, target, side="right")])


def most_likely(logits: Array, count: int) -> Array:
    """The `count` ids of highest logit, the lowest id first on a tie."""
    return np.argsort(-logits, kind="stable")[:count]


def unpacked(words: NDArray[np.uint32], vocab: int) -> NDArray[np.bool_]:
    """Bits of little-endian uint32 words as [vocab] bools."""
    return np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")[:vocab].astype(bool)


def sample_row(
    logits: Array, row: int, columns: Mapping[str, Array], mask: NDArray[np.uint32] | None
) -> tuple[int, float, list[int], list[float]] | str:
    """Token, logprob, top ids and top logprobs of one row of `sampling.sample`'s arguments, or why it failed."""
    at = {name: column[row] for name, column in columns.items() if len(column) > row}
    if np.isnan(logits).any() or logits.max() == np.inf:
        return NOT_FINITE
    if logits.max() == -np.inf:
        return NO_TOKEN
    bias = slice(*columns["bias_offsets"][row : row + 2])
    history = columns["history_ids"][slice(*columns["history_offsets"][row : row + 2])]
    z = processed(
        logits,
        list(zip(columns["bias_ids"][bias], columns["bias_values"][bias], strict=True)),
        history[: at["history_prompt_lens"]],
        history[at["history_prompt_lens"] :],
        at["repetition_penalty"],
        at["presence_penalty"],
        at["frequency_penalty"],
        None if mask is None else unpacked(mask, len(logits)),
    )
    if z.max() == np.inf:
        return NOT_FINITE
    if z.max() == -np.inf:
        return NO_TOKEN
    bits = draw_bits(int(at["seed"]), int(at["choice"]), int(at["position"]))
    token = choose(z, at["temperature"], int(at["top_k"]), at["top_p"], at["min_p"], bits)
    if at["top_n"] < 0:
        return token, math.nan, [], []
    top = most_likely(logits, int(at["top_n"])).tolist()
    return token, logprobs_of(logits, [token])[0], top, logprobs_of(logits, top)
