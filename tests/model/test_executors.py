"""The rest of an executor's contract: tickets, placeholders, drafts, outputs, masks, blocks, failures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from millrace.server.errors import FeatureUnsupported
from millrace.server.model.executors.base import Executor, Output

PROMPT = list(range(40, 63))
PENALTIES = {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.3}
LONG = [7 + 11 * place % 370 for place in range(40)]  # more than a block
SAMPLINGS = [{}, {"temperature": 1.0, "seed": 7}, PENALTIES, PENALTIES | {"temperature": 0.9, "seed": 3, "top_k": 50}]


@pytest.fixture(params=["reference", "cpu"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def executor(kind: str, load: Callable) -> Executor:
    return load("llama", kind).executor


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_pipelined_steps_equal_steps_one_at_a_time(executor, steps: SimpleNamespace, sampling: dict) -> None:
    """Depth two: each step is submitted before the one before it is read; its history lacks that token."""
    expected = steps.generate(executor, PROMPT, 20, **sampling)
    sequence, tickets = list(PROMPT), []
    first = steps.Row(PROMPT, history=PROMPT, prompt_len=len(PROMPT), sampling=sampling)
    tickets.append(steps.submit(executor, [first]))
    for step in range(19):
        row = steps.Row(
            [(tickets[-1], 0)], len(PROMPT) + step, history=sequence, prompt_len=len(PROMPT), sampling=sampling
        )
        tickets.append(steps.submit(executor, [row]))
        sequence += steps.tokens(executor.collect(tickets[step]), 0)
    sequence += steps.tokens(executor.collect(tickets[-1]), 0)
    assert sequence[len(PROMPT) :] == expected


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("wrong_at", [0, 1, 3, 4])
def test_drafts_are_accepted_up_to_the_first_wrong_one(
    executor, steps: SimpleNamespace, sampling: dict, wrong_at: int
) -> None:
    """Four drafts, of which the one at `wrong_at` is wrong (4: none): the result is plain decoding's."""
    plain = steps.generate(executor, PROMPT, 12, **sampling)
    drafts = plain[1:5]
    if wrong_at < 4:
        drafts[wrong_at] = (drafts[wrong_at] + 1) % 384
    known = [*PROMPT, plain[0]]
    row = steps.Row(
        [plain[0], *drafts], len(PROMPT), drafts=4, history=known, prompt_len=len(PROMPT), sampling=sampling
    )
    other = steps.Row(PROMPT[:5], 0, range(32, 40), Output.NOTHING)
    result = steps.run(executor, [other, row])
    assert steps.tokens(result, 0) == []
    assert steps.tokens(result, 1) == plain[1 : wrong_at + 2]

    known += steps.tokens(result, 1)  # what was rejected is overwritten
    following = steps.Row(known[-1:], len(known) - 1, history=known, prompt_len=len(PROMPT), sampling=sampling)
    assert steps.tokens(steps.run(executor, [following]), 0) == plain[wrong_at + 2 : wrong_at + 3]


def test_draft_behind_a_placeholder(executor, steps: SimpleNamespace) -> None:
    plain = steps.generate(executor, PROMPT, 3, **PENALTIES)
    known = {"history": PROMPT, "prompt_len": len(PROMPT), "sampling": PENALTIES}
    first = steps.submit(executor, [steps.Row(PROMPT, **known)])
    second = steps.submit(executor, [steps.Row([(first, 0), plain[1]], len(PROMPT), drafts=1, **known)])
    assert steps.tokens(executor.collect(first), 0) == plain[:1]
    assert steps.tokens(executor.collect(second), 0) == plain[1:]


def test_logprobs_of_accepted_drafts(executor, steps: SimpleNamespace) -> None:
    plain = steps.generate(executor, PROMPT, 4)
    wrong = (plain[2] + 1) % 384
    row = steps.Row([plain[0], plain[1], wrong], len(PROMPT), drafts=2, sampling={"top_n": 3})
    quiet = steps.Row(PROMPT, 0, range(32, 40))
    result = steps.run(executor, [quiet, row])
    assert steps.tokens(result, 1) == plain[1:3]
    assert np.isnan(result.logprobs[0])
    assert result.top_offsets.tolist() == [0, 0, 3, 6]
    assert result.top_token_ids[[0, 3]].tolist() == plain[1:3]
    logits = steps.all_logits(executor, PROMPT + plain[:2], 30, range(40, 50))[-2:].double().log_softmax(-1)
    expected = logits.topk(3)
    np.testing.assert_allclose(result.top_logprobs.reshape(2, 3), expected.values, atol=1e-5)
    np.testing.assert_allclose(result.logprobs[1:], expected.values[:, 0], atol=1e-5)


