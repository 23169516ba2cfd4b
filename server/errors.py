"""Every error that a caller or an operator can meet.

    MillraceError
    ├── RequestError                 a request cannot be served
    │   ├── InvalidRequest           FIELD_INVALID: a field is missing, malformed or out of range
    │   │   ├── PromptTooLong        PROMPT_TOO_LONG
    │   │   ├── FeatureUnsupported   FEATURE_UNSUPPORTED: this model or backend cannot do it
    │   │   ├── ExceedsKVCapacity    EXCEEDS_KV_CAPACITY: needs more KV blocks than exist
    │   │   ├── InvalidVector        INVALID_VECTOR: wrong dimension, not finite, or all zeros
    │   │   └── UnusableDocument     UNUSABLE_DOCUMENT: nothing of it was stored
    │   │       ├── EmptyDocument          EMPTY_DOCUMENT: no text in it
    │   │       ├── DocumentTooLarge       DOCUMENT_TOO_LARGE: bytes, pages or text beyond the limit
    │   │       ├── UnknownDocumentType    UNKNOWN_DOCUMENT_TYPE: binary, or no type that is read here
    │   │       ├── EncryptedDocument      ENCRYPTED_DOCUMENT: it needs a password
    │   │       └── DamagedDocument        DAMAGED_DOCUMENT: unreadable, or not within limits of time and memory
    │   ├── NotFound                 NOT_FOUND
    │   │   ├── ModelNotFound        MODEL_NOT_FOUND
    │   │   ├── CollectionNotFound   COLLECTION_NOT_FOUND
    │   │   └── DocumentNotFound     DOCUMENT_NOT_FOUND
    │   ├── RequestIdInUse           REQUEST_ID_IN_USE: another request of the tenant has this id
    │   ├── CannotContinue           CANNOT_CONTINUE: the answer would not be the one that was begun
    │   │   ├── ModelRevisionChanged MODEL_REVISION_CHANGED
    │   │   └── PromptChanged        PROMPT_CHANGED
    │   ├── Unauthenticated          UNAUTHENTICATED: no key, or not a valid one
    │   ├── PermissionDenied         PERMISSION_DENIED: a valid key that may not do this
    │   ├── Overloaded               OVERLOADED: come back later
    │   │   ├── QueueFull            QUEUE_FULL
    │   │   │   └── TenantQueueFull  TENANT_QUEUE_FULL: of this tenant
    │   │   ├── QueueTimeout         QUEUE_TIMEOUT: it did not run within its queue_timeout
    │   │   └── QuotaExceeded        QUOTA_EXCEEDED: the tenant's own limit
    │   ├── Unavailable              UNAVAILABLE: nothing was done; retry
    │   │   ├── ModelLoading         MODEL_LOADING
    │   │   ├── Draining             DRAINING: the server shuts down
    │   │   └── EngineRestarting     ENGINE_RESTARTING: the worker died before the first message
    │   ├── Aborted                  ABORTED: ended after the first message
    │   │   ├── EngineLost           ENGINE_LOST: the worker died
    │   │   ├── Drained              DRAINED: the server shut down
    │   │   └── SlowReader           SLOW_READER: the client does not read
    │   ├── DeadlineExceeded         DEADLINE_EXCEEDED
    │   │   └── DeadlineUnattainable DEADLINE_UNATTAINABLE: nothing was done, it would be late
    │   └── InternalError            INTERNAL: a bug; the caller sees an incident id, never the text
    ├── IndexDamaged                 an index image cannot be trusted; it is rebuilt, nobody outside sees this
    └── StartupError                 the process cannot start: one line that says what to do, exit status 1
        ├── ConfigError              a flag, a file or a variable is wrong
        ├── CheckpointError          a model directory cannot be read
        ├── NotEnoughMemory          weights or KV cache do not fit
        ├── MissingDependency        an optional package is needed; the text names the install command
        └── AddressInUse             the port or socket is taken

Plain Python: status numbers live at the edges (`server/api/status.py`), which map `reason`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class MillraceError(Exception):
    """Base of all. The message is written for the one who can act on it."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """`field` is a path such as `sampling.top_p` or `chat.messages[3].role`."""

    field: str
    description: str


class RequestError(MillraceError):
    """Carries `reason` (a stable word for machines) and `metadata` (every dynamic value of the message)."""

    reason = "REQUEST_ERROR"
    retry_after: float | None = None  # seconds; None: retrying does not help, or is the caller's choice

    def __init__(self, message: str, *, metadata: Mapping[str, str] | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        if retry_after is not None:
            self.retry_after = retry_after


class InvalidRequest(RequestError):
    reason = "FIELD_INVALID"

    def __init__(
        self, message: str, *, violations: Sequence[FieldViolation] = (), metadata: Mapping[str, str] | None = None
    ):
        super().__init__(message, metadata=metadata)
        self.violations = tuple(violations)

    @classmethod
    def at(cls, field: str, description: str, **metadata: str) -> "InvalidRequest":
        """An error of one field; works on every subclass."""
        return cls(f"{field}: {description}", violations=(FieldViolation(field, description),), metadata=metadata)


class PromptTooLong(InvalidRequest):
    reason = "PROMPT_TOO_LONG"


class FeatureUnsupported(InvalidRequest):
    reason = "FEATURE_UNSUPPORTED"


class ExceedsKVCapacity(InvalidRequest):
    reason = "EXCEEDS_KV_CAPACITY"


class InvalidVector(InvalidRequest):
    reason = "INVALID_VECTOR"


class UnusableDocument(InvalidRequest):
    reason = "UNUSABLE_DOCUMENT"


class EmptyDocument(UnusableDocument):
    reason = "EMPTY_DOCUMENT"


class DocumentTooLarge(UnusableDocument):
    reason = "DOCUMENT_TOO_LARGE"


class UnknownDocumentType(UnusableDocument):
    reason = "UNKNOWN_DOCUMENT_TYPE"


class EncryptedDocument(UnusableDocument):
    reason = "ENCRYPTED_DOCUMENT"


class DamagedDocument(UnusableDocument):
    reason = "DAMAGED_DOCUMENT"


class NotFound(RequestError):
    reason = "NOT_FOUND"

    def __init__(self, message: str, *, resource_type: str, resource_name: str):
        super().__init__(message, metadata={"resource_type": resource_type, "resource_name": resource_name})
        self.resource_type, self.resource_name = resource_type, resource_name


class ModelNotFound(NotFound):
    reason = "MODEL_NOT_FOUND"


class CollectionNotFound(NotFound):
    reason = "COLLECTION_NOT_FOUND"


class DocumentNotFound(NotFound):
    reason = "DOCUMENT_NOT_FOUND"


class RequestIdInUse(RequestError):
    reason = "REQUEST_ID_IN_USE"


class CannotContinue(RequestError):
    reason = "CANNOT_CONTINUE"


class ModelRevisionChanged(CannotContinue):
    reason = "MODEL_REVISION_CHANGED"


class PromptChanged(CannotContinue):
    reason = "PROMPT_CHANGED"


class Unauthenticated(RequestError):
    reason = "UNAUTHENTICATED"


class PermissionDenied(RequestError):
    reason = "PERMISSION_DENIED"


class Overloaded(RequestError):
    reason = "OVERLOADED"
    retry_after = 1.0


class QueueFull(Overloaded):
    reason = "QUEUE_FULL"


class TenantQueueFull(QueueFull):
    reason = "TENANT_QUEUE_FULL"


class QueueTimeout(Overloaded):
    reason = "QUEUE_TIMEOUT"


class QuotaExceeded(Overloaded):
    reason = "QUOTA_EXCEEDED"


class Unavailable(RequestError):
    reason = "UNAVAILABLE"
    retry_after = 0.0


class ModelLoading(Unavailable):
    reason = "MODEL_LOADING"
    retry_after = 1.0


class Draining(Unavailable):
    reason = "DRAINING"


class EngineRestarting(Unavailable):
    reason = "ENGINE_RESTARTING"
    retry_after = 1.0


class Aborted(RequestError):
    reason = "ABORTED"


class EngineLost(Aborted):
    reason = "ENGINE_LOST"


class Drained(Aborted):
    reason = "DRAINED"


class SlowReader(Aborted):
    reason = "SLOW_READER"


class DeadlineExceeded(RequestError):
    reason = "DEADLINE_EXCEEDED"


class DeadlineUnattainable(DeadlineExceeded):
    reason = "DEADLINE_UNATTAINABLE"
    retry_after = 1.0


class InternalError(RequestError):
    reason = "INTERNAL"


class IndexDamaged(MillraceError):
    pass


class StartupError(MillraceError):
    pass


class ConfigError(StartupError):
    pass


class CheckpointError(StartupError):
    pass


class NotEnoughMemory(StartupError):
    pass


class MissingDependency(StartupError):
    pass


class AddressInUse(StartupError):
    pass


def _leaves(cls: type[RequestError]) -> dict[str, type[RequestError]]:
    found = {cls.reason: cls}
    for child in cls.__subclasses__():
        found |= _leaves(child)
    return found


def from_reason(reason: str, message: str, metadata: Mapping[str, str] | None = None) -> RequestError:
    """Rebuild an error that crossed the engine link; an unknown reason is an InternalError."""
    cls = _leaves(RequestError).get(reason, InternalError)
    if issubclass(cls, NotFound):
        known = metadata or {}
        return cls(message, resource_type=known.get("resource_type", ""), resource_name=known.get("resource_name", ""))
    return cls(message, metadata=metadata)
