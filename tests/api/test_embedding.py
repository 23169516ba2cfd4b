"""EmbeddingService over the wire: every input or none, in either layout."""

import asyncio

import grpc
import numpy as np
import pytest
from fakes import EMBEDDER, bag_vector
from served import embedding_tokenizer

from millrace.server import errors
from millrace.v1 import embedding_pb2 as pb
from millrace.v1 import generation_pb2

CODE = grpc.StatusCode
TEXTS = ["A mill race", "the mill", "race the mill", "naïve 日本"]


def texts(*values: str, **fields: object) -> pb.EmbedRequest:
    return pb.EmbedRequest(inputs=[pb.EmbedInput(text=value) for value in values], **fields)


def ids(*values: int, **fields: object) -> pb.EmbedInput:
    return pb.EmbedInput(token_ids=generation_pb2.TokenIds(ids=values, **fields))


async def fails(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def expected(tokens: list[list[int]]) -> np.ndarray:
    return np.array([np.frombuffer(bag_vector(one, EMBEDDER.dimensions), "<f4") for one in tokens])


async def test_one_row_for_each_input(house) -> None:
    tokens = [embedding_tokenizer().encode(text) for text in TEXTS]
    answer = await house.embedding.Embed(texts(*TEXTS))
    assert (answer.model, answer.model_revision, answer.dimensions) == (EMBEDDER.name, EMBEDDER.revision, 128)
    assert answer.type == pb.EMBEDDING_TYPE_FLOAT32
    assert answer.usage.embedding_tokens == sum(map(len, tokens))
    rows = np.frombuffer(answer.vectors, "<f4").reshape(len(TEXTS), 128)
    assert np.array_equal(rows, expected(tokens))
    named = await house.embedding.Embed(texts(*TEXTS, model=EMBEDDER.name, type=pb.EMBEDDING_TYPE_FLOAT32))
    assert named == answer


async def test_half_precision(house) -> None:
    whole = np.frombuffer((await house.embedding.Embed(texts(*TEXTS))).vectors, "<f4")
    answer = await house.embedding.Embed(texts(*TEXTS, type=pb.EMBEDDING_TYPE_FLOAT16))
    assert (answer.type, len(answer.vectors)) == (pb.EMBEDDING_TYPE_FLOAT16, 2 * len(TEXTS) * 128)
    assert np.array_equal(np.frombuffer(answer.vectors, "<f2"), whole.astype(np.float16))


async def test_token_ids_are_taken_as_they_are(house) -> None:
    raw = np.array([7, 8, 9], "<u4").tobytes()
    message = pb.EmbedRequest(inputs=[ids(5, 6, 7), pb.EmbedInput(text="mill"), ids(ids_le32=raw)])
    answer = await house.embedding.Embed(message)
    [request] = house.backend.embed_requests
    assert [list(one) for one in request.texts][::2] == [[5, 6, 7], [7, 8, 9]]
    rows = np.frombuffer(answer.vectors, "<f4").reshape(3, 128)
    assert np.array_equal(rows[::2], expected([[5, 6, 7], [7, 8, 9]]))


async def test_the_tenant_goes_with_it(open_house) -> None:
    async with open_house(keys=True) as house:
        await house.embedding.Embed(texts("mill"), metadata=(("authorization", "Bearer good"),))
        assert house.backend.embed_requests[0].tenant == "acme"
        assert not house.backend.embed_requests[0].background


LONG = "mill " * 500
WRONG = {
    "no inputs": (pb.EmbedRequest(), "FIELD_INVALID", "inputs"),
    "an empty input": (pb.EmbedRequest(inputs=[ids(1), pb.EmbedInput()]), "FIELD_INVALID", "inputs[1].input"),
    "an empty text": (texts("a", ""), "FIELD_INVALID", "inputs[1].text"),
    "too many": (texts(*["a"] * 257), "FIELD_INVALID", "inputs"),
    "no ids": (pb.EmbedRequest(inputs=[ids()]), "FIELD_INVALID", "inputs[0].token_ids"),
    "odd bytes": (pb.EmbedRequest(inputs=[ids(ids_le32=b"\1")]), "FIELD_INVALID", "inputs[0].token_ids.ids_le32"),
    "both ids": (pb.EmbedRequest(inputs=[ids(1, ids_le32=bytes(4))]), "FIELD_INVALID", "inputs[0].token_ids.ids_le32"),
    "foreign ids": (pb.EmbedRequest(inputs=[ids(1), ids(99_999)]), "FIELD_INVALID", "inputs[1].token_ids[0]"),
    "a long text": (texts("a", LONG), "PROMPT_TOO_LONG", "inputs[1].text"),
    "long ids": (pb.EmbedRequest(inputs=[ids(*[5] * 257)]), "PROMPT_TOO_LONG", "inputs[0].token_ids"),
    "still long when cut": (texts(LONG, truncate_tokens=300), "PROMPT_TOO_LONG", "inputs[0].text"),
    "cut to nothing": (texts("a", truncate_tokens=0), "FIELD_INVALID", "truncate_tokens"),
    "no such type": (texts("a", type=9), "FIELD_INVALID", "type"),
}  # fmt: skip


@pytest.mark.parametrize(("message", "reason", "field"), WRONG.values(), ids=WRONG)
async def test_one_wrong_input_refuses_the_request(house, details_of, message, reason: str, field: str) -> None:
    error = await fails(house.embedding.Embed(message))
    found = details_of(error)
    assert (error.code(), found["ErrorInfo"].reason) == (CODE.INVALID_ARGUMENT, reason)
    assert [v.field for v in found["BadRequest"].field_violations] == [field]
    assert not house.backend.embed_requests


async def test_truncation_counts_special_tokens(house) -> None:
    whole = embedding_tokenizer().encode("mill race the mill race")
    for count in (1, 2, 3, len(whole), 256):
        answer = await house.embedding.Embed(texts("mill race the mill race", truncate_tokens=count))
        sent = list(house.backend.embed_requests[-1].texts[0])
        assert len(sent) == answer.usage.embedding_tokens == min(count, len(whole))
    assert (await house.embedding.Embed(texts(LONG, truncate_tokens=256))).usage.embedding_tokens == 256


async def test_models_that_are_not_there(house, open_house, details_of, reason_of) -> None:
    error = await fails(house.embedding.Embed(texts("a", model="builtin")))
    found = details_of(error)
    assert (error.code(), found["ErrorInfo"].reason) == (CODE.NOT_FOUND, "MODEL_NOT_FOUND")
    assert found["ResourceInfo"].resource_name == "builtin"
    async with open_house(library=lambda: None) as other:
        assert reason_of(await fails(other.embedding.Embed(texts("a")))).reason == "FEATURE_UNSUPPORTED"


async def test_what_the_backend_says_and_the_limits_of_tenants(house, reason_of) -> None:
    house.backend.embed_error = errors.EngineRestarting("the engine restarts")
    assert reason_of(await fails(house.embedding.Embed(texts("a")))).reason == "ENGINE_RESTARTING"
    house.limit = 0
    assert reason_of(await fails(house.embedding.Embed(texts("a")))).reason == "QUOTA_EXCEEDED"


async def test_a_cancelled_call_frees_what_it_holds(house) -> None:
    house.backend.resumed.clear()
    call = house.embedding.Embed(texts("a"))
    async with asyncio.timeout(10):
        while house.limits.live == 0:  # noqa: ASYNC110  # the fake tells nobody
            await asyncio.sleep(0.01)
    call.cancel()
    assert await house.limits.idle(10)
