"""`tokenizer.json` and the settings beside it, read with suspicion: what every kind of tokenizer needs to encode."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from millrace.server.errors import CheckpointError, InvalidRequest
from millrace.server.text.concealed import Conceal

MAX_FILE_BYTES = 256 << 20
MAX_VOCABULARY = 1 << 21
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """`ids` by text, and the texts by role (`bos_token`, ...)."""

    ids: Mapping[str, int]
    named: Mapping[str, str]

    def id(self, role: str) -> int | None:
        return self.ids[self.named[role]] if role in self.named else None


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """`values` and `config`: what the files say. `backend` knows special tokens by the names of `conceal` only.

    `backend` neither truncates nor pads, whatever the file says.
    """

    path: Path
    values: Mapping[str, Any]
    config: Mapping[str, Any]
    backend: tokenizers.Tokenizer
    special: SpecialTokens
    conceal: Conceal
    vocab_size: int
    sha256: str

    @classmethod
    def read(cls, directory: Path) -> "TokenizerFile":
        """Raises CheckpointError, one line, for files that are missing, broken or absurd."""
        path = directory / "tokenizer.json"
        raw, config = _read(path), read_config(directory)
        with faults_of(path):
            values = json.loads(raw)
            vocabulary = _vocabulary(values)
            special = _special_tokens(values, config, vocabulary)
            conceal = Conceal(special.ids)
            backend = _build(conceal.hide(values))
        size, digest = max(vocabulary.values()) + 1, hashlib.sha256(raw).hexdigest()
        return cls(path, values, config, backend, special, conceal, size, digest)


@contextmanager
def faults_of(path: Path) -> Iterator[None]:
    """Turn whatever the contents of a file cause into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a tokenizer file: {type(error).__name__}: {_line(error)}") from None


@contextmanager
def faults_of_text() -> Iterator[None]:
    """Turn what the library raises for a lone surrogate into InvalidRequest."""
    try:
        yield
    except (TypeError, UnicodeEncodeError):  # which of them depends on the library's version
        raise InvalidRequest("the text holds a lone surrogate, which UTF-8 cannot express") from None


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