def test_tickets_are_collected_once_and_in_order(executor, steps: SimpleNamespace) -> None:
    first, second = steps.submit(executor, [steps.Row(PROMPT)]), steps.submit(executor, [steps.Row(PROMPT)])
    with pytest.raises(ValueError, match="oldest"):
        executor.collect(second)
    executor.collect(first)
    with pytest.raises(ValueError, match="oldest"):
        executor.collect(first)
    with pytest.raises(ValueError, match="does not wait"):
        steps.submit(executor, [steps.Row([(first, 0)], len(PROMPT))])
    executor.collect(second)


def test_progress_counts_layers(executor, steps: SimpleNamespace) -> None:
    before = executor.progress
    steps.run(executor, [steps.Row(PROMPT, output=Output.NOTHING)])
    assert executor.progress == before + 3


def test_mask_allows_only_its_tokens(executor, steps: SimpleNamespace) -> None:
    allowed = [3, 31, 32, 383]
    logits = steps.all_logits(executor, PROMPT, 30, range(32))[-1]
    result = steps.run(executor, [steps.Row(PROMPT, 0, range(32, 40)), steps.Row(PROMPT, mask=allowed)])
    assert steps.tokens(result, 1) == [allowed[int(logits[allowed].argmax())]]
    assert steps.tokens(result, 0) == [int(logits.argmax())]


def test_embeddings_stand_for_tokens(executor, checkpoint: Callable[[str], Path], steps: SimpleNamespace) -> None:
    """The embedding of the hidden token, given as a vector, gives the same next token; another does not."""
    table = load_file(checkpoint("llama") / "model.safetensors")["model.embed_tokens.weight"]
    expected = steps.tokens(steps.run(executor, [steps.Row(PROMPT, sampling={"top_n": 0})]), 0)
    masked = [*PROMPT[:9], -1, *PROMPT[10:]]
    same = steps.run(executor, [steps.Row(masked)], embeddings={9: table[PROMPT[9]]})
    assert steps.tokens(same, 0) == expected

    def pooled(ids: list[int], **embeddings: dict) -> np.ndarray:
        return steps.run(executor, [steps.Row(ids, output=Output.POOLED)], **embeddings).pooled[0]

    np.testing.assert_array_equal(pooled(masked, embeddings={9: table[PROMPT[9]]}), pooled(PROMPT))
    assert np.abs(pooled(masked, embeddings={9: -table[PROMPT[9]]}) - pooled(PROMPT)).max() > 1e-2


def test_pooled_is_the_last_hidden_state(executor, kind: str, checkpoint: Callable, steps: SimpleNamespace) -> None:
    theirs = transformers.AutoModel.from_pretrained(checkpoint("llama"), dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).last_hidden_state[0, -1].numpy()
    result = steps.run(executor, [steps.Row(PROMPT, 0, range(32, 40)), steps.Row(PROMPT, output=Output.POOLED)])
    assert list(result.pooled) == [1]
    assert steps.tokens(result, 1) == []
    assert result.pooled[1].dtype == np.float32
    apart = np.linalg.norm(result.pooled[1] - expected) / np.linalg.norm(expected)
    assert apart < {"reference": 1e-5, "cpu": 0.02}[kind]


def test_nan_fails_its_row_only(executor, steps: SimpleNamespace) -> None:
    """Rows and placeholders of the failed sequence fail; neighbours, and later users of its blocks, do not."""
    expected = steps.generate(executor, PROMPT, 2)
    nan = np.full(48, np.nan, np.float32)
    failing = [-1, *range(7, 40)]
    rows = [
        steps.Row(PROMPT, 0, range(4)),
        steps.Row(failing, 0, range(4, 8)),
        steps.Row([-1], 0, range(8, 9), Output.POOLED),
    ]
    first = steps.submit(executor, rows, embeddings={len(PROMPT): nan, len(PROMPT) + len(failing): nan})
    following = [
        steps.Row([(first, 0)], len(PROMPT), range(4)),
        steps.Row([(first, 1)], len(failing), range(4, 8), history=failing[1:], sampling=PENALTIES),
    ]
    second = steps.submit(executor, following)
    result = executor.collect(first)
    assert steps.tokens(result, 0) == expected[:1]
    assert result.errors.keys() == {1, 2}
    assert result.pooled == {}
    result = executor.collect(second)
    assert steps.tokens(result, 0) == expected[1:]
    assert result.errors.keys() == {1}
    assert steps.generate(executor, PROMPT, 2, range(4, 8)) == expected


