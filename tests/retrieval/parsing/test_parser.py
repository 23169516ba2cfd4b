"""Documents to text: what is read, what is refused and with which words, and that nothing hostile gets far."""

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop
from pdfs import bombs, make_pdf
from pypdf import PdfReader, PdfWriter

from millrace.retrieval.parsing.base import DEFAULT, Limits
from millrace.retrieval.parsing.parser import Parser
from millrace.retrieval.types import Document, MediaType, ParsedDocument
from millrace.server.errors import (
    DamagedDocument,
    DocumentTooLarge,
    Draining,
    EmptyDocument,
    EncryptedDocument,
    UnknownDocumentType,
    UnusableDocument,
)

SHORT = Limits(seconds=2)
SLOW = b"<table><tr><td>x" * 20_000  # minutes of work for the tree that mends it


@pytest.fixture
async def parser() -> AsyncIterator[Parser]:
    async with Parser() as parser:
        yield parser


async def parse(content: bytes, source: str = "", limits: Limits = DEFAULT, **fields: object) -> ParsedDocument:
    async with Parser() as parser:
        return await parser.parse(Document("d", content, source=source, **fields), limits)


def children() -> set[int]:
    """Processes that this one started and has not reaped, zombies included."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread may end meanwhile
            found.update(map(int, (task / "children").read_text().split()))
    return found


def test_a_thread_that_ends_meanwhile_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Path("/proc/self/task/0"), *Path("/proc/self/task").iterdir()]
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(tasks))
    with subprocess.Popen(["sleep", "9"]) as child:
        assert child.pid in children()
        child.kill()


def read_proc(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing tells when the kernel has started a process
        await asyncio.sleep(0.01)


# ---------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("source", "content", "kind"),
    [
        ("notes.md", b"# a", MediaType.MARKDOWN),
        ("NOTES.MARKDOWN", b"a", MediaType.MARKDOWN),
        ("a/b.c/notes", b"a", MediaType.TEXT),
        ("notes #1.md", b"a", MediaType.MARKDOWN),
        ("https://example.org/a/page.html?q=x.pdf#y", b"<p>a", MediaType.HTML),
        ("https://[broken/page.md", b"a", MediaType.MARKDOWN),
        ("script.py", b"print(1)", MediaType.TEXT),
        ("page.txt", b"<!doctype html><p>a", MediaType.TEXT),
        ("", b"\xef\xbb\xbf <!-- x --><!DOCTYPE html><p>a", MediaType.HTML),
        ("", b'<?xml version="1.0"?>\n<html><body>a</body></html>', MediaType.HTML),
        ("", b"<htmlish>", MediaType.TEXT),
        ("", b"# a", MediaType.TEXT),
    ],
)
async def test_kind_is_told(source: str, content: bytes, kind: MediaType) -> None:
    assert (await parse(content, source)).media_type is kind


async def test_pdf_is_told_by_its_first_bytes() -> None:
    assert (await parse(b"junk before it\n" + make_pdf("Hello"))).media_type is MediaType.PDF


async def test_stated_kind_wins() -> None:
    parsed = await parse(b"<p>a", "page.html", media_type=MediaType.TEXT)
    assert (parsed.media_type, parsed.text) == (MediaType.TEXT, "<p>a")


# ---------------------------------------------------------------- text


async def test_text_is_the_file_itself() -> None:
    content = "# Grüße 👋\r\n\r\n\ttext \r\n".encode()
    parsed = await parse(content, "a.md")
    assert parsed.text.encode() == content
    assert parsed.pages == ()


async def test_control_characters_become_spaces_of_as_many_bytes() -> None:
    content = b"one\x0ctwo \x1b[0m " + "three\u0085four".encode() + b" and as much text again"
    parsed = await parse(content)
    assert parsed.text == "one two  [0m three\u00a0four and as much text again"
    assert len(parsed.text.encode()) == len(content)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
async def test_byte_order_mark_is_no_text(encoding: str) -> None:
    assert (await parse("Grüße 👋".encode(encoding))).text == "Grüße 👋"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"a\0b", "binary"),
        (b"much text and a NUL " * 50 + b"\0", "binary"),
        (bytes(range(256)), "binary"),
        ("Grüße".encode("cp1252"), "UTF-8"),
        ("Привет".encode("koi8-r"), "UTF-8"),
        (b"\xed\xa0\x80 half a surrogate pair", "UTF-8"),
        (b"\xff\xfe\x00\xd8a\0", "UTF-16"),
        (b"\xff\xfea", "UTF-16"),
        ("text".encode("utf-32"), "binary"),
        (b"PK\x03\x04" + b"\0" * 90, "office"),
        (b"\x89PNG\r\n\x1a\n\0\0", "picture"),
    ],
)
async def test_what_is_no_text(content: bytes, word: str) -> None:
    with pytest.raises(UnknownDocumentType, match=word):
        await parse(content, "report.docx")


async def test_pdf_called_text_is_refused() -> None:
    with pytest.raises(UnknownDocumentType, match="looks like a PDF"):
        await parse(make_pdf("Hello"), "report.txt")


@pytest.mark.parametrize("content", [b"", b" \r\n\t ", "\u00a0\u2003".encode(), b"\xef\xbb\xbf", " ".encode("utf-16")])
async def test_nothing_but_white_space(content: bytes) -> None:
    with pytest.raises(EmptyDocument):
        await parse(content, "a.md")


async def test_html_without_text_is_empty() -> None:
    with pytest.raises(EmptyDocument):
        await parse(b"<html><script>var x</script><p hidden>no</p> &nbsp;", "a.html")


@pytest.mark.parametrize(
    ("content", "source", "given", "title"),
    [
        (b"text\n\n## The *first* [heading](x) ##\n\n# Other", "a.md", "", "The first heading"),
        (b"```\n# comment\n```\nTitle\n=====\n", "a.md", "", "Title"),
        (b"# Heading", "a.md", "Given", "Given"),
        (b"# Heading", "dir/a.txt", "", "dir/a.txt"),
        (b"<title> My\n &amp; page </title><h1>H</h1>", "a.html", "", "My & page"),
        (b"<h1>Only <b>this</b></h1>", "a.html", "", "Only this"),
        (b"# " + b"x" * 9000, "a.md", "", "x" * 499 + "…"),
        (b"# a", "a.md", "Gi\0v\x1ben", "Given"),
    ],
)
async def test_title(content: bytes, source: str, given: str, title: str) -> None:
    assert (await parse(content, source, title=given)).title == title


# ---------------------------------------------------------------- limits


async def test_limits_of_size() -> None:
    html = b"<p>" + b"a" * 60
    for content, source, limits in (
        (b"a" * 101, "a.txt", Limits(max_bytes=100)),
        (b"a" * 51, "a.txt", Limits(max_text_bytes=50)),
        (html, "a.html", Limits(max_text_bytes=50)),
        (make_pdf(*["eleven text"] * 5), "a.pdf", Limits(max_text_bytes=50)),
        (make_pdf("a", "b", "c"), "a.pdf", Limits(max_pages=2)),
    ):
        with pytest.raises(DocumentTooLarge, match="split it"):
            await parse(content, source, limits)


async def test_limits_allow_what_fits_exactly() -> None:
    assert (await parse(b"a" * 50, "a.txt", Limits(max_bytes=50, max_text_bytes=50))).text == "a" * 50
    parsed = await parse(make_pdf("aaaa", "bbbb"), "a.pdf", Limits(max_text_bytes=10, max_pages=2))
    assert parsed.text == "aaaa\n\nbbbb"


# ---------------------------------------------------------------- PDF


async def test_pages_of_a_pdf() -> None:
    parsed = await parse(make_pdf("Grüße from\npage one", "", "Page three", title="My title"), "a.pdf")
    assert parsed.text == "Grüße from\npage one\n\n\n\nPage three"
    assert parsed.title == "My title"
    data = parsed.text.encode()
    assert parsed.pages == (0, data.index(b"\n\n\n\n") + 2, data.index(b"Page three"))


async def test_scan() -> None:
    with pytest.raises(EmptyDocument, match=r"3 pages and no text.*ocrmypdf"):
        await parse(make_pdf("", "", ""))


async def test_what_is_no_pdf() -> None:
    with pytest.raises(DamagedDocument, match="no PDF"):
        await parse(b"just text", media_type=MediaType.PDF)


def encrypted(content: bytes, user: str, algorithm: str) -> bytes:
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(content)))
    writer.encrypt(user_password=user, owner_password="owner", algorithm=algorithm)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-256"])
async def test_encrypted_pdf(algorithm: str) -> None:
    content = make_pdf("Hello")
    assert (await parse(encrypted(content, "", algorithm))).text == "Hello"
    with pytest.raises(EncryptedDocument, match="qpdf --decrypt"):
        await parse(encrypted(content, "secret", algorithm))


async def test_truncated_pdf(parser: Parser) -> None:
    content = make_pdf(*[f"page {i}" for i in range(5)])
    for length in range(100, len(content) - 10, 400):
        with pytest.raises(DamagedDocument, match="repair it"):
            await parser.parse(Document("d", content[:length]))


BOMBS = bombs()


@pytest.mark.parametrize("name", BOMBS)
async def test_bomb(name: str, parser: Parser) -> None:
    before = children()
    started = time.monotonic()
    with pytest.raises(UnusableDocument):
        await parser.parse(Document("d", BOMBS[name]), SHORT)
    assert time.monotonic() - started < SHORT.seconds + 2
    assert children() <= before


# ---------------------------------------------------------------- processes


async def test_too_slow_a_document_is_killed_and_reaped(parser: Parser) -> None:
    before = children()
    with pytest.raises(DamagedDocument, match=r"more than 0\.5 seconds"):
        await parser.parse(Document("d", SLOW, media_type=MediaType.HTML), Limits(seconds=0.5))
    assert children() <= before


async def test_a_process_that_does_nothing_is_not_waited_for(parser: Parser) -> None:
    before = children()
    task = asyncio.create_task(parser.parse(Document("b", SLOW, media_type=MediaType.HTML), Limits(seconds=1)))
    await until(lambda: bool(children() - before))
    (child,) = children() - before
    os.kill(child, signal.SIGSTOP)
    with pytest.raises(DamagedDocument, match="more than 1 seconds"):
        async with asyncio.timeout(10):
            await task
    assert children() <= before


def test_a_process_confines_itself() -> None:
    script = """if True:
        import resource as r, signal
        from millrace.retrieval.parsing.child import Limits, confine
        confine(Limits(seconds=4.2, memory=300 << 20))
        print(*(r.getrlimit(limit)[1] for limit in (r.RLIMIT_CPU, r.RLIMIT_AS, r.RLIMIT_FSIZE, r.RLIMIT_CORE)))
        print(signal.getitimer(signal.ITIMER_REAL)[0] > 4.2)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5", str(300 << 20), "0", "0", "True"]


