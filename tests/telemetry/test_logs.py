"""Logs as lines of JSON, and what must never be in them."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from millrace.server.telemetry.logs import configure_logs, get_logger


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    handlers = logging.getLogger().handlers[:]
    yield io.StringIO()
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers


def test_json_lines_of_both_kinds_of_logger(stream) -> None:
    configure_logs("auto", "info", stream)
    get_logger().info("request", request_id="r1", output_tokens=3)
    get_logger().debug("not shown")
    logging.getLogger("grpc").warning("from a library: %s", "details")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["request", "from a library: details"]
    assert (lines[0]["request_id"], lines[0]["output_tokens"], lines[0]["level"]) == ("r1", 3, "info")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_variables(stream, log_format) -> None:
    configure_logs(log_format, "debug", stream)

    def fail(prompt: str) -> None:
        raise KeyError("a bug")

    try:
        fail("canary-prompt " * 2)
    except KeyError as error:
        get_logger().error("internal error", exc_info=error)
    assert "a bug" in stream.getvalue()
    assert "canary-prompt canary" not in stream.getvalue()
