"""Every error of the tree has one code, complete details, and never more of them than metadata may hold."""

import re

import grpc
import pytest
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from millrace.server import errors
from millrace.server.api.status import CODES, MAX_DETAILS_BYTES, failure, public
from millrace.server.errors import FieldViolation, InvalidRequest, NotFound, QuotaExceeded, RequestError


def tree(cls: type[RequestError] = RequestError) -> list[type[RequestError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in tree(child))]


def make(cls: type[RequestError], message: str = "text") -> RequestError:
    if issubclass(cls, NotFound):
        return cls(message, resource_type="thing", resource_name="x")
    return cls(message)


def details(error: RequestError) -> dict[str, object]:
    status = Status.FromString(dict(failure(error).trailing_metadata)["grpc-status-details-bin"])
    found = {}
    for packed in status.details:
        message = getattr(error_details_pb2, packed.type_url.rpartition(".")[2])()
        assert packed.Unpack(message)
        assert type(message).__name__ not in found
        found[type(message).__name__] = message
    return found


def test_the_table_holds_every_error_and_no_other() -> None:
    assert {cls.reason for cls in tree()} == set(CODES)
    documented = set(re.findall(r" ([A-Z_]{4,})(?::|$)", errors.__doc__ or "", re.MULTILINE))
    assert documented == set(CODES) - {"REQUEST_ERROR"}


@pytest.mark.parametrize("cls", tree(), ids=lambda cls: cls.__name__)
def test_each_error_has_its_details(cls: type[RequestError]) -> None:
    error = make(cls)
    found = details(error)
    assert found["ErrorInfo"].reason == cls.reason
    assert found["ErrorInfo"].domain == "millrace"
    assert ("RetryInfo" in found) == (cls.retry_after is not None)
    assert ("ResourceInfo" in found) == issubclass(cls, NotFound)
    assert ("QuotaFailure" in found) == issubclass(cls, QuotaExceeded)
    code = failure(error).code
    pushback = dict(failure(error).trailing_metadata).get("grpc-retry-pushback-ms")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        assert pushback is not None
        assert int(pushback) != 0, "a client that is pushed back by 0 waits for ever"
        assert (int(pushback) < 0) == issubclass(cls, QuotaExceeded)
    else:
        assert pushback is None


def test_violations_are_reported() -> None:
    found = details(InvalidRequest("two", violations=[FieldViolation("a.b", "bad"), FieldViolation("c", "worse")]))
    assert [(v.field, v.description) for v in found["BadRequest"].field_violations] == [("a.b", "bad"), ("c", "worse")]


@pytest.mark.parametrize("letter", ["x", "é", "😀", "\ud800"])
@pytest.mark.parametrize("cls", tree(), ids=lambda cls: cls.__name__)
def test_details_stay_small_whatever_the_texts(cls: type[RequestError], letter: str) -> None:
    error = make(cls, letter * 50_000)
    error.metadata |= {f"key{i}" + letter * 1000: letter * 5000 for i in range(50)}
    if isinstance(error, InvalidRequest):
        error.violations = tuple(FieldViolation(letter * 3000, letter * 3000) for _ in range(100))
    if isinstance(error, NotFound):
        error.resource_name = letter * 9000
    packed = dict(failure(error).trailing_metadata)["grpc-status-details-bin"]
    assert len(packed) <= MAX_DETAILS_BYTES
    assert details(error)["ErrorInfo"].reason == cls.reason
    if isinstance(error, InvalidRequest):
        assert len(details(error)["BadRequest"].field_violations) >= 1
    assert len(failure(error).message.encode()) <= 512


@pytest.mark.parametrize("error", [ValueError("secret"), errors.InternalError("secret"), RequestError("secret")])
def test_internal_text_stays_inside(error: Exception) -> None:
    seen = public(error)
    shown = failure(seen)
    assert shown.code == grpc.StatusCode.INTERNAL
    assert "secret" not in shown.message + str(shown.trailing_metadata)
    incident = details(seen)["ErrorInfo"].metadata["incident_id"]
    assert incident in shown.message


def test_other_errors_pass_as_they_are() -> None:
    error = errors.QueueFull("full")
    assert public(error) is error
