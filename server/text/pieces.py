"""What a vocabulary entry means in bytes, read off the `decoder` of a tokenizer.json.

Two families cover the decoder-only language models:

- byte-level (GPT-2): each character of an entry stands for one byte;
- SentencePiece: U+2581 stands for a space, `<0xHH>` entries for single bytes, and the space that the
  encoder put before the text is taken off again.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from millrace.server.errors import CheckpointError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters are themselves, the other 68 bytes follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def byte_level(entry: str) -> bytes:
    """Bytes of a byte-level entry; an entry with any other character is its own UTF-8."""
    try:
        return bytes(BYTE_ALPHABET[character] for character in entry)
    except KeyError:
        return entry.encode()


@dataclass(frozen=True, slots=True)
class Pieces:
    """How entries turn into text. `to_bytes` maps one entry; the rest says how a text begins."""

    to_bytes: Callable[[str], bytes] = str.encode
    leading_spaces: int = 0  # taken off the whole text, at most
    bare_first: bool = False  # the first token loses all of its spaces

    def join(self, pieces: Iterator[bytes]) -> bytes:
        """The bytes of a whole text."""
        first = next(pieces, b"")
        data = (first.replace(b" ", b"") if self.bare_first else first) + b"".join(pieces)
        spaces = min(len(data) - len(data.lstrip(b" ")), self.leading_spaces)
        return data[spaces:]


def pieces_of(decoder: Mapping[str, Any] | None) -> Pieces:
    """Read the `decoder` section. Raises CheckpointError for one that is not of the two families."""
    pieces = Pieces()
    for step in _steps(decoder):
        pieces = _apply(pieces, step)
    return pieces


def _steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if not isinstance(decoder, dict):
        raise CheckpointError("its decoder is missing; byte-level and SentencePiece-style tokenizers are supported")
    if decoder.get("type") == "Sequence":
        for step in decoder.get("decoders", ()):
            yield from _steps(step)
    else:
        yield decoder


def _apply(pieces: Pieces, step: Mapping[str, Any]) -> Pieces:
    before = pieces.to_bytes
    match step:
        case {"type": "ByteLevel"}:
            return replace(pieces, to_bytes=byte_level)
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return replace(pieces, to_bytes=lambda entry: before(entry.replace(pattern, content)))
        case {"type": "Metaspace", "replacement": str(mark)}:
            prefixed = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
            return replace(pieces, to_bytes=lambda entry: before(entry.replace(mark, " ")), bare_first=bool(prefixed))
        case {"type": "ByteFallback"}:
            return replace(pieces, to_bytes=lambda entry: _byte_or(entry, before))
        case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
            return replace(pieces, leading_spaces=start)
        case {"type": "Fuse"}:
            return pieces
    kind = step.get("type")
    raise CheckpointError(f"its decoder {kind!r} is not supported; byte-level and SentencePiece-style ones are")


def _byte_or(entry: str, otherwise: Callable[[str], bytes]) -> bytes:
    match = BYTE_TOKEN.fullmatch(entry)
    return bytes([int(match[1], 16)]) if match else otherwise(entry)
