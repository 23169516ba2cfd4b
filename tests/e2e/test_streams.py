"""Many clients at once on the built-in model."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from millrace.v1 import generation_pb2 as pb

FREED_WITHIN = 10  # steps: those that pass while the notice of a cancel travels, and the one that frees
WORDS = ["server", "keeps", "cache", "page", "so", "that", "request", "for", "the", "same", "can", "be", "answered"]


def requests(make_request: Callable[..., pb.GenerateRequest]) -> list[pb.GenerateRequest]:
    """64 requests, every other one greedy, of all lengths."""
    draw = random.Random(7)
    return [
        make_request(
            " ".join(draw.choices(WORDS, k=draw.randrange(1, 60))),
            sampling=pb.SamplingParams(temperature=0.8 * (i % 2), top_p=0.95, repetition_penalty=1, seed=i),
            stopping=pb.StoppingCriteria(max_output_tokens=draw.randrange(8, 40), ignore_eos=True),
            output=pb.OutputOptions(token_ids=True, logprobs=pb.LogprobOptions(top_n=2)),
        )
        for i in range(64)
    ]


def collect(server, request: pb.GenerateRequest) -> tuple[str, list[int], list[float], list[float]]:
    """Text, ids, log-probabilities and the two best of each token; checks the shape of the stream."""
    events = list(server.generation.StreamGenerate(request, timeout=300))
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    assert events[0].WhichOneof("event") == "started"
    assert events[-1].WhichOneof("event") == "completed"
    deltas = [c for e in events[1:-1] for c in e.deltas.choices]
    ids = [t for d in deltas for t in d.token_ids]
    assert deltas[-1].finish.reason == pb.FINISH_REASON_MAX_TOKENS
    assert len(ids) == request.stopping.max_output_tokens == events[-1].completed.usage.output_tokens
    best = [x for d in deltas for x in d.logprobs.top_logprobs]
    return "".join(d.text for d in deltas), ids, [x for d in deltas for x in d.logprobs.sampled], best


@pytest.mark.slow
def test_64_streams_equal_their_solo_runs(builtin, make_request) -> None:
    wanted = requests(make_request)
    steps_before = builtin.metric("millrace_engine_steps_total")
    messages_before = builtin.metric("millrace_engine_messages_total")
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda r: collect(builtin, r), wanted))
    steps = builtin.metric("millrace_engine_steps_total") - steps_before
    messages = builtin.metric("millrace_engine_messages_total") - messages_before
    tokens = sum(len(ids) for _, ids, _, _ in together)
    # Fewer where a link falls behind its engine.
    assert 0 < messages <= steps + 5, "the link carries at most one message for each engine step"
    assert tokens > 4 * steps, "the streams were batched"
    for request, (text, ids, logprobs, best) in zip(wanted, together, strict=True):
        solo_text, solo_ids, solo_logprobs, _ = collect(builtin, request)
        if ids == solo_ids:
            assert text == solo_text
            assert logprobs == pytest.approx(solo_logprobs, abs=1e-4)
            continue
        first = next(i for i, (a, b) in enumerate(zip(ids, solo_ids, strict=True)) if a != b)
        assert request.sampling.temperature == 0, "seeded draws are equal"
        assert best[2 * first] - best[2 * first + 1] <= 1e-4, "greedy differs only at a tie"


def test_a_stop_string_costs_at_most_two_surplus_tokens(builtin, make_request) -> None:
    """Tokens computed past the match, counted in engine steps: a lone request makes one token in each.

    The median: on a busy machine a cancel may be late.
    """
    surplus = []
    for seed in range(12):
        stopping = pb.StoppingCriteria(max_output_tokens=200, stop_strings=[" the", "."], include_stop=True)
        sampling = pb.SamplingParams(seed=seed, temperature=1)
        settle(lambda: builtin.metric("millrace_num_requests_running") == 0)
        before = builtin.metric("millrace_engine_steps_total")
        reply = builtin.generation.Generate(make_request("The server", stopping=stopping, sampling=sampling))
        assert reply.choices[0].finish.reason == pb.FINISH_REASON_STOP_SEQUENCE
        settle(lambda: builtin.metric("millrace_num_requests_running") == 0)
        steps = builtin.metric("millrace_engine_steps_total") - before
        surplus.append(steps - 1 - reply.usage.output_tokens)  # the last step only frees the blocks
    assert sorted(surplus)[len(surplus) // 2] <= 2


def test_client_gone_frees_blocks(builtin, make_request) -> None:
    request = make_request("Once upon a time", stopping=pb.StoppingCriteria(ignore_eos=True))
    call = builtin.generation.StreamGenerate(request)
    for event in call:
        if event.WhichOneof("event") == "deltas":
            break
    assert builtin.metric("millrace_num_requests_running") >= 1
    call.cancel()
    steps = builtin.metric("millrace_engine_steps_total")
    settle(lambda: builtin.metric("millrace_kv_cache_usage_perc") == 0)
    assert builtin.metric("millrace_num_requests_running") == 0
    # A request that ran on would take hundreds of steps, to the end of the context.
    assert builtin.metric("millrace_engine_steps_total") - steps <= FREED_WITHIN


def settle(condition: Callable[[], bool], timeout: float = 10) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the server did not settle"
        time.sleep(0.02)
