import random

import pytest
from engine_fakes import EMBEDDER, make_embedding, make_engine, make_request, make_text, solo, text_vector

from millrace.server.engine import combined
from millrace.server.engine.combined import CombinedEngine
from millrace.server.errors import FeatureUnsupported


def make_combined(clock=lambda: 0, **settings):
    generation, executor, _ = make_engine(**settings)
    embedding, encoder = make_embedding()
    return CombinedEngine(generation, embedding, clock), executor, encoder


def test_streams_get_a_step_each_turn_however_many_texts_wait():
    engine, executor, encoder = make_combined()
    for sequence_id in range(1000):
        engine.embed(make_text(1000 + sequence_id, range(16), background=True))
    engine.submit(make_request(1, max_output_tokens=12))
    for turn in range(12):
        output = engine.step()
        assert [token.sequence_id for token in output.tokens] == [1]
        assert len(output.embedded) == combined.STEP_TOKENS // 16
        assert len(executor.batches) == len(encoder.steps) == turn + 1 == output.step


class Costs:
    """A clock: what a step of each executor costs, in microseconds."""

    def __init__(self, generation, embedding):
        self.of = {"generation": generation, "embedding": embedding}
        self.now = 0

    def __call__(self):
        return self.now

    def charge(self, executor, kind):
        collect = executor.collect

        def charged(ticket):
            self.now += self.of[kind]
            return collect(ticket)

        executor.collect = charged


def make_costly(generation, embedding):
    costs = Costs(generation, embedding)
    engine, executor, encoder = make_combined(costs)
    costs.charge(executor, "generation")
    costs.charge(encoder, "embedding")
    for sequence_id in range(1000):
        engine.embed(make_text(1000 + sequence_id, range(16), background=True))
    return engine


@pytest.mark.parametrize(("embedding", "turns"), [(100, 10), (95, 10), (10, 1), (1, 1)])
def test_the_background_takes_no_more_time_than_streams_do(embedding, turns):
    engine = make_costly(10, embedding)
    engine.submit(make_request(1, max_output_tokens=30))
    embeds = [bool(engine.step().embedded) for _ in range(30)]
    assert embeds == [turn % turns == 0 for turn in range(30)]
    while engine.has_work:  # nobody waits for a token any more
        assert engine.step().embedded


def test_a_question_does_not_wait_for_a_share():
    engine = make_costly(10, 100)
    engine.submit(make_request(1, max_output_tokens=30))
    assert engine.step().stats.step_us == 110
    for sequence_id in (2, 3, 4):
        engine.embed(make_text(sequence_id))
        output = engine.step()
        assert [embedded.sequence_id for embedded in output.embedded] == [sequence_id]
        assert output.stats.step_us == 110
    assert not engine.step().embedded


def test_a_question_is_embedded_in_the_next_turn_whatever_waits():
    engine, _, encoder = make_combined()
    for sequence_id in range(1000):
        engine.embed(make_text(1000 + sequence_id, range(16), background=True))
    engine.submit(make_request(1))
    engine.step()
    engine.embed(make_text(2, [4, 5]))
    assert [embedded.sequence_id for embedded in engine.step().embedded] == [2]
    assert encoder.steps[-1] == [[4, 5]]


@pytest.mark.parametrize("seed", range(10))
def test_tokens_and_vectors_are_the_same_with_and_without_the_other(seed):
    r = random.Random(seed)
    engine, _, _ = make_combined(max_num_batched_tokens=16)
    requests = [make_request(i, [r.randrange(50) for _ in range(r.randint(1, 20))]) for i in range(1, 9)]
    texts = [make_text(100 + i, [r.randrange(50) for _ in range(r.randint(1, 16))], i % 2 == 0) for i in range(60)]
    arrivals = [*requests, *texts]
    r.shuffle(arrivals)
    tokens, vectors = {}, {}
    while arrivals or engine.has_work:
        for _ in range(min(len(arrivals), r.randint(0, 6))):
            arrival = arrivals.pop()
            (engine.submit if arrival in requests else engine.embed)(arrival)
        output = engine.step()
        engine.check()
        assert not [finished for finished in output.finished if finished.error]
        for token in output.tokens:
            tokens.setdefault(token.sequence_id, []).append(token.token_id)
        vectors |= {embedded.sequence_id: embedded.vector.tolist() for embedded in output.embedded}
    assert tokens == {request.sequence_id: solo(request, 64)[0] for request in requests}
    assert vectors == {text.sequence_id: text_vector(text.token_ids).tolist() for text in texts}


def test_a_cancel_reaches_either_engine():
    engine, _, _ = make_combined()
    engine.submit(make_request(1))
    engine.embed(make_text(2), make_text(3))
    for sequence_id in (1, 3, 9):
        engine.cancel(sequence_id)
    output = engine.step()
    assert not output.tokens
    assert [embedded.sequence_id for embedded in output.embedded] == [2]
    assert not engine.has_work
    assert output.stats.free_blocks == output.stats.total_blocks


def test_failures_of_either_engine_leave_the_other_alone(caplog):
    engine, executor, encoder = make_combined()
    executor.bad_row = lambda tokens: True
    encoder.poison = lambda tokens: tokens == [7]
    engine.submit(make_request(1))
    engine.embed(make_text(2, [7]), make_text(3, [8]))
    output = engine.step()
    assert [(finished.sequence_id, finished.reason) for finished in output.finished] == [(1, None), (2, None)]
    assert [embedded.sequence_id for embedded in output.embedded] == [3]


def test_the_state_of_both_shows():
    engine, executor, encoder = make_combined()
    assert engine.embedder == EMBEDDER
    assert not engine.has_work
    engine.embed(make_text(1))
    assert engine.has_work
    before = engine.progress
    encoder.progress += 1
    executor.progress += 1
    assert engine.progress == before + 2
    engine.close()
    assert executor.closed
    assert encoder.closed


def test_broken_accounting_of_either_is_found():
    engine, _, _ = make_combined()
    engine._embedding._urgent._tokens = 3
    with pytest.raises(AssertionError, match="3 tokens"):
        engine.check()


def test_without_an_embedder_texts_are_refused_and_sequences_run():
    generation, _, _ = make_engine()
    engine = CombinedEngine(generation)
    assert engine.embedder is None
    with pytest.raises(FeatureUnsupported, match="--embedding-model"):
        engine.embed(make_text(1))
    engine.submit(make_request(1))
    engine.cancel(1)
    engine.submit(make_request(2, max_output_tokens=1))
    assert engine.progress == 0
    assert len(engine.step().tokens) == 1
    engine.check()
    assert not engine.has_work
    engine.close()
