"""Metadata of documents: how it is stored, and filters over it as SQL.

A value is stored with its kind, since SQLite would take true for 1: "string", "number" or "boolean".
"""

import json
import math
from collections.abc import Iterator
from typing import NamedTuple

from millrace.retrieval.types import Condition, Filter, Metadata, MetadataValue
from millrace.server.errors import InvalidRequest

Scalar = str | float | bool


class Where(NamedTuple):
    """`labels`: a SELECT of the chunks that pass, in no order; empty: all do. `values`: its named parameters."""

    labels: str
    values: dict[str, str | float | int]


def normalised(metadata: Metadata) -> dict[str, MetadataValue]:
    """In the order of the keys, numbers as floats. Raises InvalidRequest for what cannot be stored."""
    return {key: _value(f"document.metadata.{key}", metadata[key]) for key in sorted(metadata)}


def dump(metadata: Metadata) -> str:
    return json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":"))


def load(text: str) -> dict[str, MetadataValue]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()}


def typed_values(metadata: Metadata) -> Iterator[tuple[str, str, Scalar]]:
    """(key, kind, value) for each value, each of a list; nothing twice."""
    for key, value in metadata.items():
        for single in dict.fromkeys(value) if isinstance(value, tuple) else (value,):
            yield key, _kind(single), single


def where(collection: int, conditions: Filter) -> Where:
    """Raises InvalidRequest for a condition without exactly one test, or with a number that is none."""
    if not conditions:
        return Where("", {})
    tests: list[str] = []
    values: dict[str, str | float | int] = {"collection": collection}
    for n, condition in enumerate(conditions):
        tests.append(
            f"document IN (SELECT document FROM metadata WHERE collection = :collection AND key = :key_{n} "
            f"AND {_test(n, condition, values)})"
        )
        values[f"key_{n}"] = condition.key
    return Where(f"SELECT label FROM chunks WHERE collection = :collection AND {' AND '.join(tests)}", values)


def _test(n: int, condition: Condition, values: dict[str, str | float | int]) -> str:
    """SQL over kind and value; puts its parameters into `values`."""
    ends = [end for end in (condition.at_least, condition.at_most) if end is not None]
    if (condition.equals is not None) + bool(condition.any_of) + bool(ends) != 1:
        raise InvalidRequest.at(f"filter[{n}]", "needs exactly one of equals, any_of and range")
    if ends:
        values[f"low_{n}"], values[f"high_{n}"] = (
            _number(f"filter[{n}].range", -math.inf if condition.at_least is None else condition.at_least),
            _number(f"filter[{n}].range", math.inf if condition.at_most is None else condition.at_most),
        )
        return f"kind = 'number' AND value BETWEEN :low_{n} AND :high_{n}"
    wanted = condition.any_of if condition.equals is None else (condition.equals,)
    values.update({f"value_{n}_{i}": _scalar(f"filter[{n}]", value) for i, value in enumerate(wanted)})
    rows = (f"('{_kind(value)}', :value_{n}_{i})" for i, value in enumerate(wanted))
    return f"(kind, value) IN (VALUES {', '.join(rows)})"


def _kind(value: Scalar) -> str:
    if isinstance(value, bool):
        return "boolean"
    return "string" if isinstance(value, str) else "number"


def _value(field: str, value: MetadataValue) -> MetadataValue:
    if not isinstance(value, tuple):
        return _scalar(field, value)
    if not all(isinstance(item, str) for item in value):
        raise InvalidRequest.at(field, "a list holds strings only")
    return value


def _scalar(field: str, value: Scalar) -> Scalar:
    if isinstance(value, str | bool):
        return value
    if not isinstance(value, int | float):
        raise InvalidRequest.at(field, "must be a string, a number, a boolean or a list of strings")
    number = _number(field, value)
    if math.isinf(number):
        raise InvalidRequest.at(field, "must be a finite number")
    return number


def _number(field: str, value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if math.isnan(number):
        raise InvalidRequest.at(field, "must be a number, is NaN")
    return number
