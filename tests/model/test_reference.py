"""The rest of the executor's contract: tickets, placeholders, drafts, outputs, masks, blocks, failures."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from millrace.server.errors import FeatureUnsupported
from millrace.server.model.executors.base import Output

PROMPT = list(range(40, 63))
PENALTIES = {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.3}
SAMPLINGS = [{}, {"temperature": 1.0, "seed": 7}, PENALTIES, PENALTIES | {"temperature": 0.9, "seed": 3, "top_k": 50}]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_pipelined_steps_equal_steps_one_at_a_time(llama, steps: SimpleNamespace, sampling: dict) -> None:
    """Depth two: each step is submitted before the one before it is read; its history lacks that token."""
    expected = steps.generate(llama, PROMPT, 20, **sampling)
    sequence, tickets = list(PROMPT), []
    first = steps.Row(PROMPT, history=PROMPT, prompt_len=len(PROMPT), sampling=sampling)
    tickets.append(llama.submit(steps.pack([first])))
    for step in range(19):
        row = steps.Row(
            [(tickets[-1], 0)], len(PROMPT) + step, history=sequence, prompt_len=len(PROMPT), sampling=sampling
        )
        tickets.append(llama.submit(steps.pack([row])))
        sequence += steps.tokens(llama.collect(tickets[step]), 0)
    sequence += steps.tokens(llama.collect(tickets[-1]), 0)
    assert sequence[len(PROMPT) :] == expected


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("wrong_at", [0, 1, 3, 4])
def test_drafts_are_accepted_up_to_the_first_wrong_one(
    llama, steps: SimpleNamespace, sampling: dict, wrong_at: int
) -> None:
    """Four drafts, of which the one at `wrong_at` is wrong (4: none): the result is plain decoding's."""
    plain = steps.generate(llama, PROMPT, 12, **sampling)
    drafts = plain[1:5]
    if wrong_at < 4:
        drafts[wrong_at] = (drafts[wrong_at] + 1) % 384
    known = [*PROMPT, plain[0]]
    row = steps.Row(
        [plain[0], *drafts], len(PROMPT), drafts=4, history=known, prompt_len=len(PROMPT), sampling=sampling
    )
    other = steps.Row(PROMPT[:5], 0, range(32, 40), Output.NOTHING)
    result = steps.run(llama, [other, row])
    assert steps.tokens(result, 0) == []
    assert steps.tokens(result, 1) == plain[1 : wrong_at + 2]

    known += steps.tokens(result, 1)  # what was rejected is overwritten
    following = steps.Row(known[-1:], len(known) - 1, history=known, prompt_len=len(PROMPT), sampling=sampling)
    assert steps.tokens(steps.run(llama, [following]), 0) == plain[wrong_at + 2 : wrong_at + 3]


def test_draft_behind_a_placeholder(llama, steps: SimpleNamespace) -> None:
    plain = steps.generate(llama, PROMPT, 3, **PENALTIES)
    known = {"history": PROMPT, "prompt_len": len(PROMPT), "sampling": PENALTIES}
    first = llama.submit(steps.pack([steps.Row(PROMPT, **known)]))
    second = llama.submit(steps.pack([steps.Row([(first, 0), plain[1]], len(PROMPT), drafts=1, **known)]))
    assert steps.tokens(llama.collect(first), 0) == plain[:1]
    assert steps.tokens(llama.collect(second), 0) == plain[1:]


def test_logprobs_of_accepted_drafts(llama, steps: SimpleNamespace) -> None:
    plain = steps.generate(llama, PROMPT, 4)
    wrong = (plain[2] + 1) % 384
    row = steps.Row([plain[0], plain[1], wrong], len(PROMPT), drafts=2, sampling={"top_n": 3})
    quiet = steps.Row(PROMPT, 0, range(32, 40))
    result = steps.run(llama, [quiet, row])
    assert steps.tokens(result, 1) == plain[1:3]
    assert np.isnan(result.logprobs[0])
    assert result.top_offsets.tolist() == [0, 0, 3, 6]
    assert result.top_token_ids[[0, 3]].tolist() == plain[1:3]
    logits = steps.all_logits(llama, PROMPT + plain[:2], 30, range(40, 50))[-2:].double().log_softmax(-1)
    expected = logits.topk(3)
    np.testing.assert_allclose(result.top_logprobs.reshape(2, 3), expected.values, atol=1e-5)
    np.testing.assert_allclose(result.logprobs[1:], expected.values[:, 0], atol=1e-5)


def test_tickets_are_collected_once_and_in_order(llama, steps: SimpleNamespace) -> None:
    first, second = llama.submit(steps.pack([steps.Row(PROMPT)])), llama.submit(steps.pack([steps.Row(PROMPT)]))
    with pytest.raises(ValueError, match="oldest"):
        llama.collect(second)
    llama.collect(first)
    with pytest.raises(ValueError, match="oldest"):
        llama.collect(first)
    with pytest.raises(ValueError, match="does not wait"):
        llama.submit(steps.pack([steps.Row([(first, 0)], len(PROMPT))]))
    llama.collect(second)


def test_progress_counts_layers(llama, steps: SimpleNamespace) -> None:
    before = llama.progress
    steps.run(llama, [steps.Row(PROMPT, output=Output.NOTHING)])
    assert llama.progress == before + 3


