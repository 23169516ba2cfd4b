"""`millrace ingest`: files and folders into a collection."""

import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from millrace.server.client import Client, Document
from millrace.server.errors import ConfigError
from millrace.server.terminal import shown
from millrace.v1 import retrieval_pb2 as pb

SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".html", ".htm", ".xhtml", ".pdf"})
MAX_ID_BYTES = 512
MAX_DOCUMENT_BYTES = 32 << 20  # as in retrieval.proto
FILES_PER_CALL = 256  # a connection has an age, and a call that outlives it is cut off


@dataclass(slots=True)
class Files:
    """Files by document id; why others cannot be sent; of folders, how many were left out, by ending."""

    found: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, document_id: str, path: Path) -> None:
        """Raises ConfigError if another file has the id."""
        try:
            size = len(document_id.encode())
        except UnicodeEncodeError:
            self.failed[document_id] = "its name is no UTF-8; rename it"
            return
        if size > MAX_ID_BYTES:
            self.failed[document_id] = (
                f"its path from the folder on has {size} bytes, {MAX_ID_BYTES} at most; shorten it"
            )
        elif (other := self.found.setdefault(document_id, path)) != path:
            raise ConfigError(
                f"{shown(str(path))} and {shown(str(other))} would both be document {shown(document_id)}; "
                "ingest a folder that has both"
            )

    def add_folder(self, root: Path) -> None:
        """What can be read here; nothing hidden, and no folder behind a link, which could lead in a circle."""

        def fail(error: OSError) -> None:
            self.failed[(root.name / Path(error.filename).relative_to(root)).as_posix()] = reason(error)

        for folder, folders, names in os.walk(root, onerror=fail):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            self.skipped.update("links to folders" for name in folders if Path(folder, name).is_symlink())
            for name in sorted(name for name in names if not name.startswith(".")):
                path = Path(folder, name)
                if path.suffix.lower() in SUFFIXES:
                    self.add((root.name / path.relative_to(root)).as_posix(), path)
                else:
                    self.skipped[path.suffix.lower() or "without ending"] += 1


def find_files(paths: Sequence[Path]) -> Files:
    """A file given by name counts whatever its ending.

    An id is the path from the folder's name on, so it does not depend on where the command runs. Raises ConfigError.
    """
    files = Files()
    for path in paths:
        where = Path(os.path.abspath(path))  # unlike `resolve` it keeps the name of a link
        try:
            mode = where.stat().st_mode
        except OSError as error:
            raise ConfigError(f"{shown(str(path))}: {reason(error)}") from None
        if stat.S_ISDIR(mode):
            files.add_folder(where)
        else:
            files.add(where.name, where)
    if not files.found and not files.failed:
        raise ConfigError(f"there is nothing to ingest: no file ends in {', '.join(sorted(SUFFIXES))}")
    return files


def read(path: Path) -> bytes:
    """Raises OSError, also for what is no file and what is too much for a document."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no regular file")
    with path.open("rb") as file:
        content = file.read(MAX_DOCUMENT_BYTES + 1)  # not its size of before: a file may grow
    if len(content) > MAX_DOCUMENT_BYTES:
        raise OSError(errno.EFBIG, f"has more than {MAX_DOCUMENT_BYTES} bytes; split it")
    return content


def documents(files: Mapping[str, Path], fail: Callable[[str, str], None]) -> Iterator[Document]:
    """Read each file when its turn comes; `fail` is told which could not be read, and why."""
    for document_id, path in files.items():
        try:
            content = read(path)
        except OSError as error:
            fail(document_id, reason(error))
        else:
            yield Document(id=document_id, source=document_id, content=content)


@dataclass(slots=True)
class Tally:
    """What became of the documents so far."""

    failed: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    chunks: int = 0
    embedded: int = 0

    def add(self, result: pb.UpsertDocumentsResponse) -> None:
        if result.status == pb.UPSERT_STATUS_FAILED:
            self.failed[result.document_id] = result.error_message
            return
        self.counts[pb.UpsertStatus.Name(result.status).removeprefix("UPSERT_STATUS_").lower()] += 1
        self.chunks, self.embedded = self.chunks + result.chunks, self.embedded + result.chunks_embedded

    def __str__(self) -> str:
        done = [f"{self.counts[status]} {status}" for status in ("created", "updated", "unchanged")]
        words = [text for text in done if not text.startswith("0 ")] or ["nothing stored"]
        failed = [f"{len(self.failed)} failed"] if self.failed else []
        return f"{', '.join(words + failed)}; {self.chunks} chunks, {self.embedded} embedded"


def ingest(client: Client, collection: str, paths: Sequence[Path], console: Console) -> int:
    """Send what is there, show progress, say what became of it; 1 if a document failed.

    Ctrl-C, or a server that goes away, ends it; it has then said what is stored.
    """
    files = find_files(paths)
    tally = Tally(dict(files.failed))
    began = time.perf_counter()
    try:
        send(client, collection, files, tally, console)
    finally:
        if tally.counts or tally.failed:
            report(tally, files, f"{collection}: {tally}, {time.perf_counter() - began:.1f} s", console)
    return 1 if tally.failed else 0


def send(client: Client, collection: str, files: Files, tally: Tally, console: Console) -> None:
    columns = TextColumn("Ingesting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(files.found))

        def fail(document_id: str, why: str) -> None:
            tally.failed[document_id] = why
            progress.advance(task)

        remaining = iter(files.found.items())
        while batch := dict(islice(remaining, FILES_PER_CALL)):
            with closing(client.upsert(collection, documents(batch, fail))) as results:
                for result in results:
                    tally.add(result)
                    progress.advance(task)


def report(tally: Tally, files: Files, summary: str, console: Console) -> None:
    lines = [f"failed: {shown(document_id)}: {why}" for document_id, why in sorted(tally.failed.items())]
    skipped = [f"{count} {ending}" for ending, count in files.skipped.most_common()]
    lines += [f"skipped: {shown(', '.join(skipped))}"] if skipped else []
    for line in [*lines, summary]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def reason(error: OSError) -> str:
    return error.strerror or str(error)
