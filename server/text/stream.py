"""Tokens of one choice to text for a client, aligned."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from millrace.server.text.detokenizer import Detokenizer
from millrace.server.text.holdback import Pipeline, Stage
from millrace.server.text.stops import StopMatcher
from millrace.server.text.tokenizer import Tokenizer


class Emitted(NamedTuple):
    """`tokens`: how many, from the oldest unreleased one on, may go out with `text`.

    `stop_string` is set in the one result in which a stop string matched: the text has ended. `ends`: where in
    `text` each of these tokens ends, in characters; what follows the last one is the beginning of a token held.
    """

    text: str
    tokens: int
    stop_string: str | None
    ends: Sequence[int]


NOTHING = Emitted("", 0, None, ())


class TextStream:
    """A token goes out once all of its text has; tokens without text go with those before them.

    When a stop string matches, the match and every token with a byte in it or after it are dropped; text before
    the match is sent even where its token is dropped. With `include_stop` match and tokens are kept, and what
    follows is dropped. After a match, and after finish(), nothing more comes out.

    Joined texts do not depend on how the tokens are cut into pushes. `stages` come between detokenizing and stop
    strings; `continues`: see Detokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        include_stop: bool = False,
        *,
        stages: Sequence[Stage] = (),
        continues: bool = False,
    ):
        self._detokenizer = Detokenizer(tokenizer, continues)
        self._stops = StopMatcher(stop_strings, include_stop) if stop_strings else None
        self._include_stop = include_stop
        self._pipeline = Pipeline([*stages, self._stops] if self._stops else stages)
        self._spans: deque[tuple[int, int]] = deque()  # of each unreleased token, in characters of the whole text
        self._settled = 0
        self._ended = False

    def push(self, token_ids: Iterable[int]) -> Emitted:
        if self._ended:
            return NOTHING
        texts = []
        for token_id in token_ids:
            text, start, end = self._detokenizer.push(token_id)
            texts.append(text)
            self._spans.append((start, end))
        return self._release("".join(texts), last=False)

    def finish(self) -> Emitted:
        """Everything that was held."""
        return NOTHING if self._ended else self._release(self._detokenizer.finish(), last=True)

    def _release(self, text: str, last: bool) -> Emitted:
        before = self._settled
        text, settled = self._pipeline.push(text, last)
        self._settled += settled
        matched = self._stops.matched if self._stops else None
        self._ended = last or matched is not None
        if matched is not None and self._include_stop:
            spans = self._take_begun()
        elif last and matched is None:
            spans = list(self._spans)
        else:
            spans = self._take_settled()
        return Emitted(text, len(spans), matched, [min(end - before, len(text)) for _, end in spans])

    def _take_settled(self) -> list[tuple[int, int]]:
        taken = []
        while self._spans and self._spans[0][1] <= self._settled:
            taken.append(self._spans.popleft())
        return taken

    def _take_begun(self) -> list[tuple[int, int]]:
        """Every token with a character before the end of the text."""
        while self._spans and self._spans[-1][0] >= self._settled:
            self._spans.pop()
        return list(self._spans)
