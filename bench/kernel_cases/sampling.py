"""Drawing tokens beside the usual sampler in PyTorch."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from millrace.bench.kernel_cases.case import Case
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


def cases() -> Iterator[Case]:
    """Of ROWS rows each."""
    for vocab in VOCABS:
        logits = np.random.default_rng(0).standard_normal((ROWS, vocab)).astype(np.float32) * 3
        tensor = torch.from_numpy(logits)
        for name, options in OPTIONS.items():
            case = columns(options)
            history = torch.from_numpy(case["history_ids"]).long().view(ROWS, -1)
            ours, peer = partial(sample, logits, **case), partial(torch_sample, tensor, options, history)
            yield Case("sampling", f"{ROWS} rows of {vocab}, {name}", [ours], [peer], logits.nbytes, 0)
