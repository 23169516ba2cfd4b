"""What kind of document it is: what the client says, else the extension of its source, else its first bytes."""

import re
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from millrace.retrieval.types import Document, MediaType

EXTENSIONS = {
    ".txt": MediaType.TEXT,
    ".text": MediaType.TEXT,
    ".log": MediaType.TEXT,
    ".md": MediaType.MARKDOWN,
    ".markdown": MediaType.MARKDOWN,
    ".mdown": MediaType.MARKDOWN,
    ".mkd": MediaType.MARKDOWN,
    ".html": MediaType.HTML,
    ".htm": MediaType.HTML,
    ".xhtml": MediaType.HTML,
    ".pdf": MediaType.PDF,
}
PDF = b"%PDF-"
HEAD = 1024  # bytes in which PDF readers look for it
HTML = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL
)
# First bytes of formats that are not read here, to name them to whoever sends one.
FOREIGN = {
    b"PK\x03\x04": "an office document or a ZIP archive",
    b"\xd0\xcf\x11\xe0": "an old office document",
    b"{\\rtf": "a rich text document",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"\x7fELF": "a program",
    b"SQLite format 3": "a database",
    PDF: "a PDF",
}


def media_type_of(document: Document) -> MediaType:
    return document.media_type or EXTENSIONS.get(_extension(document.source)) or _told_by(document.content)


def looks_like(content: bytes) -> str:
    """A few words for a format that is not text; empty: unknown."""
    return next((name for start, name in FOREIGN.items() if content.startswith(start)), "")


def _extension(source: str) -> str:
    path = urlsplit(source).path if re.match(r"[a-z]+://[^\[\]]*$", source) else source
    return PurePosixPath(path).suffix.lower()


def _told_by(content: bytes) -> MediaType:
    head = content[:HEAD]
    if PDF in head:
        return MediaType.PDF
    return MediaType.HTML if HTML.match(head) else MediaType.TEXT
