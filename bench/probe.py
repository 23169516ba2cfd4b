"""Whether the time to the first token tells a tenant what another one asked: `python -m millrace.bench.probe`.

A victim sends a prompt. Then an attacker sends the same one and a fresh one, in random order. AUC: how often its time
for the known prompt is the shorter; 0.5 is chance. The control is the victim itself as the attacker.
"""

import argparse
import random
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import count
from pathlib import Path

from millrace.bench.checkpoints import work_directory
from millrace.bench.engine import locate
from millrace.server.config import EngineConfig
from millrace.server.engine.engine import Engine
from millrace.server.engine.sequence import SequenceRequest
from millrace.server.errors import MillraceError
from millrace.server.model.executors import create_executor
from millrace.server.types import Sampling

PROMPT = 256  # tokens
ASKED = 0.55


class Prober:
    """Times the first tokens of tenants' prompts, one at a time."""

    def __init__(self, engine: Engine, vocabulary: int):
        self._engine, self._draw = engine, random.Random(0)
        self._words, self._ids = range(vocabulary), count(1)

    def fresh(self) -> list[int]:
        return self._draw.choices(self._words, k=PROMPT)

    def seconds(self, tenant: str, prompt: Sequence[int]) -> float:
        request = SequenceRequest(next(self._ids), "probe", tenant, prompt, Sampling(temperature=0), 0, 1)
        start = time.perf_counter()
        self._engine.submit(request)
        while self._engine.has_work:
            self._engine.step()
        return time.perf_counter() - start

    def pair(self, tenant: str) -> tuple[float, float]:
        """Times of `tenant` for a prompt that the victim has just sent, and for one that nobody has."""
        known, unknown = self.fresh(), self.fresh()
        self.seconds("victim", known)
        if self._draw.random() < 0.5:
            first = self.seconds(tenant, known)
            return first, self.seconds(tenant, unknown)
        second = self.seconds(tenant, unknown)
        return self.seconds(tenant, known), second


def auc(pairs: Sequence[tuple[float, float]]) -> float:
    """The chance that a known prompt's time is the shorter one of two drawn at random (Mann and Whitney, 1947)."""
    known, unknown = zip(*pairs, strict=True)
    shorter: float = sum((k < u) + (k == u) / 2 for k in known for u in unknown)
    return shorter / (len(known) * len(unknown))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="builtin", help="a shape of random weights, a directory, or the built-in")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--work-dir", type=Path, default=work_directory())
    options = parser.parse_args()
    if options.pairs < 10:
        parser.error("--pairs: at least 10")
    try:
        model = options.model if options.model == "builtin" else str(locate(options.model, options.work_dir)[0])
        config = EngineConfig(model=model, embedding_model="off", max_model_len=PROMPT + 1, max_num_seqs=8)
        loaded = create_executor(config, lambda done, total: None)
        with closing(Engine(loaded.executor, loaded.info, config)) as engine:
            prober = Prober(engine, loaded.info.vocab_size)
            for _ in range(20):
                prober.pair("victim")  # nobody pays for what happens once
            own = auc([prober.pair("victim") for _ in range(options.pairs)])
            other = auc([prober.pair("attacker") for _ in range(options.pairs)])
    except (MillraceError, ValueError, OSError) as error:
        parser.exit(1, f"probe: {error}\n")
    print(f"{options.model}, {options.pairs} pairs of prompts of {PROMPT} tokens")
    print(f"AUC of a tenant's own prompts {own:.3f}; of another tenant's {other:.3f} (asked: at most {ASKED})")


if __name__ == "__main__":
    main()
