"""Documents through the Python clients against the real server over a library in memory."""

import asyncio
import random
import threading
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any

import pytest
from served import Served, in_thread, serving

from millrace.retrieval.types import Document, MediaType
from millrace.server import errors
from millrace.server.client import AsyncClient, Client
from millrace.server.client.documents import PART_BYTES, conditions, query_request, upsert_requests, vectors
from millrace.server.client.requests import generate_request
from millrace.v1 import embedding_pb2, retrieval_pb2
from millrace.v1 import generation_pb2 as pb

LONE = "\udcff"
SIZES = (0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES, 5 * PART_BYTES + 7)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as served:
        yield served


def kept(served: Served) -> dict[str, Document]:
    return served.library.documents.get(("default", "c"), {})


def some(count: int) -> Iterator[Document]:
    return (Document(f"d{i}", b"text") for i in range(count))


async def collect(results: Any, into: list[Any] | None = None) -> list[Any]:
    """What comes until the end, or until it breaks."""
    found = [] if into is None else into
    async for result in results:
        found.append(result)
    return found


async def test_documents_of_every_size_arrive_as_they_are(served: Served) -> None:
    source = random.Random(3)
    documents = [
        Document(f"d{size}", source.randbytes(size), "s", "t", MediaType.PDF, {"a": 1.0, "b": True, "c": ("x",)})
        for size in SIZES
    ]
    results = await in_thread(served, lambda client: list(client.upsert("c", documents)))
    assert kept(served) == {document.id: document for document in documents}
    assert {r.status for r in results} == {retrieval_pb2.UPSERT_STATUS_CREATED}
    async with AsyncClient(served.address) as client:
        results = await collect(client.upsert("c", documents))
    assert {r.status for r in results} == {retrieval_pb2.UPSERT_STATUS_UNCHANGED}
    assert {r.document_id for r in results} == {d.id for d in documents}


async def test_sync_and_async_say_the_same_of_documents(served: Served) -> None:
    def use(client: Client) -> list[Any]:
        list(client.upsert("c", [Document("a", b"cats and dogs", metadata={"n": 1}), Document("b", b"dogs")]))
        return [
            [chunk.document_id for chunk in client.query("c", "cats dogs", top_k=2, filter={"n": 1}).chunks],
            client.get_document("c", "a", 0, 4).text,
            client.get_document("c", "a").text,
            [(one.name, one.documents) for one in client.collections()],
            client.delete_documents("c", ["a", "x"]),
            client.delete_collection("c"),
        ]

    async with AsyncClient(served.address) as client:
        await collect(client.upsert("c", [Document("a", b"cats and dogs", metadata={"n": 1}), Document("b", b"dogs")]))
        answers = [
            [chunk.document_id for chunk in (await client.query("c", "cats dogs", top_k=2, filter={"n": 1})).chunks],
            (await client.get_document("c", "a", 0, 4)).text,
            (await client.get_document("c", "a")).text,
            [(one.name, one.documents) for one in await client.collections()],
            await client.delete_documents("c", ["a", "x"]),
            await client.delete_collection("c"),
        ]
    assert answers == [["a", "b"], "cats", "cats and dogs", [("c", 2)], 1, 1]
    assert await in_thread(served, use) == answers


