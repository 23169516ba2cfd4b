"""Typed access to a JSON object that somebody else wrote: every fault is one line naming file and field."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.server.errors import CheckpointError

MAX_JSON_BYTES = 64 * 1024 * 1024


class Fields:
    """A JSON object with its origin. Getters without a default raise CheckpointError where the field is missing.

    A field that is null counts as missing, as it does for the programs that write these files.
    """

    def __init__(self, values: Mapping[str, Any], origin: str):
        self.values, self.origin = values, origin

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.origin}: {name} {problem}")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"must be an integer from {low} to {high}, not {_shown(value)}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(name, f"must be a number from {low:g} to {high:g}, not {_shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {_shown(value)}")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"must be a string, not {_shown(value)}")
        return value

    def strings(self, name: str) -> list[str]:
        value = self._get(name, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, f"must be a list of strings, not {_shown(value)}")
        return value

    def integers(self, name: str, low: int, high: int) -> list[int]:
        """One integer or a list of them; missing is an empty list."""
        value = self.values.get(name)
        items = [] if value is None else value if isinstance(value, list) else [value]
        return [Fields({name: item}, self.origin).integer(name, low, high) for item in items]

    def section(self, name: str) -> "Fields":
        """A nested object; missing is an empty one."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, f"must be an object, not {_shown(value)}")
        return Fields(value or {}, f"{self.origin}: {name}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        return value


def parse_object(text: bytes, origin: str) -> dict[str, Any]:
    """Parse one JSON object; CheckpointError for anything else, for a name given twice and for NaN."""
    value = _parse(text, origin)
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin}: must hold a JSON object, not {_shown(value)}")
    return value


def read_object(path: Path) -> Fields:
    """Read a JSON file. CheckpointError where it cannot be read, is too large or is no object."""
    return Fields(parse_object(_read(path), str(path)), str(path))


def read_objects(path: Path) -> list[Fields]:
    """Read a JSON file that holds a list of objects; errors as of `read_object`."""
    values = _parse(_read(path), str(path))
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise CheckpointError(f"{path}: must hold a list of JSON objects, not {_shown(values)}")
    return [Fields(value, f"{path}: entry {index}") for index, value in enumerate(values)]


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: is larger than {MAX_JSON_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(text: bytes, origin: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin}: is no valid JSON: {_line(error)}") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r} is given twice")
    return values


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _shown(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
