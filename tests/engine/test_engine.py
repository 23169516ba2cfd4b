import threading

import pytest
from engine_fakes import VOCABULARY, drain, draw, make_engine, make_request, solo

from millrace.server.engine.engine import HOPELESS
from millrace.server.errors import InternalError, InvalidRequest
from millrace.server.types import FinishReason, Sampling

DEPTHS = pytest.mark.parametrize("steps_in_flight", [1, 2, 3])


def first_token(request):
    return solo(request, 64)[0][0]


@DEPTHS
def test_reasons_to_finish(steps_in_flight):
    engine, _, _ = make_engine(max_model_len=20, steps_in_flight=steps_in_flight)
    stop = first_token(make_request(1))
    requests = [
        make_request(1, stop_token_ids=frozenset({stop})),
        make_request(2, max_output_tokens=5),
        make_request(3, range(10), max_output_tokens=50),
    ]
    for request in requests:
        engine.submit(request)
    tokens, finished = drain(engine)
    assert tokens == {request.sequence_id: solo(request, 20)[0] for request in requests}
    assert (finished[1].reason, finished[1].stop_token_id, tokens[1]) == (FinishReason.STOP, stop, [stop])
    assert (finished[2].reason, len(tokens[2])) == (FinishReason.MAX_TOKENS, 5)
    assert (finished[3].reason, len(tokens[3])) == (FinishReason.CONTEXT_LENGTH, 10)


@DEPTHS
def test_no_stop_token_before_min_output_tokens_whatever_its_bias(steps_in_flight):
    engine, executor, _ = make_engine(steps_in_flight=steps_in_flight)
    stops = frozenset(range(0, VOCABULARY, 2))
    sampling = Sampling(seed=3, logit_bias={2: 100.0})
    request = make_request(1, stop_token_ids=stops, min_output_tokens=4, max_output_tokens=60, sampling=sampling)
    engine.submit(request)
    tokens, _ = drain(engine)
    assert tokens[1] == solo(request, 64)[0]
    assert not stops.intersection(tokens[1][:4])
    assert stops.intersection(tokens[1])
    assert sum(len(batch.masks) for batch in executor.batches) == 4
    assert {tuple(batch.sampling.bias_ids) for batch in executor.batches} == {(2,)}


@DEPTHS
def test_a_cancelled_sequence_says_nothing_more_and_holds_nothing(steps_in_flight):
    engine, executor, _ = make_engine(steps_in_flight=steps_in_flight)
    engine.submit(make_request(1, max_output_tokens=50))
    engine.submit(make_request(2, max_output_tokens=50))
    for _ in range(4):
        engine.step()
    engine.cancel(1)
    engine.check()
    output = engine.step()
    assert {token.sequence_id for token in output.tokens} == {2}
    assert len(executor.batches[-1].outputs) == 1
    for _ in range(steps_in_flight - 1):
        engine.step()
    held = [row for row in executor.batches[-1].block_tables[0] if row >= 0]
    assert engine.step().stats.free_blocks in (64 - len(held), 64 - len(held) - 1)


@DEPTHS
def test_a_poisoned_batch_fails_only_the_culprit(steps_in_flight, caplog):
    engine, executor, _ = make_engine(steps_in_flight=steps_in_flight)
    requests = [make_request(i, [i, i, i], max_output_tokens=12) for i in range(7)]
    executor.poison = lambda tokens: tokens[:3] == [5, 5, 5] and len(tokens) == 8
    for request in requests:
        engine.submit(request)
    tokens, finished = drain(engine)
    for request in requests:
        whole, reason = solo(request, 64)
        if request.sequence_id == 5:
            assert tokens[5] == whole[:5]
            assert isinstance(finished[5].error, InternalError)
            assert finished[5].reason is None
        else:
            assert tokens[request.sequence_id] == whole
            assert (finished[request.sequence_id].reason, finished[request.sequence_id].error) == (reason, None)
    assert "running its rows again" in caplog.text


@DEPTHS
def test_an_error_of_one_row_leaves_the_others_alone(steps_in_flight, caplog):
    engine, executor, _ = make_engine(steps_in_flight=steps_in_flight, max_num_batched_tokens=8)
    executor.bad_row = lambda tokens: tokens[0] == 1 and len(tokens) >= 9
    engine.submit(make_request(1, [1] * 20))  # fails in a chunk that yields nothing
    engine.submit(make_request(2, [2] * 20))
    tokens, finished = drain(engine)
    assert tokens == {2: solo(make_request(2, [2] * 20), 64)[0]}
    assert "not a number" in finished[1].error.message
    assert finished[2].error is None
    assert "request-1" in caplog.text


@DEPTHS
def test_a_step_that_cannot_be_submitted_is_run_again_in_halves(steps_in_flight, monkeypatch, caplog):
    engine, executor, _ = make_engine(steps_in_flight=steps_in_flight)
    submit, refused = executor.submit, []

    def refusing(batch):
        if len(batch.outputs) > 2 and len(executor.batches) > 4:
            refused.append(batch)
            raise MemoryError("too many rows")
        return submit(batch)

    monkeypatch.setattr(executor, "submit", refusing)
    requests = [make_request(i, [i], max_output_tokens=10) for i in range(5)]
    for request in requests:
        engine.submit(request)
    tokens, _ = drain(engine)
    assert refused
    assert tokens == {request.sequence_id: solo(request, 64)[0] for request in requests}