async def test_every_collection_is_listed(served: Served) -> None:
    served.library.documents = {("default", f"c{i:04}"): {} for i in range(2100)}
    names = [f"c{i:04}" for i in range(2100)]
    assert [one.name for one in await in_thread(served, lambda client: client.collections())] == names
    async with AsyncClient(served.address) as client:
        assert [one.name for one in await client.collections()] == names


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda client: client.query("none", "q"), errors.CollectionNotFound),
        (lambda client: client.query("no name", "q"), errors.InvalidRequest),
        (lambda client: client.query("c", "q", top_k=1000), errors.InvalidRequest),
        (lambda client: client.get_document("c", "none"), errors.DocumentNotFound),
        (lambda client: client.delete_documents("c", []), errors.InvalidRequest),
        (lambda client: list(client.upsert("no name", some(3))), errors.InvalidRequest),
    ],
)
async def test_failures_are_typed(served: Served, call: Any, error: type[Exception]) -> None:
    await in_thread(served, lambda client: list(client.upsert("c", some(1))))
    with pytest.raises(error) as raised:
        await in_thread(served, call)
    assert type(raised.value) is error


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_an_upload_that_is_refused_says_why(served: Served, kind: str) -> None:
    """Though the client is in the middle of sending, many times over."""
    served.limit = 0
    documents = [Document(f"d{i}", bytes(100_000)) for i in range(20)]
    for _ in range(30):
        with pytest.raises(errors.QuotaExceeded):
            await upload(served, kind, documents)


async def upload(served: Served, kind: str, documents: list[Document]) -> list[Any]:
    if kind == "sync":
        return await in_thread(served, lambda client: list(client.upsert("c", documents)))
    async with AsyncClient(served.address) as client:
        return await collect(client.upsert("c", documents))


async def test_cancelling_an_upload_ends_it(served: Served) -> None:
    served.library.resumed.clear()
    async with AsyncClient(served.address) as client:
        call = asyncio.create_task(collect(client.upsert("c", some(10))))
        async with asyncio.timeout(10):
            while served.library.live < 4:  # noqa: ASYNC110  # the fake tells nobody
                await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await settle(served)


async def test_what_failed_is_told_of_each(served: Served) -> None:
    served.library.errors["d1"] = errors.EmptyDocument("there is nothing in it")
    results = await in_thread(served, lambda client: list(client.upsert("c", some(3))))
    [failed] = [r for r in results if r.status == retrieval_pb2.UPSERT_STATUS_FAILED]
    assert (failed.document_id, failed.error_reason, failed.error_message) == (
        "d1", "EMPTY_DOCUMENT", "there is nothing in it",
    )  # fmt: skip
    assert kept(served).keys() == {"d0", "d2"}


class Broken(Exception):
    pass


def breaking(count: int, error: Exception) -> Iterator[Document]:
    yield from some(count)
    raise error


BREAKS = [Broken("mine"), OSError("disk"), errors.ConfigError("file"), KeyError("k")]


@pytest.mark.parametrize("error", BREAKS, ids=repr)
@pytest.mark.parametrize("count", [0, 10])
async def test_what_the_documents_raise_is_raised_after_the_results(
    served: Served, error: Exception, count: int
) -> None:
    def use(client: Client) -> list[Any]:
        seen: list[Any] = []
        with pytest.raises(type(error)) as raised:
            seen.extend(client.upsert("c", breaking(count, error)))
        assert raised.value is error
        return seen

    await in_thread(served, use)
    assert len(kept(served)) == count
    served.library.documents.clear()
    seen: list[Any] = []
    async with AsyncClient(served.address) as client:
        with pytest.raises(type(error)) as raised:
            await collect(client.upsert("c", breaking(count, error)), seen)
    assert raised.value is error
    assert len(kept(served)) == len(seen) == count


async def test_a_document_that_cannot_be_sent(served: Served) -> None:
    for wrong in (Document(LONE, b""), Document("a", b"", metadata={"a": {1, 2}})):  # type: ignore[dict-item]
        with pytest.raises(errors.InvalidRequest, match="document"):
            await in_thread(served, lambda client, d=wrong: list(client.upsert("c", [*some(2), d])))
    assert kept(served).keys() == {"d0", "d1"}
    with pytest.raises(errors.InvalidRequest, match="collection"):
        await in_thread(served, lambda client: list(client.upsert(LONE, some(1))))


