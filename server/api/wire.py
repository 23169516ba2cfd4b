"""Where bytes stop being a message, which protobuf's parser does not tell.

The encoding: https://protobuf.dev/programming-guides/encoding/
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from millrace.server.errors import FieldViolation

MAX_FIELDS = 2000  # looked at, so that a hostile message costs no more than its parsing does
VARINT, BYTES = 0, 2  # wire types
FIXED = {1: 8, 5: 4}  # bytes of the other wire types


def broken_field(descriptor: Any, raw: bytes) -> FieldViolation | None:
    """A string that is not UTF-8, or the message whose encoding is corrupt; None if neither is found.

    `descriptor` is a Descriptor, of either class that the protobuf stubs know.
    """
    todo: list[tuple[Descriptor, memoryview, str]] = [(descriptor, memoryview(raw), "")]
    looked_at = 0
    while todo:
        kind, body, path = todo.pop()
        seen: Counter[int] = Counter()
        name = path
        try:
            for number, value in fields(body):
                looked_at += 1
                if looked_at > MAX_FIELDS:
                    return None
                field = kind.fields_by_number.get(number)
                if field is None or value is None:
                    continue
                name = path + field.name + (f"[{seen[number]}]" if field.is_repeated else "")
                seen[number] += 1
                if field.message_type:
                    todo.append((field.message_type, value, name + "."))
                elif field.type == FieldDescriptor.TYPE_STRING:
                    str(value, "utf-8")
        except UnicodeDecodeError:
            return FieldViolation(name, "must be valid UTF-8")
        except ValueError as error:
            return FieldViolation(path.rstrip(".") or "request", f"is no valid {kind.full_name}: {error}")
    return None


def fields(body: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """Yield number and bytes of each field, None for a number. ValueError where the encoding is corrupt."""
    while body:
        tag, body = varint(body)
        wire_type, size = tag & 7, 0
        if wire_type == VARINT:
            _, body = varint(body)
        elif wire_type == BYTES:
            size, body = varint(body)
        elif wire_type in FIXED:
            size = FIXED[wire_type]
        else:
            raise ValueError(f"it has a field of wire type {wire_type}")
        if size > len(body):
            raise ValueError("it ends within a field")
        yield tag >> 3, body[:size] if wire_type == BYTES else None
        body = body[size:]


def varint(body: memoryview) -> tuple[int, memoryview]:
    """The number at the start, and what follows it."""
    value = 0
    for index, byte in enumerate(body[:10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, body[index + 1 :]
    raise ValueError("it ends within a number" if len(body) < 10 else "it has a number of more than 64 bits")
