"""Metadata and filters keep value and kind on their way through messages; what no filter could test is refused."""

import math
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct, Value
from hypothesis import given
from hypothesis import strategies as st

from millrace.retrieval.types import Condition
from millrace.server.api import bounds
from millrace.server.api import retrieval_convert as convert
from millrace.server.client import documents as client
from millrace.server.errors import InvalidRequest
from millrace.v1 import retrieval_pb2 as pb

KEYS = st.text(min_size=1, max_size=30).filter(lambda key: len(key.encode()) <= convert.MAX_KEY_BYTES)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.one_of(st.text(max_size=50), NUMBERS, st.booleans())
METADATA = st.dictionaries(KEYS, SCALARS | st.lists(st.text(max_size=20), max_size=5).map(tuple), max_size=10)
TESTS = st.one_of(
    SCALARS,
    st.lists(SCALARS, min_size=1, max_size=5),
    st.fixed_dictionaries({"at_least": st.floats(-1e18, 1e18)}),
    st.fixed_dictionaries({"at_most": st.floats(-1e18, 1e18)}),
    st.fixed_dictionaries({"at_least": st.floats(-1e18, 1e18), "at_most": st.floats(-1e18, 1e18)}),
)


def kinds(value: Any) -> Any:
    """A value with its type: 1, 1.0 and True are equal to Python."""
    if isinstance(value, tuple | list):
        return [kinds(item) for item in value]
    return (bool if isinstance(value, bool) else str if isinstance(value, str) else float), value


@given(METADATA)
def test_metadata_there_and_back(values: dict[str, Any]) -> None:
    """Through the client's message, the server's words, and the message of an answer."""
    for make in (client.struct, convert.struct):
        message = make(values) or Struct()
        request = pb.UpsertDocumentsRequest(collection="c", document=pb.Document(id="d", metadata=message))
        bounds.check(request)
        found = convert.metadata(pb.UpsertDocumentsRequest.FromString(request.SerializeToString()).document.metadata)
        assert {key: kinds(value) for key, value in found.items()} == {k: kinds(v) for k, v in values.items()}


@given(st.dictionaries(KEYS, TESTS, max_size=8))
def test_conditions_of_the_client_arrive(tests: dict[str, Any]) -> None:
    query = pb.QueryRequest(collection="c", text="q", filter=client.conditions(tests))
    bounds.check(query)
    found = convert.search_request(pb.QueryRequest.FromString(query.SerializeToString())).filter
    assert [condition.key for condition in found] == list(tests)
    for condition, test in zip(found, tests.values(), strict=True):
        if isinstance(test, dict):
            assert condition == Condition(condition.key, **test)
        elif isinstance(test, list):
            assert kinds(condition.any_of) == kinds(test)
        else:
            assert kinds(condition.equals) == kinds(test)


def condition(**fields: object) -> pb.Condition:
    return pb.Condition(key="k", **fields)


def listed(*values: object) -> pb.Condition:
    message = condition()
    message.any_of.extend(values)
    if not values:
        message.any_of.SetInParent()
    return message


ENDLESS = pb.NumberRange(at_least=math.inf)
WRONG = {
    "no test": (condition(), "filter[1].test"),
    "equal to nothing": (condition(equals=Value()), "filter[1].equals"),
    "equal to null": (condition(equals=Value(null_value=0)), "filter[1].equals"),
    "equal to NaN": (condition(equals=Value(number_value=math.nan)), "filter[1].equals.number_value"),
    "equal to infinity": (condition(equals=Value(number_value=-math.inf)), "filter[1].equals.number_value"),
    "equal to a list": (condition(equals=Value(list_value=["a"])), "filter[1].equals"),
    "equal to an object": (condition(equals=Value(struct_value={"a": "b"})), "filter[1].equals"),
    "equal to NaN in a list": (
        condition(equals=Value(list_value=[math.nan])),
        "filter[1].equals.list_value.values[0].number_value",
    ),
    "one of none": (listed(), "filter[1].any_of"),
    "one of null": (listed("a", None), "filter[1].any_of[1]"),
    "one of lists": (listed(["a"]), "filter[1].any_of[0]"),
    "one of NaN": (listed("a", math.nan), "filter[1].any_of.values[1].number_value"),
    "no end": (condition(range=pb.NumberRange()), "filter[1].range"),
    "infinite end": (condition(range=ENDLESS), "filter[1].range.at_least"),
    "NaN end": (condition(range=pb.NumberRange(at_most=math.nan)), "filter[1].range.at_most"),
    "no key": (pb.Condition(equals=Value(bool_value=True)), "filter[1].key"),
    "long equals": (condition(equals=Value(string_value="a" * 1100)), "filter[1].equals"),
}


def read(query: pb.QueryRequest) -> None:
    bounds.check(query)
    convert.search_request(query)


@pytest.mark.parametrize(("wrong", "field"), WRONG.values(), ids=WRONG)
def test_conditions_that_test_nothing(wrong: pb.Condition, field: str) -> None:
    query = pb.QueryRequest(collection="c", text="q", filter=[condition(equals=Value(bool_value=True)), wrong])
    with pytest.raises(InvalidRequest) as raised:
        read(query)
    assert [violation.field for violation in raised.value.violations] == [field]