async def test_closing_early_ends_the_call(served: Served) -> None:
    """Though there is no end of documents."""

    def endless() -> Iterator[Document]:
        index = 0
        while True:
            index += 1
            yield Document(f"d{index}", b"text")

    def leave(client: Client) -> None:
        with closing(client.upsert("c", endless())) as results:
            for _ in range(5):
                next(results)
        asyncio.run_coroutine_threadsafe(settle(served), loop).result(20)  # the client is still open

    loop = asyncio.get_running_loop()
    await in_thread(served, leave)
    async with AsyncClient(served.address) as client:
        async with aclosing(client.upsert("c", endless())) as results:
            for _ in range(5):
                await anext(results)
        await settle(served)


async def settle(served: Served) -> None:
    assert await served.gateway.limits.idle(10)
    assert served.library.live == 0


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_documents_are_read_no_faster_than_they_are_taken(served: Served, kind: str) -> None:
    """While the server takes nothing, what has been read and not stored stays small."""
    served.library.resumed.clear()
    given, count, content = 0, 3000, bytes(500)

    def documents() -> Iterator[Document]:
        nonlocal given
        for index in range(count):
            given += 1
            yield Document(f"d{index}", content)

    async def use() -> int:
        if kind == "sync":
            return len(await in_thread(served, lambda client: list(client.upsert("c", documents()))))
        async with AsyncClient(served.address) as client:
            return len(await collect(client.upsert("c", documents())))

    call = asyncio.create_task(use())
    before = -1
    while given == 0 or given > before:  # until nothing moves any more
        before = given
        await asyncio.sleep(0.4)
    assert given * len(content) < 512 * 1024
    served.library.resumed.set()
    assert await call == len(kept(served)) == count


async def test_the_event_loop_goes_on_while_documents_are_read(served: Served) -> None:
    def slow() -> Iterator[Document]:
        threads.add(threading.current_thread())
        for document in some(3):
            time.sleep(0.2)
            yield document

    threads: set[threading.Thread] = set()
    async with AsyncClient(served.address) as client:
        call = asyncio.create_task(collect(client.upsert("c", slow())))
        longest = 0.0
        while not call.done():
            began = time.perf_counter()
            await asyncio.sleep(0.01)
            longest = max(longest, time.perf_counter() - began)
        assert len(await call) == 3
    assert threading.main_thread() not in threads
    assert longest < 0.15


def test_a_long_document_is_not_copied_into_one_message() -> None:
    document = Document("a", bytes(3 * PART_BYTES + 1))
    sizes = [request.ByteSize() for request in upsert_requests("c", [document])]
    assert len(sizes) == 4
    assert max(sizes) < PART_BYTES + 1024 < 192 * 1024


def test_conditions_in_every_form() -> None:
    found = conditions(
        {
            "text": "en",
            "empty": "",
            "number": 3,
            "real": -0.5,
            "flag": False,
            "list": ["a", 1, True],
            "tuple": ("b",),
            "from": {"at_least": 0},
            "to": {"at_most": 7.5},
            "within": {"at_least": 1, "at_most": 2},
        }
    )
    shown = {
        one.key: getattr(one, one.WhichOneof("test"))
        if one.HasField("range")
        else (getattr(one.equals, one.equals.WhichOneof("kind")) if one.HasField("equals") else list(one.any_of))
        for one in found
    }
    ranges = {key: shown.pop(key) for key in ("from", "to", "within")}
    assert shown == {
        "text": "en", "empty": "", "number": 3.0, "real": -0.5, "flag": False, "list": ["a", 1.0, True], "tuple": ["b"],
    }  # fmt: skip
    assert shown["flag"] is False
    assert shown["list"][2] is True
    assert ranges["from"].HasField("at_least")
    assert not ranges["from"].HasField("at_most")
    assert (ranges["within"].at_least, ranges["within"].at_most) == (1, 2)


@pytest.mark.parametrize(
    "test",
    [None, b"bytes", {"a"}, [None], ["a", ["b"]], [{}], LONE, [LONE], {"at_leest": 1}, 10**400, [10**400]],
    ids=lambda test: repr(test)[:20],
)
def test_conditions_that_are_none(test: Any) -> None:
    with pytest.raises(errors.InvalidRequest) as raised:
        conditions({"fine": 1, "key": test})
    assert [violation.field for violation in raised.value.violations] == ["filter.key"]


