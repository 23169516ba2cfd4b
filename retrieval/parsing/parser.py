"""Documents to text. Text and Markdown are read here; HTML and PDF in processes of their own, with limits."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from types import TracebackType
from typing import Any

from millrace.retrieval.parsing.base import DEFAULT, Limits, Reading, check_text, too_costly
from millrace.retrieval.parsing.encoding import decode, seen
from millrace.retrieval.parsing.markdown import first_heading
from millrace.retrieval.parsing.media import media_type_of
from millrace.retrieval.types import Document, MediaType, ParsedDocument
from millrace.server.errors import DocumentTooLarge, Draining, EmptyDocument, from_reason

log = logging.getLogger(__name__)

PROCESSES = 2  # at a time; more documents wait
PYTHON = (sys.executable, "-P", "-m")  # -P: no module from the working directory
MODULES = {MediaType.HTML: "millrace.retrieval.parsing.html", MediaType.PDF: "millrace.retrieval.parsing.pdf"}
# What a Python process needs to start; nothing else of the server's environment is a document's business.
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HOME", "LANG", "LC_ALL", "TMPDIR")
LONGEST_TITLE = 500  # characters


class Parser:
    """Owns the processes that read documents; close it, or use it as an async context manager."""

    def __init__(self, processes: int = PROCESSES):
        self._slots = processes
        self._free = asyncio.Semaphore(processes)
        self._running: set[Process] = set()
        self._closed = False

    async def parse(self, document: Document, limits: Limits = DEFAULT) -> ParsedDocument:
        """Raises UnusableDocument, of the kind that fits, and Draining once closed."""
        if len(document.content) > limits.max_bytes:
            raise DocumentTooLarge(
                f"the document has {len(document.content)} bytes, at most {limits.max_bytes} are allowed; split it",
                metadata={"bytes": str(len(document.content)), "max_bytes": str(limits.max_bytes)},
            )
        if not document.content or document.content.isspace():
            raise EmptyDocument("the document is empty; send its text, or leave it out")
        media_type = media_type_of(document)
        if media_type in (MediaType.TEXT, MediaType.MARKDOWN):
            reading = await asyncio.to_thread(read_text, document.content, media_type, limits)
        else:
            reading = await self._read_apart(document.content, media_type, limits)
        if not reading.text or reading.text.isspace():
            raise EmptyDocument("the document has no text in it; send one that has, or leave it out")
        title = document.title or _short(reading.title) or document.source
        return ParsedDocument(reading.text, seen(title), media_type, reading.pages)

    async def close(self) -> None:
        """End every process; who waits for one gets Draining. Idempotent."""
        self._closed = True
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for _ in range(self._slots):  # with all of them in hand no process is left, nor one that is being started
            await self._free.acquire()
        for _ in range(self._slots):
            self._free.release()

    async def __aenter__(self) -> "Parser":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _read_apart(self, content: bytes, media_type: MediaType, limits: Limits) -> Reading:
        async with self._free:
            output = await self._run(content, media_type, limits)
        header, found, text = output.partition(b"\n")
        if not found:
            raise too_costly(limits)
        return _reading(json.loads(header), text)

    async def _run(self, content: bytes, media_type: MediaType, limits: Limits) -> bytes:
        """Standard output of a child; empty: it is no more, or took too long. It is reaped either way."""
        self._check_open()
        process = await asyncio.create_subprocess_exec(
            *PYTHON,
            MODULES[media_type],
            json.dumps(dataclasses.asdict(limits)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the server
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        )
        self._running.add(process)
        try:
            self._check_open()
            async with asyncio.timeout(limits.seconds):
                output, _ = await process.communicate(content)
        except TimeoutError:
            output = b""
        finally:
            await self._end(process)
        self._check_open()  # else it was this that ended the process
        if process.returncode:
            log.warning("a process that read a document of %d bytes ended with %s", len(content), process.returncode)
            return b""
        return output

    def _check_open(self) -> None:
        if self._closed:
            raise Draining("the server is shutting down and reads no more documents")

    async def _end(self, process: Process) -> None:
        try:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await asyncio.shield(process.wait())
        finally:
            self._running.discard(process)


def read_text(content: bytes, media_type: MediaType, limits: Limits) -> Reading:
    """Of a text or Markdown file. Raises UnusableDocument."""
    text = decode(content)
    check_text(len(text.encode()), limits)
    return Reading(first_heading(text) if media_type is MediaType.MARKDOWN else "", text)


def _reading(header: dict[str, Any], text: bytes) -> Reading:
    if "reason" in header:
        raise from_reason(header["reason"], header["message"], header["metadata"])
    return Reading(header["title"], text.decode(), tuple(header["pages"]))


def _short(title: str) -> str:
    title = " ".join(title.split())
    return title if len(title) <= LONGEST_TITLE else title[: LONGEST_TITLE - 1] + "…"
