"""Which models there are, under which names, and what runs them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from millrace.server.backends.base import Backend
from millrace.server.errors import ModelNotFound, RequestError, Unavailable
from millrace.server.text.template import ChatTemplate
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import AnswerMode, BackendInfo, Sampling


class ModelState(Enum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """`info` is set when READY, `reason` when not."""

    state: ModelState
    reason: str = ""
    info: BackendInfo | None = None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model that clients can ask for. `template` None: it cannot chat.

    `answer_mode`: how a question to documents is answered unless the request says otherwise.
    """

    name: str
    tokenizer: Tokenizer
    backend: Backend
    template: ChatTemplate | None = None
    aliases: tuple[str, ...] = ()
    default_sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()
    answer_mode: AnswerMode = AnswerMode.GENERATIVE

    @property
    def capabilities(self) -> tuple[str, ...]:
        return ("generate", "chat") if self.template else ("generate",)

    def status(self) -> ModelStatus:
        try:
            return ModelStatus(ModelState.READY, info=self.backend.info())
        except Unavailable as error:
            return ModelStatus(ModelState.LOADING, error.message)
        except RequestError as error:
            return ModelStatus(ModelState.FAILED, error.message)


class Routes:
    """Cards by name and alias. ValueError if two cards claim one name."""

    def __init__(self, cards: Iterable[ModelCard]):
        self.cards = tuple(cards)
        self._by_name: dict[str, ModelCard] = {}
        for card in self.cards:
            for name in (card.name, *card.aliases):
                if self._by_name.setdefault(name, card) is not card:
                    raise ValueError(f"two models are called {name!r}")

    def resolve(self, name: str) -> ModelCard:
        """Raises ModelNotFound."""
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(card.name for card in self.cards)
            raise ModelNotFound(
                f"there is no model {name!r} here; this server has {known}",
                resource_type="millrace.v1.Model",
                resource_name=name,
            ) from None
