"""The native loops over running sequences against what they mean, said plainly here, on random states."""

import random
import sys
from collections import Counter

import numpy as np
import pytest
from engine_fakes import make_request

from millrace.server.engine import loops
from millrace.server.engine.row import Row
from millrace.server.engine.sequence import Group, Sequence, SequenceToken, Status
from millrace.server.engine.tenants import Tenant
from millrace.server.types import Sampling


def any_sequence(r: random.Random, number: int, tenants: list[Tenant]) -> Sequence:
    """Fields that agree no more than the loops need."""
    prompt, pending = r.choice([3, 250, 70_000]), r.choice([0, 0, 1, 2])
    length = prompt + r.randrange(0, 5)
    request = make_request(
        r.choice([number, number + (1 << 40)]),
        stop_token_ids=frozenset(r.sample(range(10), r.choice([0, 1, 4]))),
        logprobs_top_n=r.choice([None, None, 0]),
        sampling=Sampling(presence_penalty=r.choice([0.0, 0.5])),
    )
    return Sequence(
        request,
        r.choice(tenants),
        Group(),
        number,
        0,
        prompt_len=prompt,
        limit=length + r.choice([0, 1, 50]),
        length=length,
        rank=0,
        status=r.choice([Status.RUNNING] * 4 + [Status.WAITING, Status.FINISHED]),
        scheduled=length - r.choice([1, 1, 1, 2, 3]),
        capacity=length - 1 + r.choice([0, 0, 5]),
        milestone=r.choice([0, length - 2, length - 1, length, 1 << 30]),
        pending=pending,
        in_flight=pending,
        source=(r.randrange(9), r.randrange(9)),
        lane=r.randrange(300),
        charged=length + r.choice([-2, -1, 0, 1]),
    )


def any_rows(r: random.Random, sequences: list[Sequence]) -> list[Row]:
    rows = []
    for s in sequences:
        s.pending = s.in_flight = max(1, s.pending)
        start = s.length - s.pending - r.choice([1, 1, 4])
        rows.append(Row(s, start, s.length - s.pending, r.random() < 0.8, r.choice([None, (r.randrange(9), 300)])))
    return rows


def sort_running(running):
    prefilling, decoding, growing = [], [], []
    for s in running:
        if s.length - s.scheduled > 1:
            prefilling.append(s)
        elif s.pending == 0 or (s.length < s.limit and (s.pending == 1 or not s.needs_history)):
            decoding.append(s)
            if s.scheduled == s.capacity:
                growing.append(s)
    return prefilling, decoding, growing


def plan_decodes(step, decoding):
    rows, attention, unpaid, served = [], 0, [], []
    for s in decoding:
        rows.append(Row(s, s.length - 1, s.length, True, s.source if s.pending else None))
        s.source = step, len(rows) - 1
        attention += s.length
        if s.length > s.charged:
            (served if s.length > s.prompt_len else unpaid).append(s.tenant)
            s.charged = s.length
        s.scheduled = s.length
        s.in_flight, s.pending, s.length = s.in_flight + 1, s.pending + 1, s.length + 1
    return rows, attention, unpaid, list(Counter(served).items())


def commit_plain(rows, tokens):
    accepted, others = [], []
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        s = row.sequence
        goes_on = token not in s.request.stop_token_ids and (s.length < s.limit or s.pending > 1)
        if s.status is Status.RUNNING and row.samples and row.end < s.milestone and goes_on:
            s.in_flight, s.pending, s.computed = s.in_flight - 1, s.pending - 1, row.end
            s.output.append(token)
            accepted.append(index)
        else:
            others.append(index)
    return accepted, others


def state(s: Sequence) -> tuple:
    return tuple(getattr(s, name) for name in Sequence.__slots__ if name not in ("request", "tenant", "group"))


def comparable(value: object, sequences: list[Sequence]) -> object:
    """Sequences by their place, since the two sides have copies of their own."""
    if isinstance(value, Sequence):
        return "sequence", next(i for i, s in enumerate(sequences) if s is value)
    if isinstance(value, Tenant):
        return "tenant", value.name
    if isinstance(value, list | tuple):
        return [comparable(one, sequences) for one in value]
    return value


