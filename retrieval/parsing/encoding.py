"""Bytes to text that a database and a terminal can take.

Text is UTF-8, or UTF-16 with a byte order mark. Nothing else is guessed: every byte string is valid Latin-1, so a
guess would store Cyrillic or Japanese as nonsense, without a word. HTML may name its own encoding.
"""

import codecs
import re

from millrace.retrieval.parsing.media import looks_like
from millrace.server.errors import UnknownDocumentType

UTF8_BOM, UTF16_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
# Control characters, less tab, newline, carriage return. Each becomes a space (in UTF-8 of as many bytes), so that
# positions stay those of the file.
CONTROLS = bytes(byte for byte in (*range(32), 127) if byte not in b"\t\n\r")
TO_SPACES = bytes.maketrans(CONTROLS, b" " * len(CONTROLS))
HIGH_CONTROLS = re.compile(rb"\xc2[\x80-\x9f]")
NO_BREAK_SPACE = "\u00a0".encode()
MOST_CONTROLS = 0.05  # of all bytes; more, and it is no text
# What text taken out of HTML and PDF loses: characters that nobody sees and that hide words from a search.
UNSEEN = re.compile("[\u00ad\u200b\ufeff\x00-\x08\x0e-\x1f\x7f-\x9f]")
SURROGATES = re.compile("[\ud800-\udfff]")

CHARSET = re.compile(
    rb"""<meta[^>]{1,500}?charset\s*=\s*["']?\s*([\w:.-]{1,40})|<\?xml[^>]{1,200}?encoding\s*=\s*["']([\w.-]{1,40})""",
    re.IGNORECASE,
)
CHARSET_BYTES = 1024  # in which a document must name its encoding
# By Python's names, as browsers understand them: who says Latin-1 or ASCII means Windows-1252.
ENCODINGS = {"ascii": "cp1252", "iso8859-1": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932"}
SAME = ("utf-8", "gb18030", "big5", "cp932", "euc_jp", "euc_kr", "cp949", "iso2022_jp", "koi8-r", "koi8-u", "mac-roman")
ENCODINGS |= {name: name for name in SAME}
ENCODINGS |= {name: name for name in (f"cp{page}" for page in (866, 874, *range(1250, 1259)))}
ENCODINGS |= {name: name for name in (f"iso8859-{part}" for part in (*range(2, 9), 10, 13, 14, 15, 16))}


def decode(content: bytes) -> str:
    """The text of a file. Raises UnknownDocumentType."""
    if content.startswith(UTF16_BOMS) and not content.startswith(b"\xff\xfe\0\0"):
        content = decode_as(content, "utf-16").encode()
    content = content.removeprefix(UTF8_BOM)
    controls = len(content) - len(content.translate(None, CONTROLS))
    if b"\0" in content or controls > MOST_CONTROLS * len(content):
        raise binary(content)
    return decode_as(HIGH_CONTROLS.sub(NO_BREAK_SPACE, content.translate(TO_SPACES)), "utf-8")


def decode_html(content: bytes) -> str:
    """By byte order mark, else by the encoding that it names, else as UTF-8. Raises UnknownDocumentType."""
    declared = CHARSET.search(content[:CHARSET_BYTES])
    if declared is None or content.startswith((UTF8_BOM, *UTF16_BOMS)):
        return decode(content)
    name = (declared[1] or declared[2]).decode("ascii", "replace")
    try:
        encoding = ENCODINGS[codecs.lookup(name).name]
    except LookupError:
        raise UnknownDocumentType(
            f"the document's encoding {name!r} is not known here; convert it to UTF-8", metadata={"encoding": name}
        ) from None
    return decode(content) if encoding == "utf-8" else decode_as(content, encoding)


def decode_as(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if looks_like(content):
            raise binary(content) from None
        raise UnknownDocumentType(
            f"the document is not {encoding.upper()} (byte {error.start} does not fit); if it is text, convert it to"
            " UTF-8, for example with: iconv -f WINDOWS-1252 -t UTF-8",
            metadata={"byte": str(error.start)},
        ) from None


def binary(content: bytes) -> UnknownDocumentType:
    kind = looks_like(content)
    return UnknownDocumentType(
        f"the document is binary{f' (it looks like {kind})' if kind else ''}; plain text, Markdown, HTML and PDF are"
        " read: convert it to one of these, or state its media type if it is one",
        metadata={"looks_like": kind},
    )


def seen(text: str) -> str:
    """Text without control and invisible characters; half a surrogate pair becomes U+FFFD, a page break a line's."""
    return SURROGATES.sub("\ufffd", UNSEEN.sub("", text.replace("\v", "\n").replace("\f", "\n")))
