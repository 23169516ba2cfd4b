"""The one table from errors to gRPC status, and the details that come with one.

Every status carries exactly one ErrorInfo; which other detail follows from the error. Packed details stay
under 4 KiB: gRPC peers may drop metadata above 8 KiB.
"""

import secrets
from dataclasses import dataclass

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from millrace.server.errors import InternalError, InvalidRequest, NotFound, QuotaExceeded, RequestError

DOMAIN = "millrace"
RETRIED = (StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED)  # by clients, without being told to
MAX_DETAILS_BYTES = 4095
MAX_MESSAGE = 512  # bytes
MAX_VALUE = 160  # bytes of any other text
PACKING = 64  # bytes around a packed BadRequest

CODES = {
    "REQUEST_ERROR": StatusCode.INTERNAL,
    "FIELD_INVALID": StatusCode.INVALID_ARGUMENT,
    "PROMPT_TOO_LONG": StatusCode.INVALID_ARGUMENT,
    "FEATURE_UNSUPPORTED": StatusCode.INVALID_ARGUMENT,
    "EXCEEDS_KV_CAPACITY": StatusCode.INVALID_ARGUMENT,
    "INVALID_VECTOR": StatusCode.INVALID_ARGUMENT,
    "UNUSABLE_DOCUMENT": StatusCode.INVALID_ARGUMENT,
    "EMPTY_DOCUMENT": StatusCode.INVALID_ARGUMENT,
    "DOCUMENT_TOO_LARGE": StatusCode.INVALID_ARGUMENT,
    "UNKNOWN_DOCUMENT_TYPE": StatusCode.INVALID_ARGUMENT,
    "ENCRYPTED_DOCUMENT": StatusCode.INVALID_ARGUMENT,
    "DAMAGED_DOCUMENT": StatusCode.INVALID_ARGUMENT,
    "NOT_FOUND": StatusCode.NOT_FOUND,
    "COLLECTION_NOT_FOUND": StatusCode.NOT_FOUND,
    "DOCUMENT_NOT_FOUND": StatusCode.NOT_FOUND,
    "MODEL_NOT_FOUND": StatusCode.NOT_FOUND,
    "REQUEST_ID_IN_USE": StatusCode.ALREADY_EXISTS,
    "CANNOT_CONTINUE": StatusCode.FAILED_PRECONDITION,
    "MODEL_REVISION_CHANGED": StatusCode.FAILED_PRECONDITION,
    "PROMPT_CHANGED": StatusCode.FAILED_PRECONDITION,
    "UNAUTHENTICATED": StatusCode.UNAUTHENTICATED,
    "PERMISSION_DENIED": StatusCode.PERMISSION_DENIED,
    "OVERLOADED": StatusCode.RESOURCE_EXHAUSTED,
    "QUEUE_FULL": StatusCode.RESOURCE_EXHAUSTED,
    "TENANT_QUEUE_FULL": StatusCode.RESOURCE_EXHAUSTED,
    "QUEUE_TIMEOUT": StatusCode.RESOURCE_EXHAUSTED,
    "QUOTA_EXCEEDED": StatusCode.RESOURCE_EXHAUSTED,
    "UNAVAILABLE": StatusCode.UNAVAILABLE,
    "MODEL_LOADING": StatusCode.UNAVAILABLE,
    "DRAINING": StatusCode.UNAVAILABLE,
    "ENGINE_RESTARTING": StatusCode.UNAVAILABLE,
    "ABORTED": StatusCode.ABORTED,
    "ENGINE_LOST": StatusCode.ABORTED,
    "DRAINED": StatusCode.ABORTED,
    "SLOW_READER": StatusCode.ABORTED,
    "DEADLINE_EXCEEDED": StatusCode.DEADLINE_EXCEEDED,
    "DEADLINE_UNATTAINABLE": StatusCode.DEADLINE_EXCEEDED,
    "INTERNAL": StatusCode.INTERNAL,
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A status as `ServicerContext.abort` takes it."""

    code: StatusCode
    reason: str
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def public(error: Exception) -> RequestError:
    """The error that a client may see: an unforeseen one becomes InternalError with an incident id alone."""
    if isinstance(error, RequestError) and CODES.get(error.reason, StatusCode.INTERNAL) != StatusCode.INTERNAL:
        return error
    incident = secrets.token_hex(6)
    return InternalError(
        f"internal error; the server's log has more under incident {incident}", metadata={"incident_id": incident}
    )


def failure(error: RequestError) -> Failure:
    """Render an error. It must be fit for clients, see `public`."""
    code = CODES[error.reason]
    message = _cut(error.message, MAX_MESSAGE)
    metadata = {_cut(key, 64): _cut(value, MAX_VALUE) for key, value in list(error.metadata.items())[:8]}
    status = Status(code=code.value[0], message=message)
    status.details.append(_pack(details_pb.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)))
    status.details.extend(map(_pack, _specific(error, message)))
    if isinstance(error, InvalidRequest) and error.violations:
        status.details.append(_pack(_bad_request(error, MAX_DETAILS_BYTES - status.ByteSize() - PACKING)))
    trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", status.SerializeToString())]
    if isinstance(error, QuotaExceeded):
        trailers.append(("grpc-retry-pushback-ms", "-1"))  # forbids the retry (gRFC A6)
    elif error.retry_after is not None and code in RETRIED:
        # Never 0: gRPC core 1.85 neither retries nor ends a call that is pushed back by nothing.
        trailers.append(("grpc-retry-pushback-ms", str(max(1, round(1000 * error.retry_after)))))
    return Failure(code, error.reason, message, tuple(trailers))


def _specific(error: RequestError, message: str) -> list[Message]:
    found: list[Message] = []
    if isinstance(error, NotFound):
        name = _cut(error.resource_name, MAX_VALUE)
        found.append(
            details_pb.ResourceInfo(resource_type=error.resource_type, resource_name=name, description=message)
        )
    if isinstance(error, QuotaExceeded):
        violation = details_pb.QuotaFailure.Violation(subject=error.metadata.get("tenant", ""), description=message)
        found.append(details_pb.QuotaFailure(violations=[violation]))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromMilliseconds(round(1000 * error.retry_after))
        found.append(details_pb.RetryInfo(retry_delay=delay))
    return found


def _bad_request(error: InvalidRequest, room: int) -> details_pb.BadRequest:
    """The first violations, as many as fit `room` bytes; the message says how many there are."""
    bad = details_pb.BadRequest()
    for violation in error.violations:
        bad.field_violations.add(
            field=_cut(violation.field, MAX_VALUE), description=_cut(violation.description, MAX_VALUE)
        )
        if bad.ByteSize() > room:
            del bad.field_violations[-1]
            break
    return bad


def _pack(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed


def _cut(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8, whole code points."""
    raw = text.encode("utf-8", "replace")
    return text if len(raw) <= limit else raw[: limit - 3].decode("utf-8", "ignore") + "…"
