"""HTML as a reader sees it, written as Markdown so that its structure survives.

By the standard library's parser, which never fails but needs minutes for some markup: this runs as a child process.
"""

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser

from millrace.retrieval.parsing.base import Limits, Reading
from millrace.retrieval.parsing.blocks import BREAK, Writer
from millrace.retrieval.parsing.child import serve
from millrace.retrieval.parsing.encoding import decode_html, seen
from millrace.retrieval.parsing.markdown import first_heading


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


VOID = words("area base br col embed hr img input link meta param source track wbr")
UNSEEN = words(
    "script style template noscript title svg iframe object canvas audio video select datalist textarea button nav"
    " annotation annotation-xml"
)
HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
BLOCKS = words(
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure footer"
    " form header hgroup html legend li main menu ol p pre search section summary table tbody td tfoot th thead tr"
    " ul"
) | frozenset(HEADINGS)
LISTS = frozenset({"ul", "ol", "menu", "dl"})
# What the start of an element ends, if it is open within the innermost element of the second set.
ENDS = (
    {name: (frozenset({"p"}), frozenset({"table", "td", "th", "li"})) for name in BLOCKS}
    | dict.fromkeys(("li", "dt", "dd"), (frozenset({"li", "dt", "dd"}), LISTS | {"table"}))
    | dict.fromkeys(("td", "th"), (frozenset({"td", "th"}), frozenset({"tr", "table"})))
    | {"tr": (frozenset({"tr"}), frozenset({"table"}))}
)
HIDDEN = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)", re.IGNORECASE)


def read_html(content: bytes, limits: Limits) -> Reading:
    """Visible text: paragraphs, headings, lists and tables as in Markdown. Raises UnknownDocumentType."""
    reader = _Reader()
    reader.feed(decode_html(content))
    return reader.reading()


class _Reader(HTMLParser):
    """Keeps the blocks that are open, since end tags may be missing, and skips what is not seen."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._writer = Writer()
        self._open: list[tuple[str, Callable[[], None] | None]] = []  # element, and what its end does
        self._count: Counter[str] = Counter()  # of the open ones
        self._hidden = 0  # how many elements are open with and around the outermost unseen one; 0: all is seen
        self._verbatim = 0  # open `pre`s
        self._title: list[str] = []
        self._titles = 0

    def reading(self) -> Reading:
        self.close()
        while self._open:
            self._pop()
        self._writer.end_block()
        text = seen(self._writer.result())
        title = seen("".join(self._title)).strip() or first_heading(text)
        return Reading(title, text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ENDS:
            self._end_open(*ENDS[tag])
        if tag in VOID:
            if not self._hidden:
                self._void(tag)
        elif self._hidden:
            self._push(tag, None)
        elif tag in UNSEEN or _is_hidden(tag, dict(attrs)):
            self._titles += tag == "title"
            self._push(tag, None)
            self._hidden = len(self._open)
        elif tag in BLOCKS:
            self._end_block()
            self._push(tag, self._start_block(tag))
        elif tag == "q":
            self._writer.write("“")

    def handle_endtag(self, tag: str) -> None:
        if self._count[tag]:
            while self._pop() != tag:
                pass
        elif tag == "q" and not self._hidden:
            self._writer.write("”")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._writer.write(data)
        elif self._titles == 1 and len(self._open) == self._hidden and self._open[-1][0] == "title":
            self._title.append(data)

    def _start_block(self, tag: str) -> Callable[[], None] | None:
        """What the end of the block will do, after its text is written."""
        writer = self._writer
        if tag in HEADINGS:
            writer.mark(HEADINGS[tag])
            return lambda: writer.mark("")
        if tag in LISTS:
            writer.open_list(tag == "ol")
            return writer.close_list
        if tag == "li":
            writer.open_item()
            return lambda: writer.mark("")
        if tag == "tr":
            writer.open_row()
            return writer.close_row
        if tag in ("td", "th"):
            return writer.close_cell if writer.open_cell(tag == "th") else None
        if tag == "pre":
            self._verbatim += 1
            return self._end_verbatim
        return None

    def _void(self, tag: str) -> None:
        if tag == "br":
            self._writer.write(BREAK)
        elif tag == "hr":
            self._end_block()

    def _end_block(self) -> None:
        if self._verbatim:
            self._writer.end_verbatim()
        else:
            self._writer.end_block()

    def _end_verbatim(self) -> None:
        self._verbatim -= 1

    def _end_open(self, names: frozenset[str], within: frozenset[str]) -> None:
        """End the outermost element of these names, and all in it, if one is open within its container."""
        if not any(self._count[name] for name in names):
            return
        found = 0
        for place in range(len(self._open), 0, -1):
            tag = self._open[place - 1][0]
            if tag in names:
                found = place
            elif tag in within:
                break
        while found and len(self._open) >= found:
            self._pop()

    def _push(self, tag: str, at_end: Callable[[], None] | None) -> None:
        self._open.append((tag, at_end))
        self._count[tag] += 1

    def _pop(self) -> str:
        tag, at_end = self._open[-1]
        if not self._hidden:
            self._end_block()
        self._open.pop()
        self._count[tag] -= 1
        if at_end is not None:
            at_end()
        if len(self._open) < self._hidden:
            self._hidden = 0
        return tag


def _is_hidden(tag: str, attributes: dict[str, str | None]) -> bool:
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or (tag == "dialog" and "open" not in attributes)
        or HIDDEN.search(attributes.get("style") or "") is not None
    )


if __name__ == "__main__":
    serve(read_html)
