"""Answers that go on where a client lost them: by seed, choice and position, so nothing is kept here meanwhile."""

import hashlib
import sys
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from millrace.server.backends.base import Backend, TokenStream
from millrace.server.errors import FeatureUnsupported, InvalidRequest, ModelRevisionChanged, PromptChanged
from millrace.server.gateway.prompt import check_vocabulary
from millrace.server.types import (
    AnswerMode,
    BackendInfo,
    ContinueFrom,
    Finish,
    FinishReason,
    GenerateRequest,
    ReceivedChoice,
    TokenDelta,
    TokenRequest,
)

NOTHING = ReceivedChoice()


def prompt_digest(prompt_ids: Sequence[int]) -> str:
    """Hex SHA-256 of the ids as little-endian 32-bit numbers."""
    ids = array("I", prompt_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return hashlib.sha256(ids.tobytes()).hexdigest()


def check_continuation(
    request: GenerateRequest, received: ContinueFrom, info: BackendInfo, digest: str, tokens: TokenRequest
) -> None:
    """Raise CannotContinue if the answer would be another one, InvalidRequest if it cannot have been this one.

    `digest`: of the prompt. `tokens`: the request as it would begin.
    """
    if received.model_revision != info.fingerprint:
        raise ModelRevisionChanged(
            "the answer was begun by another model revision than this server runs: continue it on a server whose "
            "model_revision is that of Started, or ask again",
            metadata={"model_revision": info.fingerprint, "continue_from": received.model_revision},
        )
    if received.prompt_digest != digest:
        raise PromptChanged(
            "the prompt is another one than that of the answer: send the request that began it; where documents or "
            "the template have changed since, ask again",
            metadata={"prompt_digest": digest, "continue_from": received.prompt_digest},
        )
    if request.sampling.seed is None and tokens.sampling.temperature > 0:
        raise InvalidRequest.at("sampling.seed", "an answer goes on with its own seed, which Started told")
    for index, choice in received.choices.items():
        check_vocabulary(f"continue_from: choice {index}", choice.token_ids, info.vocab_size)
        if len(choice.token_ids) > tokens.max_output_tokens:
            raise InvalidRequest.at(
                "continue_from",
                f"choice {index} has {len(choice.token_ids)} tokens, more than the {tokens.max_output_tokens} that the "
                "whole answer can have",
            )


def refuse_masked(request: GenerateRequest) -> None:
    """Raise FeatureUnsupported if an answer whose personal data is masked is to go on: no client has its tokens."""
    if request.continue_from:
        raise FeatureUnsupported.at("continue_from", "an answer with personal data masked cannot go on: ask again")


def refuse_quoted(request: GenerateRequest, mode: AnswerMode | None) -> None:
    """Raise if an answer that no model writes is to go on."""
    if request.continue_from is None:
        return
    if mode is AnswerMode.EXTRACTIVE:
        raise FeatureUnsupported.at("continue_from", "an extractive answer comes whole: ask again")
    raise PromptChanged("the documents that the answer was made from were not found again, or not in time: ask again")


def finish_of(token_ids: Sequence[int], tokens: TokenRequest) -> Finish | None:
    """What an output of these tokens has ended with, as a backend tells it; None: it goes on."""
    if len(token_ids) > tokens.min_output_tokens and token_ids[-1] in tokens.stop_token_ids:
        return Finish(FinishReason.STOP, stop_token_id=token_ids[-1])
    return Finish(FinishReason.MAX_TOKENS) if len(token_ids) == tokens.max_output_tokens else None


def continued(tokens: TokenRequest, received: Mapping[int, ReceivedChoice], running: Sequence[int]) -> TokenRequest:
    """What a backend runs of the choices that go on."""
    return replace(tokens, outputs={index: received.get(index, NOTHING).token_ids for index in running})


class Ended:
    """The `TokenStream` of a request none of whose choices goes on."""

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        raise StopAsyncIteration

    def stop(self, choice: int) -> None:
        pass

    async def aclose(self) -> None:
        pass


async def begin(backend: Backend, tokens: TokenRequest) -> TokenStream:
    return await backend.generate(tokens) if tokens.choices else Ended()