async def test_memory_is_limited(parser: Parser) -> None:
    document = Document("d", b"<p>" + b"text " * 4_000_000, media_type=MediaType.HTML)
    with pytest.raises(DamagedDocument, match="64 MiB of memory"):
        await parser.parse(document, Limits(memory=64 << 20))


async def test_one_bomb_holds_up_nobody_else(parser: Parser) -> None:
    bomb = asyncio.create_task(parser.parse(Document("b", SLOW, media_type=MediaType.HTML), SHORT))
    await asyncio.sleep(0.1)
    for i in range(3):
        parsed = await parser.parse(Document("d", b"<p>text %d" % i, media_type=MediaType.HTML))
        assert parsed.text == f"text {i}"
    assert not bomb.done()
    bomb.cancel()


async def test_the_loop_is_never_blocked(parser: Parser) -> None:
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    watching = asyncio.create_task(watch())
    with pytest.raises(DamagedDocument):
        await parser.parse(Document("b", SLOW, media_type=MediaType.HTML), Limits(seconds=1))
    await parser.parse(Document("t", b"line of text\n" * 1_000_000), DEFAULT)
    await asyncio.sleep(0.05)
    watching.cancel()
    assert longest < 0.8


async def test_at_most_two_processes_at_a_time(parser: Parser) -> None:
    before = children()
    documents = [Document(str(i), SLOW, media_type=MediaType.HTML) for i in range(5)]
    tasks = [asyncio.create_task(parser.parse(document, Limits(seconds=0.5))) for document in documents]
    most = 0
    while not all(task.done() for task in tasks):
        most = max(most, len(children() - before))
        await asyncio.sleep(0.05)
    assert most == 2
    assert all(isinstance(task.exception(), DamagedDocument) for task in tasks)


