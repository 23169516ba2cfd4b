"""The file of hashed API keys.

It holds no key, only SHA-256 of each:

    [[keys]]
    id = "5f3a9c01"
    sha256 = "…"                    # of the whole key, in hexadecimal
    tenant = "search"

    [tenants.search]                # optional
    weight = 2.0
    max_priority = "high"
    max_concurrent_requests = 64
"""

import re
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from millrace.server.errors import ConfigError
from millrace.server.types import Priority

PRIORITIES = {priority.name.lower(): priority for priority in Priority}
TENANT = r"^[A-Za-z0-9._-]{1,64}$"


class Tenant(BaseModel):
    """`weight`: share of the engine relative to other tenants. `max_priority`: the highest class that its requests are
    served in. `max_concurrent_requests` of None is the server's own limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(default=1.0, gt=0, le=1000)
    max_priority: Literal["high", "normal", "low"] = "normal"
    max_concurrent_requests: int | None = Field(default=None, ge=1)


class Key(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-z]{1,32}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: str = Field(pattern=TENANT)


def read_keys(path: Path) -> tuple[dict[str, Key], dict[str, Tenant]]:
    """Return keys by id and tenants by name. Raises ConfigError with the line that is wrong."""
    try:
        text = path.read_bytes().decode()
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"--api-keys {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"--api-keys {path}: {error}") from None
    try:
        return _parse(values)
    except KeyFileError as damage:
        where = f", line {line}" if (line := damage.line_in(text)) else ""
        raise ConfigError(f"--api-keys {path}{where}: {damage}") from None


class KeyFileError(Exception):
    """What is wrong, and the header of the table where it is: its pattern and which of them."""

    def __init__(self, text: str, header: str, index: int = 0):
        super().__init__(text)
        self.header, self.index = re.compile(header), index

    def line_in(self, text: str) -> int | None:
        lines = [number for number, line in enumerate(text.splitlines(), 1) if self.header.match(line.strip())]
        return lines[self.index] if self.index < len(lines) else None


def _parse(values: dict[str, object]) -> tuple[dict[str, Key], dict[str, Tenant]]:
    if unknown := sorted(values.keys() - {"keys", "tenants"}):
        name = re.escape(unknown[0])
        raise KeyFileError(
            f"there is no setting `{unknown[0]}`; the file holds [[keys]] and [tenants.NAME]", rf"\[*{name}"
        )
    entries, tables = values.get("keys", []), values.get("tenants", {})
    if not isinstance(entries, list) or not entries:
        raise KeyFileError("it holds no [[keys]]; `millrace keys new` makes one", r"\[*keys")
    if not isinstance(tables, dict):
        raise KeyFileError("`tenants` must be tables, [tenants.NAME]", r"\[*tenants")
    keys: dict[str, Key] = {}
    for index, entry in enumerate(entries):
        try:
            key = Key.model_validate(entry)
        except ValidationError as error:
            raise KeyFileError(f"key {index + 1}: {_first(error)}", r"\[\[\s*keys\s*\]\]", index) from None
        if key.id in keys:
            raise KeyFileError(f"a second key has the id {key.id!r}", r"\[\[\s*keys\s*\]\]", index)
        keys[key.id] = key
    tenants: dict[str, Tenant] = {}
    for name, table in tables.items():
        header = rf"\[\s*tenants\s*\.\s*[\"']?{re.escape(name)}"
        if not re.fullmatch(TENANT, name):
            raise KeyFileError(f"{name!r} is no tenant name", header)
        try:
            tenants[name] = Tenant.model_validate(table)
        except ValidationError as error:
            raise KeyFileError(f"tenant {name!r}: {_first(error)}", header) from None
    return keys, tenants


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'entry'}: {first['msg']}"
