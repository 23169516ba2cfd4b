"""The story of a request, told by a fake backend."""

import asyncio
from contextlib import aclosing

import pytest
from fakes import INFO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.server.errors import (
    EngineLost,
    EngineRestarting,
    FeatureUnsupported,
    InvalidRequest,
    ModelNotFound,
    PromptTooLong,
    QueueFull,
)
from millrace.server.gateway.collect import collect
from millrace.server.types import (
    Caller,
    ChatPrompt,
    ChoiceDelta,
    Completed,
    Deltas,
    Finish,
    FinishReason,
    GenerateRequest,
    Message,
    OutputOptions,
    Role,
    SamplingParams,
    Started,
    StoppingCriteria,
    Usage,
)

CALLER = Caller("acme")
SAYING = "The mill turns slowly; wörds 😀 flow past the wheel, and past the old stone bridge."


def deltas_of(events) -> list[ChoiceDelta]:
    return [delta for event in events if isinstance(event, Deltas) for delta in event.choices]


async def test_story(house, ask) -> None:
    tokens = house.say(SAYING)
    events = await house.events(ask(output=OutputOptions(token_ids=True, prompt_token_ids=True)))
    started, *middle, completed = events
    assert isinstance(started, Started)
    assert isinstance(completed, Completed)
    assert (started.model, started.model_revision, started.n) == ("builtin", INFO.fingerprint, 1)
    assert started.prompt_ids == house.tokenizer.encode("Hello there")
    assert started.usage == Usage(prompt_tokens=len(started.prompt_ids))
    assert started.max_output_tokens == INFO.max_model_len - len(started.prompt_ids)
    offset = 0
    for delta in deltas_of(middle):
        assert delta.token_offset == offset
        offset += len(delta.token_ids)
    answer = collect(events).choices[0]
    assert (answer.text, answer.token_ids) == (SAYING, tokens)
    assert answer.finish == Finish(FinishReason.STOP, stop_token_id=house.eos)
    assert [d.finish is not None for d in deltas_of(middle)] == [False] * (len(middle) - 1) + [True]
    assert completed.usage == Usage(len(started.prompt_ids), 1, len(tokens))
    assert completed.timings.queue_us == 5
    assert 0 < completed.timings.time_to_first_token_us <= completed.timings.total_us
    assert house.metric("millrace_generation_tokens_total") == len(tokens)
    assert house.metric("millrace_surplus_tokens_total") == 1, "the end-of-sequence token"
    assert house.metric("millrace_request_success_total", finished_reason="stop") == 1


async def test_include_stop_keeps_the_stop_token(house, ask) -> None:
    tokens = house.say(SAYING)
    answer = await house.run(ask(output=OutputOptions(token_ids=True), stopping=StoppingCriteria(include_stop=True)))
    assert answer.choices[0].token_ids == [*tokens, house.eos]
    assert answer.choices[0].text == SAYING
    assert answer.completed.usage.output_tokens == len(tokens) + 1


async def test_choices_share_messages(house, ask) -> None:
    words = ["short", "a rather longer answer", "middling answer"]
    answers = [house.say(word) for word in words]
    house.backend.answer = lambda request, choice: [*answers[choice], house.eos]
    events = await house.events(ask(sampling=SamplingParams(n=3)))
    assert [choice.text for choice in collect(events).choices] == words
    assert {delta.index for delta in events[1].choices} == {0, 1, 2}
    assert events[-1].usage.output_tokens == sum(map(len, answers))