async def test_cancelling_ends_the_process(parser: Parser) -> None:
    before = children()
    task = asyncio.create_task(parser.parse(Document("b", SLOW, media_type=MediaType.HTML)))
    await until(lambda: bool(children() - before))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() <= before
    assert (await parser.parse(Document("d", b"<p>next", media_type=MediaType.HTML))).text == "next"


async def test_closing_ends_what_runs_and_what_waits() -> None:
    before = children()
    parser = Parser()
    documents = [Document(str(i), SLOW, media_type=MediaType.HTML) for i in range(4)]
    tasks = [asyncio.create_task(parser.parse(document)) for document in documents]
    await until(lambda: len(children() - before) == 2)
    await parser.close()
    assert children() <= before
    assert all(isinstance(error, Draining) for error in await asyncio.gather(*tasks, return_exceptions=True))
    with pytest.raises(Draining):
        await parser.parse(documents[0])
    await parser.close()


async def test_a_child_inherits_no_secrets(monkeypatch: pytest.MonkeyPatch, parser: Parser) -> None:
    monkeypatch.setenv("MILLRACE_API_KEY", "secret")
    before = children()
    task = asyncio.create_task(parser.parse(Document("b", SLOW, media_type=MediaType.HTML), SHORT))
    await until(lambda: bool(children() - before))
    (child,) = children() - before
    await until(lambda: b"parsing" in read_proc(child, "cmdline"))
    assert b"PATH=" in (environment := read_proc(child, "environ"))
    assert b"secret" not in environment
    assert os.getsid(child) != os.getsid(0)  # Ctrl-C is for the server
    task.cancel()


def test_under_uvloop() -> None:
    """The server's own loop."""

    async def run() -> list[object]:
        before = children()
        async with Parser() as parser:
            documents = [
                Document("a", make_pdf("Hello")),
                Document("b", b"<p>text", media_type=MediaType.HTML),
                Document("c", SLOW, media_type=MediaType.HTML),
            ]
            results = await asyncio.gather(
                *(parser.parse(document, Limits(seconds=2)) for document in documents), return_exceptions=True
            )
        assert children() <= before
        return [result.text if isinstance(result, ParsedDocument) else type(result) for result in results]

    assert uvloop.run(run()) == ["Hello", "text", DamagedDocument]
