"""What a tenant that floods does to another one: `python -m millrace.bench.fairness [--model SHAPE|DIR]`.

A whole server with two tenants. B sends one short request a second, alone and then while A has sent 50 long prompts at
once. B's 99th percentile of the time to the first token should grow by two steps at most.
"""

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from pathlib import Path
from statistics import median

from millrace.bench.checkpoints import work_directory
from millrace.bench.engine import locate
from millrace.bench.serving import server_flags
from millrace.bench.workload import FIRST_ID, LAST_ID
from millrace.server.client import AsyncClient
from millrace.server.config import EngineConfig
from millrace.server.errors import MillraceError
from millrace.server.gateway.auth import new_key
from millrace.server.local import local_server

FLOOD, LONG, LONG_OUTPUT = 50, 1500, 64
SHORT, SHORT_OUTPUT = 40, 16


class Tenant:
    """A client of its own, whose prompts are never twice the same."""

    def __init__(self, address: str, key: str, seed: int):
        self._client = AsyncClient(address, api_key=key)
        self._draw = random.Random(seed)

    async def first_token(self, prompt_tokens: int, output_tokens: int) -> float:
        """Seconds to the first token; the answer is read to its end."""
        prompt = self._draw.choices(range(FIRST_ID, LAST_ID), k=prompt_tokens)
        start, first = time.perf_counter(), 0.0
        answer = self._client.stream(
            prompt, model="bench", temperature=0.0, max_output_tokens=output_tokens, ignore_eos=True
        )
        async for event in answer:
            if not first and event.WhichOneof("event") == "deltas":
                first = time.perf_counter() - start
        return first

    async def every_second(self, seconds: int) -> list[float]:
        asked = []
        for _ in range(seconds):
            asked.append(asyncio.create_task(self.first_token(SHORT, SHORT_OUTPUT)))
            await asyncio.sleep(1)
        return [await task for task in asked]

    async def close(self) -> None:
        await self._client.close()


async def measure(address: str, keys: tuple[str, str], seconds: int) -> tuple[list[float], list[float], int]:
    """B's times alone and beside the flood, and how many of A's requests had ended by then."""
    a, b = Tenant(address, keys[0], 1), Tenant(address, keys[1], 2)
    try:
        await b.every_second(3)  # nobody pays for what happens once
        alone = await b.every_second(seconds)
        flood = [asyncio.create_task(a.first_token(LONG, LONG_OUTPUT)) for _ in range(FLOOD)]
        await asyncio.sleep(2)
        beside = await b.every_second(seconds)
        ended = sum(task.done() for task in flood)
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        return alone, beside, ended
    finally:
        await a.close()
        await b.close()


def worst(times: list[float]) -> float:
    """The 99th percentile, which of fewer than a hundred is the largest."""
    return sorted(times)[min(len(times) - 1, int(0.99 * len(times)))]


def report(alone: list[float], beside: list[float], ended: int, step: float) -> None:
    allowed = worst(alone) + 2 * step
    print(f"{'B, ms to the first token':<28}{'median':>8}{'p99':>8}")
    for name, times in (("alone", alone), (f"beside {FLOOD} prompts of {LONG}", beside)):
        print(f"{name:<28}{1e3 * median(times):8.0f}{1e3 * worst(times):8.0f}")
    print(f"allowed at p99 (alone + 2 steps of {1e3 * step:.0f} ms): {1e3 * allowed:.0f}")
    print(f"ratio {worst(beside) / allowed:.2f} (asked: at most 1); {ended} of A's requests ended meanwhile")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of random weights, or a directory")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="int8")
    parser.add_argument("--seconds", type=int, default=40, help="requests of B, in each part")
    parser.add_argument("--work-dir", type=Path, default=work_directory())
    options = parser.parse_args()
    try:
        config = EngineConfig(
            model=str(locate(options.model, options.work_dir)[0]),
            embedding_model="off",
            quantization=options.quantization,
            max_model_len=LONG + LONG_OUTPUT,
            max_num_seqs=64,
        )
        with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
            (key_a, a), (key_b, b) = new_key("a"), new_key("b")
            keys = Path(directory) / "keys.toml"
            keys.write_text(a + b)
            flags = [*server_flags(config), "--served-model-name=bench", f"--api-keys={keys}"]
            address = stack.enter_context(local_server(*flags))
            result = asyncio.run(measure(address, (key_a, key_b), options.seconds))
        print(f"{options.model}, {options.quantization}")
        report(*result, config.max_step_time)
    except (MillraceError, ValueError, OSError) as error:
        parser.exit(1, f"fairness: {error}\n")


if __name__ == "__main__":
    main()
