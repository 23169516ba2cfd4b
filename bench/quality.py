"""What a narrower width costs in quality: `python -m millrace.bench.quality [--model DIR] [--text FILE]`.

The text is cut into windows; after every token but the last of a window the model predicts the next one. For each
width: perplexity and its ratio to float32's (the reference executor, which needs PyTorch), the mean divergence
KL(float32 || width) in nats, and how often both find the same token most likely.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from millrace.server.config import EngineConfig
from millrace.server.errors import MillraceError
from millrace.server.model.executors import LoadedModel, create_executor
from millrace.server.model.executors.base import Batch, Output, SamplingColumns
from millrace.server.model.executors.cpu import CpuExecutor
from millrace.server.model.executors.reference import ReferenceExecutor
from millrace.server.text.tokenizer import Tokenizer

Logits = NDArray[np.float32]
SHOP = Path(__file__).parent.parent / "examples" / "docs"
WIDTHS: dict[str, dict[str, object]] = {
    "bf16": {},
    "bf16-kv-int8": {"kv_cache_dtype": "int8"},
    "int8": {"quantization": "int8"},
    "int4-g128": {"quantization": "int4"},
    "int4-g32": {"quantization": "int4", "quantization_group": 32},
}


@dataclass(frozen=True, slots=True)
class Quality:
    width: str
    perplexity: float
    divergence: float  # mean KL from float32, nats
    agreement: float  # share of positions with the same most likely token


def windows(tokens: Sequence[int], length: int, most: int) -> list[NDArray[np.int32]]:
    """Full windows that follow each other; at least one. ValueError for a text too short to predict anything of."""
    if len(tokens) < 2:
        raise ValueError("the text has fewer than two tokens")
    cut = [np.array(tokens[at : at + length], np.int32) for at in range(0, len(tokens), length)]
    return [window for window in cut if len(window) > 1][:most]


def greedy() -> SamplingColumns:
    """Of one row."""
    real, whole, none = np.zeros(1, np.float32), np.zeros(1, np.int32), np.empty(0, np.int32)
    return SamplingColumns(
        temperature=real,
        top_p=real + 1,
        top_k=whole,
        min_p=real,
        presence_penalty=real,
        frequency_penalty=real,
        repetition_penalty=real + 1,
        seed=np.zeros(1, np.uint64),
        choice=whole,
        position=whole,
        top_n=whole - 1,
        bias_offsets=np.zeros(2, np.int32),
        bias_ids=none,
        bias_values=np.empty(0, np.float32),
        history_offsets=np.zeros(2, np.int32),
        history_ids=none,
        history_prompt_lens=whole,
    )


def prefill(window: NDArray[np.int32], block_size: int) -> Batch:
    """Each token but the first is a draft, so a token is drawn after every one."""
    count = len(window)
    positions = np.arange(count, dtype=np.int32)
    return Batch(
        token_ids=window,
        positions=positions,
        slots=positions,
        offsets=np.array([0, count], np.int32),
        context_lens=np.array([count], np.int32),
        block_tables=np.arange(-(-count // block_size), dtype=np.int32)[None],
        outputs=np.array([Output.SAMPLE], np.int32),
        draft_lens=np.array([count - 1], np.int32),
        adapters=np.array([-1], np.int32),
        sampling=greedy(),
    )


def all_logits(model: LoadedModel, window: NDArray[np.int32]) -> Logits:
    """[tokens, vocabulary]."""
    executor = model.executor
    batch = prefill(window, executor.kv_layout.block_size)
    if isinstance(executor, CpuExecutor):
        executor.collect(executor.submit(batch))
        return executor.logits
    assert isinstance(executor, ReferenceExecutor)
    with torch.inference_mode():
        found: Logits = executor.model.logits(executor.model.forward(batch, torch.from_numpy(window).long())).numpy()
    return found


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


class Sums:
    """What one width has come to so far."""

    def __init__(self) -> None:
        self.count, self.loss, self.divergence, self.agreed = 0, 0.0, 0.0, 0

    def add(self, window: NDArray[np.int32], found: Logits, wanted: Logits) -> None:
        ours, theirs = log_softmax(found[:-1]), log_softmax(wanted[:-1])
        self.count += len(ours)
        self.loss -= float(ours[np.arange(len(ours)), window[1:]].sum())
        self.divergence += float((np.exp(theirs) * (theirs - ours)).sum())
        self.agreed += int((ours.argmax(1) == theirs.argmax(1)).sum())

    def quality(self, width: str) -> Quality:
        count = self.count
        return Quality(width, float(np.exp(self.loss / count)), self.divergence / count, self.agreed / count)


def measure(model: str, cut: Sequence[NDArray[np.int32]], widths: Sequence[str]) -> Iterator[Quality]:
    """float32 first. One model is in memory at a time; float32's logits, which may be many, lie in a file."""
    longest = max(map(len, cut))
    shape = {"model": model, "max_num_seqs": 1, "max_model_len": longest, "max_num_batched_tokens": longest}

    def load(**settings: object) -> LoadedModel:
        return create_executor(EngineConfig.model_validate(shape | settings), lambda done, total: None)

    def run(width: str, loaded: LoadedModel, keep: bool) -> Quality:
        sums = Sums()
        for index, window in enumerate(cut):
            logits = all_logits(loaded, window)
            if keep:
                wanted[index, : len(window)] = logits
            sums.add(window, logits, wanted[index, : len(window)])
        loaded.executor.close()
        return sums.quality(width)

    with TemporaryDirectory() as directory:
        oracle = load(executor="reference")
        shape_kept = (len(cut), longest, oracle.info.vocab_size)
        wanted = np.memmap(Path(directory) / "logits", np.float32, "w+", shape=shape_kept)
        yield run("float32", oracle, keep=True)
        for width in widths:
            yield run(width, load(executor="cpu", **WIDTHS[width]), keep=False)


def shop() -> str:
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(SHOP.glob("*.md")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="builtin", help="checkpoint directory; default: the built-in model")
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: the pages of the example shop")
    parser.add_argument("--window", type=int, default=256, help="tokens that are predicted in one go; default 256")
    parser.add_argument("--windows", type=int, default=40, help="at most so many; default 40")
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    options = parser.parse_args()
    if options.window < 2:
        parser.error("--window: at least 2 tokens, one to predict the other")
    try:
        tokenizer = Tokenizer.load(EngineConfig(model=options.model).checkpoint)
        text = options.text.read_text(encoding="utf-8") if options.text else shop()
        cut = windows(tokenizer.encode(text), options.window, options.windows)
        source = options.text or "the example shop"
        print(f"{options.model}, {sum(map(len, cut)):,} tokens of {source} in windows of {options.window}")
        print(f"{'width':16}{'perplexity':>12}{'ratio':>10}{'KL':>12}{'top-1':>9}")
        base = 0.0
        for quality in measure(options.model, cut, options.widths):
            base = base or quality.perplexity
            print(
                f"{quality.width:16}{quality.perplexity:12.3f}{quality.perplexity / base:10.4f}"
                f"{quality.divergence:12.2e}{quality.agreement:9.3f}",
                flush=True,
            )
    except (MillraceError, OSError, UnicodeDecodeError, ValueError) as error:
        parser.exit(1, f"quality: {error}\n")


if __name__ == "__main__":
    main()
