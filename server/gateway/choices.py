"""From the tokens of a backend to the deltas of a client: text, stops, alignment, splitting."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

from millrace.server.errors import InternalError, InvalidRequest
from millrace.server.gateway.citing import MarkerCitations
from millrace.server.gateway.continuation import finish_of
from millrace.server.gateway.guardrails.base import Guard
from millrace.server.text.citations import CitationMarkers, Marked, Places
from millrace.server.text.holdback import Stage
from millrace.server.text.stream import Emitted, TextStream
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import (
    ChatPrompt,
    ChoiceDelta,
    Citation,
    Deltas,
    Finish,
    FinishReason,
    GenerateRequest,
    Logprobs,
    OutputOptions,
    ReceivedChoice,
    Source,
    TokenDelta,
    TokenRequest,
    Usage,
)

RAN_OUT = (FinishReason.MAX_TOKENS, FinishReason.CONTEXT_LENGTH)


class Choice:
    """One answer on its way out.

    A token waits here until its text may go out; `sent` tokens have. What follows a stop never goes out.
    """

    def __init__(
        self,
        index: int,
        text: TextStream | None,
        request: GenerateRequest,
        ran_out: FinishReason,
        places: Places | None = None,
    ):
        self.index, self._text, self._ran_out, self._places = index, text, ran_out, places
        self._output: OutputOptions = request.output
        self._include_stop = request.stopping.include_stop
        self._held_ids: list[int] = []
        self._held_logprobs = Logprobs(request.output.logprobs_top_n or 0)
        self._released = 0  # bytes of text
        self._skipped_tokens = self._skipped_bytes = 0  # still to come out, which the client has
        self.received = 0
        self.sent = 0
        self.earlier = 0  # of the tokens sent: those that another call sent
        self.finished_earlier = False
        self.finish: Finish | None = None

    def resume(self, received: ReceivedChoice, finish: Finish | None) -> list[ChoiceDelta]:
        """Go on where a client lost the answer; `finish`: what its tokens ended with. Returns what may go out now."""
        self.finished_earlier = received.finished
        self.earlier = self.sent = len(received.token_ids)
        if received.finished:
            if self._text:  # once more, for its citations alone
                for emitted in (self._text.push(received.token_ids), self._text.finish()):
                    self._released += len(emitted.text.encode())
            return []
        self._skipped_tokens, self._skipped_bytes = len(received.token_ids), received.text_bytes
        return self.push(TokenDelta(self.index, list(received.token_ids), finish=finish))

    def push(self, news: TokenDelta) -> list[ChoiceDelta]:
        """Return what may go out now, in pieces of at most `max_tokens_per_message` tokens."""
        self.received += len(news.token_ids)
        ids, finish = news.token_ids, news.finish
        if news.logprobs:
            self._held_logprobs.extend(news.logprobs)
        if finish and finish.stop_token_id is not None and not self._include_stop:
            ids = ids[:-1]
        if finish and finish.reason in RAN_OUT:
            finish = replace(finish, reason=self._ran_out)
        self._held_ids += ids
        deltas = self._release(self._text.push(ids) if self._text else textless(len(ids)))
        return deltas + self.end(finish) if finish and not self.finish else deltas

    def end(self, finish: Finish) -> list[ChoiceDelta]:
        """Release everything that is held and finish."""
        return self._release(self._text.finish() if self._text else textless(len(self._held_ids)), finish)

    def cited(self) -> list[Marked]:
        """Markers whose text has gone out since the last call."""
        found = self._places.found if self._places else deque[Marked]()
        return [found.popleft() for _ in range(sum(one.end <= self._released for one in found))]

    def _release(self, emitted: Emitted, finish: Finish | None = None) -> list[ChoiceDelta]:
        if emitted.stop_string is not None:
            finish = Finish(FinishReason.STOP_SEQUENCE, stop_string=emitted.stop_string)
        self.finish = finish
        self._released += len(emitted.text.encode())
        if self._skipped_tokens or self._skipped_bytes:
            emitted = self._skip(emitted)
        deltas: list[ChoiceDelta] = []
        limit = self._output.max_tokens_per_message or max(emitted.tokens, 1)
        left, start = emitted.tokens, 0
        while left > limit:
            left -= limit
            end = emitted.ends[-left - 1]
            deltas += self._delta(limit, emitted.text[start:end])
            start = end
        return deltas + self._delta(left, emitted.text[start:], finish)

    def _skip(self, emitted: Emitted) -> Emitted:
        """Without what the client has. Raises InvalidRequest if that is not the answer's."""
        tokens = min(self._skipped_tokens, emitted.tokens)
        self._skipped_tokens -= tokens
        del self._held_ids[:tokens]
        data = emitted.text.encode()
        size = min(self._skipped_bytes, len(data))
        self._skipped_bytes -= size
        is_short = self.finish and self.finish.reason is not FinishReason.TIME_LIMIT
        if is_short and (self._skipped_tokens or self._skipped_bytes):
            raise self._not_the_answer("it ends before")
        try:
            characters = len(data[:size].decode())
        except UnicodeDecodeError:
            raise self._not_the_answer("that ends within a character") from None
        ends = [max(0, end - characters) for end in emitted.ends[tokens:]]
        return emitted._replace(text=emitted.text[characters:], tokens=emitted.tokens - tokens, ends=ends)

    def _not_the_answer(self, why: str) -> InvalidRequest:
        return InvalidRequest.at("continue_from", f"choice {self.index} has not what was received: {why}")

    def _delta(self, count: int, text: str, finish: Finish | None = None) -> list[ChoiceDelta]:
        """The next `count` tokens and their text; nothing if the client wants neither.

        A token without text goes out in an empty delta: there is no gap in the offsets of what was sent.
        """
        ids = self._held_ids[:count]
        del self._held_ids[:count]
        delta = ChoiceDelta(
            self.index,
            text=text if self._output.text else "",
            token_ids=ids if self._output.token_ids else [],
            logprobs=self._held_logprobs.take(count) if self._output.logprobs_top_n is not None else None,
            finish=finish,
            token_offset=self.sent,
        )
        self.sent += count
        wants_tokens = self._output.text or self._output.token_ids or delta.logprobs
        return [delta] if delta.text or finish or (count and wants_tokens) else []