def test_copied_and_moved_blocks_continue_equally(executor, kind: str, load: Callable, steps: SimpleNamespace) -> None:
    expected = steps.generate(executor, LONG, 6)
    used = range(-(-len(LONG) // executor.kv_layout.block_size))
    steps.run(executor, [steps.Row(LONG, output=Output.NOTHING)])
    executor.copy_blocks([(block, 50 + block) for block in used])
    data = executor.export_blocks(used[::-1])
    assert len(data) == len(used) * executor.kv_layout.bytes_per_block
    executor.import_blocks(used, bytes(len(data)))

    def follow(executor: Executor, *blocks: int) -> list[float]:
        row = steps.Row(expected[:1], len(LONG), blocks, sampling={"top_n": 384})
        result = steps.run(executor, [row])
        return [*steps.tokens(result, 0), *result.top_logprobs.tolist()]

    copied = follow(executor, *(50 + block for block in used))
    assert copied[0] == expected[1]
    assert follow(executor, *used) != copied
    executor.import_blocks([60 + block for block in used[::-1]], data)
    assert follow(executor, *(60 + block for block in used)) == copied
    other = load("llama", kind).executor
    other.import_blocks([9 - block for block in used[::-1]], data)
    assert follow(other, *(9 - block for block in used)) == copied
    with pytest.raises(ValueError, match="take"):
        executor.import_blocks([0], data)


def test_what_it_does_not_do_is_refused(executor, steps: SimpleNamespace) -> None:
    with pytest.raises(FeatureUnsupported):
        executor.load_adapter("adapter")
    batch = steps.pack([steps.Row(PROMPT)], executor.kv_layout.block_size)
    batch.adapters[0] = 0
    with pytest.raises(ValueError, match="adapter"):
        executor.submit(batch)


def test_a_mask_that_is_not_ready_is_refused(executor, steps: SimpleNamespace) -> None:
    batch = steps.pack([steps.Row(PROMPT, mask=[3])], executor.kv_layout.block_size)
    batch.masks[0] = replace(batch.masks[0], is_ready=False)
    with pytest.raises(ValueError, match="not ready"):
        executor.submit(batch)


def test_a_closed_executor_runs_nothing(executor, steps: SimpleNamespace) -> None:
    waiting = steps.submit(executor, [steps.Row(PROMPT)])
    executor.close()
    executor.close()
    with pytest.raises(ValueError, match="closed"):
        steps.submit(executor, [steps.Row(PROMPT)])
    with pytest.raises(ValueError, match="oldest"):
        executor.collect(waiting)


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_any_block_size_of_the_reference(load: Callable, steps: SimpleNamespace, block_size: int) -> None:
    plain, other = load("llama").executor, load("llama", block_size=block_size).executor
    blocks = np.random.default_rng(0).permutation(other.kv_layout.num_blocks).tolist()
    assert other.kv_layout.block_size == block_size
    assert steps.generate(other, PROMPT, 8, blocks) == steps.generate(plain, PROMPT, 8)


WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "a token beyond the vocabulary": (lambda batch: batch.token_ids.__setitem__(3, 384), "token_ids"),
    "no token and no embedding": (lambda batch: batch.token_ids.__setitem__(3, -1), "token_ids"),
    "a slot beyond the cache": (lambda batch: batch.slots.__setitem__(0, 64 * 32), "slots"),
    "no slot": (lambda batch: batch.slots.__setitem__(0, -1), "slots"),
    "a block beyond the cache": (lambda batch: batch.block_tables.__setitem__((0, 0), 64), "leaves the cache"),
    "no block": (lambda batch: batch.block_tables.__setitem__((0, 1), -1), "leaves the cache"),
    "a context longer than its table": (lambda batch: batch.context_lens.__setitem__(0, 2000), "context"),
    "positions that jump": (lambda batch: batch.positions.__setitem__(0, 1), "context"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_lies_outside_is_refused_before_anything_is_touched(
    load: Callable, steps: SimpleNamespace, name: str
) -> None:
    """Of the native executor, which would read and write there."""
    executor = load("llama", "cpu").executor
    batch = steps.pack([steps.Row(LONG)], 32)
    damage, message = WRONG[name]
    damage(batch)
    with pytest.raises(ValueError, match=message):
        executor.submit(batch)
    assert executor.export_blocks(range(64)) == bytes(64 * executor.kv_layout.bytes_per_block)
    for pairs in ([(0, 64)], [(-1, 0)]):
        with pytest.raises(ValueError, match="outside the cache"):
            executor.copy_blocks(pairs)
    with pytest.raises(ValueError, match=r"token_ids\[4\] = -1, and no embedding"):
        steps.run(executor, [steps.Row([-1, *LONG[:3], -1, 5])], embeddings={0: np.zeros(48, np.float32)})
