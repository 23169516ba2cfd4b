"""`millrace ingest`: which files become which documents, and what is said of the others."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from served import Served, in_thread, serving

from millrace.retrieval.types import Document
from millrace.server import errors
from millrace.server import ingest as module
from millrace.server.errors import ConfigError
from millrace.server.ingest import documents, find_files, ingest, read
from millrace.server.terminal import shown
from millrace.v1 import retrieval_pb2 as pb


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"text of {name}".encode(errors="replace"))
    return root


class FakeClient:
    """Creates every document; `failing` fails those, `breaking` breaks the call at that one."""

    def __init__(self, failing: Iterable[str] = (), breaking: str = "", error: BaseException | None = None):
        self.failing, self.breaking, self.error = set(failing), breaking, error
        self.calls: list[list[Document]] = []

    def upsert(self, collection: str, documents: Iterator[Document]) -> Iterator[pb.UpsertDocumentsResponse]:
        self.calls.append(call := [])
        for document in documents:
            if self.error and document.id == self.breaking:
                raise self.error
            call.append(document)
            yield pb.UpsertDocumentsResponse(
                document_id=document.id,
                status=pb.UPSERT_STATUS_FAILED if document.id in self.failing else pb.UPSERT_STATUS_CREATED,
                chunks=2,
                chunks_embedded=1,
                error_message="it is empty",
            )

    @property
    def ids(self) -> list[str]:
        return [document.id for call in self.calls for document in call]


def run(client: FakeClient, *paths: Path) -> tuple[int, list[str]]:
    """Exit status and printed lines, the time left out."""
    console = Console(file=io.StringIO(), width=40)
    try:
        status = ingest(client, "notes", paths, console)  # type: ignore[arg-type]  # stands for a client
    finally:
        run.lines = re.sub(r", \d+\.\d s", "", console.file.getvalue()).splitlines()
    return status, run.lines


def test_a_folder(tmp_path: Path) -> None:
    write(
        tmp_path / "notes", "b.md", "a.TXT", "sub/c.html", "sub/deep/d.pdf", "sub/e.htm", "x.png", "Makefile", "y.png"
    )
    client = FakeClient()
    status, lines = run(client, tmp_path / "notes")
    assert client.ids == ["notes/a.TXT", "notes/b.md", "notes/sub/c.html", "notes/sub/e.htm", "notes/sub/deep/d.pdf"]
    [call] = client.calls
    assert {d.content.decode() for d in call} == {f"text of {d.id.removeprefix('notes/')}" for d in call}
    assert all(d.source == d.id for d in call)
    assert status == 0
    assert lines == ["skipped: 2 .png, 1 without ending", "notes: 5 created; 10 chunks, 5 embedded"]


def test_ids_do_not_depend_on_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "notes", "a.md", "sub/b.md")
    wanted = {"notes/a.md", "notes/sub/b.md"}
    assert find_files([tmp_path / "notes"]).found.keys() == wanted
    for folder, path in ((tmp_path, "notes"), (tmp_path, "./notes/"), (tmp_path / "notes", "."),
                         (tmp_path / "notes" / "sub", ".."), (tmp_path / "notes", "../notes")):  # fmt: skip
        monkeypatch.chdir(folder)
        assert find_files([Path(path)]).found.keys() == wanted, path
    monkeypatch.chdir(tmp_path / "notes")
    for path in ("a.md", "./a.md", str(tmp_path / "notes" / "a.md"), "sub/../a.md"):
        assert find_files([Path(path)]).found == {"a.md": tmp_path / "notes" / "a.md"}


def test_folders_of_one_name(tmp_path: Path) -> None:
    write(tmp_path, "a/docs/x.md", "a/docs/y.md", "b/docs/z.md")
    assert find_files([tmp_path / "a/docs", tmp_path / "b/docs"]).found.keys() == {
        "docs/x.md",
        "docs/y.md",
        "docs/z.md",
    }
    write(tmp_path, "b/docs/x.md")
    with pytest.raises(ConfigError, match=r"docs/x\.md.*a folder that has both"):
        find_files([tmp_path / "a/docs", tmp_path / "b/docs"])
    assert len(find_files([tmp_path / "a/docs", tmp_path / "a" / ".." / "a" / "docs"]).found) == 2, "the same twice"
    with pytest.raises(ConfigError, match="both be document"):
        find_files([tmp_path / "a/docs/x.md", tmp_path / "b/docs/x.md"])


def test_hidden_files_are_left_out_unless_named(tmp_path: Path) -> None:
    write(tmp_path / "notes", "a.md", ".b.md", ".git/c.md", "sub/.cache/d.md")
    assert find_files([tmp_path / "notes"]).found.keys() == {"notes/a.md"}
    assert not find_files([tmp_path / "notes"]).skipped
    assert find_files([tmp_path / "notes" / ".b.md"]).found.keys() == {".b.md"}
    assert find_files([tmp_path / "notes" / ".git"]).found.keys() == {".git/c.md"}


def test_links(tmp_path: Path) -> None:
    """To a file: as the file. To a folder: not followed, but told of. The one that is named keeps its name."""
    write(tmp_path, "other/far.md", "notes/a.md")
    notes = tmp_path / "notes"
    (notes / "linked.md").symlink_to(tmp_path / "other" / "far.md")
    (notes / "folder").symlink_to(tmp_path / "other")
    (notes / "circle").symlink_to(notes)
    (notes / "broken.md").symlink_to(tmp_path / "nowhere")
    (tmp_path / "alias").symlink_to(notes)
    client = FakeClient()
    status, lines = run(client, tmp_path / "alias")
    assert client.ids == ["alias/a.md", "alias/linked.md"]
    assert client.calls[0][1].content == b"text of other/far.md"
    assert status == 1
    assert lines == [
        "failed: alias/broken.md: No such file or directory",
        "skipped: 2 links to folders",
        "notes: 2 created, 1 failed; 4 chunks, 2 embedded",
    ]


def test_what_is_no_file(tmp_path: Path) -> None:
    write(tmp_path / "notes", "a.md")
    os.mkfifo(tmp_path / "notes" / "fifo.md")
    os.mkfifo(tmp_path / "notes" / "fifo")
    client = FakeClient()
    status, lines = run(client, tmp_path / "notes", Path("/dev/null"))
    assert client.ids == ["notes/a.md"]
    assert status == 1
    assert lines[:3] == [
        "failed: notes/fifo.md: is no regular file",
        "failed: null: is no regular file",
        "skipped: 1 without ending",
    ]


def test_names_that_are_no_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "notes", "a.md", "\udcff.md", "line\nend\x1b[31m.md", "é.md")
    client = FakeClient(failing=["notes/line\nend\x1b[31m.md"])
    status, lines = run(client, tmp_path / "notes")
    assert client.ids == ["notes/a.md", "notes/line\nend\x1b[31m.md", "notes/é.md"]
    assert status == 1
    assert lines[:2] == [
        r"failed: notes/line\nend\x1b[31m.md: it is empty",
        r"failed: notes/\udcff.md: its name is no UTF-8; rename it",
    ]
    "".join(lines).encode()
    status, lines = run(FakeClient(), tmp_path / "notes" / "\udcff.md")
    assert (status, lines[-1]) == (1, "notes: nothing stored, 1 failed; 0 chunks, 0 embedded")
    with pytest.raises(ConfigError, match=r"\\udcfe"):
        find_files([tmp_path / "\udcfe"])


def test_a_path_that_is_too_long_for_an_id(tmp_path: Path) -> None:
    deep = "/".join(["é" * 100] * 3)
    write(tmp_path / "notes", "a.md", f"{deep}/b.md")
    files = find_files([tmp_path / "notes"])
    assert files.found.keys() == {"notes/a.md"}
    assert files.failed == {f"notes/{deep}/b.md": "its path from the folder on has 613 bytes, 512 at most; shorten it"}


def test_the_size_of_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 10)
    for size in (0, 10, 11):
        (tmp_path / f"{size}.md").write_bytes(b"x" * size)
    assert [len(read(tmp_path / f"{size}.md")) for size in (0, 10)] == [0, 10]
    status, lines = run(client := FakeClient(), tmp_path)
    assert (status, len(client.ids)) == (1, 2)
    assert lines[0] == f"failed: {tmp_path.name}/11.md: has more than 10 bytes; split it"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    write(tmp_path / "notes", "a.md", "b.md", "sub/c.md")
    (tmp_path / "notes/b.md").chmod(0)
    (tmp_path / "notes/sub").chmod(0)
    try:
        status, lines = run(FakeClient(), tmp_path / "notes")
    finally:
        (tmp_path / "notes/sub").chmod(0o700)
    assert status == 1
    assert lines[:2] == ["failed: notes/b.md: Permission denied", "failed: notes/sub: Permission denied"]


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, also for root."""
    write(tmp_path / "notes", "a.md", "sub/c.md")
    scandir = os.scandir

    def refuse(path: str):  # type: ignore[no-untyped-def]  # an iterator of the standard library
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    files = find_files([tmp_path / "notes"])
    assert (files.found.keys(), files.failed) == ({"notes/a.md"}, {"notes/sub": "Permission denied"})


