"""Workers are killed under streams whose clients see nothing of it."""

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from millrace.v1 import generation_pb2 as pb

STREAMS = int(os.environ.get("TEST_STREAMS", "40"))
KILLS = int(os.environ.get("TEST_KILLS", "3"))
WORDS = ["server", "keeps", "cache", "page", "so", "that", "request", "for", "the", "same", "can", "be", "answered"]


def requests(make_request, count: int) -> list[pb.GenerateRequest]:
    """Seeded sampling, greedy, several choices, stop strings, log-probabilities."""
    r = random.Random(11)
    return [
        make_request(
            " ".join(r.choices(WORDS, k=r.randrange(3, 60))),
            sampling=pb.SamplingParams(temperature=0.9 * (i % 3 > 0), top_p=0.95, seed=i, n=1 + (i % 4 == 0)),
            stopping=pb.StoppingCriteria(
                max_output_tokens=r.randrange(150, 300), ignore_eos=True, stop_strings=["nnn", "zq"] * (i % 5 == 0)
            ),
            output=pb.OutputOptions(token_ids=True, logprobs=pb.LogprobOptions(top_n=1) if i % 7 == 0 else None),
        )
        for i in range(count)
    ]


def follow(server, request: pb.GenerateRequest, begun: threading.Semaphore | None = None) -> tuple:
    """All that a client sees, but for how it was cut into messages."""
    texts, ids, logprobs, finishes = {}, {}, {}, {}
    for sequence, event in enumerate(server.generation.StreamGenerate(request, timeout=300), 1):
        assert event.sequence == sequence
        last = event
        for choice in event.deltas.choices:
            if begun is not None and not ids:
                begun.release()
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            assert choice.token_offset == len(ids.setdefault(choice.index, []))
            ids[choice.index] += choice.token_ids
            logprobs.setdefault(choice.index, []).extend(choice.logprobs.sampled)
            if choice.HasField("finish"):
                finishes[choice.index] = choice.finish.reason, choice.finish.stop_string
    usage = last.completed.usage
    return texts, ids, logprobs, finishes, (usage.prompt_tokens, usage.output_tokens)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nobody_sees_that_a_worker_was_killed(start_server, make_request) -> None:
    server = start_server()
    wanted = requests(make_request, STREAMS)
    with ThreadPoolExecutor(STREAMS) as pool:
        undisturbed = list(pool.map(lambda request: follow(server, request), wanted))
        r = random.Random(5)
        for kill in range(KILLS):
            begun = threading.Semaphore(0)
            streams = [pool.submit(follow, server, request, begun) for request in wanted]
            for _ in range(r.randrange(1, STREAMS // 2)):
                assert begun.acquire(timeout=60)
            time.sleep(r.uniform(0, 0.2))
            (pid,) = server.worker_pids()
            assert not all(stream.done() for stream in streams)
            os.kill(pid, signal.SIGKILL)
            assert [stream.result() for stream in streams] == undisturbed, f"kill {kill}"
    assert server.metric("millrace_engine_restarts_total") == KILLS
    assert server.metric("millrace_num_requests_running") == 0
    assert server.stop() == 0
