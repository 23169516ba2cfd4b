"""Fixtures for every test."""

from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """`make_checkpoint(directory, architecture, *, shard_size="1GB", seed=0, **config_overrides) -> directory`."""
    return checkpoints.make_checkpoint
