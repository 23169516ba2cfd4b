"""A PDF of which a part cannot be read is refused; one that only breaks rules is read."""

import os
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from pdfs import make_pdf, page_objects, stream, write_pdf
from pypdf import PdfReader, PdfWriter

from millrace.retrieval.parsing.parser import Parser
from millrace.retrieval.types import Document, ParsedDocument
from millrace.server.errors import DamagedDocument, DocumentTooLarge, EncryptedDocument

LINES = b"BT /F1 12 Tf 72 720 Td " + b"".join(b"(%d) Tj " % (i * 7919 % 1000) for i in range(300)) + b"ET"
HUGE = b" " * (100 << 20)


async def parse(content: bytes) -> ParsedDocument:
    async with Parser() as parser:
        return await parser.parse(Document("d", content, source="a.pdf"))


def second_page(content: bytes) -> bytes:
    """The content stream of the second page of three, as an object."""
    return write_pdf(page_objects("one", "two", "three") | {8: content})


def packed(data: bytes) -> bytes:
    return b"<</Length %d/Filter/FlateDecode>>stream\n%s\nendstream" % (len(data), data)


def with_form(form: bytes) -> bytes:
    objects = page_objects("x")
    objects[5] = objects[5].replace(b"/Resources<<", b"/Resources<</XObject<</Fm0 9 0 R>>")
    return write_pdf(objects | {6: stream(b"/Fm0 Do"), 9: form})


def form(data: bytes) -> bytes:
    return stream(data, b"/Type/XObject/Subtype/Form/BBox[0 0 9 9]/Resources<</Font<</F1 3 0 R>>>>")


def broken_stream() -> bytes:
    data = bytearray(zlib.compress(LINES))
    data[40:60] = b"\xff" * 20
    return second_page(packed(bytes(data)))


def cut_stream() -> bytes:
    """Between two operators: what is left of the page is a page."""
    squeezer = zlib.compressobj()
    whole = squeezer.compress(LINES[: LINES.index(b"(") + 4]) + squeezer.flush(zlib.Z_SYNC_FLUSH)
    return second_page(packed(whole))


def wrong_checksum() -> bytes:
    data = zlib.compress(LINES)
    return second_page(packed(data[:-1] + bytes([data[-1] ^ 1])))


def ten_pages(damage: bytes) -> bytes:
    content = make_pdf(*(f"page {i}" for i in range(10)))
    return content.replace(b"\n%s 0 obj" % damage, b"\n%sx0 obj" % damage)


def null_page() -> bytes:
    objects = page_objects("one", "two", "three")
    objects[2] = objects[2].replace(b"7 0 R", b"null")
    return write_pdf(objects)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(broken_stream, "decompress", id="broken stream"),
        pytest.param(cut_stream, "cut off", id="cut stream"),
        pytest.param(wrong_checksum, "incorrect data check", id="wrong checksum"),
        pytest.param(lambda: ten_pages(b"11"), "Object 11 0 not defined", id="page"),
        pytest.param(lambda: ten_pages(b"12"), "Object 12 0 not defined", id="contents"),
        pytest.param(null_page, "says that it has 3 pages, 2 were found", id="count"),
        pytest.param(lambda: second_page(b"[(no stream)]"), "Expected StreamObject", id="no stream"),
        pytest.param(
            lambda: with_form(form(LINES).replace(b"FlateDecode", b"Unheard")), "Impossible to decode", id="form"
        ),
    ],
)
async def test_part_of_a_document_is_not_the_document(content: Callable[[], bytes], words: str) -> None:
    with pytest.raises(DamagedDocument, match=f"{words}.*repair it.*qpdf"):
        await parse(content())


@pytest.mark.parametrize(
    "content", [lambda: second_page(stream(HUGE)), lambda: with_form(form(HUGE))], ids=["page", "form"]
)
async def test_a_bomb_exceeds_the_limit(content: Callable[[], bytes]) -> None:
    with pytest.raises(DocumentTooLarge, match="exceeds the limit of 67108864 bytes"):
        await parse(content())


def wrong_table() -> bytes:
    """Every offset is off by a byte, as where a line end was changed on the way."""
    return make_pdf("one", "two", "three").replace(b"%PDF-1.7\n", b"%PDF-1.7\r\n")


def without_length() -> bytes:
    content = b"BT /F1 12 Tf 72 720 Td (two) Tj ET"
    return second_page(b"<<>>stream\n%s\nendstream" % content)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: make_pdf("one", "two", "three"), id="good"),
        pytest.param(wrong_table, id="table of objects"),
        pytest.param(lambda: make_pdf("one", "two", "three").replace(b"\n5 0 obj", b"\n 5  0 obj"), id="white space"),
        pytest.param(without_length, id="length"),
        pytest.param(lambda: make_pdf("one", "two", "three").replace(b"%%EOF", b"%%EO"), id="end"),
        pytest.param(lambda: make_pdf("one", "two", "three").replace(b"/Info 4 0 R", b"/Info 99 0 R"), id="title"),
        pytest.param(lambda: make_pdf("one", "two", "three").replace(b"/Count 3", b"/Count 2"), id="count"),
    ],
)
async def test_what_only_breaks_rules_is_read(content: Callable[[], bytes]) -> None:
    parsed = await parse(content())
    assert parsed.text == "one\n\ntwo\n\nthree"
    assert parsed.pages == (0, 5, 10)


@pytest.mark.parametrize("missing", [1, 4])
async def test_a_stream_without_its_checksum_is_whole(missing: int) -> None:
    parsed = await parse(second_page(packed(zlib.compress(LINES)[:-missing])))
    assert parsed.text.count("\n\n") == 2
    assert all(str(i * 7919 % 1000) in parsed.text for i in range(300))


@pytest.mark.parametrize("data", [b"", b"\r\n"])
async def test_a_page_without_a_byte_is_blank(data: bytes) -> None:
    assert (await parse(second_page(packed(data)))).text == "one\n\n\n\nthree"


async def test_form_is_read() -> None:
    assert (await parse(with_form(form(b"BT /F1 12 Tf (inside) Tj ET")))).text == "inside"


async def test_the_example_is_read() -> None:
    parsed = await parse((Path(__file__).parents[3] / "examples/docs/appliance-care.pdf").read_bytes())
    assert parsed.title == "Care of your appliances"


async def test_aes_without_the_package_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = PdfWriter(clone_from=PdfReader(BytesIO(make_pdf("Hello"))))
    writer.encrypt(user_password="", owner_password="owner", algorithm="AES-128")
    out = BytesIO()
    writer.write(out)
    for name in ("cryptography", "Crypto"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    with pytest.raises(EncryptedDocument, match=r"AES.*pip install cryptography.*qpdf --decrypt"):
        await parse(out.getvalue())