@pytest.mark.parametrize("names", [[], ["x.png", "y"], [".hidden.md"]])
def test_nothing_to_ingest(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"nothing to ingest.*\.md"):
        run(FakeClient(), write(tmp_path, *names))
    assert run.lines == []


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: No such file"):
        run(client := FakeClient(), write(tmp_path / "a", "a.md"), tmp_path / "nowhere")
    assert not client.calls


def test_a_file_that_goes_away_meanwhile(tmp_path: Path) -> None:
    files = find_files([write(tmp_path / "notes", "a.md", "b.md")]).found
    (tmp_path / "notes/a.md").unlink()
    failed: dict[str, str] = {}
    assert [d.id for d in documents(files, failed.__setitem__)] == ["notes/b.md"]
    assert failed == {"notes/a.md": "No such file or directory"}


def test_many_files_are_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILES_PER_CALL", 3)
    status, lines = run(client := FakeClient(), write(tmp_path, *(f"{i}.md" for i in range(7))))
    assert [len(call) for call in client.calls] == [3, 3, 1]
    assert (status, lines) == (0, ["notes: 7 created; 14 chunks, 7 embedded"])


@pytest.mark.parametrize("error", [errors.Unavailable("gone"), KeyboardInterrupt()], ids=repr)
def test_an_end_before_the_end_says_what_is_stored(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "n", "a.md", "b.md", "c.md")
    with pytest.raises(type(error)):
        run(FakeClient(breaking="n/c.md", error=error), tmp_path / "n")
    assert run.lines == ["notes: 2 created; 4 chunks, 2 embedded"]
    with pytest.raises(type(error)):
        run(FakeClient(breaking="n/a.md", error=error), tmp_path / "n")
    assert run.lines == []


