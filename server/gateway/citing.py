"""Citations: which bytes of an answer stand on which bytes of a document."""

from collections.abc import Iterator, Sequence

from millrace.server.gateway.support import Coverage, Quote, stems_of
from millrace.server.text.citations import Marked
from millrace.server.types import Citation, Source


def cite_quote(quote: Quote, start: int, end: int) -> Citation:
    """Bytes [start, end) of an extractive answer are this sentence and its marker."""
    candidate = quote.candidate
    return _citation(candidate.source, 0, (candidate.byte_start, candidate.byte_end), quote.score, (start, end))


class MarkerCitations:
    """Citations of the markers that a model wrote."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self._stems = [stems_of(f"{one.hit.chunk.title}\n{one.hit.chunk.text}") for one in sources]

    def cite(self, choice: int, marked: Marked) -> Iterator[Citation]:
        """The score is the share of content words of the marker's sentence that the chunk has."""
        coverage = Coverage(marked.statement, self._stems)
        for number in marked.numbers:
            source, score = self._sources[number - 1], coverage.of(self._stems[number - 1])
            chunk = source.hit.chunk
            yield _citation(source, choice, (chunk.byte_start, chunk.byte_end), score, (marked.start, marked.end))


def _citation(source: Source, choice: int, document: tuple[int, int], score: float, text: tuple[int, int]) -> Citation:
    chunk = source.hit.chunk
    return Citation(
        choice=choice,
        source_number=source.number,
        source=chunk.source,
        document_id=chunk.document_id,
        chunk_id=chunk.id,
        byte_start=document[0],
        byte_end=document[1],
        score=score,
        text_start=text[0],
        text_end=text[1],
        page=chunk.page,
    )
