"""One command-line option for each setting: the settings classes are the only list there is."""

import inspect
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from millrace.server.config import COMPONENTS, flag


def with_settings(*components: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the `**flags` of a command by an option for each setting; one that is not given is None."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        kept = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [
            _option(component, name, field)
            for component in components
            for name, field in COMPONENTS[component].model_fields.items()
        ]
        parameters = [*kept, *options]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect reads it
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _option(component: str, name: str, field: FieldInfo) -> inspect.Parameter:
    words = flag(name)
    kind = _plain_type(field.annotation)
    if kind is bool:
        words = f"{words}/--no-{words[2:]}"
    option = typer.Option(words, help=_help(field), rich_help_panel=f"Settings: {component}", show_default=False)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]  # a type made at run time
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain_type(annotation: Any) -> Any:
    """What the command line parses to; the settings class checks the rest."""
    if get_origin(annotation) is Union or isinstance(annotation, type(int | None)):
        annotation = next(kind for kind in get_args(annotation) if kind is not NoneType)
    return str if annotation is ByteSize else annotation


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    default = field.get_default(call_default_factory=True)
    if default is None:
        return text
    value = ("off", "on")[default] if isinstance(default, bool) else default
    return f"{text} (default: {value})".strip()
