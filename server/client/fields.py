"""Values that a message cannot hold."""

from collections.abc import Iterator
from contextlib import contextmanager

from millrace.server.errors import InvalidRequest


@contextmanager
def field(name: str) -> Iterator[None]:
    """What protobuf cannot hold is an InvalidRequest of the field `name`."""
    try:
        yield
    except UnicodeError:
        raise InvalidRequest.at(name, "must be Unicode text, which holds no lone surrogates") from None
    except (ValueError, OverflowError) as error:
        raise InvalidRequest.at(name, f"cannot be sent: {error}") from None
