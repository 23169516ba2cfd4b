"""Answers from documents over the wire: what each event carries, and that a stream joined is the unary answer."""

import pytest

from millrace.retrieval.types import Document
from millrace.v1 import generation_pb2 as pb
from millrace.v1 import retrieval_pb2

DOCUMENTS = {
    "returns.md": "Parcels may be returned within thirty days. The box does not matter.",
    "shipping.md": "Shipping to France costs nine euros. It takes a week.",
}
QUESTION = "How many days may parcels be returned within?"


@pytest.fixture
def asked(house) -> pb.GenerateRequest:
    """A question to a library that has documents."""
    house.library.documents["default", "shop"] = {
        name: Document(name, text.encode(), metadata={"kind": "help"}) for name, text in DOCUMENTS.items()
    }
    return pb.GenerateRequest(
        model="builtin", text=QUESTION,
        retrieval=pb.RetrievalOptions(collection="shop", answer_mode=pb.ANSWER_MODE_EXTRACTIVE, min_support=0.1),
    )  # fmt: skip


async def test_an_extractive_answer(house, asked) -> None:
    messages = [m async for m in house.generation.StreamGenerate(asked)]
    assert [m.sequence for m in messages] == list(range(1, len(messages) + 1))
    kinds = [m.WhichOneof("event") for m in messages]
    assert (kinds[0], kinds[-1]) == ("started", "completed")
    started = messages[0].started
    assert started.answer_mode == pb.ANSWER_MODE_EXTRACTIVE
    assert started.sources[0].number == 1
    chunk = started.sources[0].chunk
    assert (chunk.document_id, chunk.text) == ("returns.md", DOCUMENTS["returns.md"])
    assert dict(chunk.metadata) == {"kind": "help"}
    text = "".join(d.text for m in messages for d in m.deltas.choices)
    citations = [m.citation for m in messages if m.HasField("citation")]
    assert citations
    for citation in citations:
        piece = DOCUMENTS[citation.document_id].encode()[citation.byte_start : citation.byte_end].decode()
        marked = text.encode()[citation.text_start : citation.text_end].decode()
        assert marked == f"{piece} [{citation.source_number}]"
        assert 0 <= citation.score <= 1
        assert not citation.HasField("page")
    assert "thirty days" in text
    whole = await house.generation.Generate(asked)
    assert whole.choices[0].text == text
    assert list(whole.citations) == citations
    assert list(whole.sources) == list(started.sources)
    assert whole.answer_mode == pb.ANSWER_MODE_EXTRACTIVE
    assert whole.usage == messages[-1].completed.usage
    assert whole.usage.embedding_tokens > 0


async def test_no_support(house, asked) -> None:
    asked.retrieval.min_support = 1.0
    whole = await house.generation.Generate(asked)
    assert whole.choices[0].text == "I don't have enough information to answer that."
    assert whole.choices[0].finish.reason == pb.FINISH_REASON_NO_SUPPORT
    assert not whole.citations


async def test_options_reach_the_search(house, asked) -> None:
    asked.retrieval.MergeFrom(
        pb.RetrievalOptions(query="parcels returned", top_k=7, candidates=9, mode=retrieval_pb2.SEARCH_MODE_LEXICAL)
    )
    asked.retrieval.filter.add(key="kind").equals.string_value = "help"
    await house.generation.Generate(asked)
    [(tenant, search)] = house.library.searches
    assert (tenant, search.text, search.top_k, search.candidates) == ("default", "parcels returned", 7, 9)
    assert search.mode.value == "lexical"
    assert [(one.key, one.equals) for one in search.filter] == [("kind", "help")]


async def test_a_generative_answer_is_from_its_sources(house, asked) -> None:
    asked.retrieval.answer_mode = pb.ANSWER_MODE_GENERATIVE
    asked.stopping.max_output_tokens = 20
    house.script = house.tokenizer.encode("Thirty days [1], says nobody [9].", add_special_tokens=False)
    messages = [m async for m in house.generation.StreamGenerate(asked)]
    started = messages[0].started
    assert (started.answer_mode, len(started.sources)) == (pb.ANSWER_MODE_GENERATIVE, 1)
    assert started.effective_max_context_tokens > 0
    text = "".join(d.text for m in messages for d in m.deltas.choices)
    [citation] = [m.citation for m in messages if m.HasField("citation")]
    assert citation.source_number == 1
    assert text.encode()[citation.text_start : citation.text_end] == b"[1]"
    assert "[9]" not in text
