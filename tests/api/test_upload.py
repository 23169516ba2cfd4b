"""UpsertDocuments over the wire: documents in parts, what fails alone, what ends a call, and what is left behind."""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Iterable, Iterator
from itertools import pairwise

import grpc
import pytest
from fakes import FakeLibrary

from millrace.retrieval.types import Document, Upserted
from millrace.server import errors
from millrace.server.api import endpoint, retrieval, upload
from millrace.v1 import retrieval_pb2 as pb
from millrace.v1 import retrieval_pb2_grpc

CODE = grpc.StatusCode
PATH = "/millrace.v1.RetrievalService/UpsertDocuments"


def first(id: str, content: bytes = b"text", collection: str = "c", **fields: object) -> pb.UpsertDocumentsRequest:
    return pb.UpsertDocumentsRequest(collection=collection, document=pb.Document(id=id, content=content, **fields))


def part(content: bytes, collection: str = "c") -> pb.UpsertDocumentsRequest:
    return pb.UpsertDocumentsRequest(collection=collection, content_part=content)


def in_parts(id: str, content: bytes, cuts: Iterable[int]) -> Iterator[pb.UpsertDocumentsRequest]:
    """`content` cut at `cuts`, the first of which may be 0."""
    ends = [*sorted(cuts), len(content)]
    yield first(id, content[: ends[0]], content_size=len(content))
    yield from (part(content[start:end]) for start, end in pairwise(ends) if end > start)


async def send(house, messages: Iterable[pb.UpsertDocumentsRequest]) -> tuple[dict, grpc.RpcError | None]:
    """The answers by document, and how the call failed. Not by grpc.aio, whose errors get lost while it writes."""
    answers: dict[str, pb.UpsertDocumentsResponse] = {}

    def work() -> grpc.RpcError | None:
        with grpc.insecure_channel(f"127.0.0.1:{house.port}") as channel:
            stub = retrieval_pb2_grpc.RetrievalServiceStub(channel)
            try:
                for answer in stub.UpsertDocuments(iter(messages), timeout=20):
                    assert answer.document_id not in answers
                    answers[answer.document_id] = answer
            except grpc.RpcError as error:
                return error
        return None

    error = await asyncio.to_thread(work)
    return answers, error


def stored(house, tenant: str = "default", collection: str = "c") -> dict[str, Document]:
    return house.library.documents.get((tenant, collection), {})


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # what is awaited tells nobody
            await asyncio.sleep(0.01)


async def test_every_field_arrives(house) -> None:
    message = first("a", b"<p>hi", source="s", title="t", media_type=pb.MEDIA_TYPE_HTML)
    message.document.metadata.update({"year": 2020, "new": True, "tags": ["x", "y"], "none": [], "name": ""})
    answers, error = await send(house, [message])
    assert error is None
    kept = stored(house)["a"]
    assert (kept.content, kept.source, kept.title, kept.media_type.value) == (b"<p>hi", "s", "t", "text/html")
    assert kept.metadata == {"year": 2020.0, "new": True, "tags": ("x", "y"), "none": (), "name": ""}
    assert kept.metadata["new"] is True
    answer = answers["a"]
    assert (answer.status, answer.chunks, answer.chunks_embedded, answer.embedding_tokens) == (
        pb.UPSERT_STATUS_CREATED, 1, 1, 1,
    )  # fmt: skip
    assert (await send(house, [message]))[0]["a"].status == pb.UPSERT_STATUS_UNCHANGED
    assert (await send(house, [first("a", b"new")]))[0]["a"].status == pb.UPSERT_STATUS_UPDATED


async def test_parts_make_the_document_wherever_it_is_cut(house) -> None:
    random.seed(7)
    sent: dict[str, bytes] = {}
    messages: list[pb.UpsertDocumentsRequest] = []
    for index in range(40):
        content = random.randbytes(random.choice([1, 2, 1000, 200_000, 500_000]))
        cuts = {0, *(random.randrange(len(content)) for _ in range(random.randrange(5)))}
        cuts |= set(range(150_000, len(content), 150_000))
        if random.random() < 0.3:
            cuts = {*cuts, len(content)}  # all of a short one in the first message, with its size
        sent[f"d{index}"] = content
        messages += in_parts(f"d{index}", content, cuts if random.random() < 0.7 else cuts - {0} or {0})
    answers, error = await send(house, messages)
    assert error is None
    assert {id: document.content for id, document in stored(house).items()} == sent
    assert answers.keys() == sent.keys()


