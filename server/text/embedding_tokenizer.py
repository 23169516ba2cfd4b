"""Texts to the ids that an embedding model reads. Encode only: vectors are never turned back into text.

Published files switch on truncation and padding, which would drop the end of every longer text without a word, and
fill every shorter one: both are off here, and who calls decides what is too long. Special-token markers in a text
are plain text, as in `Tokenizer`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from millrace.server.errors import CheckpointError
from millrace.server.text.tokenizer_file import TokenizerFile, faults_of, faults_of_text

# What tokenizer_config.json calls the settings of BERT's normalizer.
NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


class EmbeddingTokenizer:
    """Safe for use by several threads; encoding releases the GIL.

    `raw`: the library's tokenizer, for what takes one; `special_tokens`: how many are added to each text.
    """

    def __init__(self, file: TokenizerFile):
        self.raw: tokenizers.Tokenizer = file.backend
        self.special_tokens: int = self.raw.num_special_tokens_to_add(False)
        self.vocab_size, self.sha256 = file.vocab_size, file.sha256

    @classmethod
    def load(cls, directory: Path) -> "EmbeddingTokenizer":
        """Raises CheckpointError, one line, for files that are missing, broken, absurd or at odds with each other."""
        file = TokenizerFile.read(directory)
        with faults_of(file.path):
            _check_normalizer(file)
        return cls(file)

    def encode(self, text: str) -> list[int]:
        """Ids of the whole text between the special tokens of the model."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of many texts, in as many threads as the library likes. Raises InvalidRequest."""
        with faults_of_text():
            return [encoding.ids for encoding in self.raw.encode_batch_fast(list(texts))]

    def count(self, text: str) -> int:
        """Tokens of the text itself, without special ones."""
        with faults_of_text():
            return len(self.raw.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _check_normalizer(file: TokenizerFile) -> None:
    """Either file may be what the model was trained with; the wrong one gives vectors that find little."""
    normalizer = file.values.get("normalizer") or {}
    if normalizer.get("type") != "BertNormalizer":
        return
    for name, setting in NORMALIZER.items():
        if name in file.config and file.config[name] != normalizer.get(setting):
            raise CheckpointError(
                f"its {setting} is {json.dumps(normalizer.get(setting))}, but tokenizer_config.json says {name} "
                f"{json.dumps(file.config[name])}: make them equal"
            )
