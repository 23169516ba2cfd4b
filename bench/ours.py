"""Our engine at the work of the bench, in this process."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from millrace.bench.comparison import OURS, Result
from millrace.bench.workload import Meter, Workload
from millrace.kernels import _C
from millrace.server.config import EngineConfig
from millrace.server.engine.engine import Engine
from millrace.server.engine.sequence import SequenceRequest
from millrace.server.errors import MillraceError
from millrace.server.model.executors import create_executor
from millrace.server.model.executors.base import Executor
from millrace.server.model.executors.cpu import CpuExecutor
from millrace.server.types import Sampling

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"executor": "reference"},
    "bf16": {"executor": "cpu", "dtype": "bfloat16"},
    "int8": {"executor": "cpu", "quantization": "int8"},
    "int4": {"executor": "cpu", "quantization": "int4"},
}


def read_rate(executor: Executor, threads: int, seconds: float) -> float | None:
    """Bytes per second at which `threads` threads read the weights; None of an executor that has them elsewhere."""
    if not isinstance(executor, CpuExecutor) or executor._model is None:
        return None
    return _C.roof_read_weights(model=executor._model, threads=threads, seconds=seconds)


class EngineStepper:
    """Our engine as the workload takes it."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def add(self, request: int, prompt: Sequence[int], output_tokens: int) -> None:
        greedy = Sampling(temperature=0)
        self._engine.submit(SequenceRequest(request, str(request), "bench", prompt, greedy, 0, output_tokens))

    def step(self) -> list[int]:
        output = self._engine.step()
        for finished in output.finished:
            if finished.error:
                raise finished.error
        return [token.sequence_id for token in output.tokens]


def measure_ours(
    model: Path, width: str, threads: int, workload: Workload, rates: dict[int, float], seconds: float
) -> Result:
    """`rates` takes the bytes per second at which memory gave the weights beside each batch, at best."""
    start = time.perf_counter()
    try:
        config = EngineConfig(
            prefix_caching=False,
            max_step_time=0,
            model=str(model),
            embedding_model="off",
            max_model_len=workload.context,
            max_num_seqs=workload.sequences,
            max_num_batched_tokens=workload.step_tokens,
            num_threads=threads,
            **SETTINGS[width],
        )
        loaded = create_executor(config, lambda done, total: None)
        load_seconds = time.perf_counter() - start
        engine = Engine(loaded.executor, loaded.info, config)

        def add_rate(batch: int) -> None:
            if rate := read_rate(loaded.executor, threads, seconds):
                rates[batch] = max(rate, rates.get(batch, 0))

        try:
            speeds = Meter(EngineStepper(engine)).measure(workload, add_rate)
        finally:
            engine.close()
    except ValidationError as error:
        return Result(OURS, width, error=f"this build does not take it: {error.errors()[0]['msg']}")
    except MillraceError as error:
        return Result(OURS, width, error=" ".join(str(error).split()))
    return Result(OURS, width, speeds, load_seconds=load_seconds)
