"""From a gRPC status back to the error that the server raised."""

import re
from typing import TypeVar, cast

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from millrace.server.errors import (
    Aborted,
    DeadlineExceeded,
    FeatureUnsupported,
    FieldViolation,
    InternalError,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    RequestError,
    Unauthenticated,
    Unavailable,
    from_reason,
)

Detail = TypeVar("Detail", bound=Message)

# What gRPC itself says, without any details of ours.
BARE: dict[grpc.StatusCode, type[RequestError]] = {
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.CANCELLED: Aborted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.UNIMPLEMENTED: FeatureUnsupported,
}


# The server's transport, before our code sees the request: no overload, and no other attempt helps.
TOO_LARGE = re.compile(r"(?<!CLIENT: )Received message larger than max \((\d+) vs\. (\d+)\)")


def request_error(failure: grpc.RpcError, target: str) -> RequestError:
    """Rebuild what the server raised, violations and retry delay included."""
    call = cast(grpc.Call, failure)  # every failure of a call is one, of grpc.aio too
    status = rpc_status.from_call(call)
    if status is None:
        return _bare(call, target)
    info = _detail(status, error_details_pb2.ErrorInfo())
    if info is None:
        return _bare(call, target)
    error = from_reason(info.reason, status.message, dict(info.metadata))
    request = _detail(status, error_details_pb2.BadRequest())
    if request is not None and isinstance(error, InvalidRequest):
        error.violations = tuple(FieldViolation(v.field, v.description) for v in request.field_violations)
    retry = _detail(status, error_details_pb2.RetryInfo())
    if retry is not None:
        error.retry_after = retry.retry_delay.ToTimedelta().total_seconds()
    return error


def _bare(call: grpc.Call, target: str) -> RequestError:
    code, details = call.code(), call.details() or "no details"
    if code is grpc.StatusCode.UNAVAILABLE:
        cause = details.rpartition(": ")[2]  # the rest is gRPC's own story
        return Unavailable(f"no server at {target} ({cause}); start one with `millrace serve`")
    if too_large := TOO_LARGE.search(details):
        size, limit = too_large.groups()
        text = f"has {size} bytes, but ModelLimits.max_request_bytes of this server is {limit}; send a shorter prompt"
        return InvalidRequest.at("request", text, bytes=size, max_request_bytes=limit)
    return BARE.get(code, InternalError)(details)


def _detail(status: status_pb2.Status, into: Detail) -> Detail | None:
    return next((into for packed in status.details if packed.Unpack(into)), None)
