import random

import numpy as np
import pytest
from engine_fakes import EMBEDDER, VOCABULARY, make_embedding, make_text, text_vector

from millrace.server.engine import embedding
from millrace.server.engine.engine import HOPELESS, StepOutput
from millrace.server.errors import InternalError, InvalidRequest, PromptTooLong, QueueFull


def step(engine, budget=1000):
    output = StepOutput(0)
    engine.step(budget, output)
    engine.check()
    return output


def drain(engine, budget=1000):
    """Vectors and errors by sequence."""
    vectors, errors = {}, {}
    while engine.has_work:
        output = step(engine, budget)
        for embedded in output.embedded:
            assert embedded.sequence_id not in vectors
            vectors[embedded.sequence_id] = embedded.vector
        errors |= {finished.sequence_id: finished.error for finished in output.finished}
    return vectors, errors


def ids(output):
    return [embedded.sequence_id for embedded in output.embedded]


def test_urgent_texts_come_first_and_each_kind_in_order_of_arrival():
    engine, _ = make_embedding()
    for sequence_id in (1, 2, 3):
        engine.submit(make_text(sequence_id, background=True))
    engine.submit(make_text(4), make_text(5))
    engine.submit(make_text(6))
    assert ids(step(engine, 6)) == [4, 5]
    engine.submit(make_text(7))
    assert ids(step(engine)) == [6, 7]  # though the budget has room for the background
    engine.submit(make_text(8, background=True))
    assert ids(step(engine, 9)) == [1, 2, 3]
    assert ids(step(engine)) == [8]
    assert not engine.has_work


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (1, [[5], [16], [1], [4], [3]]),  # one at least, however long
        (16, [[5], [16], [1, 4, 3]]),
        (21, [[5, 16], [1, 4, 3]]),
        (20, [[5], [16, 1], [4, 3]]),  # none overtakes one that does not fit
        (1000, [[5, 16, 1, 4, 3]]),
    ],
)
def test_a_step_takes_whole_texts_within_its_budget(budget, steps):
    engine, encoder = make_embedding()
    for sequence_id, length in enumerate((5, 16, 1, 4, 3)):
        engine.submit(make_text(sequence_id, range(length), background=True))
    drain(engine, budget)
    assert [[len(text) for text in texts] for texts in encoder.steps] == steps


def test_a_step_takes_a_bounded_number_of_texts(monkeypatch):
    monkeypatch.setattr(embedding, "MAX_STEP_TEXTS", 3)
    engine, encoder = make_embedding()
    engine.submit(*(make_text(i, [i]) for i in range(8)))
    drain(engine)
    assert [len(texts) for texts in encoder.steps] == [3, 3, 2]


@pytest.mark.parametrize("seed", range(30))
def test_every_text_gets_its_own_vector_whatever_comes_with_it(seed):
    r = random.Random(seed)
    engine, encoder = make_embedding()
    encoder.poison = lambda tokens: tokens[0] == 49
    encoder.bad_row = lambda tokens: tokens[0] == 48
    texts, cancelled, vectors, errors = {}, set(), {}, {}
    for _ in range(40):
        for _ in range(r.choice((0, 1, 5))):
            sequence_id = len(texts)
            tokens = [r.randrange(VOCABULARY) for _ in range(r.randint(1, EMBEDDER.max_tokens))]
            texts[sequence_id] = make_text(sequence_id, tokens, r.random() < 0.5)
            engine.submit(texts[sequence_id])
        if texts and r.random() < 0.3:
            victim = r.choice(list(texts))
            engine.cancel(victim)
            if victim not in vectors and victim not in errors:
                cancelled.add(victim)
        if engine.has_work:
            output = step(engine, r.choice((1, 20, 1000)))
            vectors |= {embedded.sequence_id: embedded.vector for embedded in output.embedded}
            errors |= {finished.sequence_id: finished.error for finished in output.finished}
    more_vectors, more_errors = drain(engine)
    vectors, errors = vectors | more_vectors, errors | more_errors
    assert not vectors.keys() & errors.keys()
    assert vectors.keys() | errors.keys() == texts.keys() - cancelled
    for sequence_id, vector in vectors.items():
        np.testing.assert_array_equal(vector, text_vector(texts[sequence_id].token_ids))
    assert {texts[sequence_id].token_ids[0] for sequence_id in errors} <= {48, 49}


def test_a_cancelled_text_is_never_run():
    engine, encoder = make_embedding()
    engine.submit(make_text(1, [1]), make_text(2, [2]))
    engine.submit(make_text(3, [3], background=True))
    for sequence_id in (1, 3, 3, 77):
        engine.cancel(sequence_id)
        engine.check()
    assert ids(step(engine)) == [2]
    assert encoder.steps == [[[2]]]
    assert not engine.has_work


