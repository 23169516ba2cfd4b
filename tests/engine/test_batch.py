import random
from array import array
from dataclasses import fields

import numpy as np
import pytest
from engine_fakes import make_request

from millrace.server.engine import batch as module
from millrace.server.engine.batch import BatchPacker, RaggedTable
from millrace.server.engine.row import Row
from millrace.server.engine.sequence import Group, Sequence
from millrace.server.engine.tenants import Tenant
from millrace.server.model.executors.base import Output
from millrace.server.types import Sampling

VOCABULARY = 70


def random_sequence(r, sequence_id, lane, block_size):
    prompt, output = r.randint(1, 40), r.choice((0, r.randint(1, 30)))
    sampling = Sampling(
        temperature=r.random(),
        top_p=r.random(),
        top_k=r.randrange(50),
        min_p=r.random(),
        presence_penalty=r.choice((0.0, 0.5)),
        frequency_penalty=r.choice((0.0, -0.25)),
        repetition_penalty=r.choice((1.0, 1.5)),
        seed=r.randrange(2**64),
        logit_bias={r.randrange(VOCABULARY): r.random() for _ in range(r.choice((0, 0, 3, 20)))},
    )
    request = make_request(
        sequence_id,
        array("i", (r.randrange(VOCABULARY) for _ in range(prompt))),
        sampling=sampling,
        choice=r.randrange(4),
        min_output_tokens=r.choice((0, 10)),
        stop_token_ids=frozenset(r.sample(range(VOCABULARY), 3)),
        logprobs_top_n=r.choice((None, 0, 5)),
    )
    tokens = [r.randrange(VOCABULARY) for _ in range(output)]
    blocks = r.sample(range(500), -(-(prompt + output + 2) // block_size))
    length = prompt + output
    return Sequence(
        request,
        Tenant("tenant", 1),
        Group(),
        arrival=sequence_id,
        arrival_us=0,
        prompt_len=prompt,
        limit=10**6,
        length=length,
        rank=1,
        output=tokens,
        blocks=blocks,
        lane=lane,
    )


def random_row(r, sequence):
    known = sequence.prompt_len + len(sequence.output)
    if r.random() < 0.3:  # behind the known tokens: one that is still being sampled
        return Row(sequence, known, known + 1, True, (r.choice((8, 9)), r.randrange(5)))
    start = r.randrange(known)
    end = r.choice((known, r.randint(start + 1, known)))
    return Row(sequence, start, end, end == known, None)


def naive_pack(rows, tickets, block_size):
    """The definition of a batch, one token at a time."""
    b = {name: [] for name in ("token_ids", "positions", "slots", "context_lens", "block_tables", "outputs")}
    b |= {"offsets": [0], "placeholders": [], "masks": {}}
    names = [field.name for field in fields(module.SamplingColumns)]
    s = {name: [0] if name in ("bias_offsets", "history_offsets") else [] for name in names}
    widest = max(-(-row.end // block_size) for row in rows)
    for row in rows:
        sequence, request = row.sequence, row.sequence.request
        known = [*request.prompt_ids, *sequence.output]
        for position in range(row.start, row.end):
            if position < len(known):
                b["token_ids"].append(known[position])
            else:
                b["placeholders"].append((len(b["token_ids"]), tickets[row.source[0]], row.source[1]))
                b["token_ids"].append(-1)
            b["positions"].append(position)
            b["slots"].append(sequence.blocks[position // block_size] * block_size + position % block_size)
        b["offsets"].append(len(b["token_ids"]))
        b["context_lens"].append(row.end)
        used = sequence.blocks[: -(-row.end // block_size)]
        b["block_tables"].append(used + [-1] * (widest - len(used)))
        b["outputs"].append(Output.SAMPLE if row.samples else Output.NOTHING)
        if not row.samples:
            continue
        sampling = request.sampling
        history = known if sequence.needs_history else []
        for name in ("temperature", "top_p", "top_k", "min_p", "seed"):
            s[name].append(getattr(sampling, name))
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
            s[name].append(getattr(sampling, name))
        if row.end - sequence.prompt_len < request.min_output_tokens:
            b["masks"][len(s["position"])] = set(range(VOCABULARY)) - request.stop_token_ids
        s["choice"].append(request.choice)
        s["position"].append(row.end)
        s["top_n"].append(-1 if request.logprobs_top_n is None else request.logprobs_top_n)
        s["bias_ids"] += sampling.logit_bias.keys()
        s["bias_values"] += sampling.logit_bias.values()
        s["bias_offsets"].append(len(s["bias_ids"]))
        s["history_ids"] += history
        s["history_offsets"].append(len(s["history_ids"]))
        s["history_prompt_lens"].append(sequence.prompt_len if history else 0)
    return b, s


@pytest.mark.parametrize("seed", range(40))
def test_packing_equals_the_definition(seed):
    r = random.Random(seed)
    block_size, lanes = r.randint(1, 9), r.randint(1, 12)
    packer = BatchPacker(lanes, block_size, VOCABULARY)
    sequences = [random_sequence(r, i, lane, block_size) for i, lane in enumerate(r.sample(range(lanes), lanes))]
    for sequence in sequences:
        known = list(sequence.output)
        late = r.randint(0, len(known))  # these arrive one by one
        sequence.output, blocks = known[: len(known) - late], sequence.blocks
        sequence.blocks = blocks[:1]
        packer.admit(sequence)
        for token in known[len(known) - late :]:
            sequence.output.append(token)
            packer.append(np.array([sequence.lane], np.int32), np.array([token], np.int32))
        for count in range(2, len(blocks) + 1):
            sequence.blocks = blocks[:count]
            packer.grow(sequence)
    rows = [random_row(r, sequence) for sequence in r.sample(sequences, r.randint(1, lanes))]
    tickets = {8: 31, 9: 44}
    batch = packer.pack(rows, tickets)
    expected, sampling = naive_pack(rows, tickets, block_size)
    for name in ("token_ids", "positions", "slots", "offsets", "context_lens", "block_tables", "outputs"):
        got = getattr(batch, name)
        assert (got.dtype, got.flags.c_contiguous, got.tolist()) == (np.int32, True, expected[name]), name
    assert [(p.index, p.ticket, p.row) for p in batch.placeholders] == expected["placeholders"]
    assert {m.row: {v for v in range(96) if m.words[v // 32] >> v % 32 & 1} for m in batch.masks} == expected["masks"]
    assert all((m.words.dtype, len(m.words)) == (np.uint32, 3) for m in batch.masks)
    assert (batch.draft_lens.tolist(), batch.adapters.tolist()) == ([0] * len(rows), [-1] * len(rows))
    for field in fields(batch.sampling):
        got = getattr(batch.sampling, field.name)
        assert got.flags.c_contiguous, field.name
        assert got.tolist() == np.array(sampling[field.name], got.dtype).tolist(), field.name


def test_columns_have_the_types_of_the_contract():
    packer = BatchPacker(1, 4, VOCABULARY)
    sequence = random_sequence(random.Random(0), 1, 0, 4)
    packer.admit(sequence)
    s = packer.pack([Row(sequence, 0, sequence.length, True, None)], {}).sampling
    reals = {"temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"}
    for field in fields(s):
        kind = np.float32 if field.name in reals | {"bias_values"} else np.int32
        assert getattr(s, field.name).dtype == (np.uint64 if field.name == "seed" else kind), field.name


def test_a_table_keeps_its_rows_when_it_grows():
    table = RaggedTable(3, np.int32)
    table.set(0, [1, 2, 3])
    table.set(2, list(range(100)))
    table.append(np.array([0, 2], np.int32), np.array([7, 8], np.int32))
    assert table.values[0, : table.lens[0]].tolist() == [1, 2, 3, 7]
    assert table.values[2, : table.lens[2]].tolist() == [*range(100), 8]
    assert table.lens.tolist() == [4, 0, 101]