def test_mask_allows_only_its_tokens(llama, steps: SimpleNamespace) -> None:
    allowed = [3, 31, 32, 383]
    logits = steps.all_logits(llama, PROMPT, 30, range(32))[-1]
    result = steps.run(llama, [steps.Row(PROMPT, 0, range(32, 40)), steps.Row(PROMPT, mask=allowed)])
    assert steps.tokens(result, 1) == [allowed[int(logits[allowed].argmax())]]
    assert steps.tokens(result, 0) == [int(logits.argmax())]


def test_embeddings_stand_for_tokens(llama, steps: SimpleNamespace) -> None:
    """The embedding of the hidden token, given as a vector, gives the same next token; another does not."""
    table = llama.model.outer["embedding"].numpy()
    expected = steps.tokens(steps.run(llama, [steps.Row(PROMPT, sampling={"top_n": 0})]), 0)
    masked = [*PROMPT[:9], -1, *PROMPT[10:]]
    same = steps.run(llama, [steps.Row(masked)], embeddings={9: table[PROMPT[9]]})
    assert steps.tokens(same, 0) == expected
    first = steps.run(llama, [steps.Row(masked, output=Output.POOLED)], embeddings={9: table[PROMPT[9]]}).pooled[0]
    other = steps.run(llama, [steps.Row(masked, output=Output.POOLED)], embeddings={9: -table[PROMPT[9]]}).pooled[0]
    assert np.abs(first - other).max() > 1e-3


def test_pooled_is_the_last_hidden_state(llama, steps: SimpleNamespace, checkpoint: Callable) -> None:
    import transformers

    theirs = transformers.AutoModel.from_pretrained(checkpoint("llama"), dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).last_hidden_state[0, -1].numpy()
    result = steps.run(llama, [steps.Row(PROMPT, 0, range(32, 40)), steps.Row(PROMPT, output=Output.POOLED)])
    assert list(result.pooled) == [1]
    assert steps.tokens(result, 1) == []
    assert result.pooled[1].dtype == np.float32
    np.testing.assert_allclose(result.pooled[1], expected, atol=1e-4)


def test_nan_fails_its_row_only(llama, steps: SimpleNamespace) -> None:
    """Rows and placeholders of the failed sequence fail; neighbours, and later users of its blocks, do not."""
    expected = steps.generate(llama, PROMPT, 2)
    nan = np.full(48, np.nan, np.float32)
    failing = [-1, *range(7, 40)]
    rows = [
        steps.Row(PROMPT, 0, range(4)),
        steps.Row(failing, 0, range(4, 8)),
        steps.Row([-1], 0, range(8, 9), Output.POOLED),
    ]
    first = llama.submit(steps.pack(rows, embeddings={len(PROMPT): nan, len(PROMPT) + len(failing): nan}))
    following = [
        steps.Row([(first, 0)], len(PROMPT), range(4)),
        steps.Row([(first, 1)], len(failing), range(4, 8), history=failing[1:], sampling=PENALTIES),
    ]
    second = llama.submit(steps.pack(following))
    result = llama.collect(first)
    assert steps.tokens(result, 0) == expected[:1]
    assert result.errors.keys() == {1, 2}
    assert result.pooled == {}
    result = llama.collect(second)
    assert steps.tokens(result, 0) == expected[1:]
    assert result.errors.keys() == {1}
    assert steps.generate(llama, PROMPT, 2, range(4, 8)) == expected


def test_copied_and_moved_blocks_continue_equally(llama, load: Callable, steps: SimpleNamespace) -> None:
    expected = steps.generate(llama, PROMPT, 6)
    known = PROMPT + expected[:1]
    steps.run(llama, [steps.Row(PROMPT, output=Output.NOTHING)])
    llama.copy_blocks([(0, 50), (1, 51)])
    data = llama.export_blocks([1, 0])
    assert len(data) == 2 * llama.kv_layout.bytes_per_block
    llama.import_blocks([0, 1], bytes(len(data)))

    def follow(executor, blocks: list[int]) -> list[int]:
        row = steps.Row(known[-1:], len(PROMPT), blocks, sampling={"top_n": 384})
        result = steps.run(executor, [row])
        return [*steps.tokens(result, 0), *result.top_logprobs.tolist()]

    reference = follow(llama, [50, 51])
    assert reference[0] == expected[1]
    assert follow(llama, [0, 1]) != reference
    llama.import_blocks([61, 60], data)
    assert follow(llama, [60, 61]) == reference
    other = load("llama").executor
    other.import_blocks([9, 2], data)
    assert follow(other, [2, 9]) == reference
    with pytest.raises(ValueError, match="take"):
        llama.import_blocks([0], data)


def test_what_it_does_not_do_is_refused(llama, steps: SimpleNamespace) -> None:
    with pytest.raises(FeatureUnsupported):
        llama.load_adapter("adapter")
    batch = steps.pack([steps.Row(PROMPT)])
    batch.adapters[0] = 0
    with pytest.raises(ValueError, match="adapter"):
        llama.submit(batch)


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_any_block_size(load: Callable, steps: SimpleNamespace, block_size: int, llama) -> None:
    other = load("llama", block_size=block_size).executor
    blocks = np.random.default_rng(0).permutation(other.kv_layout.num_blocks).tolist()
    assert other.kv_layout.block_size == block_size
    assert steps.generate(other, PROMPT, 8, blocks) == steps.generate(llama, PROMPT, 8)


def test_close_is_idempotent(llama) -> None:
    llama.close()
    llama.close()
