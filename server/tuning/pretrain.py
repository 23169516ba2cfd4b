"""Train the built-in model from scratch: `python -m millrace.server.tuning.pretrain --corpus DIR --output DIR`.

Resumable: the state is saved every few minutes in `--work`; the same command continues. The result is a
checkpoint directory of the usual kind: config.json, generation_config.json, model.safetensors (bf16),
tokenizer.json, tokenizer_config.json.
"""

import argparse
import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer

from millrace.server.tuning.corpus import END_OF_TEXT, encode_corpus, read_documents, train_tokenizer
from millrace.server.tuning.decoder import Decoder, DecoderConfig
from millrace.server.tuning.optimizer import Muon, learning_rate_scale

# A base model has no roles. A question rendered as a heading is the form in which its corpus answers questions.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}# {{ message['content'] | trim }}\n\n"
    "{% else %}{{ message['content'] | trim }}\n\n{% endif %}"
    "{% endfor %}"
)


def prepare_tokenizer(corpus: list[Path], work: Path, vocab_size: int) -> Tokenizer:
    path = work / "tokenizer.json"
    if not path.exists():
        documents = list(read_documents(corpus))
        sample = random.Random(0).sample(documents, min(6000, len(documents)))
        train_tokenizer(sample, vocab_size).save(str(path))
    return Tokenizer.from_file(str(path))


class Batches:
    """Random windows of the corpus; the stream is a function of (seed, step), so a resumed run sees the same data.

    Each epoch visits every window once, in a new order, from a new offset.
    """

    def __init__(self, tokens: np.ndarray, batch_tokens: int, seed: int = 0):
        self.tokens, self.batch_tokens, self.seed = tokens, batch_tokens, seed

    def get(self, step: int, length: int) -> torch.Tensor:
        rows = self.batch_tokens // length
        windows = (len(self.tokens) - 1) // length - 1
        epoch, first = divmod(step * rows, windows)
        order = np.random.default_rng((self.seed, epoch, length))
        offset = int(order.integers(length))
        chosen = order.permutation(windows).take(range(first, first + rows), mode="wrap")
        data = np.stack([self.tokens[offset + w * length : offset + w * length + length + 1] for w in chosen])
        return torch.from_numpy(data.astype(np.int64))


class Trainer:
    def __init__(self, args: argparse.Namespace, tokens: np.ndarray):
        torch.manual_seed(args.seed)
        self.args = args
        self.model = Decoder(DecoderConfig())
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers = [
            Muon(matrices, lr=args.muon_lr, weight_decay=0.1),
            torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.01),
        ]
        self.base_lr = [args.muon_lr, args.adam_lr]
        self.batches = Batches(tokens, args.batch_tokens, args.seed)
        self.step, self.seen = 0, 0
        self.state_file = args.work / "state.pt"
        self.forward = torch.compile(self.model, dynamic=False) if args.compile else self.model
        if self.state_file.exists():
            self.load()

    def load(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seen = state["step"], state["seen"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seen": self.seen,
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.state_file)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.args.bf16):
            loss: torch.Tensor = self.forward(tokens)
            return loss

    def train_step(self) -> float:
        """One optimiser step over `batch_tokens` tokens, in micro-batches; returns the loss in nats."""
        progress = self.seen / self.args.tokens
        length = self.args.long_length if progress > self.args.long_after else self.args.length
        batch = self.batches.get(self.step, length)
        micro = torch.split(batch, self.args.micro_tokens // length)
        total = 0.0
        for part in micro:
            loss = self.loss(part) / len(micro)
            torch.autograd.backward(loss)
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, lr in zip(self.optimizers, self.base_lr, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * learning_rate_scale((self.seen + self.args.batch_tokens) / self.args.tokens)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seen += self.args.batch_tokens
        return total

    @torch.no_grad()
    def validate(self, tokens: np.ndarray, length: int) -> float:
        """Mean loss in nats per token over windows of `length`; a last, shorter one is left out."""
        windows = [tokens[i : i + length + 1] for i in range(0, len(tokens) - length, length)]
        losses = [float(self.model(torch.from_numpy(window.astype(np.int64))[None])) for window in windows]
        return sum(losses) / len(losses)


def export(model: Decoder, tokenizer: Tokenizer, output: Path) -> None:
    """Write the checkpoint directory."""
    c = model.config
    output.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id(END_OF_TEXT)
    weights = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    config = asdict(c) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "bfloat16",
        "initializer_range": 0.02,
        "use_cache": True,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": "<|pad|>",
        "add_bos_token": True,
        "model_max_length": c.max_position_embeddings,
        "chat_template": "{{ bos_token }}" + CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": end, "eos_token_id": end, "temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1}
    for name, value in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation | {"do_sample": True}),
    ):
        (output / name).write_text(json.dumps(value, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="directory with docs-*.jsonl.xz and valid.jsonl.xz")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--work", type=Path, default=Path("build/pretrain"), help="state, tokenizer and encoded text")
    parser.add_argument("--tokens", type=int, default=24_000_000, help="tokens to train on")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512, help="window length in tokens")
    parser.add_argument("--long-length", type=int, default=1024, help="window length at the end")
    parser.add_argument("--long-after", type=float, default=0.8, help="share of the tokens before the longer windows")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--no-bf16", dest="bf16", action="store_false")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    files = sorted(args.corpus.glob("docs-*.jsonl.xz"))
    tokenizer = prepare_tokenizer(files, args.work, DecoderConfig().vocab_size)
    trainer = Trainer(args, encode_corpus(files, tokenizer, args.work))
    saved = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("pretrain", total=args.tokens, completed=trainer.seen)
        while trainer.seen < args.tokens:
            loss = trainer.train_step()
            progress.update(task, completed=trainer.seen, description=f"loss {loss:.3f}")
            if trainer.step % 25 == 0:
                print(f"step {trainer.step} tokens {trainer.seen} loss {loss:.4f}", flush=True)
            if time.monotonic() - saved > 60 * args.save_minutes:
                trainer.save()
                saved = time.monotonic()
    trainer.save()
    export(trainer.model, tokenizer, args.output)
    valid = [args.corpus / "valid.jsonl.xz"]
    tokens = encode_corpus(valid, tokenizer, args.work)
    characters = sum(len(text.encode()) for text in read_documents(valid))
    nats = trainer.validate(tokens, DecoderConfig().max_position_embeddings)
    print(f"validation: {nats:.4f} nats/token, {nats * len(tokens) / characters / math.log(2):.4f} bits per byte")


if __name__ == "__main__":
    main()
