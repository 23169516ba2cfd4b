"""Between the messages of `millrace.v1` and the words of `server/types.py`. Pure functions.

Requests have passed `bounds.check`; only rules that span fields are checked here.
"""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import fields

from google.protobuf.json_format import MessageToDict

from millrace.server.api import retrieval_convert
from millrace.server.api.bounds import bounds_of
from millrace.server.errors import InvalidRequest
from millrace.server.gateway.collect import Collected
from millrace.server.gateway.routing import ModelCard, ModelState
from millrace.server.types import (
    AnswerMode,
    ChatPrompt,
    ChoiceDelta,
    Citation,
    Completed,
    Deltas,
    Finish,
    FinishReason,
    GenerateEvent,
    GenerateRequest,
    Logprobs,
    Message,
    OutputOptions,
    RetrievalOptions,
    Role,
    Sampling,
    SamplingParams,
    Source,
    Started,
    StoppingCriteria,
    Timings,
    Usage,
)
from millrace.v1 import generation_pb2 as pb
from millrace.v1 import model_pb2

ROLES = {
    pb.CHAT_ROLE_SYSTEM: Role.SYSTEM,
    pb.CHAT_ROLE_USER: Role.USER,
    pb.CHAT_ROLE_ASSISTANT: Role.ASSISTANT,
    pb.CHAT_ROLE_TOOL: Role.TOOL,
}
ANSWER_MODES = {
    pb.ANSWER_MODE_GENERATIVE: AnswerMode.GENERATIVE,
    pb.ANSWER_MODE_EXTRACTIVE: AnswerMode.EXTRACTIVE,
}
ANSWER_MODE_NUMBERS = {mode: number for number, mode in ANSWER_MODES.items()}
FINISH_REASONS = {reason: f"FINISH_REASON_{reason.name}" for reason in FinishReason}
MODEL_STATES = {state: f"MODEL_STATE_{state.name}" for state in ModelState}
SAMPLING_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)
MAX_TOP_LOGPROBS = int(bounds_of(pb.LogprobOptions.DESCRIPTOR.fields_by_name["top_n"]).maximum)
MAX_N = int(bounds_of(pb.SamplingParams.DESCRIPTOR.fields_by_name["n"]).maximum)


def generate_request(message: pb.GenerateRequest) -> GenerateRequest:
    """Raises InvalidRequest where fields contradict each other."""
    return GenerateRequest(
        model=message.model,
        prompt=_prompt(message),
        sampling=_sampling_params(message.sampling),
        stopping=_stopping(message.stopping),
        output=_output(message),
        request_id=message.request_id,
        labels=dict(message.labels),
        retrieval=_retrieval(message.retrieval) if message.HasField("retrieval") else None,
        mask_pii=message.guardrails.pii == pb.PII_ACTION_MASK,
    )


def _prompt(message: pb.GenerateRequest) -> str | tuple[int, ...] | ChatPrompt:
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            ids = token_ids(message.token_ids, "token_ids")
            if not ids:
                raise InvalidRequest.at("token_ids", "a prompt needs at least one token id")
            return tuple(ids)
        case _:
            return chat_prompt(message.chat)


def token_ids(message: pb.TokenIds, path: str) -> list[int]:
    """The ids of either representation, possibly none."""
    if not message.ids_le32:
        return list(message.ids)
    if message.ids:
        raise InvalidRequest.at(f"{path}.ids_le32", "set ids or ids_le32, not both")
    if len(message.ids_le32) % 4:
        raise InvalidRequest.at(f"{path}.ids_le32", f"must have 4 bytes per id, has {len(message.ids_le32)} in all")
    ids = array("I", message.ids_le32)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def chat_prompt(message: pb.ChatPrompt) -> ChatPrompt:
    return ChatPrompt(
        messages=[
            Message(ROLES[one.role], "".join(part.text for part in one.parts), one.name) for one in message.messages
        ],
        template_kwargs=MessageToDict(message.template_kwargs),
        add_generation_prompt=message.add_generation_prompt if message.HasField("add_generation_prompt") else True,
    )


def _sampling_params(message: pb.SamplingParams) -> SamplingParams:
    values = {name: getattr(message, name) for name in SAMPLING_SCALARS if message.HasField(name)}
    return SamplingParams(**values, n=message.n if message.HasField("n") else 1, logit_bias=dict(message.logit_bias))


def _stopping(message: pb.StoppingCriteria) -> StoppingCriteria:
    limit = message.time_limit
    return StoppingCriteria(
        max_output_tokens=message.max_output_tokens if message.HasField("max_output_tokens") else None,
        min_output_tokens=message.min_output_tokens,
        stop_strings=tuple(message.stop_strings),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
        time_limit=limit.seconds + limit.nanos / 1e9 if message.HasField("time_limit") else None,
        truncate_prompt_tokens=message.truncate_prompt_tokens if message.HasField("truncate_prompt_tokens") else None,
    )


def _output(message: pb.GenerateRequest) -> OutputOptions:
    output, stream = message.output, message.stream
    return OutputOptions(
        text=output.text if output.HasField("text") else True,
        token_ids=output.token_ids,
        logprobs_top_n=output.logprobs.top_n if output.HasField("logprobs") else None,
        prompt_token_ids=output.prompt_token_ids,
        continuous_usage=output.continuous_usage,
        max_tokens_per_message=stream.max_tokens_per_message if stream.HasField("max_tokens_per_message") else None,
    )


def _retrieval(message: pb.RetrievalOptions) -> RetrievalOptions:
    top_k = message.top_k if message.HasField("top_k") else retrieval_convert.DEFAULT_TOP_K
    given = message.candidates if message.HasField("candidates") else None
    return RetrievalOptions(
        collection=message.collection,
        query=message.query,
        top_k=top_k,
        candidates=retrieval_convert.candidates(given, top_k, "retrieval.candidates"),
        filter=retrieval_convert.conditions(message.filter, "retrieval.filter"),
        mode=retrieval_convert.MODES[message.mode],
        max_context_tokens=message.max_context_tokens if message.HasField("max_context_tokens") else None,
        answer_mode=ANSWER_MODES.get(message.answer_mode),
        min_support=message.min_support if message.HasField("min_support") else None,
        max_sentences=message.max_sentences if message.HasField("max_sentences") else None,
    )


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
        effective_max_output_tokens=event.max_output_tokens,
        sources=map(_source, event.sources),
        answer_mode=_answer_mode(event.answer_mode),
        effective_max_context_tokens=event.max_context_tokens,
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
