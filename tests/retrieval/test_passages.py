"""What is stored waits for its model: for which errors, how long, and what it then gets."""

import asyncio
from collections.abc import Sequence

import pytest
from retrieval_fakes import WordEmbedder, document, library

from millrace.retrieval import passages
from millrace.retrieval.embedding import Embedded
from millrace.retrieval.passages import embed_passages
from millrace.retrieval.types import UpsertStatus
from millrace.server import errors

TEXTS = [f"word{n}" for n in range(3 * passages.BATCH)]


class Failing(WordEmbedder):
    """Raises each of `faults` once, then embeds."""

    def __init__(self, *faults: errors.RequestError):
        super().__init__()
        self.faults = list(faults)
        self.calls = 0

    async def embed(
        self, texts: Sequence[str], *, tenant: str, background: bool = False, truncate: bool = False
    ) -> Embedded:
        self.calls += 1
        assert background
        assert truncate
        if self.faults:
            raise self.faults.pop(0)
        return await super().embed(texts, tenant=tenant, background=background, truncate=truncate)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, in a moment."""
    waited: list[float] = []
    moment = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        await moment(0)

    monkeypatch.setattr(passages.asyncio, "sleep", sleep)
    return waited


async def embed(embedder: Failing) -> list[bytes]:
    vectors, _ = await embed_passages(embedder, embedder.info(), TEXTS, "t")
    return vectors


@pytest.mark.parametrize("error", [errors.EngineRestarting, errors.ModelLoading, errors.QueueFull])
async def test_a_model_that_comes_back_is_waited_for(pauses: list[float], error: type[errors.RequestError]) -> None:
    embedder = Failing(*(error("wait") for _ in range(3)), error("long", retry_after=600))
    assert await embed(embedder) == await embed(Failing())
    assert embedder.texts == TEXTS, "each text once, in order"
    assert pauses == [1, 2, 4, passages.LONGEST_PAUSE]


async def test_patience_ends_and_is_one_for_all_batches(pauses: list[float]) -> None:
    embedder = Failing(*(errors.EngineRestarting(f"wait {n}") for n in range(1000)))
    with pytest.raises(errors.EngineRestarting):
        await embed(embedder)
    assert sum(pauses) == passages.PATIENCE
    assert embedder.calls == len(pauses) + 1
    assert not embedder.texts


async def test_every_batch_spends_of_the_same_patience(pauses: list[float]) -> None:
    class Relapsing(Failing):
        async def embed(self, texts: Sequence[str], **options: object) -> Embedded:
            self.faults = [] if self.calls % 11 == 10 else [errors.QueueFull("full")]
            return await super().embed(texts, **options)  # type: ignore[arg-type]

    embedder = Relapsing()
    with pytest.raises(errors.QueueFull):
        await embed(embedder)
    assert embedder.texts == TEXTS[: passages.BATCH]
    assert sum(pauses) == passages.PATIENCE


@pytest.mark.parametrize(
    "error",
    [
        errors.Draining("the server is shutting down"),
        errors.Unavailable("the disk is full", retry_after=10),
        errors.QuotaExceeded("too many"),
        errors.EngineLost("lost"),
        errors.InvalidRequest("no"),
        errors.InternalError("a bug"),
    ],
    ids=lambda error: error.reason,
)
async def test_nothing_else_is_waited_for(pauses: list[float], error: errors.RequestError) -> None:
    embedder = Failing(error)
    with pytest.raises(type(error)) as raised:
        await embed(embedder)
    assert raised.value is error
    assert (embedder.calls, pauses) == (1, [])


async def test_a_document_lands_when_its_worker_is_back(tmp_path) -> None:
    embedder = Failing(*(errors.EngineRestarting("wait", retry_after=0.01) for _ in range(4)))
    async with library(tmp_path, embedder) as lib:
        assert (await lib.upsert("t", "c", document("d", "word1"))).status is UpsertStatus.CREATED
        embedder.faults = [errors.EngineRestarting("wait", retry_after=0.01), errors.Draining("closing")]
        with pytest.raises(errors.Draining):
            await lib.upsert("t", "c", document("e", "word2"))
        assert (await lib.list_collections("t"))[0].documents == 1
