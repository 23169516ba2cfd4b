"""The order of service, seen from outside: classes, times, tenants, caches, choices."""

import threading
import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from millrace.server.gateway.auth import new_key
from millrace.v1 import generation_pb2 as pb

PROMPT = "A server keeps what comes in order so that each request can be answered. " * 12


def details(error: grpc.RpcError) -> dict[str, object]:
    found = {}
    for detail in rpc_status.from_call(error).details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                found[kind.__name__] = message = kind()
                detail.Unpack(message)
    return found


def stopping(tokens: int, **fields: object) -> pb.StoppingCriteria:
    return pb.StoppingCriteria(max_output_tokens=tokens, ignore_eos=True, **fields)


def seconds(value: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(value * 1e9))
    return duration


@pytest.fixture(scope="module")
def narrow(start_server):
    """A server that runs one sequence at a time."""
    return start_server("--max-num-seqs", "1")


@pytest.fixture
def busy(narrow, make_request):
    """The server while its one place is taken."""
    endless = narrow.generation.StreamGenerate(make_request("The first rule", stopping=stopping(1000)), timeout=100)
    assert next(endless).WhichOneof("event") == "started"
    yield narrow
    endless.cancel()


def test_what_waits_too_long_is_turned_away_before_it_starts(busy, make_request):
    request = make_request(
        "It serves", stopping=stopping(4), scheduling=pb.SchedulingOptions(queue_timeout=seconds(0.05))
    )
    with pytest.raises(grpc.RpcError) as refused:
        list(busy.generation.StreamGenerate(request, timeout=60))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(refused.value)["ErrorInfo"].reason == "QUEUE_TIMEOUT"
    assert "RetryInfo" in details(refused.value)
    assert int(dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0


def test_a_time_limit_in_the_queue_is_an_answer_without_words(busy, make_request):
    request = make_request("It serves", stopping=stopping(4, time_limit=seconds(0.05)))
    answer = busy.generation.Generate(request, timeout=60)
    assert [(c.text, c.finish.reason) for c in answer.choices] == [("", pb.FINISH_REASON_TIME_LIMIT)]
    assert answer.usage.output_tokens == 0


def test_what_cannot_be_in_time_is_refused_at_once(narrow, make_request):
    narrow.generation.Generate(make_request("It serves", stopping=stopping(50)), timeout=60)  # now it knows its steps
    before = narrow.metric("millrace_engine_steps_total")
    with pytest.raises(grpc.RpcError) as refused:
        narrow.generation.Generate(make_request("It serves", stopping=stopping(1000)), timeout=0.1)
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    found = details(refused.value)
    assert found["ErrorInfo"].reason == "DEADLINE_UNATTAINABLE"
    assert int(found["ErrorInfo"].metadata["estimate_ms"]) > int(found["ErrorInfo"].metadata["left_ms"])
    assert "RetryInfo" in found
    assert narrow.metric("millrace_engine_steps_total") - before <= 2, "nothing was computed for it"


def test_a_higher_class_is_served_first(busy, make_request):
    ended: list[str] = []

    def ask(name: str, priority: int) -> None:
        request = make_request(
            f"{name} first", stopping=stopping(8), scheduling=pb.SchedulingOptions(priority=priority)
        )
        started = next(iter(busy.generation.StreamGenerate(request, timeout=60))).started
        assert started.effective_priority == priority
        ended.append(name)

    threads = []
    for name, priority in (("low", pb.PRIORITY_LOW), ("normal", pb.PRIORITY_NORMAL), ("high", pb.PRIORITY_HIGH)):
        threads.append(threading.Thread(target=ask, args=(name, priority)))
        threads[-1].start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(60)
    assert ended == ["high", "normal", "low"], "the running one of a normal class gives way to the high one"


def test_a_class_is_lowered_to_what_the_tenant_may_use(start_server, make_request, tmp_path):
    plain, entry = new_key("plain")
    trusted, other = new_key("trusted")
    keys = tmp_path / "keys.toml"
    keys.write_text(f'{entry}\n{other}\n[tenants.trusted]\nmax_priority = "high"\nweight = 2.0\n')
    server = start_server("--api-keys", str(keys))
    request = make_request(
        "It serves", stopping=stopping(2), scheduling=pb.SchedulingOptions(priority=pb.PRIORITY_HIGH)
    )
    for key, expected in ((plain, pb.PRIORITY_NORMAL), (trusted, pb.PRIORITY_HIGH)):
        stream = server.generation.StreamGenerate(request, timeout=60, metadata=[("authorization", f"Bearer {key}")])
        assert next(stream).started.effective_priority == expected
        stream.cancel()


def test_a_request_may_share_less_and_never_more(builtin, make_request):
    def cached(**cache: object) -> int:
        request = make_request(PROMPT, stopping=stopping(2), cache=pb.CacheOptions(**cache))
        return builtin.generation.Generate(request, timeout=60).usage.cached_prompt_tokens

    assert cached(salt="a", bypass_write=True) == 0
    assert cached(salt="a") == 0, "nothing was kept of the first"
    assert cached(salt="a") > 100
    assert cached(salt="b") == 0
    assert cached() == 0
    assert cached(salt="a", bypass_read=True) == 0
