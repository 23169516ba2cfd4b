"""From a prompt as a client wrote it to token ids that fit the model."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from millrace.server.errors import FeatureUnsupported, InvalidRequest, PromptTooLong
from millrace.server.gateway.routing import ModelCard
from millrace.server.text.template import ChatTemplate
from millrace.server.types import BackendInfo, ChatPrompt, GenerateRequest

LONG = 8192  # characters; above, tokenizing takes longer than handing it to a thread

T = TypeVar("T")


async def run_beside(executor: Executor | None, size: int, work: Callable[[], T]) -> T:
    """Run `work` here if `size` characters are few, else in a thread, so that no stream waits for it.

    `executor` None: a thread of the event loop's own.
    """
    if size <= LONG:
        return work()
    return await asyncio.get_running_loop().run_in_executor(executor, work)


def size_of(prompt: ChatPrompt) -> int:
    return sum(len(message.content) for message in prompt.messages)


def template_of(card: ModelCard) -> ChatTemplate:
    if card.template is None:
        raise FeatureUnsupported.at("chat", f"model {card.name!r} has no chat template; send text or token_ids")
    return card.template


async def encode_prompt(card: ModelCard, request: GenerateRequest, info: BackendInfo, executor: Executor) -> list[int]:
    """Return the prompt's token ids, truncated if the request says so; room for one output token is left.

    Raises InvalidRequest, FeatureUnsupported or PromptTooLong at the field that holds the prompt.
    """
    prompt = request.prompt
    if isinstance(prompt, str):
        field, ids = "text", await run_beside(executor, len(prompt), lambda: card.tokenizer.encode(prompt))
    elif isinstance(prompt, ChatPrompt):
        template = template_of(card)
        field, ids = "chat", await run_beside(executor, size_of(prompt), lambda: template.encode(prompt))
    else:
        field, ids = "token_ids.ids", list(prompt)
        check_vocabulary(field, ids, info.vocab_size)
    if not ids:
        raise InvalidRequest.at(field, "the prompt has no tokens")
    if (keep := request.stopping.truncate_prompt_tokens) is not None:
        ids = ids[-keep:]
    if len(ids) >= info.max_model_len:
        raise PromptTooLong.at(
            field,
            f"the prompt has {len(ids)} tokens; the model's context holds {info.max_model_len}, at least one of "
            "them for the output; shorten the prompt or set stopping.truncate_prompt_tokens",
            prompt_tokens=str(len(ids)),
            limit=str(info.max_model_len - 1),
        )
    return ids


def check_vocabulary(field: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest at the first id that the model does not have."""
    if ids and max(ids) >= vocab_size:
        index = next(i for i, token in enumerate(ids) if token >= vocab_size)
        raise InvalidRequest.at(
            f"{field}[{index}]",
            f"token id {ids[index]} is not in the vocabulary of {vocab_size}",
            token_id=str(ids[index]),
            vocab_size=str(vocab_size),
        )