def test_a_result_that_does_not_fit_the_batch_is_a_failure(monkeypatch, caplog):
    engine, executor, _ = make_engine()
    monkeypatch.setattr(executor, "_result", lambda tokens, errors: type(executor)._result([-1 for _ in tokens], {}))
    engine.submit(make_request(1))
    _, finished = drain(engine)
    assert isinstance(finished[1].error, InternalError)


def test_an_executor_that_fails_everything_ends_the_engine(caplog):
    engine, executor, _ = make_engine()
    executor.poison = lambda tokens: tokens != [1]
    for sequence_id in range(2 * (HOPELESS - 1)):
        if sequence_id == HOPELESS - 1:  # one success, and the count starts anew
            engine.submit(make_request(100, [1], max_output_tokens=1))
            assert engine.step().finished[0].error is None
        engine.submit(make_request(sequence_id))
        assert engine.step().finished[0].error is not None
    engine.submit(make_request(101))
    with pytest.raises(RuntimeError, match="poison"):
        engine.step()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, VOCABULARY]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"stop_token_ids": frozenset({VOCABULARY})}, "stopping.stop_token_ids"),
        ({"sampling": Sampling(logit_bias={VOCABULARY: 1.0})}, "sampling.logit_bias"),
        ({"max_output_tokens": 0}, "stopping.max_output_tokens"),
        ({"min_output_tokens": 9}, "stopping.min_output_tokens"),
        ({"min_output_tokens": 1, "stop_token_ids": frozenset(range(VOCABULARY))}, "stopping.stop_token_ids"),
    ],
)
def test_a_request_that_cannot_be_packed_is_invalid(changes, field):
    engine, _, _ = make_engine()
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(make_request(1, **changes))
    assert caught.value.violations[0].field == field
    assert not engine.has_work


def test_a_step_tells_the_state_after_it():
    engine, executor, clock = make_engine(max_num_batched_tokens=4)
    engine.submit(make_request(1, range(6), max_output_tokens=2))
    engine.submit(make_request(2, range(1, 7)))
    clock.now = 5
    first, second = engine.step(), engine.step()
    assert (first.step, first.stats.prefill_tokens, first.stats.decode_tokens, first.tokens) == (1, 4, 0, [])
    assert (first.stats.running, first.stats.waiting, first.stats.waiting_tokens) == (1, 1, 6)
    assert (first.stats.free_blocks, first.stats.total_blocks) == (62, 64)
    assert [token.token_id for token in second.tokens] == [draw(range(6), 1, 0, 6)]
    before = engine.progress
    engine.step()
    assert engine.progress > before
    assert engine.has_work
    engine.close()
    assert executor.closed


def test_steps_in_flight_is_at_least_one():
    with pytest.raises(ValueError, match="at least 1"):
        make_engine(steps_in_flight=0)


def test_requests_from_another_thread_yield_what_they_would_alone():
    engine, _, _ = make_engine(blocks=40, max_num_seqs=4, max_num_batched_tokens=16, max_queued_requests=500)
    requests = [make_request(i, [i % 50, 1, 2, i % 7], max_output_tokens=5) for i in range(300)]
    submitted = threading.Event()

    def submit() -> None:
        for request in requests:
            engine.submit(request)
        submitted.set()

    thread = threading.Thread(target=submit)
    thread.start()
    tokens: dict[int, list[int]] = {}
    while not submitted.is_set() or engine.has_work:
        for token in engine.step().tokens:
            tokens.setdefault(token.sequence_id, []).append(token.token_id)
        engine.check()
    thread.join()
    assert tokens == {request.sequence_id: solo(request, 64)[0] for request in requests}


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("prompt", [8, 9, 21, 1])
def test_choices_of_a_request_compute_its_prompt_once(prompt, prefix_caching):
    engine, executor, _ = make_engine(prefix_caching=prefix_caching)
    requests = [make_request(i, range(prompt), choice=i, max_output_tokens=6) for i in range(4)]
    engine.submit(*requests)
    tokens, finished = drain(engine)
    assert tokens == {request.sequence_id: solo(request, 64)[0] for request in requests}
    read = sum(int((batch.positions < prompt).sum()) for batch in executor.batches)
    assert read == prompt + 3, "the first reads it, the others its last token"
    assert [finish.cached_prompt_tokens for finish in finished.values()] == [0] * 4


def test_when_the_first_choice_is_cancelled_another_one_reads_the_prompt():
    engine, _, _ = make_engine(max_num_batched_tokens=4)
    requests = [make_request(i, range(21), choice=i, max_output_tokens=6) for i in range(3)]
    engine.submit(*requests)
    engine.step()
    engine.cancel(0)
    tokens, _ = drain(engine)
    assert tokens == {i: solo(requests[i], 64)[0] for i in (1, 2)}
