"""The engine with the built-in model and the reference executor."""

from functools import cache

import pytest
from engine_fakes import make_request

from millrace.server.config import EngineConfig
from millrace.server.engine.engine import Engine
from millrace.server.model.executors import create_executor
from millrace.server.types import Sampling

NEAR = 1e-4  # two log-probabilities closer than this may change places when sums are taken in another order
CONTEXT, BLOCK_SIZE = 96, 4


@cache
def bytes_per_block():
    config = EngineConfig(max_model_len=CONTEXT, block_size=BLOCK_SIZE)
    return create_executor(config, lambda done, total: None).executor.kv_layout.bytes_per_block


def load(steps_in_flight=1, blocks=512, **settings):
    memory = blocks * bytes_per_block()
    config = EngineConfig(
        max_model_len=CONTEXT, block_size=BLOCK_SIZE, kv_cache_memory=memory, num_threads=1, **settings
    )
    model = create_executor(config, lambda done, total: None)
    return Engine(model.executor, model.info, config, steps_in_flight)


def make_requests(**sampling):
    prompts = [[(7 * i + 31 * j) % 4000 + 300 for j in range(1 + 3 * i)] for i in range(16)]
    return [
        make_request(i, prompt, sampling=Sampling(seed=i, **sampling), max_output_tokens=12, logprobs_top_n=2)
        for i, prompt in enumerate(prompts)
    ]


def run(engine):
    """Tokens of each sequence with the margin between the two most likely, and how often one was preempted."""
    drawn, preemptions = {}, 0
    while engine.has_work:
        output = engine.step()
        engine.check()
        assert not any(finish.error for finish in output.finished)
        preemptions = output.stats.preemptions_total
        for token in output.tokens:
            margin = token.top_logprobs[0] - token.top_logprobs[1]
            drawn.setdefault(token.sequence_id, []).append((token.token_id, margin))
    return drawn, preemptions


@cache
def solo(*, temperature, repetition_penalty):
    engine, alone = load(), {}
    for request in make_requests(temperature=temperature, repetition_penalty=repetition_penalty):
        engine.submit(request)
        alone |= run(engine)[0]
    engine.close()
    return alone


def first_difference(one, other):
    pairs = zip(one, other, strict=True)
    return next((margin for (token, margin), (rival, _) in pairs if token != rival), None)


@pytest.mark.parametrize(
    ("repetition_penalty", "settings", "preempts"),
    [
        (1.0, {}, False),
        (1.0, {"max_num_batched_tokens": 7}, False),
        (1.3, {"steps_in_flight": 2}, False),
        (1.0, {"blocks": 40}, True),
        (1.3, {"blocks": 40, "steps_in_flight": 2, "max_num_batched_tokens": 20}, True),
    ],
    ids=["together", "in chunks of 7", "two steps in flight", "preempted", "everything at once"],
)
def test_sixteen_concurrent_greedy_requests_equal_their_solo_runs(repetition_penalty, settings, preempts):
    sampling = {"temperature": 0.0, "repetition_penalty": repetition_penalty}
    engine = load(**settings)
    for request in make_requests(**sampling):
        engine.submit(request)
    together, preemptions = run(engine)
    engine.close()
    alone = solo(**sampling)
    assert (preemptions > 0) == preempts
    assert together.keys() == alone.keys()
    differences = [first_difference(alone[i], together[i]) for i in alone]
    assert all(margin is None or margin < NEAR for margin in differences)
    assert differences.count(None) >= 14
