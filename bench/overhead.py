"""What a step costs beside the native call: `python -m millrace.bench.overhead [--model DIR]`.

Decoding sequences with the engine: of each step, the whole of `Engine.step`, the one call of the native runtime in it,
and what is left: scheduling, packing, keeping results. Medians, in microseconds.
"""

import argparse
import time
from statistics import median
from typing import Any

from millrace.bench.ours import EngineStepper
from millrace.server.config import EngineConfig
from millrace.server.engine.engine import Engine
from millrace.server.errors import MillraceError
from millrace.server.model.executors import create_executor
from millrace.server.model.executors.cpu import CpuExecutor

BATCHES = (1, 8, 32)
PROMPT = tuple(range(10, 42))
ASKED_US = 100


class TimedModel:
    """The runtime's model; `seconds` of its last step."""

    def __init__(self, model: Any):
        self._model = model
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def step(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._model.step(*arguments)
        finally:
            self.seconds = time.perf_counter() - start


def measure(model: str, batch: int, steps: int) -> tuple[float, float, float]:
    """Medians over steps of decoding: seconds of a step, of the native call, of the rest."""
    config = EngineConfig(
        model=model,
        embedding_model="off",
        quantization="int8",
        max_step_time=0,
        max_num_seqs=batch,
        max_num_batched_tokens=batch * len(PROMPT),
        max_model_len=len(PROMPT) + steps,
    )
    loaded = create_executor(config, lambda done, total: None)
    assert isinstance(loaded.executor, CpuExecutor)
    timed = TimedModel(loaded.executor._model)
    loaded.executor._model = timed  # type: ignore[assignment]  # it is that, with a clock
    engine = Engine(loaded.executor, loaded.info, config)
    stepper = EngineStepper(engine)
    for sequence in range(batch):
        stepper.add(sequence, PROMPT, steps)
    stepper.step()  # all prompts
    wholes, natives = [], []
    for _ in range(steps - 1):
        start = time.perf_counter()
        tokens = stepper.step()
        wholes.append(time.perf_counter() - start)
        natives.append(timed.seconds)
        if len(tokens) != batch:
            raise ValueError(f"a step gave {len(tokens)} tokens, not one to each of {batch} sequences")
    engine.close()
    return median(wholes), median(natives), median(a - b for a, b in zip(wholes, natives, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="builtin", help="checkpoint directory; default: the built-in model")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    if options.steps < 10:
        parser.error("--steps: at least 10")
    try:
        print(f"{options.model}, int8, microseconds of a step; asked: at most {ASKED_US} beside the native call")
        print(f"{'sequences':>9}{'step':>10}{'native':>10}{'beside':>10}")
        for batch in BATCHES:
            step, native, beside = (1e6 * seconds for seconds in measure(options.model, batch, options.steps))
            print(f"{batch:9}{step:10.0f}{native:10.0f}{beside:10.0f}", flush=True)
    except (MillraceError, ValueError) as error:
        parser.exit(1, f"overhead: {error}\n")


if __name__ == "__main__":
    main()
