"""The seam between the gateway and whatever generates tokens."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from millrace.server.types import BackendInfo, EmbedderInfo, EmbedRequest, EngineStats, TokenDelta, TokenRequest


class TokenStream(Protocol):
    """A running request.

    Iterating yields lists of deltas, at most one for each choice: everything that is new since the last
    one was taken. News that arrives while nobody waits merges, so memory is bounded by the output itself
    and a slow reader gets fewer, longer deltas. Iteration ends after every choice has finished; it raises
    a `RequestError` when the request failed: `EngineRestarting` if no token was delivered, else
    `EngineLost`, when the backend died.
    """

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]: ...

    def stop(self, choice: int) -> None:
        """End one choice early; it yields nothing more, not even a finish. Idempotent."""

    async def aclose(self) -> None:
        """End every choice and free what they hold. Idempotent; safe at any time."""


class Backend(Protocol):
    """Something that generates. One instance belongs to one event loop."""

    async def generate(self, request: TokenRequest) -> TokenStream:
        """Return once the request runs; raise a `RequestError` if it is rejected, or turned away while it waits."""

    async def embed(self, request: EmbedRequest) -> Sequence[bytes]:
        """The vector of each text, little-endian float32; all or a `RequestError`. Cancelling frees what waits."""

    def embedder(self) -> EmbedderInfo:
        """Raise as `info` does, or `FeatureUnsupported` where nothing embeds."""

    def info(self) -> BackendInfo:
        """Raise `ModelLoading` (or `EngineRestarting`) while there is nothing to describe."""

    def stats(self) -> EngineStats:
        """The latest known; zeros before the first step."""

    def on_ready(self, callback: Callable[[bool], None]) -> None:
        """Call back with every change of readiness, and at once with the present one."""

    async def close(self) -> None:
        """End every stream and release everything. Idempotent."""
