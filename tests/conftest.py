"""Fixtures for every test."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest

# Before anything imports PyTorch: the shapes are tiny, and waiting threads must not spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before anything imports Triton: its kernels run in numpy, unless somebody who has a GPU says otherwise.
os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell starts background jobs with Ctrl-C ignored, which children inherit: those that tests interrupt must not.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """`make_checkpoint(directory, architecture, *, shard_size="1GB", seed=0, **config_overrides) -> directory`."""
    return checkpoints.make_checkpoint


@pytest.fixture(scope="session")
def make_encoder() -> Callable[..., Path]:
    """`make_encoder(directory, architecture="BertModel", *, pooling="mean", normalize=True, seed=0, **overrides)`."""
    return checkpoints.make_encoder
