"""A process that reads one document: it may run out of time or memory, and nobody else does.

    python -m millrace.retrieval.parsing.pdf LIMITS      (LIMITS: JSON, the fields of `Limits`)

Standard input: the document. Standard output: a line of JSON, then the text as UTF-8. The line is {"title", "pages"}
or {"reason", "message", "metadata"} of an error. No line: it was killed, or ran into a limit too hard to say so.
"""

import json
import math
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from millrace.retrieval.parsing.base import Limits, Reading, check_text, too_costly
from millrace.server.errors import UnusableDocument

Read = Callable[[bytes, Limits], Reading]


def serve(read: Read) -> None:
    """What such a process does."""
    limits = Limits(**json.loads(sys.argv[1]))
    confine(limits)
    header, text = _answer(read, limits)
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + text)


def confine(limits: Limits) -> None:
    """The kernel kills this process when it has used up its time; more memory than the limit is a MemoryError."""
    _lower(resource.RLIMIT_AS, limits.memory)
    _lower(resource.RLIMIT_CPU, math.ceil(limits.seconds))
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_CORE, 0)
    signal.setitimer(signal.ITIMER_REAL, 2 * limits.seconds)  # should whoever waits for this process be gone


def _lower(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _answer(read: Read, limits: Limits) -> tuple[Mapping[str, Any], bytes]:
    try:
        reading = read(sys.stdin.buffer.read(), limits)
        text = reading.text.encode()
        check_text(len(text), limits)
    except UnusableDocument as error:
        return _failure(error), b""
    except MemoryError:
        return _failure(too_costly(limits)), b""
    return {"title": reading.title, "pages": reading.pages}, text


def _failure(error: UnusableDocument) -> Mapping[str, Any]:
    return {"reason": error.reason, "message": error.message, "metadata": error.metadata}
