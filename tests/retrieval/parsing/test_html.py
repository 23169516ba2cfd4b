"""HTML as a reader sees it."""

import codecs
import random
import re

import pytest

from millrace.retrieval.parsing.base import Limits
from millrace.retrieval.parsing.encoding import ENCODINGS, decode_html, seen
from millrace.retrieval.parsing.html import BLOCKS, read_html
from millrace.server.errors import UnknownDocumentType


def text_of(markup: str) -> str:
    return read_html(markup.encode(), Limits()).text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        # what is seen
        ("<p>one<p>two", "one\n\ntwo"),
        ("<div>one<div>two</div>three</div>four", "one\n\ntwo\n\nthree\n\nfour"),
        ("a <b>bold</b>,\n\n <i>word</i>s", "a bold, words"),
        ("caf&eacute; &lt;b&gt; &#8364;&nbsp;5 &unknown; &", "café <b> € 5 &unknown; &"),
        ("&#0;&#xD800;&#1;x", "\ufffd\ufffdx"),
        ("soft&shy;hyphen&#8203;", "softhyphen"),
        ("one<br>two<br/>three", "one\ntwo\nthree"),
        ("one<br><br><br>two", "one\n\ntwo"),
        ("one<hr>two", "one\n\ntwo"),
        ("he said <q>yes</q>", "he said “yes”"),
        ("<h1>Title</h1>text<h3>Sub<br>title</h3>", "# Title\n\ntext\n\n### Sub title"),
        ("<h2><div>Boxed</div></h2><h2> </h2>plain", "## Boxed\n\nplain"),
        ("<a href=x>link</a> <img src=y alt=picture>", "link"),
        ("<details><summary>More</summary>body</details>", "More\n\nbody"),
        ("<dl><dt>term<dd>meaning<dt>other<dd>thing</dl>", "term\n\nmeaning\n\nother\n\nthing"),
        # what is not seen
        ("<script>a<p>b</script><style>p{}</style>x", "x"),
        ("<noscript>a</noscript><template><p>b</template>x<nav>c</nav>", "x"),
        ("<title>a</title><svg><title>b</title><text>c</text></svg>x", "x"),
        ("<select><option>a<option>b</select>x<textarea>c</textarea>", "x"),
        ("<p hidden>a</p>x<div style='color:red; DISPLAY : none'>b<div>c</div></div>y", "xy"),
        ("<span aria-hidden=true>a<span>b</span>c</span>x", "x"),
        ("<dialog>a</dialog><dialog open>x</dialog>", "x"),
        ("<p hidden>a<p>x", "x"),
        ("<ul><li hidden>a<li>x</ul>y", "- x\n\ny"),
        ("<div style='display:block'>x</div><!-- a --><?php b ?>", "x"),
        ("<div hidden>unclosed", ""),
        # lists
        ("<ul><li>one</li><li><p>two</p></li></ul>", "- one\n- two"),
        ("<ol><li>one<li>two<ul><li>in</ul><li>three</ol>", "1. one\n2. two\n  - in\n3. three"),
        ("<ul><li></li><li>x</ul>after", "- x\n\nafter"),
        ("<li>stray", "- stray"),
        # tables
        (
            "<table><tr><th>Item<th>Price<tr><td>Tea<td>€ 3</table>",
            "| Item | Price |\n| --- | --- |\n| Tea | € 3 |",
        ),
        ("<table><tr><td><p>one</p><p>more</p></td><td>two</td></tr></table>", "| one more | two |"),
        ("<table><tr><td>layout<p>para</p></td></tr></table>", "layout\n\npara"),
        ("<table><tr><td><table><tr><td>a<td>b</table><td>c</table>", "| | a | b | | c |"),
        ("<td>stray</td><tr><td>row", "stray\n\nrow"),
        # code
        ("<pre>\n  a = 1\n    b &lt; 2\n</pre>", "```\n  a = 1\n    b < 2\n```"),
        ("<pre>```\nx\n```</pre>y", "````\n```\nx\n```\n````\n\ny"),
        # markup that is broken
        ("</p></div>x</b>", "x"),
        ("<p>one<table><p>two</table>", "one\n\ntwo"),
        ("<b>one<p>two</b>three", "one\n\ntwothree"),
        ("x<", "x<"),
        ("", ""),
    ],
)
def test_text(markup: str, text: str) -> None:
    assert text_of(markup) == text


