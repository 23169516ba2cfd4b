"""From the messages of `millrace.v1` to the words of `server/types.py`. Pure functions.

Messages have passed `bounds.check`; only rules that span fields are checked here.
"""

import hashlib
import sys
from array import array

from google.protobuf.json_format import MessageToDict

from millrace.server.api import retrieval_convert
from millrace.server.errors import InvalidRequest
from millrace.server.types import (
    AnswerMode,
    CachePolicy,
    ChatPrompt,
    ContinueFrom,
    GenerateRequest,
    Message,
    OutputOptions,
    Priority,
    ReceivedChoice,
    RetrievalOptions,
    Role,
    SamplingParams,
    StoppingCriteria,
)
from millrace.v1 import generation_pb2 as pb

ROLES = {
    pb.CHAT_ROLE_SYSTEM: Role.SYSTEM,
    pb.CHAT_ROLE_USER: Role.USER,
    pb.CHAT_ROLE_ASSISTANT: Role.ASSISTANT,
    pb.CHAT_ROLE_TOOL: Role.TOOL,
}
PRIORITIES = {
    pb.PRIORITY_HIGH: Priority.HIGH,
    pb.PRIORITY_NORMAL: Priority.NORMAL,
    pb.PRIORITY_LOW: Priority.LOW,
}
ANSWER_MODES = {
    pb.ANSWER_MODE_GENERATIVE: AnswerMode.GENERATIVE,
    pb.ANSWER_MODE_EXTRACTIVE: AnswerMode.EXTRACTIVE,
}
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


def generate_request(message: pb.GenerateRequest) -> GenerateRequest:
    """Raises InvalidRequest where fields contradict each other."""
    return GenerateRequest(
        model=message.model,
        prompt=_prompt(message),
        sampling=_sampling_params(message.sampling),
        stopping=_stopping(message.stopping),
        output=_output(message),
        request_id=message.request_id,
        digest=_digest(message) if message.request_id else b"",
        labels=dict(message.labels),
        retrieval=_retrieval(message.retrieval) if message.HasField("retrieval") else None,
        mask_pii=message.guardrails.pii == pb.PII_ACTION_MASK,
        priority=PRIORITIES.get(message.scheduling.priority, Priority.NORMAL),
        queue_timeout=_seconds(message.scheduling, "queue_timeout"),
        cache=CachePolicy(not message.cache.bypass_read, not message.cache.bypass_write, message.cache.salt),
        continue_from=_continue_from(message) if message.HasField("continue_from") else None,
    )


def _digest(message: pb.GenerateRequest) -> bytes:
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()  # maps in one order


def _continue_from(message: pb.GenerateRequest) -> ContinueFrom:
    choices: dict[int, ReceivedChoice] = {}
    n = message.sampling.n if message.sampling.HasField("n") else 1
    for position, one in enumerate(message.continue_from.choices):
        path = f"continue_from.choices[{position}]"
        if one.index >= n:
            raise InvalidRequest.at(f"{path}.index", f"there are {n} choices (sampling.n), the first is 0")
        if one.index in choices:
            raise InvalidRequest.at(f"{path}.index", f"choice {one.index} is there twice")
        choices[one.index] = ReceivedChoice(
            tuple(token_ids(one.token_ids, f"{path}.token_ids")), one.text_bytes, one.finished
        )
    return ContinueFrom(message.continue_from.model_revision, message.continue_from.prompt_digest, choices)


def _seconds(message: pb.StoppingCriteria | pb.SchedulingOptions, name: str) -> float | None:
    duration = getattr(message, name)
    return duration.seconds + duration.nanos / 1e9 if message.HasField(name) else None


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
    return StoppingCriteria(
        max_output_tokens=message.max_output_tokens if message.HasField("max_output_tokens") else None,
        min_output_tokens=message.min_output_tokens,
        stop_strings=tuple(message.stop_strings),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
        time_limit=_seconds(message, "time_limit"),
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
