"""Workers are killed under streams whose clients see nothing of it."""

import itertools
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from millrace.server.client import Received, new_text
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


class Seen(Received):
    """All that a client sees, but for how it was cut into messages."""

    def _forget(self) -> None:
        super()._forget()
        self.logprobs: dict[int, list[float]] = {}
        self.prompt_tokens = 0

    def add(self, event: pb.StreamGenerateResponse) -> None:
        for delta in event.deltas.choices:
            before = self.choices[delta.index].token_ids if delta.index in self.choices else []
            assert delta.token_offset == len(before)
            self.logprobs.setdefault(delta.index, []).extend(delta.logprobs.sampled)
        self.prompt_tokens = event.completed.usage.prompt_tokens
        super().add(event)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and (self.choices, self.logprobs) == (other.choices, other.logprobs)


def follow(server, request: pb.GenerateRequest, begun: threading.Semaphore | None = None) -> tuple[Seen, int, int]:
    """What a client sees, and what it is billed for. One that comes while there is no worker asks again."""
    seen = Seen()
    while not seen.is_complete:
        try:
            for sequence, event in enumerate(server.generation.StreamGenerate(request, timeout=300), 1):
                assert event.sequence == sequence
                if begun is not None and sequence == 2:
                    begun.release()
                seen.add(event)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or seen.started is not None:
                raise
            time.sleep(0.2)
    return seen, seen.prompt_tokens, seen.output_tokens


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


def lose(server, request: pb.GenerateRequest, seen: Seen, events: int) -> None:
    """Read so many events of a stream and lose its connection."""
    call = server.generation.StreamGenerate(request, timeout=300)
    for event in itertools.islice(call, events):
        seen.add(event)
    call.cancel()


def rest_of(request: pb.GenerateRequest, seen: Seen) -> pb.GenerateRequest:
    rest = pb.GenerateRequest()
    rest.CopyFrom(request)
    options = seen.options()
    if "continue_from" in options:
        rest.sampling.seed = options["seed"]
        rest.continue_from.CopyFrom(options["continue_from"])
    return rest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_answers_go_on_at_another_server(start_server, make_request) -> None:
    servers = [start_server(), start_server()]
    r = random.Random(6)
    for number, request in enumerate(requests(make_request, 20)):
        wanted, _, billed = follow(servers[0], request)
        seen = Seen()
        for attempt in range(3):
            lose(servers[attempt % 2], rest_of(request, seen), seen, r.choice([1, 2, 5, 40, 90]))
            if seen.is_complete:
                break
        else:
            before = sum(len(choice.token_ids) for choice in seen.choices.values())
            for event in servers[1].generation.StreamGenerate(rest_of(request, seen), timeout=300):
                seen.add(event)
            assert seen.output_tokens == billed - before
        assert seen == wanted, f"request {number}"
    for server in servers:
        assert server.stop() == 0


def test_a_request_repeated_by_its_id_is_answered_once(start_server, make_request) -> None:
    server = start_server()
    request = make_request("A mill", request_id="job-1", stopping=pb.StoppingCriteria(max_output_tokens=40))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(server.generation.Generate, [request] * 8))
    assert all(answer == answers[0] for answer in answers)
    streamed = list(server.generation.StreamGenerate(request))
    assert "".join(new_text(event) for event in streamed) == answers[0].choices[0].text
    assert streamed[-1].completed.usage == answers[0].usage
    assert server.metric("millrace_generation_tokens_total") == answers[0].usage.output_tokens
    assert server.metric("millrace_requests_repeated_total") == 8
    assert server.stop() == 0
