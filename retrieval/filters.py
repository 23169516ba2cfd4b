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
    """`labels`: a SELECT of the chunks that pass, in no order; empty: all do. `values`: its parameters, in order.

    They have no names: SQLite takes quadratic time to bind many that do.
    """

    labels: str
    values: tuple[Scalar, ...]


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
        return Where("", ())
    tests: list[str] = []
    values: list[Scalar] = []
    for n, condition in enumerate(conditions):
        test, of_test = _test(f"filter[{n}]", condition)
        tests.append(
            f"document IN (SELECT document FROM metadata WHERE collection = {collection:d} AND key = ? AND {test})"
        )
        values += [condition.key, *of_test]
    return Where(f"SELECT label FROM chunks WHERE {' AND '.join(tests)}", tuple(values))


def _test(field: str, condition: Condition) -> tuple[str, list[Scalar]]:
    """SQL over kind and value, with its parameters."""
    low, high = condition.at_least, condition.at_most
    in_range = low is not None or high is not None
    if (condition.equals is not None) + bool(condition.any_of) + in_range != 1:
        raise InvalidRequest.at(field, "needs exactly one of equals, any_of and range")
    if in_range:
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        return "kind = 'number' AND value BETWEEN ? AND ?", [_number(f"{field}.range", end) for end in ends]
    wanted = condition.any_of if condition.equals is None else (condition.equals,)
    rows = ", ".join(f"('{_kind(value)}', ?)" for value in wanted)
    return f"(kind, value) IN (VALUES {rows})", [_scalar(field, value) for value in wanted]


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
