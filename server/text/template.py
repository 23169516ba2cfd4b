"""Chat templates: a conversation to the prompt that a model was trained on.

Control tokens count only where the template writes them. Inside messages, names and template arguments they are
broken by a mark, a character that occurs nowhere else in the conversation, before the template runs; afterwards
the special tokens that are whole are the template's own, and the marks are taken out again.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from millrace.server.errors import CheckpointError, InvalidRequest
from millrace.server.text.sandbox import GLOBALS, compile_template, render
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.text.tokenizer_file import read_config
from millrace.server.types import ChatPrompt

MAX_TEMPLATE_BYTES = 1 << 20
MAX_SECONDS = 0.5  # of processor time
MAX_DEPTH = 32  # of template_kwargs
RESERVED = GLOBALS | {"messages", "tools", "documents", "add_generation_prompt"}
MARKS = [chr(code) for code in range(0xFDD0, 0xFDEF)]  # noncharacters: no text needs them


class ChatTemplate:
    """Safe for use by several threads."""

    def __init__(self, tokenizer: Tokenizer, source: str):
        """Raises jinja2.TemplateSyntaxError."""
        self._tokenizer = tokenizer
        self._template = compile_template(source)

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """None where the checkpoint has no template. Raises CheckpointError, one line."""
        path, source = _find(directory)
        if source is None:
            return None
        try:
            if len(source) > MAX_TEMPLATE_BYTES:
                raise CheckpointError(f"{path}: a chat template of more than {MAX_TEMPLATE_BYTES >> 10} KiB")
            return cls(tokenizer, source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{path}: chat template, line {error.lineno}: {error.message}") from None
        except (RecursionError, SyntaxError, ValueError) as error:
            raise CheckpointError(f"{path}: chat template: {type(error).__name__}: {error}") from None

    def render(self, chat: ChatPrompt) -> str:
        """The prompt as text. Raises InvalidRequest at `chat`."""
        text, mark = self._render(chat)
        return text.replace(mark, "")

    def encode(self, chat: ChatPrompt) -> list[int]:
        """The prompt as token ids. Raises InvalidRequest at `chat`."""
        return self._tokenizer.encode_rendered(*self._render(chat))

    def _render(self, chat: ChatPrompt) -> tuple[str, str]:
        """The prompt with marks in it, and the mark."""
        messages = [
            {"role": message.role.value, "content": message.content} | ({"name": message.name} if message.name else {})
            for message in chat.messages
        ]
        given = _arguments(chat)
        raw = json.dumps([messages, given], ensure_ascii=False)
        mark = next((mark for mark in MARKS if mark not in raw), None)
        if mark is None:
            raise InvalidRequest.at("chat", "uses every Unicode noncharacter from U+FDD0 to U+FDEE; leave one out")
        break_up = partial(self._tokenizer.break_up, mark=mark)
        variables = {
            **self._tokenizer.special.named,
            **_map_strings(given, break_up),
            "messages": _map_strings(messages, break_up),
            "add_generation_prompt": chat.add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        return self._run(variables, size=4 * len(raw) + (64 << 10)), mark

    def _run(self, variables: dict[str, Any], size: int) -> str:
        try:
            return render(self._template, variables, size, MAX_SECONDS)
        except jinja2.TemplateError as error:
            raise InvalidRequest.at("chat", f"the model's chat template refuses it: {error.message}") from None
        # Whatever else a template runs into depends on what it was given.
        except Exception as error:
            reason = f"the model's chat template cannot use it: {type(error).__name__}: {error}"
            raise InvalidRequest.at("chat", reason[:500]) from None


def _arguments(chat: ChatPrompt) -> dict[str, Any]:
    for name in chat.template_kwargs:
        if name in RESERVED or name.endswith("_token"):
            raise InvalidRequest.at("chat.template_kwargs", f"{name!r} is not for the client to set")
    return {name: _map_strings(value, str) for name, value in chat.template_kwargs.items()}


def _map_strings(value: Any, change: Callable[[str], str], depth: int = MAX_DEPTH) -> Any:
    if depth == 0:
        raise InvalidRequest.at("chat.template_kwargs", f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_map_strings(item, change, depth - 1) for item in value]
    if isinstance(value, dict):
        return {key: _map_strings(item, change, depth - 1) for key, item in value.items()}
    return value


def _find(directory: Path) -> tuple[Path, str | None]:
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path, path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: {error}") from None
    path = directory / "tokenizer_config.json"
    template = read_config(directory).get("chat_template")
    if isinstance(template, list):
        template = _default(path, template)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template is neither a string nor a list of named templates")
    return path, template


def _default(path: Path, templates: list[Any]) -> Any:
    named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
    if "default" not in named:
        raise CheckpointError(f"{path}: chat_template lists no template named 'default'")
    return named["default"]
