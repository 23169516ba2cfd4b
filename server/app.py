"""The server as a whole: the only file that knows every part."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from millrace.retrieval.library import Library
from millrace.server.api.server import ApiServer
from millrace.server.backends.base import Backend
from millrace.server.backends.supervisor import Supervisor
from millrace.server.backends.worker_process import Launcher
from millrace.server.config import RetrievalConfig, ServerConfig, Settings
from millrace.server.ending import arm_watchdog
from millrace.server.errors import CheckpointError, ConfigError
from millrace.server.gateway.auth import KeyStore
from millrace.server.gateway.embedding import TextEmbedder
from millrace.server.gateway.gateway import Gateway
from millrace.server.gateway.limits import Limits
from millrace.server.gateway.routing import ModelCard, Routes
from millrace.server.model.checkpoint import Checkpoint, checkpoint_digest, read_config, read_generation
from millrace.server.model.embedder import embedder_info, locate_embedder
from millrace.server.model.registry import model_spec
from millrace.server.telemetry.logs import configure_logs, get_logger
from millrace.server.telemetry.metrics import Metrics, MetricsServer
from millrace.server.text.embedding_tokenizer import EmbeddingTokenizer
from millrace.server.text.template import ChatTemplate
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import AnswerMode, EmbedderInfo

LAST_WORDS = 2.0  # seconds for streams to send the status that a drain ended them with
WATCHDOG = 20.0  # seconds beyond the grace after which the process ends in any case

log = get_logger()


async def serve(settings: Settings, launcher: Launcher, stop: asyncio.Future[None]) -> int:
    """Serve until `stop`; return the exit status. `launcher` may have started the worker already. Raises StartupErrors.

    The port is held, and health is truthful, while the model loads.
    """
    configure_logs(settings.server.log_format, settings.server.log_level)
    console = Console()
    keystore = KeyStore.load(settings.server.api_keys)
    encoder = read_encoder(settings.engine.embedding_model)
    supervisor = Supervisor(
        launcher,
        settings.supervisor,
        checkpoint_digest(settings.engine.checkpoint),
        embedder_revision=encoder.info.revision if encoder else None,
    )
    card, context = read_model(settings, supervisor.backend)
    metrics = Metrics()
    metrics.watch_engine(supervisor.backend.stats, lambda: supervisor.backend.messages)
    metrics.watch_tasks(asyncio.get_running_loop())
    # What ends is the reverse of what is here: the worker last, after every stream.
    async with AsyncExitStack() as stack:
        stack.push_async_callback(supervisor.close)
        embedder = TextEmbedder(supervisor.backend, encoder.tokenizer, encoder.info) if encoder else None
        library = await open_library(stack, settings.retrieval, embedder, encoder)
        if stop.done():
            return 0
        gateway = Gateway(
            Routes([card]),
            tenant_limits(keystore, settings.server),
            metrics,
            library=library,
            embedder=embedder,
            min_support=settings.retrieval.min_support,
            mask_pii=settings.server.pii == "mask",
        )
        stack.callback(gateway.close)
        api = ApiServer(gateway, settings.server, keystore.authenticate, context, library)
        page = start_metrics(stack, metrics, settings.server)
        port = await api.start()
        stack.push_async_callback(api.stop, LAST_WORDS)
        with loading_bar(console, card.name) as progress:
            await first_of(stop, loading := asyncio.ensure_future(supervisor.start(progress)))
        if stop.done():
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            return 0
        loading.result()
        follow_worker(supervisor.backend, gateway, api)
        reload_on_hangup(keystore)
        announce(console, settings.server, card, port, page)
        await stop
        log.info("draining", live_requests=gateway.limits.live, grace=settings.server.grace)
        arm_watchdog(settings.server.grace + WATCHDOG, launcher.remove_directory)
        api.set_ready(False)
        await gateway.drain(settings.server.grace)
    log.info("stopped")
    return 0


def read_model(settings: Settings, backend: Backend) -> tuple[ModelCard, int]:
    """Read all of a checkpoint but its weights; return its card and the largest context. Raises CheckpointError.

    A worker elsewhere has the weights; here they need not be.
    """
    directory = settings.engine.checkpoint
    config = read_config(directory)
    spec = model_spec(config) if settings.supervisor.worker else Checkpoint.open(directory).spec
    generation = read_generation(directory, config)
    tokenizer = Tokenizer.load(directory)
    eos_ids = generation.eos_token_ids or ((tokenizer.eos_id,) if tokenizer.eos_id is not None else ())
    name = settings.server.served_model_name or (
        "builtin" if settings.engine.model == "builtin" else directory.resolve().name
    )
    card = ModelCard(
        name=name,
        tokenizer=tokenizer,
        template=ChatTemplate.load(directory, tokenizer),
        backend=backend,
        default_sampling=generation.sampling,
        stop_token_ids=frozenset(eos_ids),
        answer_mode=answer_mode(settings),
    )
    return card, settings.engine.max_model_len or spec.context


@dataclass(frozen=True, slots=True)
class Encoder:
    """The gateway's half of the embedding model: the worker has the weights."""

    tokenizer: EmbeddingTokenizer
    info: EmbedderInfo


