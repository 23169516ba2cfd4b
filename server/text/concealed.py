"""A tokenizer.json whose special tokens nobody can name.

The `tokenizers` library finds added tokens by their text, wherever the text comes from. So, before it sees the
file, every special token gets a new name that holds a random number of this process: text can then never
contain one, whatever a client writes, and a chat template's own control tokens are put in on purpose
(`Conceal.reveal`). Merely switching the library's search off is not enough: a Unigram model also finds `<s>` as a
piece of its vocabulary, and a prompt needs control tokens and plain text in one call, since what precedes a
piece of text decides how it is split.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

EDGE = "\ufdef"  # a noncharacter: no normalizer or decoder touches it


class Conceal:
    """The special tokens of one tokenizer under their private names. `tokens`: id of each by its public name."""

    def __init__(self, tokens: Mapping[str, int]):
        nonce = secrets.randbits(64)
        self.tokens = dict(tokens)
        self._private = {public: f"{EDGE}{nonce}.{id}{EDGE}" for public, id in tokens.items()}
        self._pattern = re.compile(any_of(tokens))
        self._starts = re.compile(f"(?={any_of(tokens)})")
        self._longest = max(map(len, tokens), default=0)
        self._heads = frozenset(token[:i] for token in tokens for i in range(1, len(token)))
        self._tails = frozenset(token[i:] for token in tokens for i in range(1, len(token)))

    def hide(self, tokenizer: dict[str, Any]) -> str:
        """The same tokenizer.json with private names; every one of them is an added, special token."""
        return json.dumps(tokenizer | {"added_tokens": self._added(tokenizer), "model": self._model(tokenizer)})

    def reveal(self, text: str, mark: str) -> str:
        """Name every special token that the text spells out, the longest first, as the library would find them.

        One of a single character cannot be broken: a mark behind it spares it.
        """

        def name(match: re.Match[str]) -> str:
            spared = len(match[0]) == 1 and text.startswith(mark, match.end())
            return match[0] if spared else self._private[match[0]]

        return self._pattern.sub(name, text)

    def break_up(self, text: str, mark: str) -> str:
        """Put `mark` into every special token that the text spells out, so that reveal() passes it by.

        Also into a beginning of one where the text ends, and before an end of one where it begins: what comes next
        to them in a prompt must not complete them. Trimming the text changes nothing.
        """
        cuts = {match.start() + 1 for match in self._starts.finditer(text)}
        for end in (len(text), len(text.rstrip())):
            sizes = range(1, min(self._longest, end + 1))
            cuts |= {end - size + 1 for size in sizes if text[end - size : end] in self._heads}
        for start in (0, len(text) - len(text.lstrip())):
            if any(text[start : start + size] in self._tails for size in range(1, self._longest)):
                cuts.add(start)
        if not cuts:
            return text
        edges = [0, *sorted(cuts), len(text)]
        return mark.join(text[start:end] for start, end in pairwise(edges))

    def _added(self, tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
        entries = {entry["content"]: dict(entry) for entry in tokenizer.get("added_tokens") or ()}
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for public, id in self.tokens.items():
            entry = entries.setdefault(public, plain | {"id": id})
            # reveal() has already decided where words begin and end.
            entry |= {"content": self._private[public], "special": True, "single_word": False}
        return sorted(entries.values(), key=lambda entry: entry["id"])

    def _model(self, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
        model = dict(tokenizer["model"])
        private, vocabulary = self._private, model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {private.get(entry, entry): id for entry, id in vocabulary.items()}
        else:
            model["vocab"] = [[private.get(entry, entry), score] for entry, score in vocabulary]
        if model.get("unk_token") is not None:
            model["unk_token"] = private.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not self._concerns(merge)]
        return model

    def _concerns(self, merge: str | list[str]) -> bool:
        """A merge that makes or uses a special token would let plain text become one."""
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        return left + right in self._private or left in self._private or right in self._private


def any_of(words: Iterable[str]) -> str:
    """A regular expression of the longest of `words` at a position, in time linear in the match: a trie."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return _branch(root) if root else r"(?!)"


def _branch(node: Mapping[str, Any]) -> str:
    ways = [re.escape(character) + _branch(child) for character, child in node.items() if character]
    if not ways:
        return ""
    return f"(?:{'|'.join(ways)})" + ("?" if "" in node else "")
