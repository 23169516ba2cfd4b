"""The words of the gateway and its backends. Standard library and the words of retrieval only.

A request passes through as `GenerateRequest` (text level, what a client asked for) and then as
`TokenRequest` (token level, what a backend runs); answers come back as `TokenDelta`s and leave the
gateway as `Started`, `Delta`s and `Completed`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from types import MappingProxyType

from millrace.retrieval.types import Filter, Hit, SearchMode

EMPTY: Mapping[int, float] = MappingProxyType({})


class Role(Enum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class FinishReason(Enum):
    STOP = "stop"
    STOP_SEQUENCE = "stop_sequence"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LENGTH = "context_length"
    TIME_LIMIT = "time_limit"
    NO_SUPPORT = "no_support"


class AnswerMode(Enum):
    """How a question to documents is answered: the model writes, or sentences are quoted."""

    GENERATIVE = "generative"
    EXTRACTIVE = "extractive"


class Priority(IntEnum):
    """Classes of service; a lesser one is served first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """What a request may find in the prefix cache, and what others of its tenant may find of it.

    Only requests of equal `salt` share; the tenant is always part of it.
    """

    read: bool = True
    write: bool = True
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, decided from the headers before a body is read.

    `weight`: the tenant's share of the engine relative to others. `highest`: the class of service it may use.
    `deadline`: of the call, in seconds on the monotonic clock; None: it has none.
    """

    tenant: str
    key_id: str = ""
    weight: float = field(default=1.0, compare=False)
    highest: Priority = field(default=Priority.HIGH, compare=False)
    deadline: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    messages: Sequence[Message]
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
    add_generation_prompt: bool = True


@dataclass(frozen=True, slots=True)
class Sampling:
    """Effective sampling parameters: nothing is unset. Ranges: generation.proto."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: EMPTY)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a client set; None is unset and means the model's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=lambda: EMPTY)


@dataclass(frozen=True, slots=True)
class StoppingCriteria:
    max_output_tokens: int | None = None
    min_output_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    time_limit: float | None = None  # seconds
    truncate_prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class OutputOptions:
    text: bool = True
    token_ids: bool = False
    logprobs_top_n: int | None = None  # None: no log-probabilities at all
    prompt_token_ids: bool = False
    continuous_usage: bool = False
    max_tokens_per_message: int | None = None


@dataclass(frozen=True, slots=True)
class RetrievalOptions:
    """Answer from documents. None is unset; ranges and defaults: generation.proto."""

    collection: str
    query: str = ""
    top_k: int | None = None
    candidates: int | None = None
    filter: Filter = ()
    mode: SearchMode = SearchMode.HYBRID
    max_context_tokens: int | None = None
    answer_mode: AnswerMode | None = None
    min_support: float | None = None
    max_sentences: int | None = None


@dataclass(frozen=True, slots=True)
class ReceivedChoice:
    """What a client has of a choice. `text_bytes` may go beyond the text of its tokens."""

    token_ids: tuple[int, ...] = ()
    text_bytes: int = 0
    finished: bool = False


