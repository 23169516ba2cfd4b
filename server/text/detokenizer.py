"""Incremental detokenizing: whole code points, as early as they are certain."""

from codecs import utf_8_decode
from typing import NamedTuple

from millrace.server.text.tokenizer import Tokenizer


class Decoded(NamedTuple):
    """What one token did. `text` became certain with it; its own bytes lie in characters [start, end) of the output.

    The two need not coincide: a token may begin a character that a later one completes.
    """

    text: str
    start: int
    end: int


class Detokenizer:
    """Joined texts of all pushes and of finish() equal `tokenizer.decode(ids)`: special tokens are left out.

    At most three bytes are held: a character's incomplete beginning. With `continues` the output goes on a text
    and keeps a leading space that the vocabulary's family otherwise takes off.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self._tokenizer = tokenizer
        self._spaces = 0 if continues else tokenizer.pieces.leading_spaces
        self._bare = tokenizer.pieces.bare_first and not continues
        self._held = b""
        self._position = 0  # characters given out

    def push(self, token_id: int) -> Decoded:
        data = b"" if token_id in self._tokenizer.special_ids else self._tokenizer.token_bytes(token_id)
        if data and (self._bare or self._spaces):
            data = self._begin(data)
        start = self._position + (bool(self._held) and not self._continued(data))
        data = self._held + data
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        if self._held[:1] == b"\xed" and self._held[1:] >= b"\xa0":
            # A surrogate: CPython waits for its third byte, yet no byte can make it valid.
            text += self._held.decode("utf-8", "replace")
            self._held = b""
        self._position += len(text)
        return Decoded(text, start, self._position + bool(self._held))

    def finish(self) -> str:
        text, self._held = self._held.decode("utf-8", "replace"), b""
        self._position += len(text)
        return text

    def _begin(self, data: bytes) -> bytes:
        """Take the encoder's leading space off the first bytes of the text."""
        if self._bare:
            self._bare = False
            data = data.replace(b" ", b"")
        rest = data.lstrip(b" ")
        taken = min(len(data) - len(rest), self._spaces)
        self._spaces = self._spaces - taken if taken == len(data) else 0
        return data[taken:]

    def _continued(self, data: bytes) -> bool:
        """Whether `data` goes on the held character; otherwise that one becomes U+FFFD."""
        return bool(data) and len((self._held + data[:1]).decode("utf-8", "replace")) == 1