@pytest.mark.parametrize(
    ("markup", "title"),
    [
        ("<title> a\n &amp; b </title><title>c</title><svg><title>d</title></svg><h1>e</h1>", "a\n & b"),
        ("<nav><title>a</title></nav><h2>b</h2>", "b"),
        ("<p>a", ""),
    ],
)
def test_title(markup: str, title: str) -> None:
    assert read_html(markup.encode(), Limits()).title == title


def test_long_cells_are_layout() -> None:
    cell = "word " * 300
    assert text_of(f"<table><tr><td>{cell}<td>{cell}</table>") == f"{cell.strip()}\n\n{cell.strip()}"


def test_deep_lists_are_not_indented_for_ever() -> None:
    assert len(text_of("<ul><li>x" * 2000)) < 2000 * 25


def test_no_word_that_is_seen_is_lost() -> None:
    """Words in random nests of elements, closed or not, come out once (before a table, if they are in no cell)."""
    random_ = random.Random(7)
    tags = (*sorted(BLOCKS - {"dialog"}), "b", "span", "br", "q", "a")
    for _ in range(500):
        words, markup = [], ""
        for i in range(30):
            tag = random_.choice(tags)
            markup += random_.choice((f"<{tag}>", f"</{tag}>", f"<{tag} class=x>"))
            markup += f" w{i}x "
            words.append(f"w{i}x")
        found = text_of(markup)
        assert sorted(re.findall(r"w\d+x", found)) == sorted(words), markup


def test_damaged_markup_never_fails() -> None:
    random_ = random.Random(8)
    pieces = ["<", ">", "</", "<!", "<!--", "-->", "<?", "&", "&#", ";", "=", '"', "'", "p", "table", "td", "x ", "/>"]
    for _ in range(2000):
        text_of("".join(random_.choices(pieces, k=40)))


@pytest.mark.parametrize(
    ("encoding", "label"),
    [("cp1252", "iso-8859-1"), ("cp1251", "windows-1251"), ("koi8-r", "KOI8-R"), ("shift_jis", "Shift_JIS")],
)
def test_an_encoding_that_is_named_is_used(encoding: str, label: str) -> None:
    text = {"cp1252": "Grüße", "cp1251": "Привет", "koi8-r": "Привет", "shift_jis": "日本語"}[encoding]
    for markup in (f'<meta charset="{label}">{text}', f'<?xml version="1.0" encoding="{label}"?>{text}'):
        assert text in decode_html(markup.encode(encoding))
    http = f'<meta http-equiv="Content-Type" content="text/html; charset={label}">{text}'
    assert text in decode_html(http.encode(encoding))


def test_a_byte_order_mark_beats_what_is_named() -> None:
    assert "Grüße" in decode_html('<meta charset="koi8-r">Grüße'.encode("utf-8-sig"))
    assert "Grüße" in decode_html('<meta charset="koi8-r">Grüße'.encode("utf-16"))


def test_encodings_go_by_pythons_names() -> None:
    assert all(codecs.lookup(name).name == name for name in ENCODINGS)


@pytest.mark.parametrize("label", ["utf-7", "unicode_escape", "rot13", "zip", "utf-16", "klingon"])
def test_an_encoding_that_is_not_for_pages_is_refused(label: str) -> None:
    with pytest.raises(UnknownDocumentType, match="convert it to UTF-8"):
        decode_html(f"<meta charset={label}>x".encode())


def test_bytes_that_do_not_fit_are_not_guessed() -> None:
    for content in (b"<p>Gr\xfc\xdfe", b"<meta charset=utf-8>Gr\xfc\xdfe", b"<meta charset=windows-1252>\x81"):
        with pytest.raises(UnknownDocumentType):
            decode_html(content)


def test_what_no_database_takes_and_no_reader_sees() -> None:
    assert seen("a\ud800b\udfffc\0d\x1be\u009ff\u00adg\u200bh\fi\tj") == "a\ufffdb\ufffdcdefgh\ni\tj"
