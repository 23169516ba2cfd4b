"""The text of a PDF, page by page. pypdf does not bound what a hostile file costs: this runs as a child process."""

import io

from pypdf import PasswordType, PdfReader
from pypdf.errors import DependencyError, FileNotDecryptedError, LimitReachedError
from pypdf.generic import DictionaryObject

from millrace.retrieval.parsing.base import Limits, Reading, check_text
from millrace.retrieval.parsing.child import serve
from millrace.retrieval.parsing.encoding import seen
from millrace.retrieval.parsing.losses import Losses, lost
from millrace.retrieval.parsing.media import HEAD, PDF
from millrace.server.errors import (
    DamagedDocument,
    DocumentTooLarge,
    EmptyDocument,
    EncryptedDocument,
    UnusableDocument,
)

BETWEEN_PAGES = "\n\n"


def read_pdf(content: bytes, limits: Limits) -> Reading:
    """Raises UnusableDocument, of the kind that fits, and MemoryError."""
    if PDF not in content[:HEAD]:
        raise DamagedDocument("the document is no PDF: it does not begin with %PDF-; state its real media type")
    with Losses() as losses:
        return _read_noting(content, limits, losses)


def _read_noting(content: bytes, limits: Limits, losses: Losses) -> Reading:
    try:
        reader = PdfReader(io.BytesIO(content), strict=False)
        if reader.is_encrypted and reader.decrypt("") is PasswordType.NOT_DECRYPTED:
            raise FileNotDecryptedError
        return _read(reader, limits, losses)
    except (UnusableDocument, MemoryError):
        raise
    except FileNotDecryptedError:
        raise EncryptedDocument(
            "the PDF is encrypted; remove its password, for example with: qpdf --decrypt --password=PASSWORD in.pdf"
            " out.pdf"
        ) from None
    except DependencyError:
        raise EncryptedDocument(
            "the PDF is encrypted with AES, which this server cannot read without the package cryptography; install it"
            " there with: pip install cryptography, or remove the encryption, for example with: qpdf --decrypt in.pdf"
            " out.pdf"
        ) from None
    except Exception as error:  # pypdf meets damage with almost any of them
        losses.check()
        if isinstance(error, LimitReachedError):
            raise DocumentTooLarge(
                f"the PDF exceeds a limit ({error}); split it, or export it anew from its source"
            ) from None
        raise DamagedDocument(
            "the PDF is damaged or too intricate to be read; repair it, for example with: qpdf in.pdf out.pdf"
        ) from None


def _read(reader: PdfReader, limits: Limits, losses: Losses) -> Reading:
    texts: list[str] = []
    starts: list[int] = []
    position = 0
    for page in reader.pages:
        if len(texts) == limits.max_pages:
            raise DocumentTooLarge(
                f"the PDF has more than {limits.max_pages} pages; split it",
                metadata={"max_pages": str(limits.max_pages)},
            )
        text = seen(page.extract_text()).strip()
        losses.check()
        starts.append(position)
        texts.append(text)
        check_text(position + len(text.encode()), limits)
        position += len((text + BETWEEN_PAGES).encode())
    losses.check()
    if len(texts) < (stated := _stated_pages(reader)):
        raise lost(f"it says that it has {stated} pages, {len(texts)} were found")
    if not any(texts):
        raise EmptyDocument(
            f"the PDF has {len(texts)} pages and no text: probably they are scans; run text recognition first, for"
            " example with: ocrmypdf in.pdf out.pdf"
        )
    title = reader.metadata.title if reader.metadata is not None else None
    return Reading(seen(str(title or "")), BETWEEN_PAGES.join(texts), tuple(starts))


def _stated_pages(reader: PdfReader) -> int:
    """What the root of the page tree says, 0 if nothing."""
    pages = reader.root_object["/Pages"]
    stated = pages["/Count"] if isinstance(pages, DictionaryObject) and "/Count" in pages else 0
    return int(stated) if isinstance(stated, int) else 0


if __name__ == "__main__":
    serve(read_pdf)
