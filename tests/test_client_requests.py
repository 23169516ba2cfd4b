"""What the client refuses before anything is sent."""

from typing import Any

import pytest

from millrace.server.client import AsyncClient, Client, Message, Role
from millrace.server.client.requests import generate_request
from millrace.server.errors import ConfigError, InvalidRequest

LONE = "\udcff"  # what a byte that is no UTF-8 becomes in an argument


@pytest.mark.parametrize(
    "option",
    [
        {"seed": -1},
        {"top_k": -1},
        {"max_output_tokens": 99_999_999_999},
        {"logprobs": -1},
        {"time_limit": float("nan")},
        {"time_limit": float("inf")},
        {"time_limit": 1e30},
        {"stop_strings": [LONE]},
        {"stop_token_ids": [1 << 40]},
        {"logit_bias": {-1: 0.5}},
        {"labels": {"a": LONE}},
        {"request_id": LONE},
    ],
)
def test_a_value_that_its_field_cannot_hold(option: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request("hello", "small", option)
    assert [violation.field for violation in caught.value.violations] == list(option)


@pytest.mark.parametrize("prompt", [LONE, [-1], [Message(Role.USER, LONE)]])
def test_a_prompt_that_cannot_be_sent(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        generate_request(prompt, "small", {})


def test_other_requests_too() -> None:
    with Client("unix:/nonexistent", model="small") as client:
        for call, value in [(client.tokenize, LONE), (client.detokenize, [-1]), (client.generate, LONE)]:
            with pytest.raises(InvalidRequest):
                call(value)
        with pytest.raises(InvalidRequest, match="messages"):
            client.render_chat([Message(Role.USER, LONE)])


def test_one_string_is_no_list_of_strings() -> None:
    with pytest.raises(TypeError, match="stop_strings"):
        generate_request("hello", "small", {"stop_strings": "abc"})


@pytest.mark.parametrize("address", ["", "grpc://", "grpcs://", "here\n:1", LONE])
@pytest.mark.parametrize("cls", [Client, AsyncClient])
def test_an_address_that_is_none(cls: type[Client | AsyncClient], address: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        cls(address)


@pytest.mark.parametrize("key", ["mk-1\n", "mk-\u00e9", LONE, "a\0b"])
def test_a_key_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(ConfigError, match="API key") as caught:
        Client("127.0.0.1:1", api_key=key)
    assert key not in str(caught.value)
