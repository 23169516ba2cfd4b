"""Text cut into chunks of at most so many tokens, along its structure, every byte in at least one of them.

semantic-text-splitter finds the cuts: at headings and blocks of Markdown, else at blank lines, lines, sentences,
words. Each chunk but the first then begins a little before its cut, so that what stands at a cut is found too.
"""

import hashlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from semantic_text_splitter import MarkdownSplitter, TextSplitter
from tokenizers import Tokenizer

from millrace.retrieval.parsing.markdown import Heading, headings
from millrace.retrieval.sentences import spans, whole_characters
from millrace.retrieval.types import ChunkSpan, MediaType, ParsedDocument
from millrace.server.errors import ConfigError

LEAST_CONTENT = 32  # tokens: a single character can have as many
STRUCTURED = frozenset({MediaType.MARKDOWN, MediaType.HTML})  # HTML is parsed to Markdown

# The splitter needs more than linear time for long words and nested lists, so it sees the text through a window.
WINDOW = 65_536  # characters
LONG_WORD = 2_000  # characters: a window with one in it is NARROW
NARROW = 4_096
# Spaces, and a word too long for the vocabulary, cost a token or none; this bounds them. Plain English has 4 to 5.
CHARACTERS_PER_TOKEN = 16

WORD = re.compile(r"\s+(?=\S)")
HEAD = 1_000  # characters in which a chunk's own heading is looked for
LONGEST_TITLE = 200  # characters of a title or heading in a context
SEPARATOR = " > "


class Cut(NamedTuple):
    """Characters [start, end) of the text; the chunk begins at `overlap` <= start."""

    overlap: int
    start: int
    end: int


class Chunker:
    """For one embedding model. Safe to use from several threads; `split` releases the GIL most of the time."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chunk_tokens: int = 512,
        overlap_tokens: int = 50,
        special_tokens: int = 2,
        context_tokens: int = 0,
    ):
        """A chunk has at most `chunk_tokens` tokens, the model's `special_tokens` around it included.

        At most `overlap_tokens` of them are also in the chunk before; `context_tokens` are kept free for
        `with_context`. Raises ConfigError where that leaves too little for text of its own.
        """
        self._limit = chunk_tokens - special_tokens
        self._capacity = self._limit - context_tokens
        self._overlap_tokens = overlap_tokens
        own = self._capacity - overlap_tokens
        if min(overlap_tokens, special_tokens, context_tokens) < 0 or own < LEAST_CONTENT:
            raise ConfigError(
                f"chunks of {chunk_tokens} tokens, of which {overlap_tokens} overlap, {special_tokens} are special and"
                f" {context_tokens} are context, have {own} tokens of new text; at least {LEAST_CONTENT} are needed,"
                " and none of these numbers may be negative: choose larger chunks or less overlap"
            )
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()  # a truncated or padded count would be wrong
        self._tokenizer.no_padding()
        self._longest = own * CHARACTERS_PER_TOKEN
        self._plain = TextSplitter.from_huggingface_tokenizer(self._tokenizer, own, trim=False)
        self._markdown = MarkdownSplitter.from_huggingface_tokenizer(self._tokenizer, own, trim=False)
        self._by_length = TextSplitter(self._longest, trim=False)

    def split(self, document_id: str, text: str, media_type: MediaType) -> list[ChunkSpan]:
        """Chunks in order. `tokens` counts without special tokens.

        An id is derived from the document's id, the chunk's text and how often that text came before in the
        document: chunks that an edit leaves as they are keep their ids.
        """
        chunks: list[ChunkSpan] = []
        seen: Counter[str] = Counter()
        position = 0  # in bytes
        for overlap, start, end in self._overlapping(text, media_type):
            content = text[overlap:end]
            byte_start = position - len(text[overlap:start].encode())
            position += len(text[start:end].encode())
            chunk_id = _chunk_id(document_id, content, seen[content])
            seen[content] += 1
            chunks.append(ChunkSpan(chunk_id, byte_start, position, content, self.count(content)))
        return chunks

    def count(self, text: str) -> int:
        """Tokens of a text, special tokens left out."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def with_context(self, parsed: ParsedDocument, span: ChunkSpan) -> str:
        """What to embed: the chunk after its context, of which the innermost headings stay if not all of it fits."""
        parts = context_of(parsed, span).split(SEPARATOR)
        for i in range(len(parts)):
            text = f"{SEPARATOR.join(parts[i:])}\n\n{span.text}"
            if parts[i] and self.count(text) <= self._limit:
                return text
        return span.text

    def _overlapping(self, text: str, media_type: MediaType) -> Iterator[Cut]:
        """Pieces with their overlap. One that opens with a heading has none: its author begins anew there."""
        previous = 0
        for start, end in self._pieces(text, media_type):
            anew = not start or (media_type in STRUCTURED and _opens_with_heading(text, start))
            yield Cut(start if anew else self._overlap(text, previous, start, end), start, end)
            previous = start

    def _pieces(self, text: str, media_type: MediaType) -> Iterator[tuple[int, int]]:
        """Consecutive parts that are all of the text, each within the limits of tokens and characters."""
        splitter = self._markdown if media_type in STRUCTURED else self._plain
        position = 0
        while position < len(text):
            window = _window(text, position)
            parts = splitter.chunks(window)
            if position + len(window) < len(text) and len(parts) > 1:
                parts.pop()  # the window cut it short: it begins the next one
            for part in parts:
                for piece in self._shortened(part):
                    yield position, position + len(piece)
                    position += len(piece)

    def _shortened(self, part: str) -> Iterator[str]:
        if len(part) <= self._longest:
            yield part
        else:  # a part of a long word can have more tokens than all of it
            for piece in self._by_length.chunks(part):
                yield from self._plain.chunks(piece)

    def _overlap(self, text: str, previous: int, start: int, end: int) -> int:
        """Where the chunk of [start, end) begins: within the one before, [previous, start), or at `start`."""
        for begin in self._beginnings(text, previous, start):
            near = self.count(text[begin:start]) <= self._overlap_tokens
            if near and self.count(text[begin:end]) <= self._capacity:
                return begin
        return start

    def _beginnings(self, text: str, previous: int, start: int) -> Iterator[int]:
        """Candidates, best first: the first sentences, the first word, the first character of the last few tokens."""
        first = max(previous, start - self._overlap_tokens * CHARACTERS_PER_TOKEN)
        offsets = self._tokenizer.encode(text[first:start], add_special_tokens=False).offsets
        if not offsets:
            return
        first += offsets[max(0, len(offsets) - self._overlap_tokens)][0]
        tail = text[first:start]
        yield from (first + unit.start for unit in spans(tail) if unit.start or first == previous)
        if word := WORD.search(tail):
            yield first + word.end()
        yield whole_characters(text, previous, first)


