"""Tokenizers of every supported family, trained on the spot, saved as checkpoints are."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from millrace.server.config import BUILTIN
from millrace.server.text.tokenizer import Tokenizer

CORPUS = [
    "The mill race carries a fast current to the wheel, and the wheel turns the stone.",
    "Streams of tokens become streams of text; a stream ends once, with a clear status.",
    "naïve café déjà vu – Ελληνικά, русский, 日本語のテキスト, 한국어 😀 🙈 👩‍👩‍👧",
    "for i in range(10):\n    print('hello', i)  # <b>not</b> a token <|almost| [INS ]\n",
] * 20
CONTROL = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FAMILIES = ("byte_level", "byte_fallback", "legacy", "unigram", "builtin")


def save(directory: Path, backend: Backend, bos: str = "<s>", eos: str = "</s>", **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def leading_bos(backend: Backend, bos: str) -> processors.PostProcessor:
    return processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])


def byte_level() -> Backend:
    """As Llama 3 and Qwen: special tokens beside the model's vocabulary, one ordinary added token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    backend.add_special_tokens(["<s>", "</s>", *CONTROL])
    backend.add_special_tokens([AddedToken(f"<|{role}|>", rstrip=True) for role in ("user", "assistant", "end")])
    backend.add_tokens(["<think>"])
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), leading_bos(backend, "<s>")]
    )
    return backend


def byte_fallback() -> Backend:
    """As Mistral: SentencePiece BPE; the corpus's rarer characters fall back to byte tokens."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *CONTROL]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    latin = [line for line in CORPUS if line.isascii()]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + bytes_, max_token_length=12)
    backend.train_from_iterator([word for line in latin for word in line.split()], trainer)
    file = json.loads(backend.to_str())
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] in special]
    backend = Backend.from_str(json.dumps(file))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = leading_bos(backend, "<s>")
    backend.enable_truncation(3)  # left over from training, as in many a published file
    backend.enable_padding(length=64, pad_token="<unk>")
    return backend


def legacy() -> Backend:
    """As Llama 2: the same, but every stretch of text between special tokens gets a space before it."""
    backend = byte_fallback()
    file = json.loads(backend.to_str())
    prepend = {"type": "Prepend", "prepend": "▁"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    file |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [prepend, spaces]}}
    return Backend.from_str(json.dumps(file))


def unigram() -> Backend:
    """SentencePiece Unigram, whose control tokens are pieces of the vocabulary too."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", *CONTROL]
    backend.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return backend


@pytest.fixture(scope="session")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    made = {"byte_level": byte_level, "byte_fallback": byte_fallback, "legacy": legacy, "unigram": unigram}
    return {name: save(root / name, make()) for name, make in made.items()} | {"builtin": BUILTIN}


@pytest.fixture(scope="session")
def tokenizers(directories) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(directory) for name, directory in directories.items()}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def directory(directories, family) -> Path:
    return directories[family]


@pytest.fixture(scope="session")
def tokenizer(tokenizers, family) -> Tokenizer:
    return tokenizers[family]