def test_the_queue_is_bounded_for_each_kind_and_takes_all_of_a_request_or_none():
    engine, _ = make_embedding(max_queued_requests=3, max_queued_tokens=100)
    engine.submit(make_text(1, background=True), make_text(2, background=True))
    with pytest.raises(QueueFull, match="2 texts of 6 tokens wait") as full:
        engine.submit(make_text(3, background=True), make_text(4, background=True))
    assert full.value.metadata == {"waiting_texts": "2", "waiting_tokens": "6"}
    engine.submit(make_text(5, background=True))
    engine.submit(*(make_text(i) for i in (6, 7, 8)))  # documents keep no question out
    with pytest.raises(QueueFull):
        engine.submit(make_text(9))
    engine.check()
    vectors, _ = drain(engine)
    assert vectors.keys() == {1, 2, 5, 6, 7, 8}


def test_the_queue_is_bounded_in_tokens_and_what_exceeds_it_alone_may_wait_alone():
    engine, _ = make_embedding(max_queued_requests=100, max_queued_tokens=20)
    engine.submit(make_text(1, range(16)))
    with pytest.raises(QueueFull):
        engine.submit(make_text(2, range(5)))
    engine.cancel(1)
    engine.submit(*(make_text(i, range(16)) for i in (3, 4)))
    with pytest.raises(QueueFull):
        engine.submit(make_text(5, [1]))
    assert drain(engine)[0].keys() == {3, 4}
    engine.submit(make_text(6, range(16)))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], InvalidRequest, "is empty"),
        ([1, VOCABULARY], InvalidRequest, rf"token id {VOCABULARY} is not in \[0, {VOCABULARY}\)"),
        ([-1], InvalidRequest, "token id -1"),
        ([2**32 - 1], InvalidRequest, "token id 4294967295"),
        (range(17), PromptTooLong, "17 tokens, hash takes 16"),
    ],
)
def test_a_text_that_cannot_be_embedded_is_refused_with_its_request(tokens, error, message):
    engine, _ = make_embedding()
    with pytest.raises(error, match=message):
        engine.submit(make_text(1), make_text(2, tokens))
    assert not engine.has_work


def test_a_poisoned_step_fails_only_the_culprits(caplog):
    engine, encoder = make_embedding()
    encoder.poison = lambda tokens: tokens[0] in (5, 6)
    engine.submit(*(make_text(i, [i]) for i in range(11)))
    vectors, errors = drain(engine)
    assert vectors.keys() == set(range(11)) - {5, 6}
    assert errors.keys() == {5, 6}
    assert isinstance(errors[5], InternalError)
    assert "poison" in errors[5].message
    assert "running them again" in caplog.text


@pytest.mark.parametrize(
    ("vector", "fault"),
    [
        (np.array([1, np.nan, 0, 0], np.float32), "not finite"),
        (np.array([1, 0, -np.inf, 0], np.float32), "not finite"),
        (np.ones(3, np.float32), r"shape \(3,\)"),
        (np.ones((1, 4), np.float32), r"shape \(1, 4\)"),
    ],
)
def test_a_vector_that_is_none_fails_its_text_alone(vector, fault, caplog):
    engine, encoder = make_embedding()
    encoder.vector = lambda tokens: vector if tokens == [1] else text_vector(tokens)
    encoder.bad_row = lambda tokens: tokens == [3]
    engine.submit(*(make_text(i, [i]) for i in range(4)))
    vectors, errors = drain(engine)
    assert vectors.keys() == {0, 2}
    with pytest.raises(InternalError, match=fault):
        raise errors[1]
    assert "not a number" in errors[3].message
    assert len(encoder.steps) == 1
    assert "request-1" in caplog.text


def test_a_result_that_lacks_a_text_is_a_failure(monkeypatch, caplog):
    engine, encoder = make_embedding()
    collect = encoder.collect

    def forgetful(ticket):
        result = collect(ticket)
        if len(encoder.steps[ticket]) > 2:
            del result.pooled[1]
        return result

    monkeypatch.setattr(encoder, "collect", forgetful)
    engine.submit(*(make_text(i, [i]) for i in range(4)))
    vectors, errors = drain(engine)
    assert vectors.keys() == {0, 1, 2, 3}
    assert not errors
    assert "no vector came of the texts [1] of 4" in caplog.text


def test_an_executor_that_fails_everything_ends_the_engine(caplog):
    engine, encoder = make_embedding()
    encoder.poison = lambda tokens: tokens != [1]
    for sequence_id in range(2 * (HOPELESS - 1)):
        if sequence_id == HOPELESS - 1:  # one success, and the count starts anew
            engine.submit(make_text(100, [1]))
            assert ids(step(engine)) == [100]
        engine.submit(make_text(sequence_id))
        assert step(engine).finished[0].error is not None
    engine.submit(make_text(101))
    with pytest.raises(RuntimeError, match="poison"):
        step(engine)


def test_progress_grows_within_and_between_steps():
    engine, encoder = make_embedding()
    engine.submit(make_text(1))
    before = engine.progress
    encoder.progress += 1
    assert engine.progress == before + 1
    step(engine)
    assert engine.progress > before + 1
    engine.close()
    assert encoder.closed
