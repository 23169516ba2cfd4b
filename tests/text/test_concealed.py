"""Special tokens under private names."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from millrace.server.text.concealed import Conceal, any_of
from millrace.server.text.tokenizer import Tokenizer


@given(words=st.lists(st.text("ab|.", min_size=1, max_size=5)), text=st.text("ab|.", max_size=12))
def test_any_of_matches_the_longest_word_at_each_position(words, text):
    pattern = re.compile(any_of(words))
    for start in range(len(text)):
        found = pattern.match(text, start)
        longest = max((word for word in words if text.startswith(word, start)), key=len, default=None)
        assert (found and found[0]) == longest


@given(text=st.text("<a>|b ", max_size=12), sides=st.tuples(st.text("<a>|b", max_size=4), st.text("<a>|b", max_size=4)))
def test_broken_text_holds_no_token_and_what_surrounds_it_completes_none(text, sides):
    """Except where the text is the middle of a token: then nothing tells it from what a template composes."""
    tokens = {"<a>": 0, "<a": 1, "a>|": 2, "<|b|>": 3}
    conceal, (before, after) = Conceal(tokens), sides
    broken = conceal.break_up(text, "#")
    assert broken.replace("#", "") == text
    prompt, inside = before + broken + after, range(len(before), len(before) + len(broken))
    for match in re.finditer(any_of(tokens), prompt):
        assert match.end() <= inside.start or match.start() >= inside.stop or text in match[0][1:-1]


def test_a_special_token_of_one_character_is_spared_by_a_mark_behind_it():
    conceal = Conceal({"§": 7})
    broken = conceal.break_up("a§b", "#")
    assert conceal.reveal(broken, "#").replace("#", "") == "a§b"
    assert conceal.reveal("§" + broken, "#").endswith(broken)
    assert ".7" in conceal.reveal("§" + broken, "#")


def test_a_special_token_that_merges_would_make(tmp_path):
    """Learned from a corpus that held the marker: plain text must not merge its way to it."""
    vocabulary = {entry: id for id, entry in enumerate(["<", "s", ">", "<s", "<s>", "s>", "</s>", "Ġ"])}
    backend = Backend(models.BPE(vocabulary, [("<", "s"), ("<s", ">"), ("s", ">")]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_ids) == (4, 6, {4, 6})
    assert tokenizer.encode("<s> s>") == [3, 2, 5]
    assert tokenizer.encode_rendered("<s>s></s>", "#") == [4, 5, 6]
    assert tokenizer.decode([4, 5], skip_special_tokens=False) == "<s>s>"


@pytest.mark.parametrize("text", ["<s>", "\ufdef", "\ufdef0.1\ufdef", "\ufdefx.4\ufdef"])
def test_names_cannot_be_guessed(tokenizers, text):
    tokenizer = tokenizers["byte_level"]
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer.decode(tokenizer.encode(text)) == text
