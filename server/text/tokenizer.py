"""Text to token ids and back, over the `tokenizers` library.

A checkpoint directory brings `tokenizer.json`, and usually `tokenizer_config.json` or `special_tokens_map.json`,
which name the special tokens. Text encodes as with Hugging Face's AutoTokenizer, save that special-token markers
in it are plain text; tokens that the checkpoint does not call special (`<think>`) are ordinary vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from millrace.server.text.concealed import Conceal
from millrace.server.text.pieces import Pieces, pieces_of
from millrace.server.text.tokenizer_file import SpecialTokens, TokenizerFile, faults_of, faults_of_text


class Tokenized(NamedTuple):
    """`byte_offsets`: start and end of each token in bytes of the UTF-8 text, alternating; 0, 0 for an added token.

    A token that holds part of a character lies where the whole character does.
    """

    ids: list[int]
    byte_offsets: list[int]


class Tokenizer:
    """Safe for use by several threads; encoding releases the GIL."""

    def __init__(self, backend: tokenizers.Tokenizer, pieces: Pieces, special: SpecialTokens, conceal: Conceal):
        self._backend, self.pieces, self.special, self._conceal = backend, pieces, special, conceal
        self.special_ids = frozenset(special.ids.values())
        self.bos_id, self.eos_id = special.id("bos_token"), special.id("eos_token")
        self.vocab_size = 0
        self.sha256 = ""
        self._prefix: list[int] = []
        self._bytes = {id: text.encode() for text, id in special.ids.items()}

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Raises CheckpointError, one line, for files that are missing, broken or absurd."""
        file = TokenizerFile.read(directory)
        with faults_of(file.path):
            self = cls(file.backend, pieces_of(file.values["decoder"]), file.special, file.conceal)
        self.vocab_size, self.sha256 = file.vocab_size, file.sha256
        if file.config.get("add_bos_token") is True and self.bos_id is not None and self.bos_id not in self.encode(""):
            self._prefix = [self.bos_id]
        return self

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; with special tokens, what the model wants around a prompt (a leading BOS)."""
        encoding = self._encode(text, add_special_tokens)
        return self._prefix + encoding.ids if add_special_tokens else encoding.ids

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> Tokenized:
        encoding = self._encode(text, add_special_tokens)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1)
        if not text.isascii():
            characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            widths = 1 + sum((characters > last).astype(np.int64) for last in (0x7F, 0x7FF, 0xFFFF))
            offsets = np.concatenate([[0], np.cumsum(widths)])[offsets]
        prefix = self._prefix if add_special_tokens else []
        return Tokenized(prefix + encoding.ids, [0, 0] * len(prefix) + offsets.tolist())

    def break_up(self, text: str, mark: str) -> str:
        """The text with `mark` inside what encode_rendered() would otherwise take for a special token."""
        return self._conceal.break_up(text, mark)

    def encode_rendered(self, text: str, mark: str) -> list[int]:
        """Ids of a rendered chat template, whose special tokens count; nothing is added.

        `mark` is a character that is no part of the prompt: it stands inside what must stay plain (break_up).
        """
        return self._encode(self._conceal.reveal(text, mark).replace(mark, ""), False).ids

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        with faults_of_text():
            return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; bytes that are no UTF-8 become U+FFFD, ids without a token nothing.

        In byte-fallback vocabularies only the bytes that are wrong become U+FFFD, as in SentencePiece itself; the
        `tokenizers` library gives up the whole run of byte tokens around them.
        """
        return self.pieces.join(self._kept(ids, skip_special_tokens)).decode("utf-8", "replace")

    def _kept(self, ids: Sequence[int], skip_special_tokens: bool) -> Iterator[bytes]:
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return filter(None, (self.token_bytes(id) for id in ids if id not in skipped))

    def token_bytes(self, id: int) -> bytes:
        """Exact bytes of a token; a special token's name; nothing for an id without a token."""
        known = self._bytes.get(id)
        if known is None:
            entry = self._backend.id_to_token(id) if 0 <= id < self.vocab_size else None
            known = self._bytes[id] = b"" if entry is None else self.pieces.to_bytes(entry)
        return known