def build(seed: int) -> tuple[list[Sequence], list[Row], list[int]]:
    r = random.Random(seed)
    tenants = [Tenant(f"t{number}", number) for number in range(3)]
    sequences = [any_sequence(r, number, tenants) for number in range(r.choice([0, 1, 7, 40]))]
    return sequences, any_rows(r, sequences), [r.choice([r.randrange(10), 70_000]) for _ in sequences]


@pytest.mark.parametrize("seed", range(200))
def test_each_loop_does_what_is_said_here(seed: int) -> None:
    for name in ("sort_running", "plan_decodes", "commit_plain"):
        outcomes = []
        for side in (loops, sys.modules[__name__]):
            sequences, rows, tokens = build(seed)
            arguments = {"sort_running": (sequences,), "plan_decodes": (7, sequences), "commit_plain": (rows, tokens)}
            result = getattr(side, name)(*arguments[name])
            outcomes.append((comparable(result, sequences), [state(s) for s in sequences]))
        assert outcomes[0] == outcomes[1], name


@pytest.mark.parametrize("seed", range(50))
def test_rows_become_columns_and_news(seed: int) -> None:
    sequences, rows, tokens = build(seed)
    r = random.Random(seed)
    accepted = sorted(r.sample(range(len(rows)), len(rows) // 2))
    assert loops.tokens_of(rows, accepted, tokens) == [
        None if (q := rows[i].sequence.request).logprobs_top_n is not None else SequenceToken(q.sequence_id, tokens[i])
        for i in accepted
    ]
    lanes, ids = loops.running_tokens(rows, accepted, tokens)
    running = [i for i in accepted if rows[i].sequence.status is Status.RUNNING]
    assert (lanes.dtype, ids.dtype) == (np.int32, np.int32)
    assert lanes.tolist() == [rows[i].sequence.lane for i in running]
    assert ids.tolist() == [tokens[i] for i in running]
    *arrays, sources = loops.columns(rows)
    assert [a.tolist() for a in arrays] == [
        [row.sequence.lane for row in rows],
        *([row[k] for row in rows] for k in (1, 2, 3)),
    ]
    assert sources == [(i, row.source) for i, row in enumerate(rows) if row.source is not None]
    assert all(type(row) is Row for row in loops.plan_decodes(1, sequences)[0])


def test_nothing_leaks() -> None:
    r = random.Random(1)
    sequence = any_sequence(r, 1, [Tenant("t", 1)])
    sequence.status, sequence.length, sequence.milestone, sequence.limit = Status.RUNNING, 10**6, 1 << 40, 1 << 40
    before = [sys.getrefcount(x) for x in (sequence, sequence.tenant, sequence.request, Row, SequenceToken, None)]
    for step in range(2000):
        rows, *_ = loops.plan_decodes(step, [sequence])
        accepted, _ = loops.commit_plain(rows, [50_000])
        assert accepted == [0]
        loops.tokens_of(rows, accepted, [50_000])
        loops.columns(rows)
        loops.running_tokens(rows, accepted, [50_000])
        loops.sort_running([sequence])
    del rows
    after = [sys.getrefcount(x) for x in (sequence, sequence.tenant, sequence.request, Row, SequenceToken, None)]
    assert [b - a for a, b in zip(before, after, strict=True)][:5] == [0] * 5
    assert abs(after[5] - before[5]) < 100
    assert sys.getrefcount(sequence.length) < 10


def test_what_is_no_sequence_is_refused() -> None:
    row = Row(any_sequence(random.Random(1), 1, [Tenant("t", 1)]), 0, 1, True, None)
    stranger = any_sequence(random.Random(1), 1, [Tenant("t", 1)])
    stranger.request = object()
    for call in (
        lambda: loops.sort_running([object()]),
        lambda: loops.plan_decodes(1, [None]),
        lambda: loops.commit_plain([tuple(row)], [1]),
        lambda: loops.columns([row._replace(sequence=object())]),
        lambda: loops.commit_plain([row._replace(end="x")], [1]),
        lambda: loops.tokens_of([row._replace(sequence=stranger)], [0], [1]),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="token for each row"):
        loops.commit_plain([row], [])
    with pytest.raises(IndexError):
        loops.tokens_of([row], [1], [1])
    with pytest.raises(IndexError):
        loops.running_tokens([row], [-1], [1])
