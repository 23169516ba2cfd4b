"""The Python client against the real server over a fake backend."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing, closing
from typing import Any

import grpc
import pytest
from fakes import FakeBackend
from served import ANSWER, IDS, Served, in_thread, serving

from millrace.server import errors
from millrace.server.client import AsyncClient, Client, Message, Received, Role, new_text
from millrace.server.client.failures import BARE
from millrace.server.client.requests import Options, generate_request
from millrace.server.errors import RequestError
from millrace.v1 import generation_pb2 as pb


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as served:
        yield served


async def test_sync_and_async_say_the_same(served: Served) -> None:
    def ask(client: Client) -> list[Any]:
        conversation = [Message(Role.USER, "hello")]
        return [
            client.generate("A queue", max_output_tokens=len(IDS)).choices[0].text,
            "".join(client.stream_text([1, 2, 3], max_output_tokens=len(IDS))),
            client.tokenize("two words"),
            client.detokenize(client.tokenize("two words")),
            client.render_chat(conversation),
            client.generate(conversation, max_output_tokens=2, token_ids=True).choices[0].token_ids.ids,
            [model.name for model in client.models()],
            client.health(),
        ]

    async with AsyncClient(served.address) as client:
        conversation = [Message(Role.USER, "hello")]
        answers = [
            (await client.generate("A queue", max_output_tokens=len(IDS))).choices[0].text,
            "".join([t async for t in client.stream_text([1, 2, 3], max_output_tokens=len(IDS))]),
            await client.tokenize("two words"),
            await client.detokenize(await client.tokenize("two words")),
            await client.render_chat(conversation),
            (await client.generate(conversation, max_output_tokens=2, token_ids=True)).choices[0].token_ids.ids,
            [model.name for model in await client.models()],
            await client.health(),
        ]
    assert answers == await in_thread(served, ask)
    assert answers[:2] == [ANSWER, ANSWER]
    assert answers[3].endswith("two words")
    assert answers[5:] == [IDS[:2], ["small"], "SERVING"]


async def test_stream_of_events(served: Served) -> None:
    def ask(client: Client) -> list[pb.StreamGenerateResponse]:
        return list(client.stream("A queue", max_output_tokens=len(IDS), seed=9, n=2))

    events = await in_thread(served, ask)
    assert [e.WhichOneof("event") for e in (events[0], events[-1])] == ["started", "completed"]
    assert events[0].started.effective_sampling.seed == 9
    assert "".join(map(new_text, events)) == ANSWER
    assert events[-1].completed.usage.output_tokens == 2 * len(IDS)


async def test_an_answer_goes_on_where_it_was_lost(served: Served) -> None:
    def ask(client: Client) -> list[Received]:
        options: Options = {"max_output_tokens": 3 * len(IDS), "n": 2, "token_ids": True, "temperature": 1}
        whole, received = Received(), Received()
        for event in client.stream("A queue", **options):
            whole.add(event)
        while not received.is_complete:
            with closing(client.stream("A queue", **received.options(**options))) as events:
                for event in itertools.islice(events, 4):
                    received.add(event)
        return [whole, received]

    whole, received = await in_thread(served, ask)
    assert received.choices == whole.choices
    assert received.choices[0].text == 3 * ANSWER
    assert len(served.backend.requests) > 3


async def test_an_answer_without_token_ids_begins_anew(served: Served) -> None:
    def ask(client: Client) -> Received:
        received = Received()
        options: Options = {"max_output_tokens": len(IDS), "request_id": "job-1"}
        for count in (4, 1000):
            with closing(client.stream("A queue", **received.options(**options))) as events:
                for event in itertools.islice(events, count):
                    received.add(event)
        return received

    received = await in_thread(served, ask)
    assert received.is_complete
    assert (received.choices[0].text, received.output_tokens) == (ANSWER, len(IDS))


async def test_closing_a_stream_cancels_the_request(served: Served) -> None:
    def leave(client: Client) -> None:
        with closing(client.stream("A queue", max_output_tokens=100)) as events:
            next(events)
        asyncio.run_coroutine_threadsafe(settle(served.backend), loop).result(20)  # the client is still open

    served.backend.resumed.clear()  # nothing comes after `started`: the request would never end by itself
    loop = asyncio.get_running_loop()
    await in_thread(served, leave)
    async with AsyncClient(served.address) as client:
        async with aclosing(client.stream("A queue", max_output_tokens=100)) as events:
            await anext(events)
        await settle(served.backend)


async def settle(backend: FakeBackend) -> None:
    async with asyncio.timeout(10):
        while backend.live:  # noqa: ASYNC110  # the fake tells nobody
            await asyncio.sleep(0.01)


def tree(cls: type[RequestError] = RequestError) -> list[type[RequestError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in tree(child))]


def make(cls: type[RequestError]) -> RequestError:
    if issubclass(cls, errors.NotFound):
        return cls("no such thing", resource_type="thing", resource_name="it")
    if issubclass(cls, errors.InvalidRequest):
        return cls.at("sampling.top_p", "must be at most 1", limit="1")
    return cls("it went wrong", metadata={"limit": "5"}, retry_after=0.02 if cls.retry_after is not None else None)


@pytest.mark.parametrize("cls", [c for c in tree() if c not in (RequestError, errors.InternalError)])
async def test_errors_arrive_as_they_were_raised(cls: type[RequestError], served: Served) -> None:
    served.backend.error = raised = make(cls)
    async with AsyncClient(served.address) as client:
        with pytest.raises(RequestError) as found:
            await anext(client.stream("A queue", model="small"))
    check_equal(found.value, raised)
    with pytest.raises(RequestError) as found:
        await in_thread(served, lambda client: list(client.stream("A queue", model="small")))
    check_equal(found.value, raised)


def check_equal(found: RequestError, raised: RequestError) -> None:
    assert type(found) is type(raised)
    assert found.message == raised.message
    where = {"last_sequence": "0"} if isinstance(raised, errors.Aborted) else {}
    assert found.metadata == raised.metadata | where
    assert found.retry_after == raised.retry_after
    if isinstance(raised, errors.InvalidRequest):
        assert isinstance(found, errors.InvalidRequest)
        assert found.violations == raised.violations


@pytest.mark.parametrize(("cls", "attempts"), [(errors.QueueFull, 4), (errors.QuotaExceeded, 1), (errors.NotFound, 1)])
async def test_grpc_repeats_what_may_be_repeated(cls: type[RequestError], attempts: int, served: Served) -> None:
    served.backend.error = make(cls)
    async with AsyncClient(served.address) as client:
        with pytest.raises(cls):
            await client.generate("A queue", model="small")
    assert served.backend.attempts == attempts


async def test_a_draining_server_is_given_up_soon(served: Served) -> None:
    served.gateway.limits.refuse()
    async with AsyncClient(served.address, model="small", timeout=20) as client:
        with pytest.raises(errors.Draining):
            await client.generate("A queue")
        with pytest.raises(errors.Draining):
            await anext(client.stream("A queue"))


async def test_a_request_above_the_cap_is_the_callers_and_sent_once(served: Served) -> None:
    limit = served.api.max_request_bytes
    async with AsyncClient(served.address, model="small") as client:
        with pytest.raises(errors.InvalidRequest, match=r"max_request_bytes") as found:
            await client.generate("x" * limit)
        assert found.value.retry_after is None
        assert found.value.metadata["max_request_bytes"] == str(limit)
        assert int(found.value.metadata["bytes"]) > limit
        assert [violation.field for violation in found.value.violations] == ["request"]
    async with asyncio.timeout(10):
        while rpcs(served) == 0:  # noqa: ASYNC110  # the registry tells nobody
            await asyncio.sleep(0.01)
    assert rpcs(served) == 1


def rpcs(served: Served) -> float:
    """Calls that ended at the server."""
    families = served.gateway.metrics.registry.collect()
    return sum(s.value for f in families for s in f.samples if s.name == "millrace_rpcs_total")


async def test_deadline(served: Served) -> None:
    served.backend.resumed.clear()
    async with AsyncClient(served.address, model="small", timeout=0.3) as client:
        with pytest.raises(errors.DeadlineExceeded):
            await client.generate("A queue")


async def test_key_is_sent(served: Served) -> None:
    async with AsyncClient(f"grpc://{served.address}", api_key="mk-1-abc") as client:
        await client.models()
    assert served.authorization == "Bearer mk-1-abc"


def test_nobody_there() -> None:
    with Client("unix:/nonexistent/socket") as client, pytest.raises(errors.Unavailable, match="millrace serve"):
        client.models()


def test_bare_statuses_map_to_the_same_kind() -> None:
    assert BARE[grpc.StatusCode.UNAUTHENTICATED] is errors.Unauthenticated
    assert grpc.StatusCode.OK not in BARE


def test_every_option_reaches_its_field() -> None:
    given: dict[str, Any] = {
        name: {
            "text": False,
            "request_id": "r1",
            "labels": {"a": "b"},
            "logit_bias": {5: 1.5},
            "retrieval": {"collection": "c"},
            "priority": "low",
            "cache": {"salt": "s", "bypass_read": True},
            "continue_from": pb.ContinueFrom(model_revision="m"),
        }.get(name, 1)
        for name in Options.__annotations__
    } | {"stop_strings": ["x", "y"], "stop_token_ids": [7]}
    request = generate_request("p", "m", given)  # type: ignore[arg-type]  # built at run time
    parts = (request.sampling, request.stopping, request.output, request.stream, request.scheduling, request)
    arrived = {field.name for part in parts for field, _ in part.ListFields()} | {"mask_pii"}
    assert request.guardrails.pii == pb.PII_ACTION_MASK
    assert request.retrieval.collection == "c"
    assert request.scheduling.priority == pb.PRIORITY_LOW
    assert request.scheduling.queue_timeout.ToTimedelta().total_seconds() == 1
    assert (request.cache.salt, request.cache.bypass_read, request.cache.bypass_write) == ("s", True, False)
    assert request.continue_from.model_revision == "m"
    assert given.keys() - arrived == set()
    assert request.output.logprobs.top_n == 1
    assert request.stopping.time_limit.ToTimedelta().total_seconds() == 1
    assert request.sampling.logit_bias == {5: 1.5}


@pytest.mark.parametrize("name", ["sampling", "model", "chat", "temperatur", "stop"])
def test_unknown_option(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        generate_request("p", "m", {name: 1})  # type: ignore[misc]  # wrong on purpose


def test_zero_is_set() -> None:
    request = generate_request([1], "m", {"temperature": 0, "seed": 0})
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("seed")
    assert not request.sampling.HasField("top_p")
