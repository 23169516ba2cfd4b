"""Makes the executor that a worker runs: opens the checkpoint, settles what is `auto`, loads the weights."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from millrace.kernels import _C
from millrace.server.config import EngineConfig
from millrace.server.errors import MissingDependency
from millrace.server.model.checkpoint import Checkpoint, checkpoint_digest
from millrace.server.model.executors.base import Executor
from millrace.server.model.executors.plan import make_plan
from millrace.server.model.hub import locate
from millrace.server.model.spec import ModelSpec
from millrace.server.model.weights import find_weights, stream_weights
from millrace.server.types import BackendInfo


@dataclass(frozen=True, slots=True)
class LoadedModel:
    executor: Executor
    spec: ModelSpec
    info: BackendInfo


def create_executor(config: EngineConfig, progress: Callable[[int, int], None]) -> LoadedModel:
    """Load `config.model`. `progress(done, total)` counts bytes read.

    Raises StartupErrors: CheckpointError, ConfigError, NotEnoughMemory (before anything is allocated),
    MissingDependency where PyTorch is not installed.
    """
    config = locate(config)
    checkpoint = Checkpoint.open(config.checkpoint)
    weights = find_weights(checkpoint)
    plan = make_plan(config, checkpoint.spec)
    # Threads that wait for each other by spinning stand still for whole time slices on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import torch
    except ImportError:
        raise MissingDependency("the reference executor needs PyTorch: pip install torch==2.13.0") from None
    from millrace.server.model.executors.reference import ReferenceExecutor

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    executor = ReferenceExecutor(checkpoint.spec, stream_weights(weights, progress), plan.layout)
    build = (f"kernels {_C.isa()}", f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}")
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
