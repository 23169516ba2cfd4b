"""The sources of an answer, as client and model may see them.

A chunk or a sentence may end in the middle of a card number, of which no rule then sees enough. So each chunk is
inspected together with the text around it, and what is found is kept as bytes of the document: whatever shows a piece
of it shows the whole mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from millrace.retrieval.types import Chunk, Hit, Metadata, MetadataValue
from millrace.server.gateway.guardrails.base import Finding, Guard
from millrace.server.gateway.support import Quote
from millrace.server.types import Source

MARGIN = 512  # characters on either side of a chunk: as far as a finding can reach


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found: `hits` as they are stored and, in the same order, `shown` without personal data.

    `findings`: of each chunk, by its label, as bytes of its document. All byte ranges are those of the document.
    """

    hits: Sequence[Hit]
    shown: Sequence[Hit]
    guard: Guard | None = None
    findings: Mapping[int, Sequence[Finding]] | None = None

    def show(self, quote: Quote) -> Quote:
        """The quote of a source of `hits`, numbered in their order, without personal data."""
        if self.guard is None or self.findings is None:
            return quote
        one = quote.candidate
        findings = self.findings[one.source.hit.chunk.label]
        source = replace(one.source, hit=self.shown[one.source.number - 1])
        text = covered(one.text, one.byte_start, findings, self.guard)
        return replace(quote, candidate=replace(one, text=text, source=source))


def numbered(hits: Sequence[Hit]) -> tuple[Source, ...]:
    return tuple(Source(number, hit) for number, hit in enumerate(hits, start=1))


def masked_hits(hits: Sequence[Hit], around: Sequence[tuple[str, str] | None], guard: Guard) -> Found:
    """`around`: the text before and after each chunk; None: the chunk is no longer stored, and its hit left out."""
    kept, shown, findings = [], [], {}
    for hit, sides in zip(hits, around, strict=True):
        if sides is not None:
            kept.append(hit)
            findings[hit.chunk.label] = inspected(hit.chunk, *sides, guard)
            shown.append(replace(hit, chunk=_masked_chunk(hit.chunk, findings[hit.chunk.label], guard)))
    return Found(kept, shown, guard, findings)


def inspected(chunk: Chunk, before: str, after: str, guard: Guard) -> list[Finding]:
    """What is found in a chunk and around it, as bytes of the document."""
    text = before + chunk.text + after
    first = chunk.byte_start - len(before.encode())

    def place(position: int) -> int:
        return first + len(text[:position].encode())

    return [replace(one, start=place(one.start), end=place(one.end)) for one in guard.inspect(text)]


def covered(text: str, byte_start: int, findings: Sequence[Finding], guard: Guard) -> str:
    """A text that begins at this byte of the document, with a mask for every finding that it shows a piece of."""
    data, pieces = text.encode(), []
    for one in findings:
        start, end = max(one.start - byte_start, 0), min(one.end - byte_start, len(data))
        if start < end:
            pieces.append(replace(one, start=len(data[:start].decode()), end=len(data[:end].decode())))
    return guard.cover(text, pieces)


def _masked_chunk(chunk: Chunk, findings: Sequence[Finding], guard: Guard) -> Chunk:
    text = covered(chunk.text, chunk.byte_start, findings, guard)
    return replace(
        chunk,
        source=guard.mask(chunk.source),
        title=guard.mask(chunk.title),
        text=guard.mask(text),  # once more: cut off from what stood before, a number may look like a card's
        metadata=_masked_metadata(chunk.metadata, guard),
    )


def _masked_metadata(metadata: Metadata, guard: Guard) -> Metadata:
    def mask(value: MetadataValue) -> MetadataValue:
        if isinstance(value, str):
            return guard.mask(value)
        return tuple(map(guard.mask, value)) if isinstance(value, tuple) else value

    return {key: mask(value) for key, value in metadata.items()}
