"""Tokenizer, models, health and reflection over the wire."""

import asyncio
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from millrace.server.api import endpoint
from millrace.v1 import generation_pb2 as pb
from millrace.v1 import model_pb2, tokenizer_pb2

SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


async def test_tokenize_and_back(house) -> None:
    texts = ["some words", "naïve 😀 text", ""]
    request = tokenizer_pb2.TokenizeRequest(model="builtin", texts=texts, add_special_tokens=False, offsets=True)
    found = (await house.tokens.Tokenize(request)).results
    assert [list(one.token_ids.ids) for one in found] == [house.tokenizer.encode(t, False) for t in texts]
    for text, one in zip(texts, found, strict=True):
        assert len(one.byte_offsets) == 2 * len(one.token_ids.ids)
        assert max(one.byte_offsets, default=0) == len(text.encode())
    sequences = [one.token_ids for one in found]
    back = await house.tokens.Detokenize(tokenizer_pb2.DetokenizeRequest(model="builtin", sequences=sequences))
    assert list(back.texts) == texts


async def test_special_tokens_are_added_unless_refused(house) -> None:
    answer = await house.tokens.Tokenize(tokenizer_pb2.TokenizeRequest(model="default", texts=["x"]))
    assert list(answer.results[0].token_ids.ids) == house.tokenizer.encode("x")
    assert not answer.results[0].byte_offsets


async def test_a_model_describes_itself(house) -> None:
    found = await house.models.GetModel(model_pb2.GetModelRequest(name="default"))
    assert (found.name, list(found.aliases), found.state) == ("builtin", ["default"], model_pb2.MODEL_STATE_READY)
    assert found.revision == house.backend.described.fingerprint
    assert found.tokenizer_sha256 == house.tokenizer.sha256
    assert found.limits.max_context_tokens == 256
    assert found.limits.max_request_bytes == house.server.max_request_bytes
    assert (found.limits.max_n, found.limits.max_top_logprobs) == (8, 20)
    assert found.default_sampling.HasField("temperature")
    assert not found.default_sampling.HasField("seed")


async def test_pages_of_models(house) -> None:
    card = house.gateway.routes.cards[0]
    house.gateway.routes.cards = tuple(replace(card, name=f"m{i}", aliases=()) for i in (3, 1, 4, 0, 2))
    names, token, pages = [], "", 0
    while pages == 0 or token:
        page = await house.models.ListModels(model_pb2.ListModelsRequest(page_size=2, page_token=token))
        names += [model.name for model in page.models]
        token, pages = page.next_page_token, pages + 1
    assert names == ["m0", "m1", "m2", "m3", "m4"]
    assert pages == 3
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await house.models.ListModels(model_pb2.ListModelsRequest(page_token="?"))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_render_chat_is_what_generation_sees(house) -> None:
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role=pb.CHAT_ROLE_USER, parts=[pb.ContentPart(text="Hi")] * 2)])
    try:
        answer = await house.tokens.RenderChat(tokenizer_pb2.RenderChatRequest(model="builtin", chat=chat))
    except grpc.aio.AioRpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017  # a model without a template says so
        assert house.gateway.model("builtin").template is None
        return
    assert "HiHi" in answer.text
    await house.generation.Generate(pb.GenerateRequest(model="builtin", chat=chat))
    assert list(house.backend.requests[-1].prompt_ids) == list(answer.token_ids.ids)


async def test_health_watch_hears_every_change(house) -> None:
    health = health_pb2_grpc.HealthStub(house.channel)
    names = ["", "millrace.v1.GenerationService", "model/builtin"]
    watches = [health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in names]
    for ready, expected in ((None, SERVING), (False, NOT_SERVING), (True, SERVING), (False, NOT_SERVING)):
        if ready is not None:
            house.server.set_ready(ready)
        assert [(await watch.read()).status for watch in watches] == [expected] * 3
        checks = [(await health.Check(health_pb2.HealthCheckRequest(service=name))).status for name in names]
        assert checks == [expected] * 3
    listed = (await health.List(health_pb2.HealthListRequest())).statuses
    assert set(names) < set(listed)
    for watch in watches:
        watch.cancel()


async def test_health_of_what_does_not_exist(house, reason_of) -> None:
    health = health_pb2_grpc.HealthStub(house.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="nope"))
    assert (await watch.read()).status == SERVICE_UNKNOWN
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await health.Check(health_pb2.HealthCheckRequest(service="nope"))
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    assert reason_of(raised.value).reason == "NOT_FOUND"
    watch.cancel()


async def test_stopping_tells_watchers_first_and_lets_streams_finish(house) -> None:
    health = health_pb2_grpc.HealthStub(house.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    house.backend.resumed.clear()
    call = house.generation.StreamGenerate(pb.GenerateRequest(model="builtin", text="Hello"))
    assert (await call.read()).HasField("started")
    stopping = asyncio.create_task(house.server.stop(30))
    assert (await watch.read()).status == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await watch.read()
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    house.backend.resumed.set()
    kinds = []
    while (message := await call.read()) is not grpc.aio.EOF:
        kinds.append(message.WhichOneof("event"))
    assert kinds[-1] == "completed"
    async with asyncio.timeout(20):
        await stopping


async def test_reflection_lists_and_describes_the_services(house) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(house.channel)
    Request = reflection_pb2.ServerReflectionRequest  # noqa: N806  # it is a class
    requests = [
        Request(list_services=""),
        Request(file_containing_symbol="millrace.v1.GenerationService"),
        Request(file_containing_symbol="nope"),
    ]
    listed, described, missing = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
    assert {service.name for service in listed.list_services_response.service} == {
        "millrace.v1.EmbeddingService",
        "millrace.v1.GenerationService",
        "millrace.v1.ModelService",
        "millrace.v1.RetrievalService",
        "millrace.v1.TokenizerService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert b"StreamGenerate" in b"".join(described.file_descriptor_response.file_descriptor_proto)
    assert missing.HasField("error_response")


async def test_a_client_stream_may_rest_between_two_messages(house, monkeypatch, reason_of) -> None:
    monkeypatch.setattr(endpoint, "BODY_TIMEOUT", 0.1)
    monkeypatch.setattr(endpoint, "MAX_STRANGERS", 2)
    stub = reflection_pb2_grpc.ServerReflectionStub(house.channel)
    calls = []
    for _ in range(3):
        calls.append(call := stub.ServerReflectionInfo())
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await call.read()).HasField("list_services_response")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await calls[0].read()
    assert reason_of(raised.value).reason == "OVERLOADED", "the one that rested longest gives way"
    await asyncio.sleep(0.3)
    await calls[1].write(reflection_pb2.ServerReflectionRequest(list_services=""))
    assert (await calls[1].read()).HasField("list_services_response")
    async with asyncio.timeout(10):
        await house.server.stop(30)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await calls[2].read()
    assert reason_of(raised.value).reason == "DRAINING", "a stop does not wait for streams that rest"