@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
@pytest.mark.parametrize("include_stop", [False, True])
async def test_stop_string_across_tokens(house, ask, tokens_per_step: int, include_stop: bool) -> None:
    house.say(SAYING)
    house.backend.tokens_per_step = tokens_per_step
    answer = await house.run(
        ask(
            stopping=StoppingCriteria(stop_strings=("the old st", "never"), include_stop=include_stop),
            output=OutputOptions(token_ids=True, logprobs_top_n=2),
        )
    )
    choice = answer.choices[0]
    end = SAYING.index("the old st")
    assert choice.text == SAYING[:end] + ("the old st" if include_stop else "")
    assert choice.finish == Finish(FinishReason.STOP_SEQUENCE, stop_string="the old st")
    assert answer.completed.usage.output_tokens == len(choice.token_ids)
    assert house.tokenizer.decode(choice.token_ids).startswith(choice.text if include_stop else choice.text[:-1])
    assert choice.logprobs.sampled == [-float(t) for t in choice.token_ids]
    assert choice.logprobs.top_token_ids == [t + k for t in choice.token_ids for k in (0, 1)]
    surplus = house.metric("millrace_surplus_tokens_total")
    assert surplus == 0 if include_stop and tokens_per_step == 1 else surplus > 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    text=st.text(st.sampled_from("ab é😀\n"), min_size=1, max_size=30),
    stops=st.lists(st.text(st.sampled_from("ab é😀"), min_size=1, max_size=3), max_size=2),
    tokens_per_step=st.integers(1, 6),
    max_tokens_per_message=st.none() | st.integers(1, 4),
    n=st.integers(1, 3),
)
def test_every_chunking_gives_the_same_answer(
    house, ask, text, stops, tokens_per_step, max_tokens_per_message, n
) -> None:
    """Streams differ in their messages only, and log-probabilities stay with their tokens."""
    tokens = house.say(text)

    def request(limit: int | None) -> GenerateRequest:
        return ask(
            sampling=SamplingParams(n=n),
            stopping=StoppingCriteria(stop_strings=tuple(stops)),
            output=OutputOptions(token_ids=True, logprobs_top_n=1, max_tokens_per_message=limit),
        )

    house.backend.tokens_per_step = 1000
    whole = asyncio.run(house.run(request(None)))
    house.backend.tokens_per_step = tokens_per_step
    events = asyncio.run(house.events(request(max_tokens_per_message)))
    pieces = collect(events)
    assert pieces.choices == whole.choices
    assert pieces.completed.usage == whole.completed.usage
    matches = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    _, end, stop = min(matches, default=(0, len(text), None))
    for choice in pieces.choices:
        assert (choice.text, choice.finish.stop_string) == (text[:end], stop), "the match that is complete first"
        assert choice.token_ids == tokens[: len(choice.token_ids)]
        assert choice.logprobs.sampled == [-float(t) for t in choice.token_ids]
    if max_tokens_per_message:
        assert max(len(delta.token_ids) for delta in deltas_of(events)) <= max_tokens_per_message


async def test_output_that_nobody_wants_is_not_sent(house, ask) -> None:
    tokens = house.say(SAYING)
    events = await house.events(ask(output=OutputOptions(text=False)))
    assert len(deltas_of(events)) == 1
    assert events[-1].usage.output_tokens == len(tokens)
    events = await house.events(ask(output=OutputOptions(text=False, token_ids=True)))
    assert all(delta.text == "" for delta in deltas_of(events))
    assert collect(events).choices[0].token_ids == tokens


async def test_continuous_usage(house, ask) -> None:
    house.say(SAYING)
    events = await house.events(ask(output=OutputOptions(continuous_usage=True)))
    counts = [event.usage.output_tokens for event in events[1:]]
    assert counts == sorted(counts)
    assert counts[0] > 0


async def test_seed_is_picked_and_returned(house, ask) -> None:
    seeds = [(await house.run(ask())).started.sampling.seed for _ in range(20)]
    assert len(set(seeds)) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert [request.sampling.seed for request in house.backend.requests] == seeds
    assert (await house.run(ask(sampling=SamplingParams(seed=0)))).started.sampling.seed == 0


async def test_sampling_is_the_request_over_the_models_defaults(house, ask) -> None:
    started = (await house.run(ask(sampling=SamplingParams(temperature=0, logit_bias={5: 1.5})))).started
    assert (started.sampling.temperature, started.sampling.top_p, started.sampling.repetition_penalty) == (0, 0.9, 1.1)
    assert house.backend.requests[-1].sampling == started.sampling
    assert started.sampling.logit_bias == {5: 1.5}


