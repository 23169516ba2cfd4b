"""Metrics by their names, and their page."""

import socket
import urllib.request

import pytest

from millrace.server.errors import AddressInUse
from millrace.server.telemetry.metrics import Metrics, MetricsServer
from millrace.server.types import EngineStats


def test_engine_state_is_read_when_metrics_are() -> None:
    metrics = Metrics()
    stats = EngineStats()
    metrics.watch_engine(lambda: stats, lambda: 12)
    read = metrics.registry.get_sample_value
    assert read("millrace_kv_cache_usage_perc") == 0, "before the first step"
    stats = EngineStats(step=9, running=3, waiting=2, free_blocks=25, total_blocks=100, preemptions_total=4)
    assert read("millrace_num_requests_running") == 3
    assert read("millrace_num_requests_waiting") == 2
    assert read("millrace_kv_cache_usage_perc") == 0.75
    assert read("millrace_engine_steps_total") == 9
    assert read("millrace_engine_messages_total") == 12
    assert read("millrace_num_preemptions_total") == 4


def test_the_page(recwarn) -> None:
    metrics = Metrics()
    metrics.prompt_tokens.inc(5)
    server = MetricsServer(metrics, "127.0.0.1", 0)
    try:
        with urllib.request.urlopen(server.url, timeout=10) as response:
            text = response.read().decode()
    finally:
        server.close()
    assert "millrace_prompt_tokens_total 5.0" in text
    assert "python_gc" not in text, "only what is ours"


def test_port_in_use_names_the_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(AddressInUse, match="--metrics-port"):
        MetricsServer(Metrics(), "127.0.0.1", taken.getsockname()[1])
