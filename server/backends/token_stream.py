"""The mailbox of one request: news of its choices merges until somebody takes it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from millrace.server.errors import EngineLost, EngineRestarting, RequestError
from millrace.server.types import Finish, Logprobs, TokenDelta


class MergedStream:
    """A `TokenStream`. Whoever fills it calls the methods of the second half, on the same event loop."""

    def __init__(self, choices: Iterable[int], cancel: Callable[[list[int]], None]):
        """`cancel(choices)` frees what open choices hold; it is called for each at most once."""
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open = set(choices)
        self._news: dict[int, TokenDelta] = {}
        self._error: RequestError | None = None
        self._delivered = 0
        self._cancel = cancel
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        while not self._news:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if not self._open:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        news, self._news = self._news, {}
        self._delivered += sum(len(delta.token_ids) for delta in news.values())
        return list(news.values())

    def stop(self, choice: int) -> None:
        self._news.pop(choice, None)
        if choice in self._open:
            self._open.remove(choice)
            self._cancel([choice])
        self._wake()

    async def aclose(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        """`aclose` without a wait."""
        self._news, self._error = {}, None
        self._close()

    def admit(self) -> None:
        """A choice runs, or has ended: the others will."""
        if not self.admitted.done():
            self.admitted.set_result(None)

    def push(self, choice: int, token_id: int) -> None:
        self._delta(choice).token_ids.append(token_id)

    def push_logprobs(self, choice: int, logprobs: Logprobs) -> None:
        delta = self._delta(choice)
        if delta.logprobs is None:
            delta.logprobs = logprobs
        else:
            delta.logprobs.extend(logprobs)

    def finish(self, choice: int, finish: Finish, queue_us: int, cached_prompt_tokens: int, preemptions: int) -> None:
        delta = self._delta(choice)
        delta.finish, delta.queue_us = finish, queue_us
        delta.cached_prompt_tokens, delta.preemptions = cached_prompt_tokens, preemptions
        self._open.discard(choice)
        self.admit()

    def fail(self, error: RequestError) -> None:
        """End the request: what was pushed before is still delivered, then the error is raised, once."""
        if not self.admitted.done():
            self.admitted.set_exception(error)
            self.admitted.exception()  # whoever asked may have left
        elif self._open:
            self._error = error
        self._close()

    def lose(self, why: str) -> None:
        """The backend is gone. Undelivered tokens of a request that delivered none are dropped: it can be retried."""
        if self._delivered:
            # What waits in the mailbox is taken before the error is met.
            tokens = self._delivered + sum(len(delta.token_ids) for delta in self._news.values())
            self.fail(EngineLost(f"{why}, after {tokens} tokens", metadata={"tokens_delivered": str(tokens)}))
        elif self._open:
            self._news = {}
            self.fail(EngineRestarting(f"{why}, before the first token"))

    def _delta(self, choice: int) -> TokenDelta:
        delta = self._news.get(choice)
        if delta is None:
            delta = self._news[choice] = TokenDelta(choice)
            self._wake()
        return delta

    def _close(self) -> None:
        cancelled, self._open = sorted(self._open), set()
        if cancelled:
            self._cancel(cancelled)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
