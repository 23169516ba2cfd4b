"""What pypdf leaves out of a damaged PDF: it goes on with the rest, but part of a document is not the document."""

import logging
import re
import zlib
from types import TracebackType
from typing import Any

from pypdf import filters
from pypdf.errors import LimitReachedError

from millrace.retrieval.parsing.base import MiB
from millrace.retrieval.parsing.encoding import seen
from millrace.server.errors import DamagedDocument, DocumentTooLarge, UnusableDocument

MAX_UNPACKED = 64 * MiB  # of one stream
LONGEST_WORDS = 200  # characters of pypdf's, which may quote the document

# The warnings of pypdf 6 and 7 behind which something that a page shows is missing. The others are about what it
# mended, such as a wrong table of objects, and about what is no text: widths, outlines, annotations, pictures.
LOST = re.compile(
    r"Object \d+ \d+ not defined"
    r"|^(?!PdfReadError)\w+(Error|Exception)\("  # the rest of a dictionary
    r"|^Ignoring page tree entry"
    r"|^Page contents are not a stream"
    r"|^Expected StreamObject"
    r"|(R|^Page r|^Font r|^XObject r)esources are not a dictionary"
    r"|^Impossible to decode XFormObject"
    r"|form content is skipped"
    r"|ignoring the stream|skipping the entry|^Invalid stream \(index|Limiting to \d+\.$"  # objects in streams
    r"|EOD in "
)


class Losses(logging.Handler):
    """Notices losses while it is entered, for one document at a time in a process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._found: list[UnusableDocument] = []
        self._replaced: Any = None

    def __enter__(self) -> "Losses":
        logging.getLogger("pypdf").addHandler(self)
        self._replaced = filters.decompress
        filters.decompress = self.decompress
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        filters.decompress = self._replaced
        logging.getLogger("pypdf").removeHandler(self)

    def check(self) -> None:
        """Raises UnusableDocument for the first loss, if there was one."""
        if self._found:
            raise self._found[0]

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage()
        if record.levelno >= logging.ERROR or LOST.search(words):
            self._found.append(lost(seen(words[:LONGEST_WORDS])))

    def decompress(self, data: bytes) -> bytes:
        """In place of pypdf's, which gives what it can of a stream that is cut or damaged."""
        if not data.strip():
            return b""
        decompressor = zlib.decompressobj()
        try:
            unpacked = decompressor.decompress(data, MAX_UNPACKED)
        except zlib.error as error:
            self._found.append(lost(str(error)))
            raise
        if decompressor.unconsumed_tail:
            self._found.append(
                DocumentTooLarge(
                    f"a part of the PDF exceeds the limit of {MAX_UNPACKED} bytes once unpacked; split it, or export"
                    " it anew from its source",
                    metadata={"max_unpacked_bytes": str(MAX_UNPACKED)},
                )
            )
            raise LimitReachedError("a stream is too large")
        if not decompressor.eof and not _ends(data):
            self._found.append(lost("a compressed stream is cut off"))
        return unpacked


def lost(what: str) -> DamagedDocument:
    return DamagedDocument(
        f"part of the PDF cannot be read ({what.rstrip('.')}); repair it, for example with: qpdf in.pdf out.pdf, or"
        " export it anew from its source"
    )


def _ends(data: bytes) -> bool:
    """Whether nothing but the checksum is missing, which some programs leave out."""
    decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
    decompressor.decompress(data[2:], MAX_UNPACKED)  # behind the header
    return decompressor.eof