async def test_limits_of_the_output(house, ask) -> None:
    house.say(SAYING)
    answer = await house.run(ask(stopping=StoppingCriteria(max_output_tokens=4)))
    assert answer.choices[0].finish == Finish(FinishReason.MAX_TOKENS)
    assert answer.started.max_output_tokens == answer.completed.usage.output_tokens == 4
    answer = await house.run(ask(prompt=(7,) * (INFO.max_model_len - 3), stopping=StoppingCriteria()))
    assert answer.choices[0].finish == Finish(FinishReason.CONTEXT_LENGTH)
    assert answer.started.max_output_tokens == answer.completed.usage.output_tokens == 3
    answer = await house.run(
        ask(prompt=(7,) * (INFO.max_model_len - 3), stopping=StoppingCriteria(max_output_tokens=3))
    )
    assert answer.choices[0].finish == Finish(FinishReason.MAX_TOKENS)


async def test_stop_tokens(house, ask) -> None:
    tokens = house.say(SAYING)
    third = tokens[2]
    answer = await house.run(ask(stopping=StoppingCriteria(stop_token_ids=(third,)), output=OutputOptions(True, True)))
    assert answer.choices[0].token_ids == tokens[: tokens.index(third)]
    assert answer.choices[0].finish == Finish(FinishReason.STOP, stop_token_id=third)
    await house.run(ask(stopping=StoppingCriteria(ignore_eos=True, max_output_tokens=2)))
    assert house.backend.requests[-1].stop_token_ids == frozenset()