def read_encoder(setting: str) -> Encoder | None:
    """None: nothing embeds here. Raises CheckpointError."""
    directory = locate_embedder(setting)
    if directory is None:
        return None
    encoder = Encoder(EmbeddingTokenizer.load(directory), embedder_info(directory))
    if encoder.tokenizer.vocab_size > encoder.info.vocab_size:
        raise CheckpointError(
            f"{directory}: tokenizer.json has {encoder.tokenizer.vocab_size} tokens and the model "
            f"{encoder.info.vocab_size}; they do not belong together"
        )
    return encoder


async def open_library(
    stack: AsyncExitStack, config: RetrievalConfig, embedder: TextEmbedder | None, encoder: Encoder | None
) -> Library | None:
    """The documents of the data directory; None where nothing embeds. Raises ConfigError."""
    if embedder is None or encoder is None:
        return None
    config = fitted(config, encoder.info)
    library = await Library.open(config, embedder, encoder.tokenizer.raw, encoder.tokenizer.special_tokens)
    stack.push_async_callback(library.close)
    return library


def fitted(config: RetrievalConfig, info: EmbedderInfo) -> RetrievalConfig:
    """Chunks that the embedding model can read: the default gives way to it, what was asked for is a ConfigError."""
    if config.chunk_tokens <= info.max_tokens:
        return config
    if "chunk_tokens" in config.model_fields_set:
        raise ConfigError(f"--chunk-tokens {config.chunk_tokens}: {info.name} reads {info.max_tokens} at most")
    overlap = min(config.chunk_overlap, info.max_tokens // 4)
    return config.model_copy(update={"chunk_tokens": info.max_tokens, "chunk_overlap": overlap})


def answer_mode(settings: Settings) -> AnswerMode:
    """The built-in model writes grammar, not facts: it quotes."""
    asked = settings.retrieval.answer_mode
    if asked == "auto":
        return AnswerMode.EXTRACTIVE if settings.engine.model == "builtin" else AnswerMode.GENERATIVE
    return AnswerMode(asked)


def tenant_limits(keystore: KeyStore, config: ServerConfig) -> Limits:
    """Live requests per tenant: the key file's number, else --max-concurrent-requests."""
    return Limits(lambda tenant: keystore.tenant(tenant).max_concurrent_requests or config.max_concurrent_requests)


def start_metrics(stack: AsyncExitStack | ExitStack, metrics: Metrics, config: ServerConfig) -> str | None:
    """Return the address of the page, or None if there is none."""
    if config.metrics_port is None:
        return None
    server = MetricsServer(metrics, config.metrics_host, config.metrics_port)
    stack.callback(server.close)
    return server.url


@contextmanager
def loading_bar(console: Console, name: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told (bytes done, bytes in all)."""
    columns = TextColumn("Loading {task.description}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def follow_worker(backend: Backend, gateway: Gateway, api: ApiServer) -> None:
    """Health says what the worker is, which is ready now; every later time that it becomes ready is a restart."""
    earlier_starts = count()

    def on_ready(ready: bool) -> None:
        if ready and next(earlier_starts):
            gateway.metrics.engine_restarts.inc()
        api.set_ready(ready and not gateway.limits.draining)

    backend.on_ready(on_ready)


def announce(console: Console, config: ServerConfig, card: ModelCard, port: int, page: str | None) -> None:
    """The ready line, and commands that work."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    address = f"{f'[{host}]' if ':' in host else host}:{port}"
    url = f"{'grpcs' if config.tls_cert else 'grpc'}://{address}"
    where = url if config.tls_cert else address
    lines = [
        f"Ready: model {card.name} at {url}",
        *(["  export MILLRACE_API_KEY=mk-…"] if config.api_keys else []),
        f"  millrace chat --address {where}",
        f'  millrace generate --address {where} "A queue keeps"',
    ]
    if page:
        lines.append(f"  curl {page}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def reload_on_hangup(keystore: KeyStore) -> None:
    """SIGHUP reads the keys again; a damaged file changes nothing."""

    def reload() -> None:
        try:
            keystore.reload()
        except ConfigError as error:
            log.error("keys not reloaded", error=str(error))
        else:
            log.info("keys reloaded")

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


async def first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
