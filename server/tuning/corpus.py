"""Text corpora for pretraining: xz-compressed JSON Lines in, one array of token ids out."""

import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# The markers after the first stand for nothing yet: they keep their ids free for a chat-tuned successor.
SPECIAL_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|source|>", "<|pad|>")


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """Yield the `text` of every document of `*.jsonl.xz` files, in file order."""
    for path in files:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (every byte string is representable, no unknown token).

    Digits are split one by one, so that numbers have one spelling in tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode_corpus(files: list[Path], tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    """Return every document as uint16 ids, each followed by END_OF_TEXT, memory-mapped from `cache`.

    The file in `cache` is named after its inputs, so an interrupted run continues without encoding again.
    """
    key = hashlib.sha256(tokenizer.to_str().encode())
    for path in files:
        key.update(f"{path.name}:{path.stat().st_size}".encode())
    target = cache / f"{key.hexdigest()[:16]}.u16"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        end = tokenizer.token_to_id(END_OF_TEXT)
        partial = target.with_suffix(".partial")
        with partial.open("wb") as out:
            documents = read_documents(files)
            while batch := list(islice(documents, 256)):
                for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                    np.asarray([*encoding.ids, end], dtype=np.uint16).tofile(out)
        partial.rename(target)
    return np.memmap(target, dtype=np.uint16, mode="r")
