"""Kernels against a peer and against the machine, in one run: `python -m millrace.bench.kernels [--seconds N]`.

Each row of the table: microseconds per row of the batch here and with the peer, their ratio, and the gigabytes per
second of input that the time means, beside those of a plain read of the same memory.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from millrace.kernels import _C
from millrace.kernels.sampling import sample

ROWS = 8
VOCABS = (8_192, 151_936)
OPTIONS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1, "top_n": 5},
}


@dataclass(frozen=True, slots=True)
class Measurement:
    kernel: str
    case: str
    ours_us: float  # per row
    peer_us: float  # per row
    gigabytes_per_second: float
    read_gigabytes_per_second: float  # a plain sum of the same memory


def best_seconds(run: Callable[[], object], seconds: float) -> float:
    """The shortest of as many runs as fit: noise only ever adds."""
    run()
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def columns(options: dict[str, float]) -> dict[str, Any]:
    def full(name: str, default: float, dtype: type[Any]) -> NDArray[Any]:
        return np.full(ROWS, options.get(name, default), dtype)

    history = 200
    return {
        "temperature": full("temperature", 1, np.float32),
        "top_p": full("top_p", 1, np.float32),
        "top_k": full("top_k", 0, np.int32),
        "min_p": full("min_p", 0, np.float32),
        "presence_penalty": full("presence_penalty", 0, np.float32),
        "frequency_penalty": full("frequency_penalty", 0, np.float32),
        "repetition_penalty": full("repetition_penalty", 1, np.float32),
        "seed": np.arange(ROWS, dtype=np.uint64),
        "choice": np.zeros(ROWS, np.int32),
        "position": np.zeros(ROWS, np.int32),
        "top_n": full("top_n", -1, np.int32),
        "bias_offsets": np.zeros(ROWS + 1, np.int32),
        "bias_ids": np.empty(0, np.int32),
        "bias_values": np.empty(0, np.float32),
        "history_offsets": np.arange(ROWS + 1, dtype=np.int32) * history,
        "history_ids": np.tile(np.arange(history, dtype=np.int32) * 37, ROWS),
        "history_prompt_lens": np.full(ROWS, history // 2, np.int32),
    }


def torch_sample(logits: torch.Tensor, options: dict[str, float], history: torch.Tensor) -> torch.Tensor:
    """The usual sampler in PyTorch: top-k or a sort of the vocabulary, softmax, cut, draw."""
    if "top_n" in options:
        torch.log_softmax(logits, -1).topk(int(options["top_n"]))
    if "repetition_penalty" in options:
        seen = logits.gather(1, history)
        penalty = options["repetition_penalty"]
        logits = logits.scatter(1, history, torch.where(seen > 0, seen / penalty, seen * penalty))
    if options["temperature"] == 0:
        return logits.argmax(-1)
    scaled = logits / options["temperature"]
    if not options.keys() & {"top_k", "top_p", "min_p"}:
        return torch.multinomial(scaled.softmax(-1), 1)
    if "top_k" in options:
        ordered, ids = scaled.topk(int(options["top_k"]))
    else:
        ordered, ids = scaled.sort(-1, descending=True)
    p = ordered.softmax(-1)
    if "top_p" in options:
        p[p.cumsum(-1) - p >= options["top_p"]] = 0
    if "min_p" in options:
        p[p < options["min_p"] * p[:, :1]] = 0
    return ids.gather(1, torch.multinomial(p, 1))


def sampling(seconds: float) -> Iterator[Measurement]:
    for vocab in VOCABS:
        logits = np.random.default_rng(0).standard_normal((ROWS, vocab)).astype(np.float32) * 3
        tensor = torch.from_numpy(logits)
        read = logits.nbytes / best_seconds(tensor.sum, seconds) / 1e9
        for name, options in OPTIONS.items():
            case = columns(options)
            history = torch.from_numpy(case["history_ids"]).long().view(ROWS, -1)
            ours = best_seconds(partial(sample, logits, **case), seconds)
            peer = best_seconds(partial(torch_sample, tensor, options, history), seconds)
            yield Measurement(
                "sampling", f"{vocab} {name}", ours / ROWS * 1e6, peer / ROWS * 1e6, logits.nbytes / ours / 1e9, read
            )


KERNELS = {"sampling": sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement; default 0.3")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    print(f"one thread, {_C.isa()}, {ROWS} rows, peer: PyTorch {torch.__version__}")
    print(f"{'kernel':10}{'case':20}{'us/row':>10}{'peer':>10}{'ratio':>8}{'GB/s':>8}{'read':>8}")
    for run in KERNELS.values():
        for m in run(seconds):
            print(
                f"{m.kernel:10}{m.case:20}{m.ours_us:10.1f}{m.peer_us:10.1f}{m.peer_us / m.ours_us:8.1f}"
                f"{m.gigabytes_per_second:8.1f}{m.read_gigabytes_per_second:8.1f}"
            )


if __name__ == "__main__":
    main()
