"""Makes the executors that a worker runs: opens the checkpoint, settles what is `auto`, loads the weights."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.server.config import EngineConfig
from millrace.server.errors import MissingDependency, NotEnoughMemory
from millrace.server.model.checkpoint import Checkpoint, checkpoint_digest
from millrace.server.model.embedder import embedder_info
from millrace.server.model.executors.base import Executor, KVLayout
from millrace.server.model.executors.cpu import CpuExecutor, thread_pool
from millrace.server.model.executors.cpu_weights import stored_bytes
from millrace.server.model.executors.plan import instruction_set, make_plan, plan_encoder, uses_cpu
from millrace.server.model.executors.precision import ENCODER_PRECISION, Precision, make_precision
from millrace.server.model.hub import locate
from millrace.server.model.spec import ModelSpec
from millrace.server.model.weights import Found, Progress, find_weights, stream_weights
from millrace.server.types import BackendInfo, EmbedderInfo


@dataclass(frozen=True, slots=True)
class LoadedModel:
    executor: Executor
    spec: ModelSpec
    info: BackendInfo


@dataclass(frozen=True, slots=True)
class LoadedEmbedder:
    """`executor` takes the batches of `texts.py`."""

    executor: Executor
    info: EmbedderInfo


def create_executor(config: EngineConfig, progress: Progress) -> LoadedModel:
    """Load `config.model`. `progress(done, total)` counts bytes read.

    Raises StartupErrors: CheckpointError, ConfigError, NotEnoughMemory (before anything is allocated),
    MissingDependency where PyTorch is not installed.
    """
    config = locate(config)
    checkpoint = Checkpoint.open(config.checkpoint)
    found = find_weights(checkpoint)
    plan = make_plan(config, checkpoint.spec, stored_bytes(found))
    if uses_cpu(config):
        executor = _cpu_executor(config, checkpoint.spec, found, make_precision(config), plan.layout, progress)
        build: tuple[str, ...] = (f"kernels {instruction_set()}",)
    else:
        executor, library = _reference_executor(config, checkpoint.spec, found, plan.layout, progress)
        build = (f"kernels {instruction_set()}", library)
    info = BackendInfo(
        fingerprint=checkpoint.fingerprint(plan.executor, plan.dtype, build),
        executor=plan.executor,
        architecture=checkpoint.spec.architecture,
        parameters=checkpoint.spec.parameters,
        vocab_size=checkpoint.spec.vocab_size,
        max_model_len=plan.max_model_len,
        kv_block_size=plan.layout.block_size,
        kv_total_blocks=plan.layout.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        checkpoint_digest=checkpoint_digest(config.checkpoint),
    )
    return LoadedModel(executor, checkpoint.spec, info)


def create_embedder(config: EngineConfig, directory: Path, progress: Progress) -> LoadedEmbedder:
    """Load the encoder of a sentence-transformers directory; progress and errors as of `create_executor`.

    To be called before `create_executor`, whose KV cache takes its memory only when it is used: then the plan of
    that cache knows what is left.
    """
    checkpoint = Checkpoint.open_encoder(directory)
    found = find_weights(checkpoint)
    layout = plan_encoder(config, checkpoint.spec, stored_bytes(found))
    info = embedder_info(directory)
    if uses_cpu(config):
        return LoadedEmbedder(_cpu_executor(config, checkpoint.spec, found, ENCODER_PRECISION, layout, progress), info)
    return LoadedEmbedder(_reference_executor(config, checkpoint.spec, found, layout, progress)[0], info)


def _cpu_executor(
    config: EngineConfig,
    spec: ModelSpec,
    found: Sequence[Found],
    precision: Precision,
    layout: KVLayout,
    progress: Progress,
) -> Executor:
    try:
        return CpuExecutor(spec, found, precision, layout, thread_pool(config.num_threads, config.first_core), progress)
    except MemoryError as error:
        raise NotEnoughMemory(f"{error}: free some memory, or serve a smaller --model") from None


def _reference_executor(
    config: EngineConfig, spec: ModelSpec, found: Sequence[Found], layout: KVLayout, progress: Progress
) -> tuple[Executor, str]:
    """Also names the library, with what in it decides the last bits."""
    # Threads that wait for each other by spinning stand still for whole time slices on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import torch
    except ImportError:
        raise MissingDependency("the reference executor needs PyTorch: pip install torch==2.13.0") from None
    from millrace.server.model.executors.reference import ReferenceExecutor

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    executor = ReferenceExecutor(spec, stream_weights(found, progress), layout)
    return executor, f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