def test_options_of_a_query() -> None:
    request = query_request(
        "c", "q", {"top_k": 3, "candidates": 9, "filter": {"a": 1}, "mode": "vector", "ef_search": 5, "exact": True,
                   "without_text": True},
    )  # fmt: skip
    assert (request.top_k, request.candidates, request.ef_search) == (3, 9, 5)
    assert (request.exact, request.without_text, request.mode) == (True, True, retrieval_pb2.SEARCH_MODE_VECTOR)
    assert [one.key for one in request.filter] == ["a"]
    bare = query_request("c", "q", {})
    assert not bare.HasField("top_k")
    assert bare.mode == retrieval_pb2.SEARCH_MODE_UNSPECIFIED


def test_a_vector_asks_too() -> None:
    vector = array("f", [1, -2.5])
    for question in (vector, [1, -2.5], (1.0, -2.5)):
        request = query_request("c", question, {})
        assert (request.WhichOneof("query"), request.vector_f32le) == ("vector_f32le", vector.tobytes())
    with pytest.raises(errors.InvalidRequest, match="question"):
        query_request("c", [1e300], {})


@pytest.mark.parametrize("name", ["topk", "vector_f32le", "collection", "query"])
def test_an_option_that_no_query_has(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        query_request("c", "q", {name: 1})  # type: ignore[misc]  # wrong on purpose


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ({"mode": "fuzzy"}, "mode"),
        ({"mode": "unspecified"}, "mode"),
        ({"top_k": -1}, "top_k"),
        ({"ef_search": 1 << 40}, "ef_search"),
    ],
)
def test_a_value_that_no_query_holds(option: Any, field: str) -> None:
    with pytest.raises(errors.InvalidRequest) as raised:
        query_request("c", "q", option)
    assert [violation.field for violation in raised.value.violations] == [field]


def test_options_of_an_answer_from_documents() -> None:
    options = {
        "collection": "c", "query": "q", "top_k": 1, "candidates": 2, "filter": {"a": True}, "mode": "lexical",
        "max_context_tokens": 3, "answer_mode": "extractive", "min_support": 0.0, "max_sentences": 4,
    }  # fmt: skip
    message = generate_request("p", "m", {"retrieval": options}).retrieval
    assert {field.name for field, _ in message.ListFields()} == options.keys()
    assert set(message.DESCRIPTOR.fields_by_name) == options.keys()
    assert (message.mode, message.answer_mode) == (retrieval_pb2.SEARCH_MODE_LEXICAL, pb.ANSWER_MODE_EXTRACTIVE)
    assert message.HasField("min_support")
    with pytest.raises(TypeError, match="answer"):
        generate_request("p", "m", {"retrieval": {"collection": "c", "answer": "extractive"}})
    with pytest.raises(errors.InvalidRequest, match="generative, extractive"):
        generate_request("p", "m", {"retrieval": {"collection": "c", "answer_mode": "creative"}})


def test_one_string_is_no_list() -> None:
    with Client("unix:/nonexistent") as client:
        with pytest.raises(TypeError, match="ids"):
            client.delete_documents("c", "abc")
        with pytest.raises(TypeError, match="texts"):
            client.embed("abc")
        for call in (
            lambda: client.delete_documents("c", [LONE]),
            lambda: client.embed([LONE]),
            lambda: client.get_document("c", "a", -1),
            lambda: client.delete_collection(LONE),
            lambda: client.query("c", LONE),
        ):
            with pytest.raises(errors.InvalidRequest):
                call()


def test_vectors_are_cut_into_rows() -> None:
    raw = array("f", [1, 2, 3, 4, 5, 6]).tobytes()
    response = embedding_pb2.EmbedResponse(dimensions=3, vectors=raw)
    assert vectors(response) == [array("f", [1, 2, 3]), array("f", [4, 5, 6])]
