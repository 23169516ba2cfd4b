"""The table of errors, end to end: what a client sees for each kind of fault."""

import asyncio

import grpc
import pytest

from millrace.server import errors
from millrace.v1 import generation_pb2 as pb
from millrace.v1 import model_pb2, tokenizer_pb2

CODE = grpc.StatusCode


def ask(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"model": "builtin", "text": "Hello", **fields})


async def fails(call: object) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def received(*choices: pb.ReceivedChoice) -> pb.GenerateRequest:
    return ask(continue_from=pb.ContinueFrom(model_revision="r", prompt_digest="d", choices=choices))


def chat(role: int, *texts: str) -> pb.ChatPrompt:
    parts = [pb.ContentPart(text=text) for text in texts]
    return pb.ChatPrompt(messages=[pb.ChatMessage(role=role, parts=parts)])


USER = pb.CHAT_ROLE_USER

BAD = {
    "no model": (ask(model=""), "model"),
    "no prompt": (pb.GenerateRequest(model="builtin"), "prompt"),
    "empty text": (ask(text=""), "text"),
    "no messages": (pb.GenerateRequest(model="builtin", chat=pb.ChatPrompt()), "chat.messages"),
    "no role": (pb.GenerateRequest(model="builtin", chat=chat(0, "hi")), "chat.messages[0].role"),
    "unknown role": (pb.GenerateRequest(model="builtin", chat=chat(99, "hi")), "chat.messages[0].role"),
    "no parts": (pb.GenerateRequest(model="builtin", chat=chat(USER)), "chat.messages[0].parts"),
    "no ids": (pb.GenerateRequest(model="builtin", token_ids=pb.TokenIds()), "token_ids"),
    "both ids": (
        pb.GenerateRequest(model="builtin", token_ids=pb.TokenIds(ids=[1], ids_le32=b"\1\0\0\0")),
        "token_ids.ids_le32",
    ),
    "odd bytes": (pb.GenerateRequest(model="builtin", token_ids=pb.TokenIds(ids_le32=b"\1\0")), "token_ids.ids_le32"),
    "NaN": (ask(sampling=pb.SamplingParams(temperature=float("nan"))), "sampling.temperature"),
    "infinity": (ask(sampling=pb.SamplingParams(top_p=float("inf"))), "sampling.top_p"),
    "negative": (ask(sampling=pb.SamplingParams(temperature=-1)), "sampling.temperature"),
    "absurd": (ask(sampling=pb.SamplingParams(n=2**32 - 1)), "sampling.n"),
    "10,000 stops": (ask(stopping=pb.StoppingCriteria(stop_strings=["x"] * 10_000)), "stopping.stop_strings"),
    "bad id": (ask(request_id="a b"), "request_id"),
    "no revision": (ask(continue_from=pb.ContinueFrom(prompt_digest="d")), "continue_from.model_revision"),
    "no digest": (ask(continue_from=pb.ContinueFrom(model_revision="r")), "continue_from.prompt_digest"),
    "no such choice": (received(pb.ReceivedChoice(index=1)), "continue_from.choices[0].index"),
    "a choice twice": (received(*[pb.ReceivedChoice()] * 2), "continue_from.choices[1].index"),
    "both ids received": (
        received(pb.ReceivedChoice(token_ids=pb.TokenIds(ids=[1], ids_le32=b"1234"))),
        "continue_from.choices[0].token_ids.ids_le32",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
async def test_bad_fields_are_named(house, details_of, name: str, method: str) -> None:
    request, field = BAD[name]
    call = getattr(house.generation, method)(request)
    error = await fails(call if method == "Generate" else call.read())
    found = details_of(error)
    assert error.code() == CODE.INVALID_ARGUMENT
    assert found["ErrorInfo"].reason == "FIELD_INVALID"
    assert [v.field for v in found["BadRequest"].field_violations] == [field]
    assert not house.backend.requests


async def test_many_violations_at_once(house, details_of) -> None:
    request = ask(stopping=pb.StoppingCriteria(stop_strings=[""] * 8), sampling=pb.SamplingParams(n=9, top_p=2))
    found = details_of(await fails(house.generation.Generate(request)))
    assert len(found["BadRequest"].field_violations) == 10


def latin_1(message: pb.GenerateRequest) -> bytes:
    """The message with its one ä in another encoding, of the same length."""
    return message.SerializeToString().replace("ä".encode(), "ä ".encode("latin-1"))


def field(number: int, raw: bytes) -> bytes:
    size = len(raw)
    return bytes((8 * number + 2, size & 127 | 128, size >> 7 & 127 | 128, size >> 14)) + raw


def nested(depth: int) -> bytes:
    """A request whose template_kwargs hold lists in lists, deeper than protobuf reads."""
    raw = b""
    for _ in range(depth):
        raw = field(6, field(1, raw))
    return field(4, field(4, field(1, field(2, raw))))


UNREADABLE = {
    "bad UTF-8": (b"\x0a\x02\xff\xfe", "model"),
    "bad prompt": (latin_1(ask(text="ä")), "text"),
    "bad message": (
        latin_1(
            pb.GenerateRequest(chat=pb.ChatPrompt(messages=[*chat(USER, "a").messages, *chat(USER, "b", "ä").messages]))
        ),
        "chat.messages[1].parts[1].text",
    ),
    "bad stop": (latin_1(ask(stopping=pb.StoppingCriteria(stop_strings=["x", "ä"]))), "stopping.stop_strings[1]"),
    "bad label": (latin_1(ask(labels={"team": "ä"})), "labels[0].value"),
    "after numbers": (
        latin_1(ask(sampling=pb.SamplingParams(top_p=0.5, seed=2**63, logit_bias={1: 1}), request_id="ä")),
        "request_id",
    ),
    "short": (b"\x0a\xff", "request"),
    "noise": (b"\xff" * 20, "request"),
    "short nested": (b"\x2a\x01\x0d", "sampling"),
    "too much to look at": (b"\x2a\x00" * 2000 + b"\x0a\x01\xff", "request"),
    "too deep": (nested(3000), "request"),
}


@pytest.mark.parametrize(("raw", "field"), UNREADABLE.values(), ids=UNREADABLE)
async def test_what_cannot_be_parsed_is_the_clients_fault(house, details_of, raw: bytes, field: str) -> None:
    for method, kind in (("Generate", house.channel.unary_unary), ("StreamGenerate", house.channel.unary_stream)):
        call = kind(f"/millrace.v1.GenerationService/{method}")(raw)
        error = await fails(call if method == "Generate" else call.read())
        assert error.code() == CODE.INVALID_ARGUMENT
        found = details_of(error)
        assert found["ErrorInfo"].reason == "FIELD_INVALID"
        assert [v.field for v in found["BadRequest"].field_violations] == [field]


async def test_a_call_without_a_message(house, reason_of) -> None:
    async def nothing():  # type: ignore[no-untyped-def]  # an empty request stream
        return
        yield

    error = await fails(house.channel.stream_unary("/millrace.v1.GenerationService/Generate")(nothing()))
    assert error.code() == CODE.INVALID_ARGUMENT
    assert reason_of(error).reason == "FIELD_INVALID"


async def test_an_unknown_field_is_refused_not_ignored(house, details_of) -> None:
    raw = ask().SerializeToString() + b"\x52\x00"  # field 10, kept for structured output
    error = await fails(house.channel.unary_unary("/millrace.v1.GenerationService/Generate")(raw))
    assert "field number 10" in details_of(error)["BadRequest"].field_violations[0].description


async def test_unknown_models(house, details_of) -> None:
    for call in (
        house.generation.Generate(ask(model="nope")),
        house.models.GetModel(model_pb2.GetModelRequest(name="nope")),
        house.tokens.Tokenize(tokenizer_pb2.TokenizeRequest(model="nope", texts=["x"])),
    ):
        error = await fails(call)
        found = details_of(error)
        assert error.code() == CODE.NOT_FOUND
        assert found["ErrorInfo"].reason == "MODEL_NOT_FOUND"
        assert found["ResourceInfo"].resource_name == "nope"


async def test_a_prompt_beyond_the_context(house, details_of) -> None:
    error = await fails(house.generation.Generate(ask(text="word " * 2000)))
    info = details_of(error)["ErrorInfo"]
    assert (error.code(), info.reason) == (CODE.INVALID_ARGUMENT, "PROMPT_TOO_LONG")
    assert int(info.metadata["prompt_tokens"]) > int(info.metadata["limit"])


async def test_a_message_above_the_cap_is_not_read(house) -> None:
    error = await fails(house.generation.Generate(ask(text="x" * (house.server.max_request_bytes + 1))))
    assert error.code() == CODE.RESOURCE_EXHAUSTED
    assert not house.backend.requests


async def test_ids_in_use_and_quota(house, details_of) -> None:
    house.backend.resumed.clear()
    call = house.generation.StreamGenerate(ask(request_id="same"))
    await call.read()
    error = await fails(house.generation.Generate(ask(request_id="same", sampling=pb.SamplingParams(seed=1))))
    assert (error.code(), details_of(error)["ErrorInfo"].reason) == (CODE.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
    house.limit = 1
    error = await fails(house.generation.Generate(ask()))
    found = details_of(error)
    assert (error.code(), found["ErrorInfo"].reason) == (CODE.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert found["QuotaFailure"].violations[0].subject == "default"
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
    call.cancel()


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (errors.QueueFull("full"), CODE.RESOURCE_EXHAUSTED),
        (errors.ModelLoading("loading"), CODE.UNAVAILABLE),
        (errors.EngineRestarting("restarting"), CODE.UNAVAILABLE),
        (errors.ExceedsKVCapacity("too big"), CODE.INVALID_ARGUMENT),
        (errors.FeatureUnsupported("cannot"), CODE.INVALID_ARGUMENT),
    ],
    ids=lambda value: getattr(value, "reason", ""),
)
async def test_rejections_by_the_backend(house, details_of, cause: errors.RequestError, code: grpc.StatusCode) -> None:
    house.backend.error = cause
    for method in ("Generate", "StreamGenerate"):
        call = getattr(house.generation, method)(ask())
        error = await fails(call if method == "Generate" else call.read())
        assert (error.code(), details_of(error)["ErrorInfo"].reason) == (code, cause.reason)
        pushback = dict(error.trailing_metadata()).get("grpc-retry-pushback-ms")
        assert (pushback is not None and int(pushback) >= 0) == (cause.retry_after is not None)


async def test_an_engine_lost_in_a_stream(house, reason_of) -> None:
    house.backend.error, house.backend.fail_after = errors.EngineLost("lost"), 2
    call = house.generation.StreamGenerate(ask(sampling=pb.SamplingParams(seed=77)))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        [message async for message in call]
    info = reason_of(raised.value)
    assert (raised.value.code(), info.reason) == (CODE.ABORTED, "ENGINE_LOST")
    assert info.metadata["seed"] == "77"
    assert int(info.metadata["last_sequence"]) >= 2


async def test_an_engine_lost_in_a_unary_call_can_be_retried(house, reason_of) -> None:
    house.backend.error, house.backend.fail_after = errors.EngineLost("lost"), 2
    error = await fails(house.generation.Generate(ask()))
    assert (error.code(), reason_of(error).reason) == (CODE.UNAVAILABLE, "ENGINE_RESTARTING")


async def test_an_answer_of_another_model_does_not_go_on(house, details_of) -> None:
    place = pb.ContinueFrom(model_revision="other", prompt_digest="d", choices=[pb.ReceivedChoice()])
    error = await fails(house.generation.Generate(ask(continue_from=place)))
    info = details_of(error)["ErrorInfo"]
    assert (error.code(), info.reason) == (CODE.FAILED_PRECONDITION, "MODEL_REVISION_CHANGED")
    assert info.metadata["continue_from"] == "other"
    place.model_revision = info.metadata["model_revision"]
    error = await fails(house.generation.Generate(ask(continue_from=place)))
    assert (error.code(), details_of(error)["ErrorInfo"].reason) == (CODE.FAILED_PRECONDITION, "PROMPT_CHANGED")


async def test_a_drain_ends_what_the_client_has_begun_to_see(house, reason_of) -> None:
    house.backend.resumed.clear()
    stream = house.generation.StreamGenerate(ask(sampling=pb.SamplingParams(seed=77)))
    assert (await stream.read()).HasField("started")
    unary = asyncio.ensure_future(fails(house.generation.Generate(ask())))
    while len(house.backend.live) < 2:  # noqa: ASYNC110  # the fake tells nobody
        await asyncio.sleep(0.01)
    await house.gateway.drain(0)
    error = await fails(stream.read())
    info = reason_of(error)
    assert (error.code(), info.reason) == (CODE.ABORTED, "DRAINED")
    assert (info.metadata["last_sequence"], info.metadata["seed"]) == ("1", "77")
    assert "grpc-retry-pushback-ms" not in dict(error.trailing_metadata())
    error = await unary
    assert (error.code(), reason_of(error).reason) == (CODE.UNAVAILABLE, "DRAINING")


async def test_a_bug_shows_an_incident_and_no_more(house, reason_of) -> None:
    def explode(request: object, choice: int) -> list[int]:
        raise ValueError("the secret text")

    house.backend.answer = explode
    error = await fails(house.generation.Generate(ask()))
    assert error.code() == CODE.INTERNAL
    assert "secret" not in error.details() + str(error.trailing_metadata())
    assert reason_of(error).metadata["incident_id"] in error.details()


async def test_an_unknown_method(house) -> None:
    error = await fails(house.channel.unary_unary("/millrace.v1.GenerationService/Nope")(b""))
    assert error.code() == CODE.UNIMPLEMENTED
