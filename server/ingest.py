"""`millrace ingest`: files and folders into a collection."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from millrace.server.client import Client, Document
from millrace.server.errors import ConfigError
from millrace.v1 import retrieval_pb2 as pb

SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".html", ".htm", ".xhtml", ".pdf"})
MAX_ID_BYTES = 512
MAX_DOCUMENT_BYTES = 32 << 20  # as in retrieval.proto


@dataclass(slots=True)
class Files:
    """Files by document id, and what was left out of folders, by ending."""

    found: dict[str, Path] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, document_id: str, path: Path) -> None:
        """Raises ConfigError for a path that cannot be an id, or that another file has."""
        if (other := self.found.setdefault(document_id, path)) != path:
            raise ConfigError(f"{path} and {other} would both be document {document_id!r}; ingest their common folder")
        try:
            size = len(document_id.encode())
        except UnicodeEncodeError:
            raise ConfigError(f"{path!r}: its name is no UTF-8; rename it") from None
        if size > MAX_ID_BYTES:
            raise ConfigError(f"{path}: its path within the folder has more than {MAX_ID_BYTES} bytes; shorten it")


def find_files(paths: Sequence[Path]) -> Files:
    """A file given by name counts whatever it is; of a folder, what can be read here, hidden ones left out.

    An id is the path from the folder's name on, so it does not depend on where the command runs. Raises ConfigError.
    """
    files = Files()
    for path in paths:
        if path.is_dir():
            root = path.resolve()
            for child in sorted(root.rglob("*")):
                inner = child.relative_to(root)
                if child.is_file() and not any(part.startswith(".") for part in inner.parts):
                    if child.suffix.lower() in SUFFIXES:
                        files.add((Path(root.name) / inner).as_posix(), child)
                    else:
                        files.skipped[child.suffix.lower() or "no ending"] += 1
        elif path.exists():
            files.add(path.name, path.resolve())
        else:
            raise ConfigError(f"{path}: there is no such file or folder")
    if not files.found:
        raise ConfigError(f"there is nothing to ingest: no file ends in {', '.join(sorted(SUFFIXES))}")
    return files


def documents(files: Mapping[str, Path], unreadable: dict[str, str]) -> Iterator[Document]:
    """Read each file when its turn comes; those that cannot be read are told in `unreadable`."""
    for document_id, path in files.items():
        try:
            size = path.stat().st_size
            content = path.read_bytes() if size <= MAX_DOCUMENT_BYTES else None
        except OSError as error:
            unreadable[document_id] = error.strerror or str(error)
            continue
        if content is None:
            unreadable[document_id] = f"has {size} bytes, a document {MAX_DOCUMENT_BYTES} at most; split it"
        else:
            yield Document(id=document_id, source=document_id, content=content)


def ingest(client: Client, collection: str, paths: Sequence[Path], console: Console) -> int:
    """Send what is there, show progress, say what became of it; 1 if a document failed."""
    files = find_files(paths)
    failed: dict[str, str] = {}
    counts: Counter[str] = Counter()
    chunks = embedded = 0
    began = time.perf_counter()
    columns = TextColumn("Ingesting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(files.found))
        with closing(client.upsert(collection, documents(files.found, failed))) as results:
            for result in results:
                counts[pb.UpsertStatus.Name(result.status).removeprefix("UPSERT_STATUS_").lower()] += 1
                chunks, embedded = chunks + result.chunks, embedded + result.chunks_embedded
                if result.status == pb.UPSERT_STATUS_FAILED:
                    failed[result.document_id] = result.error_message
                progress.advance(task)
    seconds = time.perf_counter() - began
    for document_id, reason in sorted(failed.items()):
        console.print(f"failed: {document_id}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if files.skipped:
        kinds = ", ".join(f"{count} {ending}" for ending, count in files.skipped.most_common())
        console.print(f"skipped: {kinds}", markup=False, highlight=False, soft_wrap=True)
    done = ", ".join(f"{counts[status]} {status}" for status in ("created", "updated", "unchanged") if counts[status])
    console.print(
        f"{collection}: {done or 'nothing stored'}{f', {len(failed)} failed' if failed else ''}; "
        f"{chunks} chunks, {embedded} embedded, {seconds:.1f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 1 if failed else 0
