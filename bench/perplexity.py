"""The perplexity that engines give windows of tokens: ours at each width, beside float32's, and a peer's."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from millrace.bench.checkpoints import label_of
from millrace.bench.comparison import OURS
from millrace.bench.likelihood import log_softmax, loss
from millrace.bench.logits import Logits, all_logits
from millrace.bench.peers.base import Peer
from millrace.server.config import EngineConfig
from millrace.server.model.executors import LoadedModel, create_executor

WIDTHS: dict[str, dict[str, object]] = {
    "bf16": {},
    "bf16-kv-int8": {"kv_cache_dtype": "int8"},
    "int8": {"quantization": "int8"},
    "int4-g128": {"quantization": "int4"},
    "int4-g32": {"quantization": "int4", "quantization_group": 32},
}
Cut = Sequence[NDArray[np.int32]]  # windows of token ids


@dataclass(frozen=True, slots=True)
class Quality:
    width: str
    losses: NDArray[np.float64]  # negative log likelihood of each window, nats
    predicted: int  # tokens of all windows
    divergence: float | None = None  # mean KL from float32, nats; None: the engine does not tell
    agreement: float | None = None  # share of positions with the same most likely token
    engine: str = OURS

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.losses.sum() / self.predicted))

    def over(self, other: "Quality") -> tuple[float, float]:
        """The ratio of this perplexity to that of the same windows, and its standard error: NaN for one window.

        Texts differ much more than engines do on one text, so it is the differences that are summed.
        """
        differences = self.losses - other.losses
        ratio = float(np.exp(differences.sum() / self.predicted))
        if len(differences) < 2:
            return ratio, float("nan")
        return ratio, ratio * float(differences.std(ddof=1)) * len(differences) ** 0.5 / self.predicted


def windows(tokens: Sequence[int], length: int, most: int) -> list[NDArray[np.int32]]:
    """Full windows that follow each other; at least one. ValueError for a text too short to predict anything of."""
    if len(tokens) < 2:
        raise ValueError("the text has fewer than two tokens")
    cut = [np.array(tokens[at : at + length], np.int32) for at in range(0, len(tokens), length)]
    return [window for window in cut if len(window) > 1][:most]


class Sums:
    """What one width has come to so far."""

    def __init__(self) -> None:
        self.count, self.divergence, self.agreed = 0, 0.0, 0
        self.losses: list[float] = []

    def add(self, window: NDArray[np.int32], found: Logits, wanted: Logits) -> None:
        ours, theirs = log_softmax(found[:-1]), log_softmax(wanted[:-1])
        self.count += len(ours)
        self.losses.append(loss(ours, window))
        self.divergence += float((np.exp(theirs) * (theirs - ours)).sum())
        self.agreed += int((ours.argmax(1) == theirs.argmax(1)).sum())

    def quality(self, width: str) -> Quality:
        count = self.count
        return Quality(width, np.array(self.losses), count, self.divergence / count, self.agreed / count)


def measure(model: str, cut: Cut, widths: Sequence[str]) -> Iterator[Quality]:
    """Ours, float32 first. One model is in memory at a time; float32's logits, which may be many, lie in a file."""
    longest = max(map(len, cut))
    shape = {"model": model, "max_num_seqs": 1, "max_model_len": longest, "max_num_batched_tokens": longest}

    def load(**settings: object) -> LoadedModel:
        return create_executor(EngineConfig.model_validate(shape | settings), lambda done, total: None)

    def run(width: str, loaded: LoadedModel, keep: bool) -> Quality:
        sums = Sums()
        for index, window in enumerate(cut):
            logits = all_logits(loaded.executor, window)
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


def peer_width(peer: Peer, width: str) -> str | None:
    """What the peer calls a width of ours; None: it has none to compare."""
    called = {"bf16": "bf16", "int8": "int8", f"int4-g{peer.int4_group}": "int4"}.get(width)
    return called if called in peer.widths else None


def measure_peer(peer: Peer, width: str, checkpoint: Path, cut: Cut, work: Path) -> Quality:
    """Raises PeerError."""
    called = peer_width(peer, width)
    assert called is not None
    model = peer.convert(checkpoint, label_of(checkpoint), called, work)
    threads = len(os.sched_getaffinity(0))
    losses = peer.losses(model, called, threads, [window.tolist() for window in cut], work)
    predicted = sum(len(window) - 1 for window in cut)
    return Quality(width, np.array(losses), predicted, engine=peer.name)
