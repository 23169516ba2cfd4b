"""What the engine accepts: a request that passes can index no array outside its bounds."""

from array import array
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from millrace.server.engine.sequence import SequenceRequest
from millrace.server.engine.texts import TextRequest
from millrace.server.errors import InvalidRequest, PromptTooLong
from millrace.server.types import EmbedderInfo


def checked_request(request: SequenceRequest, vocab_size: int) -> SequenceRequest:
    """The request with its tokens as arrays of int32. InvalidRequest unless every id and count is usable."""
    prompt, output = np.asarray(request.prompt_ids, np.int64), np.asarray(request.output_ids, np.int64)
    if len(prompt) == 0:
        raise InvalidRequest.at("prompt", "is empty; give at least one token")
    for name, ids in {
        "prompt": prompt,
        "output_ids": output,
        "stopping.stop_token_ids": np.fromiter(request.stop_token_ids, np.int64),
        "sampling.logit_bias": np.fromiter(request.sampling.logit_bias, np.int64),
    }.items():
        check_ids(name, ids, vocab_size)
    if request.max_output_tokens < 1:
        raise InvalidRequest.at("stopping.max_output_tokens", f"is {request.max_output_tokens}, at least 1 is needed")
    if not 0 <= request.min_output_tokens <= request.max_output_tokens:
        raise InvalidRequest.at(
            "stopping.min_output_tokens",
            f"is {request.min_output_tokens}, not in [0, {request.max_output_tokens}] (max_output_tokens)",
        )
    if request.min_output_tokens and len(request.stop_token_ids) >= vocab_size:
        raise InvalidRequest.at("stopping.stop_token_ids", "leave no token for the first min_output_tokens")
    if len(output) >= request.max_output_tokens:
        raise InvalidRequest.at("output_ids", f"has all of the {request.max_output_tokens} tokens (max_output_tokens)")
    return replace(
        request,
        prompt_ids=array("i", prompt.astype(np.int32).tobytes()),
        output_ids=array("i", output.astype(np.int32).tobytes()),
    )


def checked_text(text: TextRequest, info: EmbedderInfo) -> TextRequest:
    """The text with its tokens as an array of int32. InvalidRequest or PromptTooLong unless it can be embedded."""
    ids = np.asarray(text.token_ids, np.int64)
    if len(ids) == 0:
        raise InvalidRequest.at("texts", "one is empty; give at least one token")
    if len(ids) > info.max_tokens:
        raise PromptTooLong(
            f"the text has {len(ids)} tokens, {info.name} takes {info.max_tokens}; shorten it or cut it into pieces",
            metadata={"text_tokens": str(len(ids)), "limit": str(info.max_tokens)},
        )
    check_ids("texts", ids, info.vocab_size)
    return replace(text, token_ids=array("i", ids.astype(np.int32).tobytes()))


def check_ids(field: str, ids: NDArray[np.int64], vocab_size: int) -> None:
    """Raise InvalidRequest unless every id is one of the vocabulary."""
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise InvalidRequest.at(field, f"token id {outside[0]} is not in [0, {vocab_size})")
