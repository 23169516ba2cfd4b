"""The values a request runs with: what the client set over the model's defaults."""

import secrets
import time
from typing import TypeVar

from millrace.server.errors import InvalidRequest
from millrace.server.gateway.prompt import check_vocabulary
from millrace.server.gateway.routing import ModelCard
from millrace.server.types import (
    BackendInfo,
    Caller,
    FinishReason,
    GenerateRequest,
    Priority,
    Sampling,
    SamplingParams,
    StoppingCriteria,
    TokenRequest,
)

T = TypeVar("T")


def either(value: T | None, default: T) -> T:
    return default if value is None else value


def effective_sampling(params: SamplingParams, default: Sampling) -> Sampling:
    """Fill what is unset from the model's defaults; an unset seed becomes a random one of 63 bits."""
    return Sampling(
        temperature=either(params.temperature, default.temperature),
        top_p=either(params.top_p, default.top_p),
        top_k=either(params.top_k, default.top_k),
        min_p=either(params.min_p, default.min_p),
        presence_penalty=either(params.presence_penalty, default.presence_penalty),
        frequency_penalty=either(params.frequency_penalty, default.frequency_penalty),
        repetition_penalty=either(params.repetition_penalty, default.repetition_penalty),
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        logit_bias=params.logit_bias,
    )


def output_limit(stopping: StoppingCriteria, context_left: int) -> tuple[int, FinishReason]:
    """Return the most tokens a choice may have, and why it ends when it has them."""
    asked = either(stopping.max_output_tokens, context_left + 1)
    if asked <= context_left:
        limit, reason = asked, FinishReason.MAX_TOKENS
    else:
        limit, reason = context_left, FinishReason.CONTEXT_LENGTH
    if stopping.min_output_tokens > limit:
        raise InvalidRequest.at(
            "stopping.min_output_tokens",
            f"{stopping.min_output_tokens} is more than the {limit} tokens that the output can have",
            limit=str(limit),
        )
    return limit, reason


def stop_tokens(stopping: StoppingCriteria, card: ModelCard) -> frozenset[int]:
    return frozenset(stopping.stop_token_ids) | (frozenset() if stopping.ignore_eos else card.stop_token_ids)


def effective_priority(request: GenerateRequest, caller: Caller) -> Priority:
    """The highest that the tenant may use, if the request asks for more."""
    return max(request.priority, caller.highest)


def token_request(
    card: ModelCard,
    request: GenerateRequest,
    info: BackendInfo,
    request_id: str,
    caller: Caller,
    prompt_ids: list[int],
    time_limit: float | None,
) -> tuple[TokenRequest, FinishReason]:
    """Return what the backend runs, and why a choice ends that uses up its tokens. Raises InvalidRequest.

    `time_limit`: seconds that are left of it.
    """
    check_vocabulary("stopping.stop_token_ids", request.stopping.stop_token_ids, info.vocab_size)
    for token in request.sampling.logit_bias:
        if token >= info.vocab_size:
            raise InvalidRequest.at(
                f"sampling.logit_bias[{token}]",
                f"token id {token} is not in the vocabulary of {info.vocab_size}",
                token_id=str(token),
                vocab_size=str(info.vocab_size),
            )
    limit, reason = output_limit(request.stopping, info.max_model_len - len(prompt_ids))
    tokens = TokenRequest(
        request_id=request_id,
        tenant=caller.tenant,
        prompt_ids=prompt_ids,
        sampling=effective_sampling(request.sampling, card.default_sampling),
        max_output_tokens=limit,
        n=request.sampling.n,
        min_output_tokens=request.stopping.min_output_tokens,
        stop_token_ids=stop_tokens(request.stopping, card),
        logprobs_top_n=request.output.logprobs_top_n,
        watched=bool(request.stopping.stop_strings),
        priority=effective_priority(request, caller),
        tenant_weight=caller.weight,
        queue_timeout=request.queue_timeout,
        time_limit=time_limit,
        deadline=None if caller.deadline is None else caller.deadline - time.monotonic(),
        cache=request.cache,
    )
    return tokens, reason
