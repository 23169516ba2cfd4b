"""Checkpoints of well-known shapes with random weights: `python -m millrace.bench.checkpoints [NAME]`.

Speed depends on a model's shape, not on what it has learned, so nothing has to be downloaded. The files are those of a
published checkpoint, bfloat16, written tensor by tensor; the tokenizer has every id of the vocabulary, most of them
words that no text contains. Norms are ones, everything else is normal with a standard deviation of 0.02.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from millrace.server.model.checkpoint import checkpoint_digest
from millrace.server.model.fields import Fields
from millrace.server.model.registry import model_spec
from millrace.server.model.spec import Weight

SHARD_BYTES = 1 << 30
CHUNK = 1 << 22  # numbers drawn at once
DEVIATION = 0.02

COMMON: dict[str, Any] = {"hidden_act": "silu", "initializer_range": DEVIATION, "torch_dtype": "bfloat16"}
LLAMA = COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
LLAMA |= {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}
QWEN2 = COMMON | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6}
QWEN2 |= {"use_sliding_window": False, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": LLAMA
    | {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    },
    "qwen2.5-0.5b": QWEN2
    | {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "max_window_layers": 24,
        "sliding_window": 32_768,
        "rope_theta": 1_000_000.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_643,
    },
    "tiny": LLAMA
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "bos_token_id": 510,
        "eos_token_id": 511,
    },
}


def label_of(directory: Path) -> str:
    """What to call a checkpoint of the user's: another name once its weights are others."""
    weights = sorted(directory.glob("*.safetensors"))
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    digest = hashlib.sha256(f"{checkpoint_digest(directory)} {facts}".encode()).hexdigest()
    return f"{directory.name}-{digest[:8]}"


def work_directory() -> Path:
    """Where checkpoints and peers are kept unless the user says where."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace" / "bench"


def checkpoint(name: str, work: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """The directory of a shape of SHAPES, written unless it is there. ValueError for an unknown name."""
    if name not in SHAPES:
        raise ValueError(f"there is no shape {name!r}; there are {', '.join(SHAPES)}")
    directory = work / "checkpoints" / name
    if directory.is_dir():
        return directory
    # Under another name until it is whole: what an interrupted run leaves is never taken for a checkpoint.
    partial = directory.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_checkpoint(partial, SHAPES[name], shard_bytes)
    partial.rename(directory)
    return directory


def write_checkpoint(directory: Path, config: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", ends)
    write_tokenizer(directory, config)
    weights = model_spec(Fields(config, "config.json")).all_weights
    shards = list(grouped(weights, shard_bytes))
    names = [f"model-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
    places = {weight.name: file for file, shard in zip(names, shards, strict=True) for weight in shard}
    total = sum(map(stored_bytes, weights))
    random = np.random.default_rng(0)
    for file, shard in zip(names, shards, strict=True):
        with (directory / file).open("wb") as stream:
            write_shard(stream, shard, random)
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def stored_bytes(weight: Weight) -> int:
    return 2 * int(np.prod(weight.shape))


def grouped(weights: Iterable[Weight], most: int) -> Iterator[list[Weight]]:
    """Runs of weights of at most `most` bytes, or of one weight."""
    shard: list[Weight] = []
    size = 0
    for weight in weights:
        if shard and size + stored_bytes(weight) > most:
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += stored_bytes(weight)
    yield shard


def write_shard(stream: BinaryIO, shard: list[Weight], random: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for weight in shard:
        end = begin + stored_bytes(weight)
        header[weight.name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight bytes
    stream.write(len(text).to_bytes(8, "little") + text)
    for weight in shard:
        for part in drawn(weight, random):
            stream.write(part.data)


def drawn(weight: Weight, random: np.random.Generator) -> Iterator[NDArray[np.uint16]]:
    """The numbers of a weight as bfloat16, a chunk at a time."""
    count = stored_bytes(weight) // 2
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        if weight.role.endswith("norm"):
            values = np.ones(size, np.float32)
        else:
            values = random.standard_normal(size, np.float32) * np.float32(DEVIATION)
        yield ((values.view(np.uint32) + 0x8000) >> 16).astype("<u2")


def write_tokenizer(directory: Path, config: dict[str, Any]) -> None:
    """A byte-level BPE of one merge (llama.cpp wants one); the two special tokens have the ids of the config."""
    special = {config["bos_token_id"]: "<|begin|>", config["eos_token_id"]: "<|end|>"}
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt"]
    words += [f"<unused{id}>" for id in range(len(words), config["vocab_size"])]
    vocabulary = {special.get(id, word): id for id, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special.values()])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[config["bos_token_id"]],
        "eos_token": special[config["eos_token_id"]],
        "model_max_length": config["max_position_embeddings"],
    }
    write_json(directory / "tokenizer_config.json", settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="?", choices=SHAPES, default="llama-3.2-1b", help="default: %(default)s")
    parser.add_argument("--work-dir", type=Path, default=work_directory(), help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        print(checkpoint(arguments.name, arguments.work_dir))
    except OSError as error:
        sys.exit(f"the checkpoint cannot be written: {error}")


if __name__ == "__main__":
    main()
