"""What the engine itself costs per step, without a model: schedule, pack, commit.

    python -m millrace.bench.scheduler [--running 32 64 128 256] [--waiting 0 200 2000 10000] [--steps 300]

Plots microseconds per step of pure decoding. The cost should grow no faster than what runs, and not with what waits;
the aim at 256 running sequences is 300 microseconds.
"""

import argparse
import time
from statistics import median

import numpy as np

from millrace.server.config import EngineConfig
from millrace.server.engine.engine import Engine
from millrace.server.engine.sequence import SequenceRequest
from millrace.server.model.executors.base import Batch, KVLayout, Output, StepResult
from millrace.server.types import BackendInfo, Sampling

BLOCK_SIZE = 32
PROMPT = tuple(range(64))
BAR = 10  # microseconds of a mark of the plot


class NullExecutor:
    """Answers at once: every row that samples yields token 0."""

    progress = 0

    def __init__(self, num_blocks: int):
        self.kv_layout = KVLayout(BLOCK_SIZE, num_blocks, 1)
        self._batch: Batch | None = None

    def submit(self, batch: Batch) -> int:
        self._batch = batch
        return 0

    def collect(self, ticket: int) -> StepResult:
        assert self._batch is not None
        offsets = np.zeros(len(self._batch.outputs) + 1, np.int32)
        np.cumsum(self._batch.outputs == Output.SAMPLE, out=offsets[1:])
        ids, reals = np.zeros(offsets[-1], np.int32), np.zeros(offsets[-1], np.float32)
        return StepResult(offsets, ids, reals, np.zeros(offsets[-1] + 1, np.int32), ids[:0], reals[:0])


def step_us(running: int, waiting: int, steps: int) -> float:
    """Median microseconds of a step that decodes `running` sequences while `waiting` others wait."""
    length = len(PROMPT) + 2 * steps
    blocks = (running + 1) * -(-length // BLOCK_SIZE)
    info = BackendInfo("", "null", "", 0, 1000, length + 1, BLOCK_SIZE, blocks)
    config = EngineConfig(
        max_num_seqs=running,
        max_num_batched_tokens=65_536,
        max_queued_requests=running + waiting,
        max_queued_tokens=10**9,
        max_step_time=0,
    )
    engine = Engine(NullExecutor(blocks), info, config)  # type: ignore[arg-type]  # only what a step needs
    for sequence_id in range(running + waiting):
        engine.submit(SequenceRequest(sequence_id, "", "", PROMPT, Sampling(), 0, max_output_tokens=2 * steps))
    engine.step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        output = engine.step()
        times.append(time.perf_counter() - started)
        assert (len(output.tokens), output.stats.waiting) == (running, waiting)
    return median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--running", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 200, 2000, 10_000])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    print(f"{'running':>8} {'waiting':>8} {'us/step':>8}")
    for running in arguments.running:
        for waiting in arguments.waiting:
            cost = step_us(running, waiting, arguments.steps)
            print(f"{running:>8} {waiting:>8} {cost:>8.0f} {'#' * round(cost / BAR)}", flush=True)


if __name__ == "__main__":
    main()
