"""What a request to documents asks, and whether this server and mode can serve all of it."""

from millrace.server.errors import FeatureUnsupported, InvalidRequest
from millrace.server.gateway.routing import ModelCard
from millrace.server.types import AnswerMode, ChatPrompt, GenerateRequest, RetrievalOptions, Role

REFUSAL = "I don't have enough information to answer that."
MAX_QUERY_BYTES = 8192  # as QueryRequest.text


def last_user_message(chat: ChatPrompt) -> int:
    """Index of the message that asks. Raises InvalidRequest at `chat` if nobody does."""
    for index in reversed(range(len(chat.messages))):
        if chat.messages[index].role is Role.USER:
            return index
    raise InvalidRequest.at("chat", "no message of the user to answer from documents")


def question_text(prompt: str | tuple[int, ...] | ChatPrompt) -> str:
    """A text, or what the user said last. Raises InvalidRequest at the prompt."""
    if isinstance(prompt, ChatPrompt):
        return prompt.messages[last_user_message(prompt)].content
    if not isinstance(prompt, str):
        raise InvalidRequest.at("token_ids", "a question to documents is a text or a conversation, not token ids")
    return prompt


def query_of(request: GenerateRequest, options: RetrievalOptions) -> str:
    """What to search for: the request's own query, or its question. Raises InvalidRequest at the prompt."""
    question = question_text(request.prompt)
    field = "text" if isinstance(request.prompt, str) else "chat"
    if not question.strip():
        raise InvalidRequest.at(field, "the question is empty")
    if options.query:
        return options.query
    if (size := len(question.encode(errors="replace"))) > MAX_QUERY_BYTES:
        raise InvalidRequest.at(
            field,
            f"the question has {size} bytes, more than the {MAX_QUERY_BYTES} that can be searched for; "
            "say what to search for in retrieval.query",
            limit=str(MAX_QUERY_BYTES),
        )
    return question


def answer_mode(card: ModelCard, request: GenerateRequest, options: RetrievalOptions) -> AnswerMode:
    """The request's mode, else the model's. Raises FeatureUnsupported at what cannot be had with it."""
    mode = options.answer_mode or card.answer_mode
    stopping, output = request.stopping, request.output
    if stopping.truncate_prompt_tokens is not None:
        raise FeatureUnsupported.at(
            "stopping.truncate_prompt_tokens", "not with retrieval: retrieval.max_context_tokens bounds its prompt"
        )
    if mode is AnswerMode.EXTRACTIVE:
        unsupported = {
            "sampling.n": request.sampling.n > 1,
            "output.token_ids": output.token_ids,
            "output.logprobs": output.logprobs_top_n is not None,
            "output.prompt_token_ids": output.prompt_token_ids,
            "stopping.min_output_tokens": stopping.min_output_tokens > 0,
            "stopping.stop_token_ids": bool(stopping.stop_token_ids),
        }
        for field in (field for field, asked in unsupported.items() if asked):
            raise FeatureUnsupported.at(
                field,
                "an extractive answer quotes documents, no model writes it; set retrieval.answer_mode to generative",
            )
    return mode
