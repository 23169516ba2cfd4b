"""The engine with the built-in model: what runs at once, in pieces or again is what runs alone.

On the cpu executor to the bit; on the reference but for tokens that are level.
"""

from functools import cache

import pytest
from engine_fakes import make_request

from millrace.server.config import EngineConfig
from millrace.server.engine.engine import Engine
from millrace.server.model.executors import create_executor
from millrace.server.types import Sampling

NEAR = 1e-4  # two log-probabilities closer than this may change places when sums are taken in another order
CONTEXT = 96
BLOCK_SIZES = {"reference": 4, "cpu": 32}
OUTPUT_TOKENS = {"reference": 12, "cpu": 48}  # so that they grow by more than a block
SCARCE = {"reference": 40, "cpu": 8}  # blocks, of which running sequences lose some to others


@cache
def bytes_per_block(executor):
    config = EngineConfig(max_model_len=CONTEXT, block_size=BLOCK_SIZES[executor], executor=executor, num_threads=1)
    return create_executor(config, lambda done, total: None).executor.kv_layout.bytes_per_block


def load(executor, steps_in_flight=1, blocks=512, **settings):
    config = EngineConfig(
        executor=executor,
        max_model_len=CONTEXT,
        block_size=BLOCK_SIZES[executor],
        kv_cache_memory=blocks * bytes_per_block(executor),
        num_threads=1,
        **settings,
    )
    model = create_executor(config, lambda done, total: None)
    return Engine(model.executor, model.info, config, steps_in_flight)


def make_requests(executor, **sampling):
    prompts = [[(7 * i + 31 * j) % 4000 + 300 for j in range(1 + 3 * i)] for i in range(16)]
    outputs = OUTPUT_TOKENS[executor]
    return [
        make_request(i, prompt, sampling=Sampling(seed=i, **sampling), max_output_tokens=outputs, logprobs_top_n=2)
        for i, prompt in enumerate(prompts)
    ]


def run(engine):
    """All that each sequence reports of its tokens, how often one was preempted, and prompt tokens found computed."""
    drawn, preemptions, cached = {}, 0, 0
    while engine.has_work:
        output = engine.step()
        engine.check()
        assert not any(finish.error for finish in output.finished)
        preemptions = output.stats.preemptions_total
        cached += sum(finish.cached_prompt_tokens for finish in output.finished)
        for token in output.tokens:
            facts = (token.token_id, token.logprob, *token.top_ids, *token.top_logprobs)
            drawn.setdefault(token.sequence_id, []).append(facts)
    return drawn, preemptions, cached


@cache
def solo(executor, *, temperature, repetition_penalty):
    engine, alone = load(executor, prefix_caching=False), {}
    for request in make_requests(executor, temperature=temperature, repetition_penalty=repetition_penalty):
        engine.submit(request)
        alone |= run(engine)[0]
    engine.close()
    return alone


def first_difference(one, other):
    """The margin, where they part, between the two most likely tokens; None where they do not."""
    pairs = zip(one, other, strict=True)
    return next((facts[-2] - facts[-1] for facts, rival in pairs if facts[0] != rival[0]), None)


def assert_equal(executor, alone, together):
    if executor == "cpu":
        assert together == alone
        return
    assert together.keys() == alone.keys()
    differences = [first_difference(alone[i], together[i]) for i in alone]
    assert all(margin is None or margin < NEAR for margin in differences)
    assert differences.count(None) >= len(differences) - 2


# At a temperature, a draw of the reference may fall between two sums of the same numbers.
@pytest.mark.parametrize(("executor", "temperature"), [("reference", 0.0), ("cpu", 0.0), ("cpu", 0.8)])
@pytest.mark.parametrize(
    ("repetition_penalty", "settings", "preempts"),
    [
        (1.0, {}, False),
        (1.0, {"max_num_batched_tokens": 7}, False),
        (1.3, {"steps_in_flight": 2}, False),
        (1.0, {"blocks": SCARCE}, True),
        (1.3, {"blocks": SCARCE, "steps_in_flight": 2, "max_num_batched_tokens": 20}, True),
    ],
    ids=["together", "in chunks of 7", "two steps in flight", "preempted", "everything at once"],
)
def test_sixteen_concurrent_requests_equal_their_solo_runs(
    executor, temperature, repetition_penalty, settings, preempts
):
    if "blocks" in settings:
        settings = settings | {"blocks": settings["blocks"][executor]}
    sampling = {"temperature": temperature, "repetition_penalty": repetition_penalty}
    engine = load(executor, **settings)
    for request in make_requests(executor, **sampling):
        engine.submit(request)
    together, preemptions, _ = run(engine)
    engine.close()
    assert (preemptions > 0) == preempts
    assert_equal(executor, solo(executor, **sampling), together)


@pytest.mark.parametrize(("executor", "temperature"), [("reference", 0.0), ("cpu", 0.0), ("cpu", 0.8)])
def test_a_beginning_that_was_computed_before_changes_nothing(executor, temperature):
    """Every request twice: the second time it finds its own blocks, and both times those of the others."""
    common = [31 * j % 4000 + 300 for j in range(66)]
    prompts = [[*common[:length], 500 + length] for length in (1, 31, 32, 33, 40, 64, 66)]
    cold, warm = load(executor, prefix_caching=False), load(executor)
    alone, again, found = {}, {}, 0
    for round_ in range(2):
        for i, prompt in enumerate(prompts):
            name = round_ * len(prompts) + i
            sampling = Sampling(seed=i, temperature=temperature)
            request = make_request(name, prompt, sampling=sampling, max_output_tokens=8, logprobs_top_n=2)
            for engine, drawn in ((cold, alone), (warm, again)):
                engine.submit(request)
                news, _, cached = run(engine)
                drawn |= news
                found += cached
    assert found > 300
    assert_equal(executor, alone, again)
    cold.close()
    warm.close()
