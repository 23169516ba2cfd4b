"""Building `GenerateRequest` messages from keyword arguments."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

from google.protobuf.message import Message as ProtoMessage

from millrace.server.client.documents import conditions
from millrace.server.client.fields import check_list, field, set_fields
from millrace.server.types import Message, Role
from millrace.v1 import generation_pb2 as pb

ROLES = {
    Role.SYSTEM: pb.CHAT_ROLE_SYSTEM,
    Role.USER: pb.CHAT_ROLE_USER,
    Role.ASSISTANT: pb.CHAT_ROLE_ASSISTANT,
    Role.TOOL: pb.CHAT_ROLE_TOOL,
}
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation that the model's chat template renders."""


class Options(TypedDict, total=False):
    """Fields of `SamplingParams`, `StoppingCriteria` and `GenerateRequest`; what is not given is unset there.

    Units, ranges and defaults: `proto/millrace/v1/generation.proto`, except `logprobs` (the number of most
    likely tokens to report beside the chosen one), `time_limit` (seconds), `retrieval` (fields of
    `RetrievalOptions`, see `retrieval_options`), `mask_pii` (`GuardrailOptions.pii`), `priority` ("high", "normal" or
    "low"), `queue_timeout` (seconds), `cache` (fields of `CacheOptions`) and `continue_from` (see `Received`).
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    n: int
    logit_bias: Mapping[int, float]
    max_output_tokens: int
    min_output_tokens: int
    stop_strings: Iterable[str]
    stop_token_ids: Iterable[int]
    ignore_eos: bool
    include_stop: bool
    time_limit: float
    truncate_prompt_tokens: int
    text: bool
    token_ids: bool
    prompt_token_ids: bool
    continuous_usage: bool
    logprobs: int
    max_tokens_per_message: int
    request_id: str
    labels: Mapping[str, str]
    retrieval: Mapping[str, Any]
    mask_pii: bool
    priority: str
    queue_timeout: float
    cache: Mapping[str, Any]
    continue_from: pb.ContinueFrom


def generate_request(prompt: Prompt, model: str, options: Options) -> pb.GenerateRequest:
    """Raises TypeError for an option that there is not or of another type, InvalidRequest for a value that its
    field cannot hold."""
    request = pb.GenerateRequest()
    with field("model"):
        request.model = model
    with field("prompt"):
        set_prompt(request, prompt)
    for name, value in options.items():
        with field(name):
            if name == "logprobs":
                request.output.logprobs.top_n = cast(int, value)
            elif name == "time_limit":
                request.stopping.time_limit.FromNanoseconds(round(cast(float, value) * 1e9))
            elif name == "retrieval":
                request.retrieval.CopyFrom(retrieval_options(cast(Mapping[str, Any], value)))
            elif name == "mask_pii":
                request.guardrails.pii = pb.PII_ACTION_MASK if value else pb.PII_ACTION_UNSPECIFIED
            elif name == "priority":
                set_fields(request.scheduling, {name: value}, (name,))
            elif name == "queue_timeout":
                request.scheduling.queue_timeout.FromNanoseconds(round(cast(float, value) * 1e9))
            elif name == "continue_from":
                request.continue_from.CopyFrom(cast(pb.ContinueFrom, value))
            elif name == "cache":
                values = cast(Mapping[str, Any], value)
                set_fields(request.cache, values, request.cache.DESCRIPTOR.fields_by_name.keys())
            else:
                _set(request, name, value)
    return request


def retrieval_options(values: Mapping[str, Any]) -> pb.RetrievalOptions:
    """Fields of `RetrievalOptions`; `filter` as `documents.conditions` takes it, `answer_mode` "generative" or
    "extractive", `mode` "hybrid", "lexical" or "vector"."""
    message = pb.RetrievalOptions(filter=conditions(values.get("filter", {})))
    plain = {name: value for name, value in values.items() if name != "filter"}
    set_fields(message, plain, message.DESCRIPTOR.fields_by_name.keys())
    return message


def _set(request: pb.GenerateRequest, name: str, value: object) -> None:
    parts: tuple[ProtoMessage, ...] = (request.sampling, request.stopping, request.output, request.stream, request)
    part = next((p for p in parts if name in p.DESCRIPTOR.fields_by_name and name in Options.__annotations__), None)
    if part is None:
        raise TypeError(f"there is no option `{name}`; there are {', '.join(sorted(Options.__annotations__))}")
    if part.DESCRIPTOR.fields_by_name[name].is_repeated:
        check_list(name, value)
    constructor: Any = type(part)  # it takes scalars, lists and maps alike
    part.MergeFrom(constructor(**{name: value}))


def set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Message):
        request.chat.CopyFrom(chat_prompt(cast(Sequence[Message], prompt)))
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=cast(Sequence[int], prompt)))


def chat_prompt(messages: Sequence[Message]) -> pb.ChatPrompt:
    return pb.ChatPrompt(
        messages=[
            pb.ChatMessage(role=ROLES[m.role], parts=[pb.ContentPart(text=m.content)], name=m.name) for m in messages
        ]
    )
