"""The native sampler against its definition, bit for bit, and the definition against the world."""

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.kernels.reference import sampling as reference
from millrace.kernels.sampling import SampleResult, sample

Make = Callable[..., dict[str, Any]]
Logits = NDArray[np.float32]

VOCABS = (1, 2, 7, 17, 31, 33, 127, 128, 129, 257, 8192)


@dataclass(frozen=True)
class Mask:
    row: int
    words: NDArray[np.uint32]


def pack(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    padded = np.zeros(-(-allowed.size // 32) * 32, bool)
    padded[: allowed.size] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


def assert_equals_definition(logits: Logits, columns: dict[str, Any], masks: list[Mask], result: SampleResult) -> None:
    words = {mask.row: mask.words for mask in masks}
    for row in range(len(logits)):
        expected = reference.sample_row(logits[row], row, columns, words.get(row))
        span = slice(result.top_offsets[row], result.top_offsets[row + 1])
        if isinstance(expected, str):
            assert result.errors[row] == expected
            expected = (-1, math.nan, [], [])
        else:
            assert row not in result.errors
        token, logprob, ids, logprobs = expected
        context = {name: column[row] for name, column in columns.items() if column.size > row}
        assert result.token_ids[row] == token, context
        np.testing.assert_array_equal(result.logprobs[row], np.float32(logprob))
        assert result.top_token_ids[span].tolist() == ids
        np.testing.assert_array_equal(result.top_logprobs[span], np.array(logprobs, np.float32))


def random_logits(rng: np.random.Generator, rows: int, vocab: int) -> Logits:
    """Of every shape: flat, peaked, with ties, with -inf, with huge values."""
    logits = rng.standard_normal((rows, vocab)).astype(np.float32) * rng.choice([0, 0.01, 1, 4, 30], (rows, 1))
    for row in range(rows):
        match rng.integers(6):
            case 0:
                logits[row] = np.round(logits[row])
            case 1:
                logits[row, rng.random(vocab) < 0.7] = -np.inf
            case 2:
                logits[row, rng.integers(vocab)] = 1e30
            case 3:
                logits[row] *= 1e30
            case 4:
                logits[row, rng.random(vocab) < 0.3] = -1e30
    return np.asarray(logits, np.float32)


def random_case(rng: np.random.Generator, make: Make, rows: int, vocab: int) -> tuple[dict[str, Any], list[Mask]]:
    def some(values: list[float], otherwise: NDArray[Any]) -> NDArray[Any]:
        return np.where(rng.random(rows) < 0.5, rng.choice(values, rows), otherwise)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in rng.integers(vocab, size=count)]

    with_extras = [row for row in range(rows) if rng.random() < 0.4]
    columns = make(
        rows,
        bias={row: [(t, rng.uniform(-100, 100)) for t in tokens(5)] for row in with_extras},
        history={row: (tokens(7), tokens(9)) for row in range(rows)},
        temperature=some([0, 1, 1e-6, 1e-42], rng.uniform(0.01, 2, rows)),
        top_p=some([1, 1, 1e-9, 0.999999], rng.uniform(0.01, 1, rows)),
        top_k=some([0, 0, 1, 2, vocab, vocab + 1, 2**31 - 1], rng.integers(0, max(vocab, 100), rows)),
        min_p=some([0, 0, 1, 1e-9], rng.uniform(0, 1, rows)),
        presence_penalty=some([0], rng.uniform(-2, 2, rows)),
        frequency_penalty=some([0], rng.uniform(-2, 2, rows)),
        repetition_penalty=some([1], rng.uniform(0.01, 4, rows)),
        seed=rng.integers(2**64, size=rows, dtype=np.uint64),
        choice=rng.integers(8, size=rows),
        position=rng.integers(2**31, size=rows),
        top_n=rng.choice([-1, 0, 1, 5, 20], rows),
    )
    return columns, [Mask(row, pack(rng.random(vocab) < rng.choice([0, 0.5, 0.99]))) for row in with_extras]


@pytest.mark.parametrize("vocab", VOCABS)
def test_equals_the_definition(vocab: int, isa: str, columns: Make) -> None:
    rng = np.random.default_rng(vocab)
    for _ in range(6 if vocab < 1000 else 2):
        logits = random_logits(rng, 24, vocab)
        case, masks = random_case(rng, columns, 24, vocab)
        assert_equals_definition(logits, case, masks, sample(logits, **case, masks=masks))


def test_equals_the_definition_on_a_large_vocabulary(isa: str, columns: Make) -> None:
    rng = np.random.default_rng(3)
    logits = random_logits(rng, 12, 151_936)
    case, masks = random_case(rng, columns, 12, 151_936)
    assert_equals_definition(logits, case, masks, sample(logits, **case, masks=masks))


@pytest.mark.parametrize("value", [0.0, -0.0, 5.0, -1e30])
def test_equal_logits_are_equally_likely_and_the_lowest_id_is_preferred(value: float, isa: str, columns: Make) -> None:
    logits = np.full((4, 1000), value, np.float32)
    case = columns(4, temperature=[0, 1, 1, 1], top_k=[0, 1, 10, 0], top_p=[1, 1, 1, 0.01], top_n=3, seed=9)
    result = sample(logits, **case)
    assert result.token_ids[0] == result.token_ids[1] == 0
    assert result.token_ids[2] < 10
    assert result.token_ids[3] < 10
    assert result.top_token_ids.tolist() == [0, 1, 2] * 4
    np.testing.assert_allclose(result.logprobs, -math.log(1000), rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options: dict[str, Any], columns: Make) -> None:
    draws, vocab = 20_000, 40
    logits = np.random.default_rng(5).standard_normal(vocab).astype(np.float32) * 1.5
    expected = plain_distribution(logits.astype(float), **options)
    result = sample(
        np.broadcast_to(logits, (draws, vocab)), **columns(draws, seed=77, position=np.arange(draws), **options)
    )
    counts = np.bincount(result.token_ids, minlength=vocab)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    statistic = ((counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept])).sum()
    freedom = kept.sum() - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)  # the seed is fixed: this passes always or never


