"""One answer in the making: what was asked, how far it has come, and the words for its news."""

from collections import abc
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from millrace.server.engine.prefixes import Chain
from millrace.server.engine.tenants import Tenant
from millrace.server.errors import RequestError
from millrace.server.types import CachePolicy, FinishReason, Priority, Sampling


@dataclass(frozen=True, slots=True, eq=False)
class SequenceRequest:
    """One choice of one request. `sequence_id` is the caller's, never reused; ids are below the vocabulary size.

    The times count from submission, in microseconds; None: no such limit. `queue_timeout_us`: it is turned away if it
    does not run by then; `time_limit_us`: it ends there with what it has; `deadline_us`: an answer is of no use later.
    """

    sequence_id: int
    request_id: str
    tenant: str
    prompt_ids: abc.Sequence[int]
    sampling: Sampling
    choice: int
    max_output_tokens: int
    min_output_tokens: int = 0  # no stop token before this many
    stop_token_ids: frozenset[int] = frozenset()
    logprobs_top_n: int | None = None  # None: no log-probabilities
    priority: Priority = Priority.NORMAL
    tenant_weight: float = 1.0
    queue_timeout_us: int | None = None
    time_limit_us: int | None = None
    deadline_us: int | None = None
    cache: CachePolicy = field(default_factory=CachePolicy)
    watched: bool = False  # its text may end it at any token
    output_ids: abc.Sequence[int] = ()  # that it has already: it goes on after them
    resumes: bool = False  # it ran before, on a worker that died


class SequenceToken(NamedTuple):
    """A token that a sequence yielded; natural logarithms, the most likely first."""

    sequence_id: int
    token_id: int
    logprob: float | None = None  # None: not asked for
    top_ids: abc.Sequence[int] = ()
    top_logprobs: abc.Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class SequenceFinished:
    """The last word of a sequence: a reason, or the error that ended it. A cancelled sequence has none.

    `started`: it, or another choice of its request, ran.
    """

    sequence_id: int
    reason: FinishReason | None
    stop_token_id: int | None = None
    error: RequestError | None = None
    queue_us: int = 0
    preemptions: int = 0
    cached_prompt_tokens: int = 0
    started: bool = True


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Group:
    """The sequences of one request, which are queued together and turned away together."""

    def __init__(self) -> None:
        self.members: list[Sequence] = []
        self.held: list[Sequence] = []  # until another one has computed the prompt
        self.started = False  # one of them ran
        self.was_misjudged = False  # it may wait, so it was said, and came too late


@dataclass(slots=True, eq=False)
class Sequence:
    """State of a sequence. Its lengths, in tokens:

        scheduled < length <= limit,    length = prompt_len + len(output) + pending

    `scheduled` tokens have KV, or will have it when the steps in flight are done; `pending` tokens are being
    sampled by those steps; at `limit` the sequence ends, so its last token never needs KV.
    """

    request: SequenceRequest
    tenant: Tenant
    group: Group
    arrival: int
    arrival_us: int
    prompt_len: int
    limit: int
    length: int
    rank: int  # class of priority, 0 the first; waiting improves it
    status: Status = Status.WAITING
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    scheduled: int = 0
    computed: int = 0  # those of them whose steps are done
    capacity: int = 0  # tokens that its blocks hold
    milestone: int = 0  # tokens after which others may find a block, or its prompt
    pending: int = 0
    in_flight: int = 0  # rows of steps that are not collected
    source: tuple[int, int] = (0, 0)  # step and row that sample the newest pending token
    lane: int = -1  # index among the running
    queue_us: int | None = None  # None: never served
    announced: bool = False  # that it runs
    preemptions: int = 0
    charged: int = 0  # how far it was ever computed: before that, nothing costs anything again
    expected_output: int = 0  # tokens that the queue reckons with
    cached_prompt_tokens: int = 0  # found when it was first served
    chain: Chain | None = None  # None: its blocks are not shared
    published: int = 0  # its first blocks that others may find
    last_prefix: int | None = 0  # serial of the last of them; None: what follows cannot be found

    def extend_chain(self, chain: Chain, full: int) -> None:
        """Name the first `full` blocks, whose tokens are all known."""
        start, end = len(chain) * chain.block_size, full * chain.block_size
        if start < end:
            prompt, output = self.request.prompt_ids[start:end], self.output[max(0, start - self.prompt_len) :]
            chain.extend([*prompt, *output][: end - start])

    @property
    def donor(self) -> "Sequence | None":
        """Another choice that runs and has the keys and values of the prompt, for one that has not begun."""
        if self.output or self.pending:
            return None
        return next((s for s in self.group.members if s.status is Status.RUNNING and s.computed >= s.prompt_len), None)

    @property
    def least_output(self) -> int:
        """Tokens that it yields at least, whatever they are."""
        ends_by_itself = self.request.stop_token_ids or self.request.watched
        least = self.request.min_output_tokens if ends_by_itself else self.limit - self.prompt_len
        return max(1, least - len(self.output))

    @property
    def due_us(self) -> int | None:
        """When its answer is of no use any more."""
        deadline_us = self.request.deadline_us
        return None if deadline_us is None else self.arrival_us + deadline_us

    @property
    def end_us(self) -> int | None:
        """When it is over, however far it has come."""
        request = self.request
        waits = None if self.group.started else request.queue_timeout_us
        ends = [t for t in (waits, request.time_limit_us, request.deadline_us) if t is not None]
        return self.arrival_us + min(ends) if ends else None

    @property
    def needs_history(self) -> bool:
        """Whether sampling looks at the tokens so far."""
        s = self.request.sampling
        return s.presence_penalty != 0 or s.frequency_penalty != 0 or s.repetition_penalty != 1

    def finished(
        self, reason: FinishReason | None, stop_token_id: int | None = None, error: RequestError | None = None
    ) -> SequenceFinished:
        return SequenceFinished(
            self.request.sequence_id,
            reason,
            stop_token_id,
            error,
            self.queue_us or 0,
            self.preemptions,
            self.cached_prompt_tokens,
            self.group.started,
        )

    def check(self) -> None:
        """Raise AssertionError unless the lengths agree."""
        known = self.prompt_len + len(self.output)
        if not (0 <= self.scheduled < self.length <= self.limit and self.length == known + self.pending):
            raise AssertionError(f"lengths of sequence {self.request.sequence_id} disagree: {self}")
