"""Personal data out of prompts, before anything else sees them; what carries it past the mask is refused."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace

from millrace.server.errors import FeatureUnsupported
from millrace.server.gateway.guardrails.base import Finding, Guard
from millrace.server.gateway.guardrails.pii import MASKS, PIIGuard
from millrace.server.gateway.prompt import run_beside, size_of
from millrace.server.telemetry.metrics import Metrics
from millrace.server.text.holdback import Piece, Stage, rewrite
from millrace.server.types import ChatPrompt, GenerateRequest

# What a mask begins with stands for nothing of the text, so a piece like that is one finding.
BEGINNINGS = {mask[:-1]: category for category, mask in MASKS.items()}


async def mask_prompt(request: GenerateRequest, guard: Guard, executor: Executor) -> GenerateRequest:
    """The request with every message, the text prompt and the query masked.

    Raises FeatureUnsupported for a prompt or an output of token ids, and for log-probabilities.
    """
    refuse_tokens(request)
    prompt = request.prompt
    size = size_of(prompt) if isinstance(prompt, ChatPrompt) else len(prompt)
    return await run_beside(executor, size, lambda: masked_request(request, guard))


def refuse_tokens(request: GenerateRequest) -> None:
    output = request.output
    carriers = {
        "token_ids": isinstance(request.prompt, tuple),
        "output.token_ids": output.token_ids,
        "output.logprobs": output.logprobs_top_n is not None,
        "output.prompt_token_ids": output.prompt_token_ids,
    }
    for field in (field for field, asked in carriers.items() if asked):
        raise FeatureUnsupported.at(
            field, "personal data is masked in text, and token ids would carry it past the mask"
        )


def masked_request(request: GenerateRequest, guard: Guard) -> GenerateRequest:
    def mask(text: str) -> str:
        return rewrite(guard.stream(), text).text

    prompt, retrieval = request.prompt, request.retrieval
    if isinstance(prompt, str):
        prompt = mask(prompt)
    elif isinstance(prompt, ChatPrompt):
        messages = [replace(one, content=mask(one.content), name=mask(one.name)) for one in prompt.messages]
        prompt = replace(prompt, messages=messages)
    if retrieval:
        retrieval = replace(retrieval, query=mask(retrieval.query))
    return replace(request, prompt=prompt, retrieval=retrieval)


class CountingGuard:
    """The PII guard; what its streams mask and what it covers is counted by category."""

    def __init__(self, metrics: Metrics):
        self._guard, self._metrics = PIIGuard(), metrics

    def inspect(self, text: str) -> list[Finding]:
        return self._guard.inspect(text)

    def cover(self, text: str, findings: Sequence[Finding]) -> str:
        for finding in findings:
            self._metrics.pii_masked.labels(finding.category).inc()
        return self._guard.cover(text, findings)

    def mask(self, text: str) -> str:
        return self._guard.mask(text)

    def stream(self) -> Stage:
        return CountingStage(self._guard.stream(), self._metrics)


class CountingStage:
    def __init__(self, stage: Stage, metrics: Metrics):
        self._stage, self._metrics = stage, metrics

    def push(self, text: str) -> list[Piece]:
        return self._counted(self._stage.push(text))

    def finish(self) -> list[Piece]:
        return self._counted(self._stage.finish())

    def _counted(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            if piece.source == 0 and piece.text in BEGINNINGS:
                self._metrics.pii_masked.labels(BEGINNINGS[piece.text]).inc()
        return pieces
