"""The bounds that the protos declare, enforced on any request message from its descriptor.

A message type is read once into a plan; checking a message then visits only the fields that are set.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from google.protobuf.unknown_fields import UnknownFieldSet

from millrace.server.errors import FieldViolation, InvalidRequest
from millrace.v1 import bounds_pb2
from millrace.v1.bounds_pb2 import Bounds

MAX_VIOLATIONS = 16  # reported at once; with their paths they fit the status details
SHOWN = 40  # characters of a client's value in a description

Found = Iterator[FieldViolation]
Check = Callable[[str, Any], Found]


def check(request: Message) -> None:
    """Raise InvalidRequest that names every field (at most MAX_VIOLATIONS) outside its declared bounds."""
    found: list[FieldViolation] = []
    for violation in violations(request):
        if len(found) == MAX_VIOLATIONS:
            break
        found.append(violation)
    if found:
        rest = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise InvalidRequest(f"{found[0].field}: {found[0].description}{rest}", violations=found)


def violations(message: Message, path: str = "") -> Found:
    """Yield what is wrong with a message; `path` is a prefix such as `sampling.`."""
    plan = plan_of(message.DESCRIPTOR)
    unknown = UnknownFieldSet(message)
    for index in range(len(unknown)):
        number = unknown[index].field_number
        yield FieldViolation(path.rstrip(".") or "request", f"this server does not know field number {number}")
    present = message.ListFields()
    if plan.required:
        names = {_name(field) for field, _ in present}
        yield from (FieldViolation(path + name, "required") for name in plan.required if name not in names)
    for field, value in present:
        if field_check := plan.checks.get(field.name):
            yield from field_check(path + field.name, value)


def bounds_of(field: Any) -> Bounds:
    """The declaration on a FieldDescriptor (of either class that the protobuf stubs know)."""
    extension: Any = bounds_pb2.bounds  # the generated stub calls it a plain field
    bounds: Bounds = field.GetOptions().Extensions[extension]
    return bounds


@dataclass(frozen=True, slots=True)
class Plan:
    """`required`: names of fields and oneofs. `checks`: by field name."""

    required: tuple[str, ...]
    checks: dict[str, Check]


@cache
def plan_of(descriptor: Descriptor) -> Plan:
    required = dict.fromkeys(_name(field) for field in descriptor.fields if bounds_of(field).required)
    checks = {field.name: _field_check(field) for field in descriptor.fields}
    return Plan(tuple(required), {name: check for name, check in checks.items() if check})


def _name(field: FieldDescriptor) -> str:
    """What must be set for the field to count: itself, or its oneof (`optional` makes one that begins with _)."""
    oneof = field.containing_oneof
    return oneof.name if oneof and not oneof.name.startswith("_") else field.name


def _field_check(field: FieldDescriptor) -> Check | None:
    bounds = bounds_of(field)
    if _is_map(field):
        return _map_check(field, bounds)
    one = _value_check(field, bounds)
    return _items_check(bounds, one) if field.is_repeated else one


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


def _value_check(field: FieldDescriptor, bounds: Bounds) -> Check | None:
    """The check of one value, or of one element; None where every value will do."""
    if field.message_type:
        return _message_check(field.message_type, bounds)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return _enum_check(field, bounds)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _length_check(bounds)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return None
    is_real = field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)
    return _number_check(bounds) if is_real or _has_range(bounds) else None


def _has_range(bounds: Bounds) -> bool:
    return bounds.HasField("minimum") or bounds.HasField("maximum")


def _number_check(bounds: Bounds, unit: str = "") -> Check:
    low = bounds.minimum if bounds.HasField("minimum") else -math.inf
    high = bounds.maximum if bounds.HasField("maximum") else math.inf
    open_low = bounds.exclusive_minimum
    span = f"{'(' if open_low else '['}{low:.15g}, {high:.15g}]{unit}"

    def run(path: str, value: float) -> Found:
        if not math.isfinite(value):
            yield FieldViolation(path, f"must be a finite number in {span}, not {value}")
        elif value < low or value > high or (open_low and value == low):
            yield FieldViolation(path, f"must be in {span}, not {value:.9g}")

    return run


def _length_check(bounds: Bounds) -> Check | None:
    low, high = bounds.min_bytes, bounds.max_bytes if bounds.HasField("max_bytes") else None
    pattern = re.compile(bounds.pattern) if bounds.pattern else None
    if not low and high is None and pattern is None:
        return None

    def run(path: str, value: str | bytes) -> Found:
        size = len(value) if isinstance(value, bytes) or value.isascii() else len(value.encode())
        if size < low:
            yield FieldViolation(path, f"must have at least {low} byte{'s' * (low > 1)}, has {size}")
        elif high is not None and size > high:
            yield FieldViolation(path, f"must have at most {high} bytes, has {size}")
        elif pattern and isinstance(value, str) and not pattern.fullmatch(value):
            yield FieldViolation(path, f"must match {pattern.pattern}, not {value[:SHOWN]!r}")

    return run


def _enum_check(field: FieldDescriptor, bounds: Bounds) -> Check:
    enum = field.enum_type
    assert enum

    def run(path: str, value: int) -> Found:
        if value not in enum.values_by_number or (bounds.required and value == 0):
            names = ", ".join(known.name for known in enum.values if known.number)
            yield FieldViolation(path, f"{value} is not a known {enum.name}: use one of {names}")

    return run


def _message_check(descriptor: Descriptor, bounds: Bounds) -> Check:
    if descriptor.full_name == Duration.DESCRIPTOR.full_name:
        return _duration_check(bounds)

    def run(path: str, value: Message) -> Found:
        if bounds.HasField("max_bytes") and (size := value.ByteSize()) > bounds.max_bytes:
            yield FieldViolation(path, f"must have at most {bounds.max_bytes} bytes when serialized, has {size}")
        elif isinstance(value, Struct):
            if not _is_json(value):
                yield FieldViolation(path, "must be plain JSON: every value set, every number finite")
        else:
            yield from violations(value, path + ".")

    return run


def _duration_check(bounds: Bounds) -> Check:
    in_range = _number_check(bounds, " seconds")

    def run(path: str, value: Duration) -> Found:
        seconds, nanos = value.seconds, value.nanos
        if abs(nanos) > 999_999_999 or seconds * nanos < 0:
            yield FieldViolation(path, f"is no duration: {seconds} s and {nanos} ns")
        else:
            yield from in_range(path, seconds + nanos / 1e9)

    return run


def _is_json(value: Struct) -> bool:
    values: list[Value] = list(value.fields.values())
    while values:
        one = values.pop()
        kind = one.WhichOneof("kind")
        if kind is None or (kind == "number_value" and not math.isfinite(one.number_value)):
            return False
        if kind == "struct_value":
            values += one.struct_value.fields.values()
        elif kind == "list_value":
            children: ListValue = one.list_value
            values += children.values
    return True


def _count(bounds: Bounds, path: str, count: int) -> Found:
    if count < bounds.min_items:
        yield FieldViolation(path, f"must have at least {bounds.min_items} entries, has {count}")
    elif bounds.HasField("max_items") and count > bounds.max_items:
        yield FieldViolation(path, f"must have at most {bounds.max_items} entries, has {count}")


def _items_check(bounds: Bounds, one: Check | None) -> Check:
    def run(path: str, value: Sequence[object]) -> Found:
        wrong = list(_count(bounds, path, len(value)))
        yield from wrong
        if one and not wrong:
            for index, item in enumerate(value):
                yield from one(f"{path}[{index}]", item)

    return run


def _map_check(field: FieldDescriptor, bounds: Bounds) -> Check:
    """Bounds of a map hold for its values; those of length also for its keys."""
    assert field.message_type
    entry = field.message_type.fields_by_name
    key_check = _length_check(bounds) if entry["key"].cpp_type == FieldDescriptor.CPPTYPE_STRING else None
    value_check = _value_check(entry["value"], bounds)

    def run(path: str, value: Mapping[str | int, object]) -> Found:
        wrong = list(_count(bounds, path, len(value)))
        yield from wrong
        for key, item in () if wrong else value.items():
            shown = f"{path}[{key[:SHOWN]!r}]" if isinstance(key, str) else f"{path}[{key}]"
            if key_check:
                yield from key_check(f"{shown} (key)", key)
            if value_check:
                yield from value_check(shown, item)

    return run