@dataclass(frozen=True, slots=True)
class ContinueFrom:
    """What a client has of an answer: `model_revision` and `prompt_digest` of its Started, choices of which it has
    something."""

    model_revision: str
    prompt_digest: str
    choices: Mapping[int, ReceivedChoice] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What a client asked for; `prompt` is text, token ids or a conversation.

    `retrieval` None: from the model alone. `mask_pii`: personal data in prompt and answer is masked. `queue_timeout`:
    seconds. `digest`: where there is a request_id, of all that was asked for.
    """

    model: str
    prompt: str | tuple[int, ...] | ChatPrompt
    sampling: SamplingParams = SamplingParams()
    stopping: StoppingCriteria = StoppingCriteria()
    output: OutputOptions = OutputOptions()
    request_id: str = ""
    digest: bytes = b""
    labels: Mapping[str, str] = field(default_factory=dict)
    retrieval: RetrievalOptions | None = None
    mask_pii: bool = False
    priority: Priority = Priority.NORMAL
    queue_timeout: float | None = None
    cache: CachePolicy = field(default_factory=CachePolicy)
    continue_from: ContinueFrom | None = None


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts for a backend to embed, as ids of the embedding model, special tokens included.

    `background` ones wait behind every other.
    """

    request_id: str
    tenant: str
    texts: Sequence[Sequence[int]]
    background: bool = False


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What a backend runs: one prompt, `n` choices. Times are seconds from submission; None: no such limit.

    `outputs`: the choices that go on, and the tokens that each has already; None: all of them begin.
    """

    request_id: str
    tenant: str
    prompt_ids: Sequence[int]
    sampling: Sampling
    max_output_tokens: int
    n: int = 1
    min_output_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    logprobs_top_n: int | None = None
    outputs: Mapping[int, Sequence[int]] | None = None
    watched: bool = False  # its text may end it at any token: a stop string
    priority: Priority = Priority.NORMAL
    tenant_weight: float = 1.0
    queue_timeout: float | None = None
    time_limit: float | None = None
    deadline: float | None = None
    cache: CachePolicy = field(default_factory=CachePolicy)
    resumes: bool = False  # it ran before, on a worker that died

    @property
    def choices(self) -> Sequence[int]:
        return range(self.n) if self.outputs is None else list(self.outputs)


@dataclass(slots=True)
class Logprobs:
    """Natural logarithms, one entry per token; `top_*` hold `top_n` entries per token, most likely first."""

    top_n: int
    sampled: list[float] = field(default_factory=list)
    top_token_ids: list[int] = field(default_factory=list)
    top_logprobs: list[float] = field(default_factory=list)

    def extend(self, other: "Logprobs") -> None:
        self.sampled += other.sampled
        self.top_token_ids += other.top_token_ids
        self.top_logprobs += other.top_logprobs

    def take(self, count: int) -> "Logprobs":
        """Split off the first `count` tokens."""
        k = count * self.top_n
        head = Logprobs(self.top_n, self.sampled[:count], self.top_token_ids[:k], self.top_logprobs[:k])
        del self.sampled[:count], self.top_token_ids[:k], self.top_logprobs[:k]
        return head


@dataclass(frozen=True, slots=True)
class Finish:
    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(slots=True)
class TokenDelta:
    """News of one choice from a backend. `finish` is set on its last delta.

    A stop token that ended the choice is the last of `token_ids`.
    """

    choice: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    finish: Finish | None = None
    queue_us: int = 0
    cached_prompt_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    embedding_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Microseconds on the monotonic clock."""

    queue_us: int = 0
    time_to_first_token_us: int = 0
    total_us: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """A retrieved chunk under the number, from 1, by which markers in the answer name it."""

    number: int
    hit: Hit


@dataclass(frozen=True, slots=True)
class Started:
    """`sources`, `answer_mode` and, in generative mode, `max_context_tokens` are set with retrieval."""

    request_id: str
    model: str
    model_revision: str
    sampling: Sampling
    n: int
    prompt_ids: Sequence[int] | None
    usage: Usage
    max_output_tokens: int
    priority: Priority = Priority.NORMAL
    sources: tuple[Source, ...] = ()
    answer_mode: AnswerMode | None = None
    max_context_tokens: int | None = None
    prompt_digest: str = ""


@dataclass(slots=True)
class ChoiceDelta:
    """News of one choice for a client. `token_offset`: tokens of the choice sent before, by calls that this one
    continues too."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    finish: Finish | None = None
    token_offset: int = 0


@dataclass(slots=True)
class Deltas:
    choices: list[ChoiceDelta]
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Citation:
    """Bytes [text_start, text_end) of a choice's text stand on bytes [byte_start, byte_end) of a document's.

    `score`: support in [0, 1]. What the bytes are in each answer mode: generation.proto.
    """

    choice: int
    source_number: int
    source: str
    document_id: str
    chunk_id: str
    byte_start: int
    byte_end: int
    score: float
    text_start: int
    text_end: int
    page: int | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    usage: Usage
    timings: Timings


GenerateEvent = Started | Deltas | Citation | Completed


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What a backend runs; counts are tokens and blocks."""

    fingerprint: str
    executor: str
    architecture: str
    parameters: int
    vocab_size: int
    max_model_len: int
    kv_block_size: int
    kv_total_blocks: int
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    checkpoint_digest: str = ""


@dataclass(frozen=True, slots=True)
class EmbedderInfo:
    """What turns texts into vectors. `max_tokens` counts the special tokens that the tokenizer adds.

    `revision`: hex SHA-256 over weights, configuration, pooling and tokenizer; vectors of equal revisions compare.
    """

    name: str
    revision: str
    dimensions: int
    max_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """State of an engine after a step."""

    step: int = 0
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    step_us: int = 0
    preemptions_total: int = 0
