"""The Jinja environment of chat templates, with bounds on processor time and on the size of every value.

Jinja's immutable sandbox keeps a template from reaching Python's internals, but not from burning time and memory.
So a render has a budget: every turn of a loop and every macro call looks at the thread's clock, and what calls,
filters and operators take and make is weighed. What remains: a single built-in operation on values within bounds
runs to its end, milliseconds; so a render ends soon after its time is up, not at once. Templates come from the
operator's model directory, never from a request.
"""

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

LARGEST = 100_000  # any integer that a call, a filter or a repetition is given
MAX_BITS = 4096  # of a product or a power
FREE_TURNS = 100  # before the clock counts: a collection of garbage inside a short render is not the template's doing
GROWING = frozenset({"join", "format", "format_map", "replace", "indent", "wordwrap", "translate"})
# Filters and methods that neither print nor copy what is inside their operands, and that templates call in loops.
CHEAP = frozenset({"length", "count", "first", "last", "default", "d", "get", "items", "keys", "values"})
WIDE = re.compile(r"\d{5}|\*")  # a field width in a format that makes something large of nothing
OPERATORS = frozenset({"+", "*", "**", "%"})
NOT_FOR_TEMPLATES = ("lipsum",)


class LimitExceeded(jinja2.TemplateError):
    """The template did too much."""


class _Budget:
    def __init__(self, size: int, seconds: float):
        self.size, self.deadline, self.turns = size, time.thread_time() + seconds, 0

    def tick(self) -> str:
        self.turns += 1
        if self.turns > FREE_TURNS and time.thread_time() > self.deadline:
            raise LimitExceeded("the chat template takes too long")
        return ""

    def weigh(self, *values: object) -> None:
        """Characters and items of all values, each counted as often as it is reached, are at most `size`."""
        total, waiting = 0, list(values)
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                waiting += [item for pair in value.items() for item in pair]
            elif isinstance(value, list | tuple | set | frozenset):
                waiting += value
            total += len(value) if isinstance(value, str | bytes | dict | list | tuple | set | frozenset) else 0
            self.fit(total)

    def fit(self, size: int) -> None:
        if size > self.size:
            raise LimitExceeded(f"the chat template makes more than {self.size} characters of this conversation")


_budget: ContextVar[_Budget] = ContextVar("budget")


def _check_call(name: str, values: tuple[Any, ...]) -> None:
    budget = _budget.get()
    budget.tick()
    if name in CHEAP:
        return
    budget.weigh(*values)
    if any(isinstance(value, int) and abs(value) > LARGEST for value in values):
        raise LimitExceeded(f"the chat template calls {name} with a number above {LARGEST}")
    if name not in GROWING:
        return
    if name == "replace" and len(values) > 2 and all(isinstance(value, str) for value in values[:3]):
        text, old, new = values[:3]
        budget.fit(len(text) + text.count(old) * len(new))
        return
    product = 1
    for value in values:
        product *= len(value) + 1 if isinstance(value, str | list | tuple) else 1
    budget.fit(product)
    _check_format(values[0] if values else "")


def _check_format(text: object) -> None:
    if isinstance(text, str) and WIDE.search(text):
        raise LimitExceeded("the chat template formats with a width above 9999")


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps Jinja's marks of what a filter wants first: context, environment
    def guarded(*args: Any, **kwargs: Any) -> Any:
        passed = args[1:] if hasattr(function, "jinja_pass_arg") else args
        _check_call(name, (*passed, *kwargs.values()))
        result = function(*args, **kwargs)
        _budget.get().weigh(result)
        return result

    return guarded


class _Checks(NodeTransformer):
    """Puts the budget's checks into a parsed template, where no variable can shadow them."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's name
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802 - Jinja's name
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802 - Jinja's name
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        return _method("concat", node.nodes).set_lineno(node.lineno)

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_method("tick", [])).set_lineno(node.lineno))
        return node


def _method(name: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.ExtensionAttribute(_Support.identifier, name), args, [], None, None)


class _Support(Extension):
    """`{% generation %}` blocks, which mark what a model would have written, and the functions of `_Checks`."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generation"), [], [], body).set_lineno(line)

    def generation(self, caller: Macro) -> str:
        return str(caller())

    def tick(self) -> str:
        return _budget.get().tick()

    def concat(self, *values: object) -> str:
        _budget.get().weigh(*values)
        return "".join(map(str, values))


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = OPERATORS

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Support, loopcontrols], finalize=_finalize)
        self.filters["tojson"] = _tojson
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        for name in NOT_FOR_TEMPLATES:
            del self.globals[name]

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The sandbox wraps `str.format`.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        text = owner if isinstance(owner, str | list | tuple | dict) else ""
        _check_call(getattr(__obj, "__name__", "a function"), (text, *args, *kwargs.values()))
        result = super().call(__context, __obj, *args, **kwargs)
        _budget.get().weigh(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.weigh(left, right)
        if operator == "*":
            for repeated, times in ((left, right), (right, left)):
                if isinstance(repeated, str | list | tuple) and isinstance(times, int):
                    budget.fit(len(repeated) * times)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise LimitExceeded("the chat template computes with numbers that are too large")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            budget.fit((left.count("%") + 1) * len(str(right)))
        return super().call_binop(context, operator, left, right)


def _finalize(value: Any) -> Any:
    """Runs on constants at load too, where there is no budget yet."""
    if (budget := _budget.get(None)) is not None:
        budget.weigh(value)
    return value


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without HTML escapes, unlike Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


_environment = _Environment()
GLOBALS = frozenset(_environment.globals)


def compile_template(source: str) -> jinja2.Template:
    """Raises jinja2.TemplateSyntaxError."""
    parsed = _Checks().visit(_environment.parse(source))
    return _environment.from_string(parsed)


def render(template: jinja2.Template, variables: dict[str, Any], size: int, seconds: float) -> str:
    """`size` bounds the output and every value on the way, in characters; `seconds` is time of this thread.

    Raises LimitExceeded, or whatever the template raises.
    """
    budget = _Budget(size, seconds)
    token = _budget.set(budget)
    try:
        return "".join(_metered(template.generate(variables), budget))
    finally:
        _budget.reset(token)


def _metered(chunks: Iterator[str], budget: _Budget) -> Iterator[str]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        budget.fit(total)
        yield chunk
