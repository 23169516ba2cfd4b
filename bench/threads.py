"""What the thread pool costs: `python -m millrace.bench.threads [--threads N]`.

A barrier, an empty run and a shared loop in nanoseconds (a step has about nine barriers for each layer), and the
processor time that an idle worker takes until it sleeps. The least of many means: noise only ever adds.
"""

import argparse

from millrace.kernels import _C

BARRIER_NS, IDLE_US = 1000, 50  # what they may cost


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=_C.available_cores(), help="default: one per core")
    parser.add_argument("--rounds", type=int, default=20_000)
    options = parser.parse_args()
    if options.threads < 2:
        parser.error("--threads: a pool of one has nobody to wait for")
    print(f"{'threads':>8}{'barrier ns':>12}{'run ns':>10}{'share ns':>10}{'idle us':>10}")
    for threads in sorted({2, options.threads}):
        barrier, run, share = (
            _C.pool_cost(what=what, threads=threads, rounds=options.rounds) for what in ("barrier", "run", "share")
        )
        idle = _C.pool_cost(what="idle", threads=threads, rounds=500)
        print(f"{threads:8}{barrier:12.0f}{run:10.0f}{share:10.0f}{idle:10.1f}")
    print(f"at most: barrier {BARRIER_NS} ns, idle {IDLE_US} us of spinning and a wake-up")


if __name__ == "__main__":
    main()
