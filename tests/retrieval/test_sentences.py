"""Sentences: labelled cases, and what must hold of every text."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.retrieval.sentences import MAX_BYTES, sentences

# Each case is its sentences; they are joined by one space.
CASES = [
    # plain
    ["One sentence."],
    ["No full stop"],
    ["We ship on Monday.", "Returns are free.", "Ask us!"],
    ["Is it new?", "Yes.", "Really?!", "Good."],
    ["The price is 5.", "The tax is 2."],
    # titles and names
    ["Dr. Smith met Mr. Jones and Mrs. Hall.", "They talked."],
    ["Prof. Lee et al. (2020) wrote it.", "It was read."],
    ["J. K. Rowling and J.R.R. Tolkien wrote books.", "Many read them."],
    ["Ask John F. Kennedy.", "He knows."],
    ["St. Louis is a city.", "So is Mt. Airy."],
    ["Gen. Grant and Lt. Col. North left.", "Sgt. Pepper stayed."],
    ["He works at Apple Inc. in California.", "She works at Acme Ltd. as well."],
    ["She works at Acme Inc.", "The pay is good."],
    ["Martin Luther King Jr. spoke.", "We listened."],
    ["Smith v. Jones was heard.", "Smith won."],
    # abbreviations
    ["Use a browser, e.g. Firefox, i.e. not a phone.", "Then log in."],
    ["Apples, pears, etc. are fruit.", "We sell apples, pears, etc.", "They are fresh."],
    ["It takes approx. 5 days.", "Or less."],
    ["See No. 5 and fig. 3, pp. 12 and vol. 2.", "Then stop."],
    ["Did it work?", "No.", "Try again."],
    ["The answer is no.", "Ask again."],
    ["See Sec. 4.2 and Art. 5 and app. B of it.", "That is all."],
    ["Download the app.", "Open it."],
    ["It was 3 vs. 2 in the end.", "They won."],
    ["Call tel. 555 1234.", "Wait."],
    ["He was born on Jan. 5 in Rome.", "It rained."],
    ["We close on Dec. 24.", "We open on Jan. 2."],
    ["She sat.", "Birds sang in the sun.", "Nothing moved."],
    ["It is 5 ft. tall.", "That is 1.5 m."],
    ["He lives at 5 Main St. in Boston.", "She lives on Oak Ave.", "They are friends."],
    ["She has a Ph.D. in physics.", "He has a Ph.D.", "They teach."],
    # acronyms and initials
    ["The U.S. army and the U.K. navy met.", "Nobody won."],
    ["He moved to the U.S.", "He liked it."],
    ["We ship to the US.", "We ship to the EU."],
    ["Be here at 9 a.m. Monday or 5 p.m. Tuesday.", "Do not be late."],
    ["We open at 9 a.m.", "We close at 5 p.m."],
    ["Take vitamin C.", "It helps."],
    ["Go to plan B.", "If it fails, stop."],
    ["So do I.", "They do not."],
    # numbers
    ["Pi is 3.14 and costs $3.50.", "A version is 2.0.1.", "Fine."],
    ["Set it to .5 or 1.", "Then save."],
    ["It grew 3.5% in 2020.", "It fell in 2021."],
    # ellipses
    ["Wait... what is it?", "Well...", "It works."],
    ["Then… nothing came.", "So we left…", "We came back."],
    ["Once . . . there was a king.", "He died."],
    # quotes and brackets
    ["“We ship daily.”", "He nodded."],
    ["She said, “Stop!” and left.", "He stayed."],
    ['"Is it done?" asked Bob.', '"Yes."', "They left."],
    ["He left (it was late.)", "She stayed."],
    ["It rained (see below).", "(That was new.)", "We left."],
    ["It is so.[1]", "It was so.[12][13]", "It will be."],
    ["**Bold ends.**", "_So does this._", "Plain."],
    ["«C'est fini.»", "Il part."],
    ["„Das geht.“", "Er ging."],
    # names in lower case, addresses
    ["I have an iPhone.", "iPhones are fine.", "eBay sells them."],
    ["Write to a.b@example.com or see https://example.com/a.b?c=d.", "We answer."],
    ["Edit config.toml and run main.py.", "Use Node.js or .NET."],
    ["Yahoo! is a company.", "It is old."],
    # other languages and scripts
    ["z.B. ein Haus, d.h. ein Heim, bzw. eine Wohnung.", "Das ist gut."],
    ["Er kam, sah usw. und ging.", "Es war spät."],
    ["¿Qué hora es?", "¡Es tarde!", "Adiós."],
    ["هل هذا جديد؟", "نعم۔", "شكرا."],
    ["यह नया है।", "हाँ।"],
    ["Привет. как дела?", "Хорошо."],
    ["👋 Hello!", "👍 Good.", "Done 🎉"],
]
# Text and sentences, where no single space joins them.
LAID_OUT = [
    ("他来了。你好！真的吗？OK", ["他来了。", "你好！", "真的吗？", "OK"]),
    ("「走ろう。」と言った。次。", ["「走ろう。」と言った。", "次。"]),
    ("「行け！」彼は走った。", ["「行け！」", "彼は走った。"]),
    ("# Shipping\nWe ship. Fast.", ["# Shipping", "We ship.", "Fast."]),
    ("Shipping\n========\nWe ship.", ["Shipping\n========", "We ship."]),
    ("A line that\nwraps here. Next\nwraps too.", ["A line that\nwraps here.", "Next\nwraps too."]),
    ("No full stop\n\nNew paragraph", ["No full stop", "New paragraph"]),
    ("- one. More of it.\n- two\n  wraps\n* three", ["- one.", "More of it.", "- two\n  wraps", "* three"]),
    ("1. First. Then.\n2. Second.\n10) Tenth", ["1. First.", "Then.", "2. Second.", "10) Tenth"]),
    ("| a. B | c |\n|---|---|\n| d | e |", ["| a. B | c |", "|---|---|", "| d | e |"]),
    ("See:\n```\nx = 1. Y\ny\n```\nEnd.", ["See:", "```", "x = 1. Y", "y", "```", "End."]),
    ("one.\r\n\r\ntwo.\r\n", ["one.", "two."]),
    ("\n\n  \t\n", []),
    ("", []),
    ("...", ["..."]),
    ("a.b.c", ["a.b.c"]),
]


@pytest.mark.parametrize("expected", CASES, ids=" ".join)
def test_labelled(expected: list[str]) -> None:
    assert [sentence.text for sentence in sentences(" ".join(expected))] == expected


@pytest.mark.parametrize(("text", "expected"), LAID_OUT)
def test_laid_out(text: str, expected: list[str]) -> None:
    assert [sentence.text for sentence in sentences(text)] == expected


def test_headings_are_marked() -> None:
    text = "# One. Two\n\nThree\n---\nFour.\n- # five\n"
    assert [sentence.text for sentence in sentences(text) if sentence.is_heading] == ["# One. Two", "Three\n---"]


PIECES = [*"aZ1.!?… \n\r\t\"')(|#-*`é中。」👍", "\u0301", "\u200d", "\u00a0", "Dr", "e.g.", "The", "---"]
TEXTS = st.lists(st.sampled_from(PIECES)).map("".join)


@given(st.one_of(TEXTS, st.text()))
def test_slices_are_exact_in_order_and_complete(text: str) -> None:
    data = text.encode()
    position = 0
    for sentence in sentences(text):
        assert sentence.byte_start >= position
        assert not data[position : sentence.byte_start].decode().strip()
        assert data[sentence.byte_start : sentence.byte_end].decode() == sentence.text
        assert sentence.text == sentence.text.strip() != ""
        assert len(sentence.text.encode()) <= MAX_BYTES
        position = sentence.byte_end
    assert not data[position:].decode().strip()


@pytest.mark.parametrize(
    "text", ["word word, " * 400, "word " * 900, "x" * 4000, "中" * 2000, "e\u0301" * 1500, "👩\u200d🦰" * 300]
)
def test_long_sentences_are_cut(text: str) -> None:
    found = sentences(text)
    assert "".join(sentence.text for sentence in found).replace(" ", "") == text.replace(" ", "")
    assert all(len(sentence.text.encode()) <= MAX_BYTES for sentence in found)
    assert all(len(sentence.text.encode()) > MAX_BYTES // 2 for sentence in found[:-1])
    assert all(sentence.text[0] in "wx中e👩" for sentence in found)
    if "," in text:
        assert all(sentence.text.endswith(",") for sentence in found)


@pytest.mark.parametrize(
    "piece", ["Hello world. ", "a.", "x", "中。", "# a\n", "- a\n", "* ", "```\n", " \n", "e.g. ", "a\n---\n", "“"]
)
def test_time_is_linear(piece: str) -> None:
    """Ten times the text may not take forty times the processor's time."""
    short, long = piece * (6_000 // len(piece)), piece * (60_000 // len(piece))
    assert min(_seconds(long) for _ in range(2)) < 40 * max(min(_seconds(short) for _ in range(3)), 0.002)


def _seconds(text: str) -> float:
    started = time.thread_time()
    sentences(text)
    return time.thread_time() - started
