"""What every reader of documents takes and gives."""

from dataclasses import dataclass
from typing import NamedTuple

from millrace.server.errors import DamagedDocument, DocumentTooLarge

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one document. `seconds` of wall clock, and of processor time; `memory` of the process that reads it."""

    max_bytes: int = 32 * MiB
    max_text_bytes: int = 16 * MiB  # of the text in it, as UTF-8
    max_pages: int = 5_000
    seconds: float = 30.0
    memory: int = 512 * MiB  # bytes of address space


DEFAULT = Limits()


class Reading(NamedTuple):
    """What a document says of itself. `title` may be empty; `pages`: the byte of the text at which each begins."""

    title: str
    text: str
    pages: tuple[int, ...] = ()


def check_text(size: int, limits: Limits) -> None:
    """Raises DocumentTooLarge if `size` bytes of text are too many."""
    if size > limits.max_text_bytes:
        raise DocumentTooLarge(
            f"the document has more than {limits.max_text_bytes} bytes of text; split it",
            metadata={"max_text_bytes": str(limits.max_text_bytes)},
        )


def too_costly(limits: Limits) -> DamagedDocument:
    return DamagedDocument(
        f"reading the document takes more than {limits.seconds:g} seconds or {limits.memory // MiB} MiB of memory: it"
        " is damaged, hostile or too intricate; export it anew from its source, or split it"
    )
