"""Answers that no model writes: sentences of the sources word for word, or the sentence that says there are none."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from millrace.server.gateway.citing import cite_quote
from millrace.server.gateway.guardrails.base import Guard
from millrace.server.gateway.guardrails.folding import fold
from millrace.server.gateway.question import REFUSAL
from millrace.server.gateway.support import Quote
from millrace.server.text.holdback import rewrite
from millrace.server.text.stops import StopMatcher
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import ChoiceDelta, Citation, Deltas, Finish, FinishReason, GenerateRequest, Usage

NUMBER = re.compile(rb"[0-9]+")
LOOK_ALIKE = re.compile(rb"\[\s*[0-9]{1,4}(?:\s*[,;]\s*[0-9]{1,4})*\s*\]")  # in folded text


class Quotation:
    """An answer that is whole before its first message goes out; every choice is the same.

    Tokens are the model's, as if it had written the text.
    """

    surplus_tokens = 0

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: GenerateRequest,
        text: str,
        finish: Finish,
        citations: Sequence[Citation] = (),
        embedding_tokens: int = 0,
    ):
        self._request, self._bytes, self._finish, self._citations = request, text.encode(), finish, citations
        tokens = tokenizer.encode_with_offsets(text, add_special_tokens=False)
        self._ids, self._ends = tokens.ids, tokens.byte_offsets[1::2]
        self._embedding_tokens = embedding_tokens
        self._sent = 0  # tokens of each choice
        self.finishes: list[Finish] = []

    @classmethod
    def refusal(cls, tokenizer: Tokenizer, request: GenerateRequest, embedding_tokens: int) -> "Quotation":
        return cls(tokenizer, request, REFUSAL, Finish(FinishReason.NO_SUPPORT), embedding_tokens=embedding_tokens)

    @classmethod
    def out_of_time(cls, tokenizer: Tokenizer, request: GenerateRequest) -> "Quotation":
        return cls(tokenizer, request, "", Finish(FinishReason.TIME_LIMIT))

    @property
    def usage(self) -> Usage:
        return Usage(output_tokens=self._sent * self._request.sampling.n, embedding_tokens=self._embedding_tokens)

    def events(self) -> Iterator[Deltas | Citation]:
        """A message for each sentence, its citation after it; the last message has the finish."""
        output, size = self._request.output, len(self._bytes)
        edges = sorted({0, size, *(citation.text_end for citation in self._citations), *self._message_ends()})
        for start, end in pairwise(edges if size else [0, 0]):
            before, self._sent = self._tokens(start), self._tokens(end)
            delta = ChoiceDelta(
                0,
                text=self._bytes[start:end].decode() if output.text else "",
                token_ids=self._ids[before : self._sent] if output.token_ids else [],
                finish=self._finish if end == size else None,
                token_offset=before,
            )
            choices = [replace(delta, index=index) for index in range(self._request.sampling.n)]
            self.finishes = [delta.finish] * len(choices) if delta.finish else []
            if delta.text or delta.token_ids or delta.finish:
                yield Deltas(choices, self.usage if output.continuous_usage else None)
            yield from (citation for citation in self._citations if citation.text_end == end)

    def _message_ends(self) -> list[int]:
        """Where a message must end, in bytes, because it has all the tokens that one may have."""
        limit = self._request.output.max_tokens_per_message
        return self._ends[limit - 1 :: limit] if limit else []

    def _tokens(self, position: int) -> int:
        """Tokens that end at this byte or before."""
        return bisect_right(self._ends, position)


def quote(
    tokenizer: Tokenizer,
    request: GenerateRequest,
    quotes: Sequence[Quote],
    guard: Guard | None,
    embedding_tokens: int,
) -> Quotation:
    """Join the quotes, best first, each with its marker; mask the text; end it at a stop string.

    A sentence that max_output_tokens leaves no room for is left out and the next one tried. One that a stop string
    cuts is not cited.
    """
    chosen = fitting(tokenizer, quotes, guard, request.stopping.max_output_tokens)
    finish = Finish(FinishReason.STOP if len(chosen) == len(quotes) else FinishReason.MAX_TOKENS)
    text, spans = compose(chosen, guard)
    if stops := request.stopping.stop_strings:
        matcher = StopMatcher(stops, request.stopping.include_stop)
        text = rewrite(matcher, text).text
        if matcher.matched is not None:
            finish = Finish(FinishReason.STOP_SEQUENCE, stop_string=matcher.matched)
    citations = [
        cite_quote(one, *(len(text[:edge].encode()) for edge in span))
        for one, span in zip(chosen, spans, strict=True)
        if span[1] <= len(text)
    ]
    return Quotation(tokenizer, request, text, finish, citations, embedding_tokens)


def forges(text: str, sources: int) -> bool:
    """Whether a reader would take something in the text for the marker of a source, 1 to `sources`.

    A quote is word for word, so that it would cite what it likes.
    """
    markers = LOOK_ALIKE.finditer(fold(text).data)
    return any(1 <= int(number) <= sources for marker in markers for number in NUMBER.findall(marker[0]))


def fitting(tokenizer: Tokenizer, quotes: Sequence[Quote], guard: Guard | None, limit: int | None) -> Sequence[Quote]:
    """Those that fit, in order, into `limit` tokens of the text as it is sent."""
    if limit is None:
        return quotes
    chosen: list[Quote] = []
    for one in quotes:
        text = " ".join(map(shown, [*chosen, one]))
        if len(tokenizer.encode(guard.mask(text) if guard else text, add_special_tokens=False)) <= limit:
            chosen.append(one)
    return chosen


def compose(quotes: Sequence[Quote], guard: Guard | None) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where each quote with its marker is in it, in characters."""
    parts = [shown(one) for one in quotes]
    starts = accumulate((len(part) + 1 for part in parts), initial=0)
    text, spans = " ".join(parts), [(start, start + len(part)) for start, part in zip(starts, parts, strict=False)]
    if guard is None:
        return text, spans
    masked = rewrite(guard.stream(), text)
    return masked.text, [masked.place(*span) for span in spans]


def shown(one: Quote) -> str:
    return f"{one.candidate.text} [{one.candidate.source.number}]"
