"""Values that a message cannot hold."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from google.protobuf.message import Message

from millrace.server.errors import InvalidRequest

Strings = TypeVar("Strings")


@contextmanager
def field(name: str) -> Iterator[None]:
    """What protobuf cannot hold is an InvalidRequest of the field `name`."""
    try:
        yield
    except UnicodeError:
        raise InvalidRequest.at(name, "must be Unicode text, which holds no lone surrogates") from None
    except (ValueError, OverflowError) as error:
        raise InvalidRequest.at(name, f"cannot be sent: {error}") from None


def check_list(name: str, value: Strings) -> Strings:
    """The value. Raises TypeError for one string, which is a sequence of strings too, but nobody means that."""
    if isinstance(value, str):
        raise TypeError(f"`{name}` takes a list, not one string")
    return value


def set_fields(message: Message, values: Mapping[str, Any], known: Collection[str]) -> None:
    """Set scalar fields; a value of an enum is named in small letters, without what all its names begin with.

    Raises TypeError for a name that is not `known`, InvalidRequest for a value that its field cannot hold.
    """
    for name, value in values.items():
        if name not in known:
            raise TypeError(f"there is no option `{name}`; there are {', '.join(sorted(known))}")
        with field(name):
            setattr(message, name, _number(message, name, value))


def _number(message: Message, name: str, value: Any) -> Any:
    """The number of an enum's value, any other value as it is."""
    enum = message.DESCRIPTOR.fields_by_name[name].enum_type
    if enum is None:
        return value
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    names = {one.name.removeprefix(prefix).lower(): one.number for one in enum.values if one.number}
    if value not in names:
        raise ValueError(f"{value!r} is none of {', '.join(names)}")
    return names[value]