def context_of(parsed: ParsedDocument, span: ChunkSpan) -> str:
    """Where in its document a chunk stands: "title > heading > heading below it". Empty: nothing is known.

    The headings are those above the chunk's first byte; one that the chunk opens with is left out. Meant to be
    indexed with the chunk's text: from deep inside a document, a chunk rarely says what it is about.
    """
    parts = [_short(parsed.title), *_path(parsed, span)]
    return SEPARATOR.join(part for i, part in enumerate(parts) if part and part not in parts[:i])


def _path(parsed: ParsedDocument, span: ChunkSpan) -> tuple[str, ...]:
    if parsed.media_type not in STRUCTURED:
        return ()
    outline = _outline(parsed.text)
    opening = span.byte_start + len(span.text.encode()) - len(span.text.lstrip().encode())
    if not (above := bisect_right(outline, opening, key=lambda heading: heading.byte_start)):
        return ()
    heading = outline[above - 1]
    return heading.path[:-1] if heading.byte_start >= span.byte_start else heading.path


class _Section(NamedTuple):
    """What a heading opens. `path`: the headings above it, from the outermost, and itself."""

    byte_start: int
    path: tuple[str, ...]


@lru_cache(maxsize=2)  # asked once for every chunk of a document, one document after the other
def _outline(text: str) -> tuple[_Section, ...]:
    sections: list[_Section] = []
    open_headings: list[Heading] = []
    characters = position = 0  # how far the text is counted, in both units
    for heading in headings(text):
        position += len(text[characters : heading.start].encode())
        characters = heading.start
        while open_headings and open_headings[-1].level >= heading.level:
            open_headings.pop()
        open_headings.append(heading)
        sections.append(_Section(position, tuple(_short(above.title) for above in open_headings)))
    return tuple(sections)


def _short(title: str) -> str:
    return title if len(title) <= LONGEST_TITLE else title[: LONGEST_TITLE - 1] + "…"


def _window(text: str, position: int) -> str:
    window = text[position : position + WINDOW]
    if max(map(len, window.split()), default=0) > LONG_WORD:
        return window[:NARROW]
    return window


def _opens_with_heading(text: str, start: int) -> bool:
    head = text[start : start + HEAD]
    first = next(headings(head), None)
    return first is not None and not head[: first.start].strip()


def _chunk_id(document_id: str, content: str, occurrence: int) -> str:
    digest = hashlib.sha256()
    for part in (document_id.encode(), content.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    digest.update(occurrence.to_bytes(8, "little"))
    return digest.digest()[:16].hex()
