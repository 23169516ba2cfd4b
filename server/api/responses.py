"""From the words of `server/types.py` to the messages of `millrace.v1`. Pure functions."""

from collections.abc import Sequence
from dataclasses import fields

from millrace.server.api import retrieval_convert
from millrace.server.api.bounds import bounds_of
from millrace.server.api.requests import ANSWER_MODES, PRIORITIES, SAMPLING_SCALARS
from millrace.server.gateway.collect import Collected
from millrace.server.gateway.routing import ModelCard, ModelState
from millrace.server.types import (
    AnswerMode,
    ChoiceDelta,
    Citation,
    Completed,
    Deltas,
    Finish,
    FinishReason,
    GenerateEvent,
    Logprobs,
    Sampling,
    Source,
    Started,
    Timings,
    Usage,
)
from millrace.v1 import generation_pb2 as pb
from millrace.v1 import model_pb2

PRIORITY_NUMBERS = {priority: number for number, priority in PRIORITIES.items()}
ANSWER_MODE_NUMBERS = {mode: number for number, mode in ANSWER_MODES.items()}
FINISH_REASONS = {reason: f"FINISH_REASON_{reason.name}" for reason in FinishReason}
MODEL_STATES = {state: f"MODEL_STATE_{state.name}" for state in ModelState}
MAX_TOP_LOGPROBS = int(bounds_of(pb.LogprobOptions.DESCRIPTOR.fields_by_name["top_n"]).maximum)
MAX_N = int(bounds_of(pb.SamplingParams.DESCRIPTOR.fields_by_name["n"]).maximum)


def stream_response(sequence: int, event: GenerateEvent) -> pb.StreamGenerateResponse:
    match event:
        case Deltas():
            return pb.StreamGenerateResponse(sequence=sequence, deltas=_deltas(event))
        case Citation():
            return pb.StreamGenerateResponse(sequence=sequence, citation=_citation(event))
        case Started():
            return pb.StreamGenerateResponse(sequence=sequence, started=_started(event))
        case Completed():
            completed = pb.Completed(usage=_usage(event.usage), timings=_timings(event.timings))
            return pb.StreamGenerateResponse(sequence=sequence, completed=completed)


def generate_response(answer: Collected, *, with_token_ids: bool) -> pb.GenerateResponse:
    started, completed = answer.started, answer.completed
    choices = [
        pb.Choice(
            index=choice.index,
            text=choice.text,
            token_ids=pb.TokenIds(ids=choice.token_ids) if with_token_ids else None,
            logprobs=_logprobs(choice.logprobs),
            finish=_finish(choice.finish),
        )
        for choice in answer.choices
    ]
    return pb.GenerateResponse(
        request_id=started.request_id,
        model=started.model,
        model_revision=started.model_revision,
        choices=choices,
        prompt=_prompt_info(started.prompt_ids),
        usage=_usage(completed.usage),
        timings=_timings(completed.timings),
        effective_sampling=sampling(started.sampling, started.n),
        sources=map(_source, started.sources),
        citations=map(_citation, answer.citations),
        answer_mode=_answer_mode(started.answer_mode),
    )


def _started(event: Started) -> pb.Started:
    return pb.Started(
        request_id=event.request_id,
        model=event.model,
        model_revision=event.model_revision,
        effective_sampling=sampling(event.sampling, event.n),
        prompt=_prompt_info(event.prompt_ids),
        usage=_usage(event.usage),
        effective_priority=PRIORITY_NUMBERS[event.priority],
        effective_max_output_tokens=event.max_output_tokens,
        sources=map(_source, event.sources),
        answer_mode=_answer_mode(event.answer_mode),
        effective_max_context_tokens=event.max_context_tokens,
        prompt_digest=event.prompt_digest,
    )


def _answer_mode(mode: AnswerMode | None) -> pb.AnswerMode:
    return pb.ANSWER_MODE_UNSPECIFIED if mode is None else ANSWER_MODE_NUMBERS[mode]


def _source(source: Source) -> pb.Source:
    return pb.Source(number=source.number, chunk=retrieval_convert.retrieved_chunk(source.hit))


def _citation(citation: Citation) -> pb.Citation:
    return pb.Citation(**{field.name: getattr(citation, field.name) for field in fields(citation)})


def sampling(values: Sampling, n: int | None = None) -> pb.SamplingParams:
    scalars = {name: getattr(values, name) for name in SAMPLING_SCALARS}
    return pb.SamplingParams(**scalars, n=n, logit_bias=values.logit_bias)


def model_defaults(values: Sampling) -> pb.SamplingParams:
    """What unset parameters mean; an unset seed means a new one for each request, so it stays unset."""
    message = sampling(values)
    message.ClearField("seed")
    return message


def _prompt_info(ids: Sequence[int] | None) -> pb.PromptInfo | None:
    return None if ids is None else pb.PromptInfo(token_ids=pb.TokenIds(ids=ids))


def _deltas(event: Deltas) -> pb.Deltas:
    return pb.Deltas(choices=map(_choice_delta, event.choices), usage=_usage(event.usage))


def _choice_delta(delta: ChoiceDelta) -> pb.ChoiceDelta:
    return pb.ChoiceDelta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=_logprobs(delta.logprobs),
        finish=_finish(delta.finish),
        token_offset=delta.token_offset,
    )


def _finish(finish: Finish | None) -> pb.FinishInfo | None:
    if finish is None:
        return None
    return pb.FinishInfo(
        reason=FINISH_REASONS[finish.reason], stop_string=finish.stop_string, stop_token_id=finish.stop_token_id
    )


def _logprobs(values: Logprobs | None) -> pb.Logprobs | None:
    if values is None:
        return None
    return pb.Logprobs(
        sampled=values.sampled,
        top_n=values.top_n,
        top_token_ids=values.top_token_ids,
        top_logprobs=values.top_logprobs,
    )


def _usage(usage: Usage | None) -> pb.Usage | None:
    if usage is None:
        return None
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        output_tokens=usage.output_tokens,
        embedding_tokens=usage.embedding_tokens,
    )


def _timings(timings: Timings) -> pb.Timings:
    return pb.Timings(
        queue_us=timings.queue_us,
        time_to_first_token_us=timings.time_to_first_token_us,
        total_us=timings.total_us,
        preemptions=timings.preemptions,
    )


def model(card: ModelCard, max_request_bytes: int) -> model_pb2.Model:
    """What only a loaded model knows is unset until it is."""
    status = card.status()
    message = model_pb2.Model(
        name=card.name,
        aliases=card.aliases,
        tokenizer_sha256=card.tokenizer.sha256,
        limits=model_pb2.ModelLimits(
            max_top_logprobs=MAX_TOP_LOGPROBS, max_n=MAX_N, max_request_bytes=max_request_bytes
        ),
        default_sampling=model_defaults(card.default_sampling),
        capabilities=card.capabilities,
        state=MODEL_STATES[status.state],
        state_reason=status.reason,
        answer_mode=ANSWER_MODE_NUMBERS[card.answer_mode],
    )
    if info := status.info:
        message.revision = info.fingerprint
        message.backend = info.executor
        message.architecture = info.architecture
        message.parameters = info.parameters
        message.kv_block_size = info.kv_block_size
        message.kv_total_blocks = info.kv_total_blocks
        message.limits.max_context_tokens = info.max_model_len
    return message
