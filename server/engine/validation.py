"""What the engine accepts: a request that passes can index no array outside its bounds."""

from array import array
from dataclasses import replace

import numpy as np

from millrace.server.engine.sequence import SequenceRequest
from millrace.server.errors import InvalidRequest


def checked_request(request: SequenceRequest, vocab_size: int) -> SequenceRequest:
    """The request with its prompt as an array of int32. InvalidRequest unless every id and count is usable."""
    prompt = np.asarray(request.prompt_ids, np.int64)
    if len(prompt) == 0:
        raise InvalidRequest.at("prompt", "is empty; give at least one token")
    for name, ids in {
        "prompt": prompt,
        "stopping.stop_token_ids": np.fromiter(request.stop_token_ids, np.int64),
        "sampling.logit_bias": np.fromiter(request.sampling.logit_bias, np.int64),
    }.items():
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if len(outside):
            raise InvalidRequest.at(name, f"token id {outside[0]} is not in [0, {vocab_size})")
    if request.max_output_tokens < 1:
        raise InvalidRequest.at("stopping.max_output_tokens", f"is {request.max_output_tokens}, at least 1 is needed")
    if not 0 <= request.min_output_tokens <= request.max_output_tokens:
        raise InvalidRequest.at(
            "stopping.min_output_tokens",
            f"is {request.min_output_tokens}, not in [0, {request.max_output_tokens}] (max_output_tokens)",
        )
    if request.min_output_tokens and len(request.stop_token_ids) >= vocab_size:
        raise InvalidRequest.at("stopping.stop_token_ids", "leave no token for the first min_output_tokens")
    return replace(request, prompt_ids=array("i", prompt.astype(np.int32).tobytes()))