async def test_prompts(house, ask) -> None:
    chat = ChatPrompt([Message(Role.USER, "What is a mill race?")])
    await house.run(ask(prompt=chat))
    text, ids = await house.gateway.render_chat("builtin", chat)
    assert list(house.backend.requests[-1].prompt_ids) == ids
    assert "What is a mill race?" in text
    await house.run(ask(prompt=(1, 2, 3, 4), stopping=StoppingCriteria(truncate_prompt_tokens=3)))
    assert list(house.backend.requests[-1].prompt_ids) == [2, 3, 4]
    long = "word " * 5000
    await house.run(ask(prompt=long, stopping=StoppingCriteria(truncate_prompt_tokens=100)))
    assert list(house.backend.requests[-1].prompt_ids) == house.tokenizer.encode(long)[-100:]


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"prompt": "word " * 500}, PromptTooLong, "text"),
        ({"prompt": (1,) * 256}, PromptTooLong, "token_ids.ids"),
        ({"prompt": ChatPrompt([Message(Role.USER, "word " * 500)])}, PromptTooLong, "chat"),
        ({"prompt": ()}, InvalidRequest, "token_ids.ids"),
        ({"prompt": (1, 8191, 8192)}, InvalidRequest, "token_ids.ids[2]"),
        ({"stopping": StoppingCriteria(stop_token_ids=(1, 9000))}, InvalidRequest, "stopping.stop_token_ids[1]"),
        ({"sampling": SamplingParams(logit_bias={9000: 1})}, InvalidRequest, "sampling.logit_bias[9000]"),
        (
            {"stopping": StoppingCriteria(min_output_tokens=5, max_output_tokens=4)},
            InvalidRequest,
            "stopping.min_output_tokens",
        ),
    ],
)
async def test_bad_requests_name_the_field(house, ask, fields, error, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await house.events(ask(**fields))
    assert type(caught.value) is error
    assert [violation.field for violation in caught.value.violations] == [field]
    assert not house.backend.requests
    house.check_idle()
    assert house.metric("millrace_request_failure_total", reason=error.reason) == 1


async def test_too_long_says_by_how_much(house, ask) -> None:
    with pytest.raises(PromptTooLong) as caught:
        await house.events(ask(prompt=(1,) * 300))
    assert caught.value.metadata == {"prompt_tokens": "300", "limit": "255"}


async def test_unknown_model_and_missing_template(house, ask, builtin_card) -> None:
    with pytest.raises(ModelNotFound, match="builtin"):
        await house.events(GenerateRequest(model="gpt", prompt="hello"))
    object.__setattr__(house.gateway.model("default"), "template", None)
    with pytest.raises(FeatureUnsupported):
        await house.events(ask(prompt=ChatPrompt([Message(Role.USER, "hello")])))


@pytest.mark.parametrize(
    ("steps", "error", "raised"),
    [
        (0, QueueFull("full"), QueueFull),
        (0, EngineRestarting("lost"), EngineRestarting),
        (1, EngineRestarting("lost"), EngineLost),
        (3, EngineLost("lost"), EngineLost),
    ],
)
async def test_errors_of_the_backend(house, ask, steps: int, error, raised) -> None:
    house.say(SAYING)
    house.backend.fail_after, house.backend.error = steps, error
    events = []

    async def consume() -> None:
        async with aclosing(house.gateway.generate(CALLER, ask())) as stream:
            async for event in stream:
                events.append(event)

    with pytest.raises(raised):
        await consume()
    assert len(events) == (0 if steps == 0 else steps + 1)
    house.check_idle()


async def test_time_limit_ends_with_what_there_is(house, ask) -> None:
    """What was held back as a possible stop string goes out, and the status is OK."""
    tokens = house.say("It never rains but it po po")

    request = ask(
        stopping=StoppingCriteria(time_limit=0.05, stop_strings=("pours",)),
        sampling=SamplingParams(n=2),
        output=OutputOptions(token_ids=True),
    )
    house.backend.answer = lambda request, choice: stall_after(house, tokens)
    answer = await house.run(request)
    for choice in answer.choices:
        assert choice.finish == Finish(FinishReason.TIME_LIMIT)
        assert choice.text == house.tokenizer.decode(choice.token_ids)
    assert answer.choices[0].text.endswith("po"), "held back as the start of a stop string, and then not"
    answer = await house.run(request)
    assert [choice.finish for choice in answer.choices] == [Finish(FinishReason.TIME_LIMIT)] * 2
    assert answer.completed.usage.output_tokens == 0, "the backend was still stalled"


def stall_after(house, tokens: list[int]):
    """An answer whose last token never comes."""
    yield from tokens[:-1]
    house.backend.resumed.clear()
    yield tokens[-1]
    raise AssertionError


@pytest.mark.parametrize("delay_steps", range(12))
async def test_cancelled_at_any_point_nothing_is_left(house, ask, delay_steps: int) -> None:
    house.say("word " * 3000 if delay_steps % 2 else SAYING)

    async def consume() -> None:
        async with aclosing(house.gateway.generate(CALLER, ask(prompt="word " * 100))) as stream:
            async for _ in stream:
                await asyncio.sleep(0)

    task = asyncio.create_task(consume())
    for _ in range(delay_steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    house.check_idle()
    if delay_steps:
        assert house.metric("millrace_request_failure_total", reason="CANCELLED") == 1


@pytest.mark.parametrize("events", [0, 1, 2, 5])
async def test_closed_at_any_event_nothing_is_left(house, ask, events: int) -> None:
    house.say(SAYING)
    stream = house.gateway.generate(CALLER, ask())
    for _ in range(events):
        await anext(stream)
    await stream.aclose()
    house.check_idle()


async def test_cancelled_while_a_long_prompt_is_encoded(house, ask) -> None:
    task = asyncio.create_task(house.events(ask(prompt="word " * 50_000)))
    await asyncio.sleep(0.001)
    assert house.limits.live == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    house.check_idle()
    assert not house.backend.requests


async def test_the_log_has_counts_and_no_text(house, ask, logs) -> None:
    tokens = house.say("the canary answers")
    await house.run(ask(prompt="the canary asks", request_id="job-7", labels={"team": "search"}))
    (entry,) = logs
    assert "canary" not in str(entry)
    assert (entry["request_id"], entry["tenant"], entry["outcome"]) == ("job-7", "acme", "OK")
    assert (entry["output_tokens"], entry["finish"], entry["labels"]) == (len(tokens), ["stop"], {"team": "search"})


async def test_a_matched_choice_stops_at_the_backend(house, ask) -> None:
    """At the very step of the match; the other choice goes on."""
    tokens = house.say("stop here, please")
    request = ask(sampling=SamplingParams(n=2), stopping=StoppingCriteria(stop_strings=("here",)))
    house.backend.answer = lambda request, choice: tokens * 20 if choice == 0 else [tokens[0]] * 100 + [house.eos]
    async with aclosing(house.gateway.generate(CALLER, request)) as events:
        await anext(events)
        (stream,) = house.backend.live
        rest = [event async for event in events]
    made = next(n for n in range(1, len(tokens) + 1) if "here" in house.tokenizer.decode(tokens[:n]))
    assert stream.made == {0: made, 1: 101}
    assert rest[-1].usage.output_tokens >= 100
