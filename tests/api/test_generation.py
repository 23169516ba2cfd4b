"""Streams over the wire: order, numbering, equality with the unary answer, cancellation, slow readers."""

import grpc
import pytest

from millrace.v1 import generation_pb2 as pb


def ask(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"model": "builtin", "text": "Hello", **fields})


async def test_a_stream_is_started_numbered_deltas_completed(house) -> None:
    messages = [m async for m in house.generation.StreamGenerate(ask())]
    assert [m.sequence for m in messages] == list(range(1, len(messages) + 1))
    kinds = [m.WhichOneof("event") for m in messages]
    assert kinds[0] == "started"
    assert kinds[-1] == "completed"
    assert set(kinds[1:-1]) == {"deltas"}


async def test_a_stream_joined_is_the_unary_answer(house) -> None:
    request = ask(
        sampling=pb.SamplingParams(n=3, seed=5),
        output=pb.OutputOptions(token_ids=True, logprobs=pb.LogprobOptions(top_n=2), prompt_token_ids=True),
    )
    whole = await house.generation.Generate(request)
    messages = [m async for m in house.generation.StreamGenerate(request)]
    assert [choice.text for choice in whole.choices] == ["one two three four five"] * 3
    for choice in whole.choices:
        deltas = [d for m in messages for d in m.deltas.choices if d.index == choice.index]
        assert "".join(d.text for d in deltas) == choice.text
        assert [t for d in deltas for t in d.token_ids] == list(choice.token_ids.ids)
        assert [x for d in deltas for x in d.logprobs.sampled] == list(choice.logprobs.sampled)
        assert [x for d in deltas for x in d.logprobs.top_token_ids] == list(choice.logprobs.top_token_ids)
        assert [d.HasField("finish") for d in deltas] == [False] * (len(deltas) - 1) + [True]
        assert choice.finish.reason == pb.FINISH_REASON_STOP
        offsets = [d.token_offset for d in deltas]
        assert offsets == [sum(len(d.token_ids) for d in deltas[:i]) for i in range(len(deltas))]
    started = messages[0].started
    assert started.effective_sampling == whole.effective_sampling
    assert whole.effective_sampling.seed == 5
    assert started.prompt == whole.prompt
    assert list(whole.prompt.token_ids.ids) == house.tokenizer.encode("Hello")
    assert messages[-1].completed.usage == whole.usage


async def test_a_request_without_options_gets_text_alone(house) -> None:
    answer = await house.generation.Generate(ask())
    assert answer.choices[0].text
    assert not answer.choices[0].HasField("token_ids")
    assert not answer.choices[0].HasField("logprobs")
    assert not answer.HasField("prompt")


async def test_one_token_a_message_when_asked_for(house) -> None:
    house.backend.tokens_per_step = 3
    request = ask(output=pb.OutputOptions(token_ids=True), stream=pb.StreamOptions(max_tokens_per_message=1))
    messages = [m async for m in house.generation.StreamGenerate(request)]
    assert max(len(d.token_ids) for m in messages for d in m.deltas.choices) == 1


async def test_both_forms_of_token_ids_are_the_same_prompt(house) -> None:
    ids = house.tokenizer.encode("some words")
    raw = b"".join(i.to_bytes(4, "little") for i in ids)
    for form in (pb.TokenIds(ids=ids), pb.TokenIds(ids_le32=raw)):
        await house.generation.Generate(pb.GenerateRequest(model="builtin", token_ids=form))
    assert [list(r.prompt_ids) for r in house.backend.requests] == [ids, ids]


async def test_a_repeated_request_is_answered_alike_by_either_method(house) -> None:
    request = ask(request_id="job-1", labels={"b": "1", "a": "2"})
    again = ask(request_id="job-1", labels={"a": "2", "b": "1"})
    whole = await house.generation.Generate(request)
    assert await house.generation.Generate(again) == whole
    messages = [m async for m in house.generation.StreamGenerate(again)]
    assert "".join(d.text for m in messages for d in m.deltas.choices) == whole.choices[0].text
    assert [m.sequence for m in messages] == list(range(1, len(messages) + 1))
    assert len(house.backend.requests) == 1


async def test_a_cancelled_call_frees_what_it_holds(house) -> None:
    house.backend.resumed.clear()
    call = house.generation.StreamGenerate(ask())
    assert (await call.read()).HasField("started")
    assert house.limits.live == 1
    call.cancel()
    assert await house.limits.idle(10)
    assert not house.backend.live


async def test_a_deadline_frees_what_the_call_holds(house) -> None:
    house.backend.resumed.clear()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await house.generation.Generate(ask(), timeout=0.3)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert await house.limits.idle(10)
    assert not house.backend.live


async def test_a_reader_that_stands_still_is_let_go(open_house, reason_of) -> None:
    async with open_house(slow_reader_timeout=0.5) as house:
        house.script = [house.tokenizer.encode("word", add_special_tokens=False)[0]] * 250
        house.backend.tokens_per_step = 1
        output = pb.OutputOptions(token_ids=True, logprobs=pb.LogprobOptions(top_n=20))
        channel = house.connect(("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
        stream = channel.unary_stream(
            "/millrace.v1.GenerationService/StreamGenerate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.StreamGenerateResponse.FromString,
        )
        call = stream(ask(sampling=pb.SamplingParams(n=8), output=output))
        assert (await call.read()).HasField("started")
        assert await house.limits.idle(20)
        assert not house.backend.live

        async def read_on() -> None:
            last = 1
            while (message := await call.read()) is not grpc.aio.EOF:
                last += 1
                assert message.sequence == last

        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await read_on()
        info = reason_of(raised.value)
        assert info.reason == "SLOW_READER"
        assert raised.value.code() == grpc.StatusCode.ABORTED
        assert info.metadata["seed"]
        await channel.close()