def plain_distribution(
    logits: NDArray[np.float64], temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> NDArray[np.float64]:
    """The textbook in float64, independent of the definition under test."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.concatenate(([0], np.cumsum(p[order])[:-1]))
    p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return np.asarray(p / p.sum())


def test_draws_of_neighbouring_keys_are_independent(columns: Make) -> None:
    grid = [(seed, choice, position) for seed in range(10) for choice in range(10) for position in range(100)]
    seed, choice, position = zip(*grid, strict=True)
    logits = np.zeros((len(grid), 16), np.float32)
    tokens = sample(logits, **columns(len(grid), seed=seed, choice=choice, position=position)).token_ids
    for distance in (1, 100, 1000):
        equal = float((tokens[distance:] == tokens[:-distance]).mean())
        assert abs(equal - 1 / 16) < 4 * math.sqrt(1 / 16 * 15 / 16 / len(grid))


def test_a_row_does_not_depend_on_the_batch(isa: str, columns: Make) -> None:
    rng = np.random.default_rng(11)
    logits = random_logits(rng, 16, 300)
    case, _ = random_case(rng, columns, 16, 300)
    together = sample(logits, **case)
    for row in range(16):
        alone = sample(logits[row : row + 1], **rows_of(case, [row]))
        assert_same_row(together, row, alone, 0)
    order = rng.permutation(16).tolist()
    shuffled = sample(logits[order], **rows_of(case, order))
    for index, row in enumerate(order):
        assert_same_row(together, row, shuffled, index)


def rows_of(columns: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    ragged = {"bias_offsets": ("bias_ids", "bias_values"), "history_offsets": ("history_ids",)}
    flat = {name for names in ragged.values() for name in names}
    picked = {name: column[rows] for name, column in columns.items() if name not in ragged and name not in flat}
    for name, values in ragged.items():
        spans = [np.arange(*columns[name][row : row + 2]) for row in rows]
        picked[name] = np.concatenate(([0], np.cumsum([span.size for span in spans]))).astype(np.int32)
        picked |= {value: columns[value][np.concatenate(spans)] for value in values}
    return picked


def assert_same_row(a: SampleResult, i: int, b: SampleResult, j: int) -> None:
    assert a.token_ids[i] == b.token_ids[j]
    np.testing.assert_array_equal(a.logprobs[i], b.logprobs[j])
    top_a, top_b = (slice(*r.top_offsets[k : k + 2]) for r, k in ((a, i), (b, j)))
    np.testing.assert_array_equal(a.top_token_ids[top_a], b.top_token_ids[top_b])
    np.testing.assert_array_equal(a.top_logprobs[top_a], b.top_logprobs[top_b])
    assert a.errors.get(i) == b.errors.get(j)


def test_a_bad_row_fails_alone(isa: str, columns: Make) -> None:
    logits = np.random.default_rng(2).standard_normal((8, 200)).astype(np.float32)
    good = sample(logits, **columns(8, seed=4, top_n=2))
    bad = logits.copy()
    bad[1, 150], bad[2, 7], bad[5, 199], bad[6] = np.nan, np.inf, -np.float32(np.nan), -np.inf
    result = sample(bad, **columns(8, seed=4, top_n=2), masks=[Mask(3, np.zeros(7, np.uint32))])
    assert result.errors == dict.fromkeys((1, 2, 5), reference.NOT_FINITE) | dict.fromkeys((3, 6), reference.NO_TOKEN)
    for row in range(8):
        if row in result.errors:
            assert result.token_ids[row] == -1
            assert np.isnan(result.logprobs[row])
            assert result.top_offsets[row] == result.top_offsets[row + 1]
        else:
            assert_same_row(result, row, good, row)


def test_an_overflow_in_processing_is_an_error(isa: str, columns: Make) -> None:
    logits = np.array([[3e38, 1.0]], np.float32)
    result = sample(logits, **columns(1, history={0: ([0], [])}, repetition_penalty=0.1))
    assert result.errors == {0: reference.NOT_FINITE}


def test_rows_may_have_any_stride_and_are_not_copied(isa: str, columns: Make) -> None:
    wide = np.random.default_rng(8).standard_normal((6, 150)).astype(np.float32)
    case = columns(3, seed=5)
    for view in (wide[::2, 10:139], wide[::-2, :129], np.broadcast_to(wide[4], (3, 150)), wide[:3, 7:8]):
        np.testing.assert_array_equal(sample(view, **case).token_ids, sample(view.copy(), **case).token_ids)
    view.flags.writeable = False
    sample(view, **case)


def test_no_rows(columns: Make) -> None:
    result = sample(np.empty((0, 5), np.float32), **columns(0))
    assert result.token_ids.size == 0
    assert result.top_offsets.tolist() == [0]


def test_logprobs_are_those_of_the_raw_distribution(isa: str, columns: Make) -> None:
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(6).standard_normal((4, 5000)).astype(np.float32) * 3
    logits[3] = -2.0
    logits[3, 17] = 20.0  # a tail that is light token by token and heavy together
    result = sample(logits, **columns(4, temperature=0.5, top_k=3, bias={0: [(4, 50.0)]}, top_n=20))
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    np.testing.assert_allclose(result.logprobs, expected[np.arange(4), result.token_ids], atol=2e-6)
    top = result.top_token_ids.reshape(4, 20)
    np.testing.assert_array_equal(top, np.argsort(-logits, 1, kind="stable")[:, :20])
    np.testing.assert_allclose(result.top_logprobs.reshape(4, 20), np.take_along_axis(expected, top, 1), atol=2e-6)
    assert result.token_ids[0] == 4


def test_penalties_count_what_they_say(columns: Make) -> None:
    logits = np.array([[4.0, -4.0, 3.0, 2.0]], np.float32)
    history = {0: ([0, 1, 1], [0, 2, 2])}

    def best(**options: float) -> list[int]:
        """Ids by processed logit: mask the best away, again and again."""
        allowed, order = np.ones(4, bool), []
        for _ in range(4):
            masks = [Mask(0, pack(allowed))]
            order.append(
                int(sample(logits, **columns(1, history=history, temperature=0, **options), masks=masks).token_ids[0])
            )
            allowed[order[-1]] = False
        return order

    assert best() == [0, 2, 3, 1]
    assert best(repetition_penalty=3.0) == [3, 0, 2, 1]  # 4/3, -12, 1, 2
    assert best(presence_penalty=1.5) == [0, 3, 2, 1]  # 2.5, -4, 1.5, 2: the prompt does not count
    assert best(frequency_penalty=0.6) == [0, 3, 2, 1]  # 3.4, -4, 1.8, 2
    assert best(presence_penalty=-2.0, frequency_penalty=-2.0) == [2, 0, 3, 1]  # 8, -4, 9, 2


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], block: tuple[int, ...]
) -> None:
    """Of the authors' distribution, Random123: tests/kat_vectors."""
    assert reference.philox4x32(counter, key) == block


def test_exp2_is_accurate_and_exact_at_zero() -> None:
    t = -np.concatenate((np.geomspace(1e-9, 99, 200_000), np.linspace(0, 4, 200_001))).astype(np.float32)
    exact = np.exp2(t.astype(float))
    assert np.abs(reference.exp2_nonpositive(t) / exact - 1).max() < 2e-7
    assert reference.exp2_nonpositive(np.zeros(1, np.float32))[0] == 1


BAD_ARGUMENTS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": np.array([-1], np.float32)},
    "temperature ": {"temperature": np.array([np.nan], np.float32)},
    "top_p": {"top_p": np.array([0], np.float32)},
    "top_p ": {"top_p": np.array([np.nan], np.float32)},
    "min_p": {"min_p": np.array([1.1], np.float32)},
    "top_k": {"top_k": np.array([-1], np.int32)},
    "top_n": {"top_n": np.array([-2], np.int32)},
    "repetition_penalty": {"repetition_penalty": np.array([0], np.float32)},
    "presence_penalty": {"presence_penalty": np.array([np.inf], np.float32)},
    "position": {"position": np.array([-1], np.int32)},
    "seed": {"seed": np.array([1], np.int64)},
    "choice": {"choice": np.array([1, 2], np.int32)},
    "top_k ": {"top_k": np.array([[1]], np.int32)},
    "bias_ids": {"bias_ids": np.array([9], np.int32), "bias_values": np.ones(1, np.float32)},
    "bias_values": {"bias_ids": np.array([1], np.int32)},
    "bias_offsets": {"bias_offsets": np.array([0, 1], np.int32)},
    "history_ids": {"history_ids": np.array([-1], np.int32)},
    "history_prompt_lens": {"history_prompt_lens": np.array([1], np.int32)},
    "history_offsets": {"history_offsets": np.array([1, 0], np.int32)},
    "mask": {"masks": [Mask(0, np.zeros(2, np.uint32))]},
    "row 1": {"masks": [Mask(1, np.zeros(1, np.uint32))]},
    "two masks": {"masks": [Mask(0, np.ones(1, np.uint32))] * 2},
    "logits": {"logits": np.zeros((1, 9), np.float64)},
    "logits ": {"logits": np.zeros(9, np.float32)},
    "columns": {"logits": np.zeros((1, 0), np.float32)},
    "contiguous": {"logits": np.zeros((1, 18), np.float32)[:, ::2]},
}


@pytest.mark.parametrize("named", BAD_ARGUMENTS)
def test_a_bad_argument_is_named(named: str, columns: Make) -> None:
    arguments = {"logits": np.zeros((1, 9), np.float32)} | columns(1) | BAD_ARGUMENTS[named]
    with pytest.raises(ValueError, match=named.strip()):
        sample(arguments.pop("logits"), **arguments)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch, columns: Make) -> None:
    monkeypatch.setenv("MILLRACE_ISA", "mmx")
    with pytest.raises(ValueError, match="MILLRACE_ISA=mmx: this machine has baseline"):
        sample(np.zeros((1, 9), np.float32), **columns(1))


def test_other_python_threads_run_meanwhile(columns: Make) -> None:
    logits = np.random.default_rng(1).standard_normal((64, 4000)).astype(np.float32)
    case = columns(64, seed=3, top_p=0.9)
    alone = sample(logits, **case).token_ids
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(sample, logits, **case) for _ in range(8)]
    assert Counter(tuple(r.result().token_ids) for r in results) == {tuple(alone): 8}
