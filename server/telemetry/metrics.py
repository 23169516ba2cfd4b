"""Prometheus metrics, named as vLLM names them, under our prefix. No label names a tenant, key or prompt."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from millrace.server.errors import AddressInUse
from millrace.server.types import EngineStats

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)


class Metrics:
    """One registry of a gateway process. Histograms are in seconds."""

    def __init__(self) -> None:
        # They double the page and nobody asks for them.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the package has no types for it
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"millrace_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"millrace_{name}", text, buckets=buckets, registry=self.registry)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self.cached_prompt_tokens = counter("cached_prompt_tokens", "Prompt tokens found in the prefix cache.")
        self.generation_tokens = counter("generation_tokens", "Output tokens sent.")
        self.surplus_tokens = counter("surplus_tokens", "Output tokens computed and neither sent nor billed.")
        self.success = counter("request_success", "Choices that finished, by reason.", "finished_reason")
        self.failure = counter("request_failure", "Requests that ended otherwise, by error.", "reason")
        self.repeated = counter("requests_repeated", "Requests told what another with their id was.", "answer")
        self.engine_restarts = counter("engine_restarts", "Workers started to replace one that was lost.")
        self.time_to_first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", LONG)
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Between tokens of a choice.", SHORT)
        self.e2e_latency = histogram("e2e_request_latency_seconds", "From arrival to the last message.", LONG)
        self.retrieval_requests = counter("retrieval_requests", "Questions to documents, by outcome.", "outcome")
        self.retrieval_time = histogram("retrieval_time_seconds", "From a question to what its answer stands on.", LONG)
        self.pii_masked = counter("pii_masked", "Personal data masked in all texts, by category.", "category")
        self.queue_time = histogram("request_queue_time_seconds", "From arrival to the first step.", LONG)

    def watch_engine(self, stats: Callable[[], EngineStats], messages: Callable[[], int]) -> None:
        """Read an engine's state whenever metrics are. `messages`: received from it so far."""
        self.registry.register(EngineCollector(stats, messages))

    def watch_tasks(self, loop: asyncio.AbstractEventLoop) -> None:
        """Count the tasks of an event loop whenever metrics are read: what grows without end is a leak."""
        gauge = Gauge("millrace_tasks", "Tasks of the gateway's event loop.", registry=self.registry)
        gauge.set_function(lambda: len(asyncio.all_tasks(loop)))


class EngineCollector(Collector):
    """What the last step of an engine said. Counters begin anew when a worker does."""

    def __init__(self, stats: Callable[[], EngineStats], messages: Callable[[], int]):
        self._stats, self._messages = stats, messages

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._stats()
        used = 1 - stats.free_blocks / stats.total_blocks if stats.total_blocks else 0.0
        yield GaugeMetricFamily("millrace_num_requests_running", "Sequences in the batch.", stats.running)
        yield GaugeMetricFamily("millrace_num_requests_waiting", "Sequences in the queue.", stats.waiting)
        yield GaugeMetricFamily("millrace_num_tokens_waiting", "Prompt tokens in the queue.", stats.waiting_tokens)
        yield GaugeMetricFamily("millrace_kv_cache_usage_perc", "KV blocks in use, 1 is all of them.", used)
        yield GaugeMetricFamily("millrace_engine_step_seconds", "Time of the latest step.", stats.step_us / 1e6)
        yield CounterMetricFamily("millrace_engine_steps", "Steps of the engine.", stats.step)
        yield CounterMetricFamily("millrace_engine_messages", "Messages from the engine.", self._messages())
        yield CounterMetricFamily("millrace_num_preemptions", "Sequences preempted.", stats.preemptions_total)


class MetricsServer:
    """`/metrics` over HTTP, in a thread of its own."""

    def __init__(self, metrics: Metrics, host: str, port: int):
        """Raises AddressInUse."""
        try:
            started: tuple[WSGIServer, threading.Thread] = start_http_server(port, host, metrics.registry)
        except OSError as error:
            raise AddressInUse(
                f"--metrics-port {port}: cannot listen on {host}:{port} ({error.strerror}); choose another port, "
                "or 0 for a free one"
            ) from None
        self._server, self._thread = started
        self.port = self._server.server_port
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