async def test_one_of_the_largest(house) -> None:
    content = random.Random(1).randbytes(32 << 20)
    _, error = await send(house, in_parts("big", content, range(128 << 10, len(content), 128 << 10)))
    assert error is None
    assert stored(house)["big"].content == content


def enormous(id: str, size: int = (32 << 20) + 1) -> Iterator[pb.UpsertDocumentsRequest]:
    """A document in parts that are all alike."""
    yield first(id, b"", content_size=size)
    piece = bytes(128 << 10)
    yield from (part(piece[: size - start]) for start in range(0, size, len(piece)))


async def test_one_that_is_too_large_fails_alone(open_house, monkeypatch) -> None:
    """It is dropped as it comes: none of it is kept, and it takes no place of those that can be stored."""
    monkeypatch.setattr(retrieval, "LARGE_AT_ONCE", 1)
    kept: list[bool] = []
    content = upload.Upload._content

    async def seen(self, head: pb.Document, *, keep: bool) -> bytes:
        kept.append(keep)
        found = await content(self, head, keep=keep)
        assert len(found) == (head.content_size if keep else 0)
        return found

    monkeypatch.setattr(upload.Upload, "_content", seen)
    async with open_house() as house:
        other = house.retrieval.UpsertDocuments()
        await other.write(first("open", b"12", content_size=4))
        await until(lambda: kept == [True])
        answers, error = await send(house, [first("a"), *enormous("x", 36 << 20), *enormous("y"), first("z")])
        assert error is None
        assert kept == [True, False, False]
        for id in ("x", "y"):
            assert (answers[id].status, answers[id].error_reason) == (pb.UPSERT_STATUS_FAILED, "DOCUMENT_TOO_LARGE")
            assert f"document {id!r}" in answers[id].error_message
            assert "33554432 at most" in answers[id].error_message
        assert stored(house).keys() == {"a", "z"}
        other.cancel()


async def test_a_call_brings_so_much_for_nothing_and_no_more(house, reason_of, monkeypatch) -> None:
    """It ends where its messages say that they will, not when all of that has come."""
    monkeypatch.setattr(upload, "MAX_DROPPED", 68 << 20)
    answers, error = await send(house, [first("a"), *enormous("x"), *enormous("y"), first("w", content_size=1 << 25)])
    assert error is not None  # w has no more parts
    assert answers.keys() == {"a", "x", "y"}
    answers, error = await send(house, [first("b"), *enormous("x"), *enormous("y"), first("q", content_size=1 << 26)])
    assert error.code() == CODE.INVALID_ARGUMENT
    assert reason_of(error).reason == "DOCUMENT_TOO_LARGE"
    assert "'q'" in error.details()
    assert answers.keys() == {"b", "x", "y"}
    assert stored(house).keys() == {"a", "b"}


WRONG = {
    "too much": ([first("x", b"12", content_size=3), part(b"34")], "document.content_size"),
    "too much at once": ([first("x", b"1234", content_size=3)], "document.content_size"),
    "too little": ([first("x", b"12", content_size=3)], "content_part"),
    "another document within": ([first("x", b"12", content_size=3), first("y")], "content_part"),
    "a part of nothing": ([part(b"12")], "content_part"),
    "a part after all": ([first("x", b"123", content_size=3), part(b"4")], "content_part"),
    "an empty part": ([first("x", b"12", content_size=3), part(b"")], "content_part"),
    "another collection": ([first("x", collection="d")], "collection"),
    "another collection in a part": ([first("x", b"12", content_size=3), part(b"3", "d")], "collection"),
    "a bad collection in a part": ([first("x", b"12", content_size=3), part(b"3", "")], "collection"),
    "no id": ([first("")], "document.id"),
    "a long id": ([first("x" * 513)], "document.id"),
    "no size": ([first("x", content_size=0)], "document.content_size"),
    "a size beyond all": ([first("x", content_size=1 << 60)], "document.content_size"),
    "a large one without an id": ([first("", content_size=(32 << 20) + 1)], "document.id document.content_size"),
    "a large one with too little": ([first("x", content_size=(32 << 20) + 1)], "content_part"),
    "nothing": ([pb.UpsertDocumentsRequest(collection="c")], "item"),
}


