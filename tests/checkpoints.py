"""Tiny random checkpoints as `save_pretrained` writes them, with a tokenizer and a chat template.

And encoders as sentence-transformers saves them.
"""

import json
import string
from pathlib import Path
from typing import Any

SENTENCES = [
    "The mill race carries a fast current to the wheel.",
    "A server streams the answer to every question, token by token.",
    "def main() -> None:\n    print('héllo, wörld', 3.14159)\n",
    "Blocks are free, owned or evictable; their sum is the total.",
    "日本語と emoji 🙂 go through bytes.",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB_SIZE = 384

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}

ENCODER_SIZES: dict[str, Any] = {
    name: SIZES[name]
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "initializer_range",
    )
}  # fmt: skip
DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
}
WORDPIECE_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_checkpoint(
    directory: Path, architecture: str, *, shard_size: str = "1GB", seed: int = 0, **overrides: Any
) -> Path:
    """Write a random float32 checkpoint of a `transformers` architecture. `overrides`: values of its config."""
    import torch
    import transformers

    own = {"MistralForCausalLM": {"sliding_window": 40}, "Qwen3ForCausalLM": {"head_dim": 32}}.get(architecture, {})
    model_class = getattr(transformers, architecture)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**SIZES | own | overrides))
    _randomise(model)
    model.save_pretrained(directory, max_shard_size=shard_size)
    write_tokenizer(directory)
    return directory


def make_encoder(
    directory: Path,
    architecture: str = "BertModel",
    *,
    pooling: str = "mean",
    normalize: bool = True,
    shard_size: str = "1GB",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a random float32 encoder of a `transformers` architecture, with texts of up to 512 tokens.

    `pooling`: mean, cls, max, ...; `overrides`: values of its config.
    """
    import torch
    import transformers

    model_class = getattr(transformers, architecture)
    # RoBERTa's table begins behind the row of the padding token, whose id is 1 there.
    own = {"max_position_embeddings": 514} if "Roberta" in architecture else {"pad_token_id": 0}
    renamed = DISTILBERT_NAMES if architecture == "DistilBertModel" else {}
    sizes = {renamed.get(name, name): value for name, value in ENCODER_SIZES.items()}
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**sizes | own | overrides))
    _randomise(model)
    model.save_pretrained(directory, max_shard_size=shard_size)
    write_wordpiece(directory)
    _write_sentence_transformer(directory, model.config.hidden_size, pooling, normalize)
    return directory


def _randomise(model: Any) -> None:
    """Norms start as ones and biases as zeros, which hides mistakes."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + name.lower().endswith("norm.weight"))


def write_tokenizer(directory: Path) -> None:
    """Train a byte-level BPE of at most 384 tokens; write tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "add_bos_token": True,
        "model_max_length": SIZES["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_wordpiece(directory: Path) -> None:
    """Put a WordPiece together of at most 384 tokens, lower case: every ASCII text has ids, few words one of their own.

    With truncation and padding switched on, as they are in many a published file.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = string.ascii_lowercase + string.digits
    words = sorted({word for line in SENTENCES for word in line.lower().split() if word.isascii() and word.isalpha()})
    entries = [*WORDPIECE_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *string.punctuation, *words]
    vocabulary = {entry: id for id, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(WORDPIECE_SPECIAL)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    around = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=around
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), WORDPIECE_SPECIAL, strict=True)
    )
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | named, indent=2))


def _write_sentence_transformer(directory: Path, dimensions: int, pooling: str, normalize: bool) -> None:
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 3 if normalize else 2]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(steps)
    ]
    modes = {f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens", "max_tokens")}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": dimensions, **modes},
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "", "document": ""}, "default_prompt_name": None},
    }
    (directory / "1_Pooling").mkdir()
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2))
