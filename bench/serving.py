"""What the way over gRPC costs: `python -m millrace.bench.serving [--model SHAPE|DIR] [--quantization int8]`.

The mixed load of the engine's bench (32 requests of 256 + 64 tokens), in turns: by the engine alone in this process,
and by a whole server, streamed to 32 clients. Output tokens a second, and the memory of the worker beside what its
weights and KV cache take.
"""

import argparse
import asyncio
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from millrace.bench.checkpoints import work_directory
from millrace.bench.engine import locate
from millrace.bench.ours import EngineStepper
from millrace.bench.workload import FIRST_ID, LAST_ID, Meter, Workload
from millrace.kernels import _C
from millrace.server.client import AsyncClient
from millrace.server.config import EngineConfig
from millrace.server.engine.engine import Engine
from millrace.server.errors import MillraceError
from millrace.server.local import local_server
from millrace.server.model.executors import create_executor
from millrace.server.model.executors.cpu import CpuExecutor

MIB = 1 << 20


def alone(config: EngineConfig, work: Workload) -> tuple[float, int]:
    """Output tokens per second, and bytes of weights and of the KV cache."""
    loaded = create_executor(config, lambda done, total: None)
    assert isinstance(loaded.executor, CpuExecutor)
    layout = loaded.executor.kv_layout
    size = loaded.executor.weight_bytes + layout.num_blocks * layout.bytes_per_block
    engine = Engine(loaded.executor, loaded.info, config)
    try:
        return Meter(EngineStepper(engine)).mixed(work), size
    finally:
        engine.close()


def served(config: EngineConfig, work: Workload) -> tuple[float, int]:
    """Output tokens per second, and the bytes that the worker has in memory."""
    with local_server(*server_flags(config), "--served-model-name=bench") as address:
        speed = asyncio.run(stream_all(address, work))
        return speed, max(memory(pid, "VmRSS") for pid in worker_pids())


def server_flags(config: EngineConfig) -> list[str]:
    """Of `millrace serve`, for the settings that were set."""
    settings = config.model_dump(exclude_unset=True)
    names = {name: name.replace("_", "-") for name in settings}
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{names[name]}" if value else f"--no-{names[name]}")
        elif value is not None:
            flags.append(f"--{names[name]}={value}")
    return flags


async def stream_all(address: str, work: Workload) -> float:
    draw = random.Random(1)

    async def stream(client: AsyncClient, prompt: int, output: int) -> int:
        """Output tokens."""
        ids = [draw.randint(FIRST_ID, LAST_ID) for _ in range(prompt)]
        tokens = 0
        async for event in client.stream(ids, model="bench", temperature=0, max_output_tokens=output, ignore_eos=True):
            tokens += event.completed.usage.output_tokens
        return tokens

    async with AsyncClient(address) as client:
        await stream(client, work.decode_prompt, 2)  # nobody pays for what happens once
        start = time.perf_counter()
        streams = [stream(client, work.request_prompt, work.request_output) for _ in range(work.requests)]
        tokens = sum(await asyncio.gather(*streams))
        seconds = time.perf_counter() - start
    if tokens != work.requests * work.request_output:
        raise ValueError(f"{tokens} tokens came, {work.requests * work.request_output} were asked for")
    return tokens / seconds


def worker_pids() -> Iterator[int]:
    """The worker of the server that this process has started."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if (
                b"millrace.server.worker.main" in path.read_bytes()
                and parent(parent(int(path.parent.name))) == os.getpid()
            ):
                yield int(path.parent.name)
        except OSError:
            continue  # it has just ended


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def memory(pid: int, what: str) -> int:
    """Bytes in memory: VmRSS now, VmHWM at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{what}:")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llama-3.2-1b", help="a shape of random weights, or a directory")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--work-dir", type=Path, default=work_directory())
    options = parser.parse_args()
    work = Workload(requests=options.requests)
    try:
        config = EngineConfig(
            prefix_caching=False,
            max_step_time=0,
            model=str(locate(options.model, options.work_dir)[0]),
            embedding_model="off",
            quantization=options.quantization,
            max_model_len=work.context,
            max_num_seqs=work.sequences,
            max_num_batched_tokens=work.step_tokens,
        )
        print(f"{options.model}, {options.quantization}, {_C.isa()}: output tokens a second, {work.requests} requests")
        print(f"{'engine alone':>14}{'over gRPC':>12}{'share':>8}{'worker MiB':>12}{'weights + KV':>14}")
        shares = []
        for _ in range(options.rounds):
            (engine, planned), (server, used) = alone(config, work), served(config, work)
            shares.append(server / engine)
            print(f"{engine:14.1f}{server:12.1f}{shares[-1]:8.1%}{used / MIB:12.0f}{planned / MIB:14.0f}", flush=True)
        print(f"median share {median(shares):.1%}")
    except (MillraceError, ValueError, OSError) as error:
        parser.exit(1, f"serving: {error}\n")


if __name__ == "__main__":
    main()