@pytest.mark.parametrize(("messages", "fields"), WRONG.values(), ids=WRONG)
async def test_messages_that_make_no_documents_end_the_call(house, details_of, messages, fields: str) -> None:
    """What came whole before is stored and answered; what comes after is not read."""
    before = [first("a"), *in_parts("b", b"12345", {2})]
    answers, error = await send(house, [*before, *messages, first("z")])
    assert error is not None
    assert error.code() == CODE.INVALID_ARGUMENT
    assert [v.field for v in details_of(error)["BadRequest"].field_violations] == fields.split()
    created = {id for id, answer in answers.items() if answer.status == pb.UPSERT_STATUS_CREATED}
    assert (
        created
        == stored(house).keys()
        == {"a", "b"} | ({"x"} if messages[0] == WRONG["a part after all"][0][0] else set())
    )


@pytest.mark.parametrize(
    "raw", [b"\xff", b"\x0a\x02\xff\xfe", b"\x52\x00"], ids=["noise", "bad UTF-8", "unknown field"]
)
async def test_bytes_that_are_no_message(house, reason_of, raw: bytes) -> None:
    async def messages() -> AsyncIterator[bytes]:
        yield first("a").SerializeToString()
        yield first("b").SerializeToString() + raw

    call = house.channel.stream_stream(PATH)(messages())
    assert pb.UpsertDocumentsResponse.FromString(await call.read()).document_id == "a"
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert reason_of(raised.value).reason == "FIELD_INVALID"
    assert stored(house).keys() == {"a"}


def with_metadata(id: str, values: dict) -> pb.UpsertDocumentsRequest:
    message = first(id)
    message.document.metadata.update(values)
    return message


def with_unknown_field() -> pb.UpsertDocumentsRequest:
    message = first("x")
    message.document.MergeFromString(b"\xa0\x06\x01")
    return message


ALONE = {
    "NaN": [with_metadata("x", {"a": math.nan})],
    "infinity": [with_metadata("x", {"a": math.inf})],
    "null": [with_metadata("x", {"a": None})],
    "an object": [with_metadata("x", {"a": {"b": 1}})],
    "a list of numbers": [with_metadata("x", {"a": [1]})],
    "a mixed list": [with_metadata("x", {"a": ["b", True]})],
    "a list in a list": [with_metadata("x", {"a": [["b"]]})],
    "too many keys": [with_metadata("x", {str(i): i for i in range(65)})],
    "an empty key": [with_metadata("x", {"": 1})],
    "a long key": [with_metadata("x", {"é" * 65: 1})],
    "much metadata": [with_metadata("x", {"a": "b" * 20_000})],
    "a long source": [first("x", source="s" * 1025)],
    "a long title": [first("x", title="s" * 1025)],
    "no such type": [first("x", media_type=99)],
    "too much in one message": [first("x", b"a" * 200_000)],
    "an unknown field": [with_unknown_field()],
    "in parts": [first("x", b"12", source="s" * 1025, content_size=4), part(b"3"), part(b"4")],
}


@pytest.mark.parametrize("messages", ALONE.values(), ids=ALONE)
async def test_a_document_that_is_wrong_fails_alone(house, messages) -> None:
    answers, error = await send(house, [first("a"), *messages, first("z")])
    assert error is None
    assert answers["x"].status == pb.UPSERT_STATUS_FAILED
    assert answers["x"].error_reason == "FIELD_INVALID"
    assert answers["x"].error_message.startswith("document")
    assert stored(house).keys() == {"a", "z"}


@pytest.mark.parametrize(
    "error",
    [
        errors.EmptyDocument("it is empty"),
        errors.DamagedDocument("it is damaged"),
        errors.QuotaExceeded("too many chunks"),
        errors.EngineRestarting("the engine restarts"),
        errors.InvalidRequest.at("document.metadata", "no"),
    ],
    ids=lambda error: error.reason,
)
async def test_a_document_that_the_library_refuses_fails_alone(house, error: errors.RequestError) -> None:
    house.library.errors["x"] = error
    answers, failed = await send(house, [first("a"), first("x"), first("z")])
    assert failed is None
    assert (answers["x"].status, answers["x"].error_reason) == (pb.UPSERT_STATUS_FAILED, error.reason)
    assert answers["x"].error_message == error.message
    assert stored(house).keys() == {"a", "z"}


async def test_a_bug_fails_alone_and_says_nothing_of_itself(house) -> None:
    house.library.errors["x"] = ValueError("secret")
    answers, failed = await send(house, [first("x"), first("z")])
    assert failed is None
    assert answers["x"].error_reason == "INTERNAL"
    assert "incident" in answers["x"].error_message
    assert "secret" not in answers["x"].error_message
    assert stored(house).keys() == {"z"}