def textless(tokens: int) -> Emitted:
    """What a choice whose text nobody reads releases."""
    return Emitted("", tokens, None, [0] * tokens)


class Choices:
    """All the answers of one request, and what they have used. `stop` ends one at the backend, once there is one.

    `guard` masks what they say; `sources` are what their markers may name, and are cited for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: GenerateRequest,
        prompt_tokens: int,
        ran_out: FinishReason,
        *,
        guard: Guard | None = None,
        sources: Sequence[Source] = (),
        embedding_tokens: int = 0,
    ):
        stops, include_stop = request.stopping.stop_strings, request.stopping.include_stop
        continues = not isinstance(request.prompt, ChatPrompt)  # an answer to a conversation begins a text
        self._choices = []
        for index in range(request.sampling.n):
            mask, places, text = guard.stream() if guard else None, None, None
            stages: list[Stage] = [mask] if mask else []
            if sources:
                markers = CitationMarkers(len(sources))
                places = Places(markers, mask)
                stages = [markers, places]
            if request.output.text or stops or stages:
                text = TextStream(tokenizer, stops, include_stop, stages=stages, continues=continues)
            self._choices.append(Choice(index, text, request, ran_out, places))
        self._citations = MarkerCitations(sources)
        self.stop: Callable[[int], None] = lambda choice: None
        self._continuous_usage = request.output.continuous_usage
        self._prompt_tokens, self._embedding_tokens = prompt_tokens, embedding_tokens
        self._cached_prompt_tokens = 0

    @property
    def usage(self) -> Usage:
        sent = sum(choice.sent - choice.earlier for choice in self._choices)
        return Usage(self._prompt_tokens, self._cached_prompt_tokens, sent, self._embedding_tokens)

    @property
    def surplus_tokens(self) -> int:
        """Tokens that were computed and neither sent nor billed: stop tokens, stop strings and what follows."""
        return sum(choice.received - choice.sent for choice in self._choices if choice.finish)

    @property
    def running(self) -> list[int]:
        return [choice.index for choice in self._choices if not choice.finish and not choice.finished_earlier]

    @property
    def finishes(self) -> list[Finish]:
        return [choice.finish for choice in self._choices if choice.finish]

    def resume(self, received: Mapping[int, ReceivedChoice], tokens: TokenRequest) -> Sequence[Deltas | Citation]:
        """Go on where a client lost the answer; what may go out now. Raises InvalidRequest if it cannot be of these."""
        columns = [
            self._choices[index].resume(one, finish_of(one.token_ids, tokens)) for index, one in received.items()
        ]
        return list(self._messages(columns))

    def push(self, news: Sequence[TokenDelta]) -> Iterator[Deltas | Citation]:
        """Return messages for what is new, every choice that advanced in the same one, and what these cite."""
        columns = []
        for delta in news:
            self._cached_prompt_tokens = max(self._cached_prompt_tokens, delta.cached_prompt_tokens)
            choice = self._choices[delta.choice]
            if not choice.finish:
                columns.append(choice.push(delta))
                if choice.finish and not delta.finish:
                    self.stop(choice.index)
        return self._messages(columns)

    def end(self, finish: Finish) -> Iterator[Deltas | Citation]:
        """Finish every choice that still runs."""
        return self._messages([self._choices[index].end(finish) for index in self.running])

    def check(self) -> None:
        """Raise InternalError if a choice still runs."""
        if self.running:
            raise InternalError("the backend ended a stream whose choices have not finished")

    def _messages(self, columns: list[list[ChoiceDelta]]) -> Iterator[Deltas | Citation]:
        for row in zip_longest(*columns):
            choices = [delta for delta in row if delta]
            yield Deltas(choices, self.usage if self._continuous_usage else None)
        for choice in self._choices:
            for marked in choice.cited():
                yield from self._citations.cite(choice.index, marked)
