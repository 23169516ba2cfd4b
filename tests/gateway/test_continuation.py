"""An output that continues a text keeps the space between them; an answer to a conversation begins without one."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from millrace.server.gateway.choices import Choices
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import ChatPrompt, Finish, FinishReason, GenerateRequest, Message, Role, TokenDelta

CHAT = ChatPrompt([Message(Role.USER, "Go on")])


@pytest.fixture
def metaspace(tmp_path: Path) -> Tokenizer:
    """A tokenizer in the manner of SentencePiece, where a word's token begins with its space."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["once upon a time"] * 50, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("prompt", "text"), [("once", " upon a"), ((5, 6), " upon a"), (CHAT, "upon a")])
def test_the_first_space(metaspace: Tokenizer, prompt: str | tuple[int, ...] | ChatPrompt, text: str) -> None:
    ids = metaspace.encode("upon a", add_special_tokens=False)
    request = GenerateRequest("tiny", prompt)
    choices = Choices(metaspace, request, 1, FinishReason.MAX_TOKENS)
    news = [TokenDelta(0, ids, finish=Finish(FinishReason.MAX_TOKENS))]
    assert "".join(delta.text for message in choices.push(news) for delta in message.choices) == text
