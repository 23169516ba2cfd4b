"""Tiny random checkpoints as `save_pretrained` writes them, with a tokenizer and a chat template."""

import json
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
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms start as ones and biases as zeros, which hides mistakes
                parameter.copy_(torch.randn_like(parameter) * 0.1 + name.endswith("norm.weight"))
    model.save_pretrained(directory, max_shard_size=shard_size)
    write_tokenizer(directory)
    return directory


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
