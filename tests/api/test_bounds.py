"""Every bound that the protos declare holds at its edges, and every request field declares one."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message_factory import GetMessageClass

from millrace.server.api import bounds
from millrace.server.errors import InvalidRequest
from millrace.v1 import embedding_pb2, model_pb2, retrieval_pb2, tokenizer_pb2
from millrace.v1 import generation_pb2 as pb

FILES = tuple(file.DESCRIPTOR for file in (pb, model_pb2, tokenizer_pb2, retrieval_pb2, embedding_pb2))
REALS = (Field.CPPTYPE_FLOAT, Field.CPPTYPE_DOUBLE)


def requests() -> Iterator:
    """Every message that a client can send, nested ones included."""
    waiting = [m.input_type for file in FILES for s in file.services_by_name.values() for m in s.methods]
    seen = set()
    while waiting:
        message = waiting.pop()
        if message.full_name not in seen and message.file.package == "millrace.v1":
            seen.add(message.full_name)
            yield message
            waiting += [f.message_type for f in message.fields if f.message_type and not bounds._is_map(f)]


FIELDS = [field for message in requests() for field in message.fields]


def named(field) -> str:
    return f"{field.containing_type.name}.{field.name}"


@pytest.mark.parametrize("field", FIELDS, ids=named)
def test_every_field_declares_its_bounds(field) -> None:
    declared = bounds.bounds_of(field)
    if field.is_repeated:
        assert declared.max_items, "entries without a bound"
    if bounds._is_map(field):
        values = field.message_type.fields_by_name["value"]
    else:
        values = field
    if values.cpp_type == Field.CPPTYPE_STRING:
        assert declared.max_bytes, "bytes without a bound"
    elif values.message_type and values.message_type.file.package != "millrace.v1":
        assert declared.max_bytes or declared.HasField("maximum"), "a foreign message without a bound"
    elif values.message_type or values.cpp_type in (Field.CPPTYPE_BOOL, Field.CPPTYPE_ENUM):
        pass
    elif not field.is_repeated:
        assert declared.HasField("minimum") or declared.HasField("maximum"), "a number without a bound"


def wrong_fields(message) -> set[str]:
    return {v.field for v in bounds.violations(message)}


def message_with(field, value):
    message = GetMessageClass(field.containing_type)()
    if field.message_type:
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)
    return message


def numbers(field, declared) -> Iterator[tuple[object, bool]]:
    """Values at and just outside the edges, and whether each is accepted. float32 where the field is."""
    is_real = field.cpp_type in REALS

    def step(value: float, direction: int) -> float:
        return (
            float(np.nextafter(np.float32(value), np.float32(direction * math.inf))) if is_real else value + direction
        )

    def make(value: float) -> float | int:
        return value if is_real else int(value)

    if declared.HasField("minimum"):
        low = declared.minimum
        yield make(low), not declared.exclusive_minimum
        yield make(step(low, 1)), True
        if is_real or low > 0 or field.cpp_type in (Field.CPPTYPE_INT32, Field.CPPTYPE_INT64):
            yield make(step(low, -1)), False
    if declared.HasField("maximum"):
        yield make(declared.maximum), True
        yield make(step(declared.maximum, 1)), False
    if is_real:
        yield from ((x, False) for x in (math.nan, math.inf, -math.inf, 3e38))


SCALARS = [f for f in FIELDS if not f.is_repeated and f.cpp_type not in (Field.CPPTYPE_BOOL, Field.CPPTYPE_ENUM)]


@pytest.mark.parametrize(
    "field", [f for f in SCALARS if not f.message_type and f.cpp_type != Field.CPPTYPE_STRING], ids=named
)
def test_numbers_at_their_edges(field) -> None:
    cases = list(numbers(field, bounds.bounds_of(field)))
    assert cases
    for value, accepted in cases:
        assert (field.name in wrong_fields(message_with(field, value))) is not accepted, value


@pytest.mark.parametrize("field", [f for f in SCALARS if f.cpp_type == Field.CPPTYPE_STRING], ids=named)
def test_lengths_at_their_edges(field) -> None:
    declared = bounds.bounds_of(field)
    make = (lambda n: b"a" * n) if field.type == Field.TYPE_BYTES else (lambda n: "a" * n)
    for size in {declared.min_bytes, declared.max_bytes, declared.max_bytes + 1, max(declared.min_bytes - 1, 0)}:
        is_set = size > 0 or field.has_presence
        wrong = not declared.min_bytes <= size <= declared.max_bytes if is_set else declared.required
        assert (field.name in wrong_fields(message_with(field, make(size)))) is wrong, size
    if field.type != Field.TYPE_BYTES:
        wide = "é" * (declared.max_bytes // 2 + 1)
        assert field.name in wrong_fields(message_with(field, wide)), "bytes are counted, not characters"


@pytest.mark.parametrize("field", [f for f in FIELDS if f.is_repeated], ids=named)
def test_entries_at_their_edges(field) -> None:
    declared = bounds.bounds_of(field)
    for count in {declared.max_items, declared.max_items + 1}:
        message = GetMessageClass(field.containing_type)()
        entries = getattr(message, field.name)
        if bounds._is_map(field):
            keys = field.message_type.fields_by_name["key"]
            for i in range(count):
                entries[str(i) if keys.cpp_type == Field.CPPTYPE_STRING else i]  # creates the entry
        elif field.message_type:
            for _ in range(count):
                entries.add()
        else:
            entries.extend([("a" if field.cpp_type == Field.CPPTYPE_STRING else 1)] * count)
        assert (field.name in wrong_fields(message)) is (count > declared.max_items)


def test_a_message_of_defaults_violates_nothing_but_what_is_required() -> None:
    for descriptor in requests():
        plan = bounds.plan_of(descriptor)
        assert wrong_fields(GetMessageClass(descriptor)()) == set(plan.required)


def test_durations_of_every_kind() -> None:
    field = pb.StoppingCriteria.DESCRIPTOR.fields_by_name["time_limit"]
    for seconds, nanos, accepted in (
        (0, 0, False),
        (0, 1, True),
        (86400, 0, True),
        (86400, 1, False),
        (-1, 0, False),
        (1, -5, False),
        (5, 10**9, False),
        (2**62, 0, False),
    ):
        message = message_with(field, Duration(seconds=seconds, nanos=nanos))
        assert (wrong_fields(message) == set()) is accepted, (seconds, nanos)


def test_paths_lead_to_the_field() -> None:
    request = pb.GenerateRequest(model="m", sampling=pb.SamplingParams(top_p=2))
    request.chat.messages.add(role=pb.CHAT_ROLE_USER).parts.add(text="hi")
    request.chat.messages.add(role=9).parts.add()
    request.labels["k" * 200] = "v"
    request.sampling.logit_bias[7] = math.nan
    request.stopping.stop_strings.extend(["", "ok"])
    assert wrong_fields(request) == {
        "sampling.top_p",
        "chat.messages[1].role",
        "chat.messages[1].parts[0].part",
        f"labels[{'k' * 40!r}] (key)",
        "sampling.logit_bias[7]",
        "stopping.stop_strings[0]",
    }


def test_nan_anywhere_in_template_kwargs() -> None:
    request = pb.ChatPrompt()
    request.template_kwargs.update({"a": {"b": [1, {"c": math.nan}]}})
    assert "template_kwargs" in wrong_fields(request)
    request.template_kwargs.update({"a": "x" * 70_000})
    assert "template_kwargs" in wrong_fields(request)


def test_unknown_fields_are_refused_wherever_they_are() -> None:
    request = pb.GenerateRequest(model="m", text="t")
    request.sampling.MergeFromString(b"\xa0\x06\x01")  # field 100
    assert wrong_fields(request) == {"sampling"}
    request.MergeFromString(b"\x52\x00")  # field 10, kept for structured output
    assert wrong_fields(request) == {"sampling", "request"}


def test_violations_are_capped_and_lists_that_are_too_long_are_not_walked() -> None:
    request = pb.GenerateRequest(model="m", text="t")
    request.stopping.stop_strings.extend([""] * 10_000)
    assert [v.field for v in bounds.violations(request)] == ["stopping.stop_strings"]
    request.chat.messages.extend([pb.ChatMessage()] * 512)
    with pytest.raises(InvalidRequest) as raised:
        bounds.check(request)
    assert len(raised.value.violations) == bounds.MAX_VIOLATIONS
