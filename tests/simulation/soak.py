"""Simulate many seeds: python tests/simulation/soak.py [--seeds 100000] [--first 0] [--steps 300] [--processes 2]

A seed that fails is shrunk, and joins the corpus, which every test run replays.
"""

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from simulation_script import CORPUS, Script, shrink, write_script
from simulation_world import World

BATCH = 50  # seeds of one job


def failure(script: Script) -> str | None:
    """What a script violates."""
    try:
        World(script).run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def run_batch(first: int, count: int, steps: int) -> tuple[dict[str, int], list[tuple[int, str]]]:
    counts: Counter[str] = Counter()
    failed: list[tuple[int, str]] = []
    for seed in range(first, first + count):
        world = World(write_script(seed, steps))
        try:
            world.run()
        except Exception as error:
            failed.append((seed, f"{type(error).__name__}: {str(error)[:200]}"))
        counts.update(world.counts)
    return counts, failed


def keep(seed: int, steps: int) -> Path:
    """Put what is left of a failing seed into the corpus."""
    script = shrink(write_script(seed, steps), lambda script: failure(script) is not None)
    path = CORPUS / f"seed-{seed}.json"
    script.save(path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    arguments = parser.parse_args()
    started, counts, failed = time.monotonic(), Counter[str](), []
    last = arguments.first + arguments.seeds
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(run_batch, first, min(BATCH, last - first), arguments.steps)
            for first in range(arguments.first, last, BATCH)
        ]
        for job in jobs:
            more, bad = job.result()
            counts.update(more)
            failed += bad
            for seed, why in bad:
                print(f"seed {seed}: {why}; kept as {keep(seed, arguments.steps)}", flush=True)
    seconds = time.monotonic() - started
    print(f"{arguments.seeds} seeds x {arguments.steps} steps in {seconds:.0f} s, {len(failed)} failed")
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
