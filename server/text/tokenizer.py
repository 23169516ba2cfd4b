"""Text to token ids and back, over the `tokenizers` library.

A checkpoint directory brings `tokenizer.json`, and usually `tokenizer_config.json` or `special_tokens_map.json`,
which name the special tokens. Text encodes as with Hugging Face's AutoTokenizer, save that special-token markers
in it are plain text; tokens that the checkpoint does not call special (`<think>`) are ordinary vocabulary.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from millrace.server.errors import CheckpointError, InvalidRequest
from millrace.server.text.concealed import Conceal
from millrace.server.text.pieces import Pieces, pieces_of

MAX_FILE_BYTES = 256 << 20
MAX_VOCABULARY = 1 << 21
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenized(NamedTuple):
    """`byte_offsets`: start and end of each token in bytes of the UTF-8 text, alternating; 0, 0 for an added token.

    A token that holds part of a character lies where the whole character does.
    """

    ids: list[int]
    byte_offsets: list[int]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`ids` by text, and the texts by role (`bos_token`, ...)."""

    ids: Mapping[str, int]
    named: Mapping[str, str]

    def id(self, role: str) -> int | None:
        return self.ids[self.named[role]] if role in self.named else None


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
        path = directory / "tokenizer.json"
        raw = _read(path)
        try:
            return cls._parse(directory, raw)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a tokenizer file: {type(error).__name__}: {_line(error)}") from None

    @classmethod
    def _parse(cls, directory: Path, raw: bytes) -> "Tokenizer":
        file = json.loads(raw)
        config = read_config(directory)
        vocabulary = _vocabulary(file)
        special = _special_tokens(file, config, vocabulary)
        conceal = Conceal(special.ids)
        backend = _build(conceal.hide(file))
        self = cls(backend, pieces_of(file["decoder"]), special, conceal)
        self.vocab_size = max(vocabulary.values()) + 1
        self.sha256 = hashlib.sha256(raw).hexdigest()
        if config.get("add_bos_token") is True and self.bos_id is not None and self.bos_id not in self.encode(""):
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
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):  # which of them depends on the library's version
            raise InvalidRequest("the text holds a lone surrogate, which UTF-8 cannot express") from None

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


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; a missing file is empty."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if not path.exists():
            continue
        try:
            config |= json.loads(_read(path))
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a JSON object: {_line(error)}") from None
    return config


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, which no tokenizer file is")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _build(text: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
        backend.no_truncation()
        backend.no_padding()
        backend.encode("a b")
    # The library raises bare Exceptions, and panics in Rust arrive as a BaseException of its own.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(f"the tokenizers library cannot use it: {_line(error)}") from None
    return backend


def _vocabulary(file: Mapping[str, Any]) -> dict[str, int]:
    """Every token with its id."""
    entries = file["model"]["vocab"]
    if not isinstance(entries, dict):
        entries = {entry: id for id, (entry, _) in enumerate(entries)}
    vocabulary: dict[str, int] = entries | {token["content"]: token["id"] for token in file.get("added_tokens") or ()}
    if not vocabulary:
        raise CheckpointError("its vocabulary is empty")
    if not 0 <= min(vocabulary.values()) <= max(vocabulary.values()) < MAX_VOCABULARY:
        raise CheckpointError(f"a token id lies outside [0, {MAX_VOCABULARY})")
    return vocabulary


def _special_tokens(file: Mapping[str, Any], config: Mapping[str, Any], vocabulary: Mapping[str, int]) -> SpecialTokens:
    """What either file calls special, and is in the vocabulary."""
    named = {role: text for role in NAMED if (text := _text(config.get(role))) is not None}
    for role in ("bos_token", "eos_token"):
        if role in named and named[role] not in vocabulary:
            raise CheckpointError(f"tokenizer_config.json names the {role} {named[role]!r}, which is not in it")
    listed = [*(config.get("additional_special_tokens") or ()), *_values(config.get("extra_special_tokens"))]
    added = [*(file.get("added_tokens") or ()), *(config.get("added_tokens_decoder") or {}).values()]
    flagged = [token for token in added if token.get("special")]
    texts = [*named.values(), *(_text(token) for token in [*listed, *flagged])]
    ids = {text: vocabulary[text] for text in texts if text and text in vocabulary}
    return SpecialTokens(ids, {role: text for role, text in named.items() if text in ids})


def _values(listed: Any) -> list[Any]:
    return list(listed.values()) if isinstance(listed, dict) else list(listed or ())


def _text(token: object) -> str | None:
    """A token in a configuration is its text or an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