def test_names_as_a_terminal_takes_them() -> None:
    assert shown("a b/é😀.md") == "a b/é😀.md"
    assert shown("\x1b\n\t\udcff\u202e") == r"\x1b\n\t\udcff\u202e"


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as served:
        yield served


def millrace(served: Served, *words: str | Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "millrace.server", *map(str, words), "--address", served.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


async def test_the_command(served: Served, tmp_path: Path) -> None:
    notes = write(tmp_path / "notes", "a.md", "b.md")
    served.library.errors["notes/b.md"] = errors.EmptyDocument("there is no text in it")

    def use(_: object) -> tuple[int, str, str]:
        process = millrace(served, "ingest", notes, "--collection", "c")
        out, err = process.communicate(timeout=60)
        return process.returncode, re.sub(r"\d+\.\d s", "0.1 s", out), err

    assert await in_thread(served, use) == (
        1,
        "failed: notes/b.md: there is no text in it\nc: 1 created, 1 failed; 1 chunks, 1 embedded, 0.1 s\n",
        "",
    )
    del served.library.errors["notes/b.md"]
    status, out, _ = await in_thread(served, use)
    assert (status, out) == (0, "c: 1 created, 1 unchanged; 2 chunks, 1 embedded, 0.1 s\n")


async def test_ctrl_c_leaves_what_was_acknowledged(served: Served, tmp_path: Path) -> None:
    notes = write(tmp_path / "notes", *(f"{i:02}.md" for i in range(20)))
    serve_one = served.library.upsert

    async def upsert(tenant: str, collection: str, document: Document):  # type: ignore[no-untyped-def]  # as the fake
        if document.id == "notes/05.md":
            served.library.resumed.clear()
        return await serve_one(tenant, collection, document)

    served.library.upsert = upsert  # type: ignore[method-assign]  # of this one

    def use(_: object) -> tuple[int, str, str]:
        process = millrace(served, "ingest", notes, "-c", "c")
        for _ in range(600):
            if served.library.live == 4 and len(served.library.documents.get(("default", "c"), {})) == 5:
                break
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    status, out, err = await in_thread(served, use)
    assert status == 130
    assert out.startswith("c: 5 created; ")
    assert "Traceback" not in err
    assert await served.gateway.limits.idle(10)
    assert len(served.library.documents["default", "c"]) == 5
