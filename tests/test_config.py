"""Settings that nobody would read, or that no one could have meant, are errors."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from millrace.server.config import COMPONENTS, RetrievalConfig, load_settings
from millrace.server.errors import ConfigError
from millrace.server.gateway.gateway import Gateway

TCP = {"worker": "127.0.0.1:5"}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (TCP | {"max_num_seqs": 256}, "--max-num-seqs"),  # the default: given is given
        (TCP | {"kv_cache_memory": "2GiB"}, "--kv-cache-memory"),
        (TCP | {"max_model_len": 64}, "--max-model-len"),
        ({"worker_ca": "ca.pem"}, "--worker-ca"),
        ({"worker_key": "key.pem", "worker": "unix:/socket"}, "--worker-key"),
        ({"worker": ""}, "worker"),
        ({"model": ""}, "model"),
        ({"host": ""}, "host"),
        ({"metrics_host": ""}, "metrics_host"),
        ({"served_model_name": ""}, "served_model_name: must have 1 to 256 bytes"),
        ({"served_model_name": "é" * 129}, "served_model_name: must have 1 to 256 bytes"),
    ],
)
def test_settings_that_mean_nothing(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"command line: .*{named}"):
        load_settings(flags, environment={})


def test_the_source_is_named() -> None:
    with pytest.raises(ConfigError, match="environment: --num-threads"):
        load_settings(TCP, environment={"MILLRACE_NUM_THREADS": "2"})


def test_a_worker_elsewhere() -> None:
    files = {"worker_ca": "ca.pem", "worker_cert": "cert.pem", "worker_key": "key.pem"}
    load_settings(TCP | files | {"model": "somewhere", "served_model_name": "é" * 128}, environment={})


@pytest.mark.parametrize("value", ["inf", "nan", "1e9", "-1"])
def test_every_float_is_bounded(value: str) -> None:
    names = [
        name for cls in COMPONENTS.values() for name, field in cls.model_fields.items() if field.annotation is float
    ]
    assert "grace" in names
    for name in names:
        with pytest.raises(ConfigError, match=name):
            load_settings({name: value}, environment={})


def test_support_has_one_default() -> None:
    """Of the setting, of a gateway without settings, and on the page."""
    default = RetrievalConfig().min_support
    assert inspect.signature(Gateway).parameters["min_support"].default == default
    page = Path(__file__).parent.parent / "docs" / "retrieval.md"
    assert f"`min_support` {default}" in page.read_text()