async def test_a_few_documents_at_once_and_no_more(house) -> None:
    house.library.resumed.clear()
    call = asyncio.create_task(send(house, [first(f"d{i}") for i in range(20)]))
    await until(lambda: house.library.live == upload.AT_ONCE)
    await asyncio.sleep(0.1)
    house.library.resumed.set()
    answers, error = await call
    assert error is None
    assert len(answers) == 20
    assert house.library.most == upload.AT_ONCE


class Slow(FakeLibrary):
    """Waits for `gates`, by document."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[str, asyncio.Event] = {}

    async def upsert(self, tenant: str, collection: str, document: Document) -> Upserted:
        if gate := self.gates.get(document.id):
            await gate.wait()
        return await super().upsert(tenant, collection, document)


@pytest.fixture
async def slow_house(open_house) -> AsyncIterator:
    async with open_house(library=Slow) as house:
        yield house


async def test_answers_come_as_documents_end(slow_house) -> None:
    slow_house.library.gates["a"] = asyncio.Event()
    call = slow_house.retrieval.UpsertDocuments(iter([first("a"), first("b"), first("c")]))
    assert [(await call.read()).document_id for _ in range(2)] == ["b", "c"]
    slow_house.library.gates["a"].set()
    assert (await call.read()).document_id == "a"
    assert await call.read() is grpc.aio.EOF


async def test_an_upload_that_stands_still_ends(slow_house, monkeypatch) -> None:
    """What is still in work then lands first."""
    monkeypatch.setattr(upload, "PART_TIMEOUT", 0.2)
    slow_house.library.gates["a"] = asyncio.Event()
    call = slow_house.retrieval.UpsertDocuments()
    await call.write(first("a"))
    await call.write(first("b", b"12", content_size=4))
    await asyncio.sleep(0.5)
    slow_house.library.gates["a"].set()
    assert (await call.read()).document_id == "a"
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert raised.value.code() == CODE.DEADLINE_EXCEEDED
    assert "'b'" in raised.value.details()
    assert stored(slow_house).keys() == {"a"}


async def test_a_call_may_rest_between_documents(house, monkeypatch) -> None:
    """And before the first one; many that do keep nobody out."""
    monkeypatch.setattr(upload, "PART_TIMEOUT", 0.1)
    monkeypatch.setattr(endpoint, "BODY_TIMEOUT", 0.1)
    calls = [house.retrieval.UpsertDocuments() for _ in range(100)]
    await until(lambda: house.limits.live == 100)
    await asyncio.sleep(0.2)
    for index, call in enumerate(reversed(calls)):
        await call.write(first(f"d{index}"))
        assert (await call.read()).status == pb.UPSERT_STATUS_CREATED
    for call in calls:
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_an_upload_without_documents(house) -> None:
    assert await send(house, []) == ({}, None)


async def test_the_call_is_one_request_of_its_tenant(house, reason_of) -> None:
    house.limit = 1
    assert len((await send(house, [first(f"d{i}") for i in range(20)]))[0]) == 20
    call = house.retrieval.UpsertDocuments()
    await until(lambda: house.limits.live == 1)
    _, error = await send(house, [first("a")])
    assert reason_of(error).reason == "QUOTA_EXCEEDED"
    call.cancel()
    assert await house.limits.idle(10)


async def test_long_documents_of_a_tenant_wait_for_each_other(open_house, monkeypatch) -> None:
    monkeypatch.setattr(retrieval, "LARGE_AT_ONCE", 1)
    async with open_house() as house:
        one, other = house.retrieval.UpsertDocuments(), house.retrieval.UpsertDocuments()
        await one.write(first("a", b"12", content_size=4))
        await asyncio.sleep(0.1)
        await other.write(first("b", b"12", content_size=4))
        await other.write(part(b"34"))
        await asyncio.sleep(0.2)
        assert stored(house).keys() == set(), "there is one place, and an open document has it"
        assert (await send(house, [first("short")]))[0].keys() == {"short"}
        await one.write(part(b"34"))
        assert [(await call.read()).document_id for call in (one, other)] == ["a", "b"]
        one.cancel()
        other.cancel()


@pytest.mark.parametrize("open_document", [True, False])
async def test_a_call_that_is_cancelled_leaves_nothing(slow_house, open_document: bool) -> None:
    before = len(asyncio.all_tasks())
    slow_house.library.gates |= {f"d{i}": asyncio.Event() for i in range(3)}
    call = slow_house.retrieval.UpsertDocuments()
    await call.write(first("a"))
    assert (await call.read()).document_id == "a"
    for i in range(3):
        await call.write(first(f"d{i}"))
    if open_document:
        await call.write(first("x", b"12", content_size=4))
    await asyncio.sleep(0.1)
    call.cancel()
    assert await slow_house.limits.idle(10)
    await until(lambda: len(asyncio.all_tasks()) <= before)
    assert slow_house.library.live == 0
    assert stored(slow_house).keys() == {"a"}


async def test_a_call_that_is_cancelled_gives_its_place_to_another(open_house, monkeypatch) -> None:
    monkeypatch.setattr(retrieval, "LARGE_AT_ONCE", 1)
    async with open_house() as house:
        call = house.retrieval.UpsertDocuments()
        await call.write(first("a", b"12", content_size=4))
        await asyncio.sleep(0.1)
        call.cancel()
        answers, _ = await send(house, in_parts("b", b"1234", {2}))
        assert answers.keys() == {"b"}


async def test_a_client_that_vanishes_leaves_nothing(house) -> None:
    channel = house.connect()
    call = channel.stream_stream(PATH, request_serializer=pb.UpsertDocumentsRequest.SerializeToString)()
    await call.write(first("a"))
    await call.read()
    await call.write(first("x", b"12", content_size=4))
    await channel.close()
    assert await house.limits.idle(10)
    assert stored(house).keys() == {"a"}


async def test_a_message_above_the_cap_ends_the_call(house) -> None:
    _, error = await send(house, [first("a"), first("x", b"1" * (house.server.max_request_bytes + 1)), first("z")])
    assert error.code() == CODE.RESOURCE_EXHAUSTED
    assert await house.limits.idle(10)
    assert stored(house).keys() <= {"a"}


async def test_a_drain_ends_what_does_not_end_by_itself(house, reason_of) -> None:
    begun, idle = house.retrieval.UpsertDocuments(), house.retrieval.UpsertDocuments()
    await begun.write(first("a"))
    await begun.read()
    await until(lambda: house.limits.live == 2)
    await house.gateway.drain(0.1)
    for call, reason in ((begun, "DRAINED"), (idle, "DRAINING")):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert reason_of(raised.value).reason == reason
    assert await house.limits.idle(10)
    assert reason_of((await send(house, [first("b")]))[1]).reason == "DRAINING"


async def test_a_drain_lets_documents_land(house) -> None:
    house.library.resumed.clear()
    call = asyncio.create_task(send(house, [first("a"), first("b")]))
    await until(lambda: house.library.live == 2)
    drain = asyncio.create_task(house.gateway.drain(10))
    await asyncio.sleep(0.1)
    house.library.resumed.set()
    answers, error = await call
    await drain
    assert error is None
    assert answers.keys() == {"a", "b"}


async def test_a_drain_takes_no_more_documents(slow_house) -> None:
    """What had begun lands, in parts or not; what begins then fails at once, and the call may go on to its end."""
    slow_house.library.gates["a"] = asyncio.Event()
    call = slow_house.retrieval.UpsertDocuments()
    await call.write(first("a"))
    await call.write(first("b", b"12", content_size=4))
    await asyncio.sleep(0.2)  # until both have come
    drain = asyncio.create_task(slow_house.gateway.drain(10))
    await until(lambda: slow_house.limits.draining)
    await call.write(part(b"34"))
    assert (await call.read()).document_id == "b"
    for message in (*in_parts("x", b"1234", {2}), first("y")):
        await call.write(message)
    for id in ("x", "y"):
        answer = await call.read()
        assert (answer.document_id, answer.status, answer.error_reason) == (id, pb.UPSERT_STATUS_FAILED, "DRAINING")
        assert "use another replica" in answer.error_message
    slow_house.library.gates["a"].set()
    assert (await call.read()).document_id == "a"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    await drain
    assert stored(slow_house).keys() == {"a", "b"}


async def read_all(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_client_that_reads_no_answers_is_let_go(open_house, reason_of) -> None:
    async with open_house(slow_reader_timeout=0.5) as house:
        house.library.errors = dict.fromkeys((f"d{i}" for i in range(100)), errors.EmptyDocument("it is empty " * 1000))
        channel = house.connect(("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
        call = channel.stream_stream(
            PATH,
            request_serializer=pb.UpsertDocumentsRequest.SerializeToString,
            response_deserializer=pb.UpsertDocumentsResponse.FromString,
        )(iter([first(f"d{i}") for i in range(100)]))
        await until(lambda: house.limits.live == 1)
        assert await house.limits.idle(10)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await read_all(call)
        assert reason_of(raised.value).reason == "SLOW_READER"
        await channel.close()
