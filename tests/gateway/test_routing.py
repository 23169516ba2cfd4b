"""Names of models and what can be said of them, and the smaller questions of the gateway."""

from dataclasses import replace

import pytest
from fakes import INFO

from millrace.server.errors import InternalError, InvalidRequest, ModelLoading, ModelNotFound
from millrace.server.gateway.routing import ModelState, Routes


def test_names_and_aliases(builtin_card) -> None:
    other = replace(builtin_card, name="other", aliases=("o",))
    routes = Routes([builtin_card, other])
    assert routes.resolve("default") is routes.resolve("builtin") is builtin_card
    assert routes.resolve("o") is other
    with pytest.raises(ModelNotFound) as caught:
        routes.resolve("Builtin")
    assert caught.value.resource_name == "Builtin"
    with pytest.raises(ValueError, match="default"):
        Routes([builtin_card, replace(other, aliases=("default",))])


def test_state_follows_the_backend(house, monkeypatch) -> None:
    card = house.gateway.model("builtin")
    assert (card.status().state, card.status().info) == (ModelState.READY, INFO)
    for error, state in ((ModelLoading("half way"), ModelState.LOADING), (InternalError("gone"), ModelState.FAILED)):

        def info(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(house.backend, "info", info)
        assert (card.status().state, card.status().reason) == (state, str(error))


async def test_loading_is_said_before_the_first_event(house, ask, monkeypatch) -> None:
    def info() -> None:
        raise ModelLoading("half way")

    monkeypatch.setattr(house.backend, "info", info)
    with pytest.raises(ModelLoading):
        await house.events(ask())
    house.check_idle()


@pytest.mark.parametrize("text", ["Hello wörld 😀", "Hello wörld 😀 " * 2000])
async def test_tokenize_and_back(house, text: str) -> None:
    (one,) = await house.gateway.tokenize("builtin", [text])
    assert one.ids == house.tokenizer.encode(text)
    assert len(one.byte_offsets) == 2 * len(one.ids)
    assert await house.gateway.detokenize("builtin", [one.ids, []]) == [text, ""]


async def test_detokenize_names_the_unknown_id(house) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await house.gateway.detokenize("builtin", [[1], [1, 2, 99_999]])
    assert caught.value.violations[0].field == "sequences[1].ids[2]"
