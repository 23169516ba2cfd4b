"""API keys: who may call, and as which tenant.

A key is `mk-ID-SECRET`, with 256 random bits in the secret, so a fast hash is enough. The file holds no key,
only SHA-256 of each:

    [[keys]]
    id = "5f3a9c01"
    sha256 = "…"                    # of the whole key, in hexadecimal
    tenant = "search"

    [tenants.search]                # optional
    weight = 2.0
    max_concurrent_requests = 64
"""

import hashlib
import hmac
import re
import secrets
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from millrace.server.errors import ConfigError, Unauthenticated
from millrace.server.types import Caller

DEFAULT_TENANT = "default"
MAX_KEY_BYTES = 128
KEY = re.compile(r"mk-([0-9a-z]{1,32})-([0-9A-Za-z_-]{16,90})", re.ASCII)
TENANT = r"^[A-Za-z0-9._-]{1,64}\Z"
NO_DIGEST = bytes(32)


class Tenant(BaseModel):
    """`weight` is the share of the engine relative to other tenants; None: the server's own limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(1.0, gt=0, le=1000)
    max_concurrent_requests: int | None = Field(None, ge=1)


class Key(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-z]{1,32}\Z")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}\Z")
    tenant: str = Field(pattern=TENANT)


class KeyStore:
    """Decides who calls. Without a file everybody is the tenant `default`."""

    def __init__(self, path: Path | None = None):
        """Raises ConfigError with the line that is wrong."""
        self.path = path
        self._keys: dict[str, Key] = {}
        self._tenants: dict[str, Tenant] = {}
        self.reload()

    @classmethod
    def load(cls, path: Path | None) -> "KeyStore":
        return cls(path)

    def reload(self) -> None:
        """Read the file again. What was known stays in force if the file is damaged: raises ConfigError."""
        if self.path:
            self._keys, self._tenants = read_keys(self.path)

    def tenant(self, name: str) -> Tenant:
        return self._tenants.get(name, Tenant())

    def authenticate(self, authorization: str | None) -> Caller:
        """Return the caller whose key the header carries. Raises Unauthenticated.

        A key is looked up by its id; an unknown id takes the same work as a known one.
        """
        if self.path is None:
            return Caller(DEFAULT_TENANT)
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated("this server needs a key: send the metadata `authorization: Bearer mk-…`")
        match = KEY.fullmatch(token) if len(token) <= MAX_KEY_BYTES else None
        key = self._keys.get(match[1]) if match else None
        expected = bytes.fromhex(key.sha256) if key else NO_DIGEST
        digest = hashlib.sha256(token[:MAX_KEY_BYTES].encode("utf-8", "replace")).digest()
        if not hmac.compare_digest(digest, expected) or key is None:
            raise Unauthenticated("the API key is not valid")
        return Caller(key.tenant, key.id)


def new_key(tenant: str) -> tuple[str, str]:
    """Return a new key, to be shown once, and the text to append to the file. Raises ConfigError."""
    if not re.match(TENANT, tenant):
        raise ConfigError(f"{tenant!r} is no tenant name: use 1 to 64 characters of [A-Za-z0-9._-]")
    key_id = secrets.token_hex(4)
    key = f"mk-{key_id}-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    return key, f'[[keys]]\nid = "{key_id}"\nsha256 = "{digest}"\ntenant = "{tenant}"\n'


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
    except _Damage as damage:
        where = f", line {line}" if (line := damage.line_in(text)) else ""
        raise ConfigError(f"--api-keys {path}{where}: {damage}") from None


class _Damage(Exception):
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
        raise _Damage(f"there is no setting `{unknown[0]}`; the file holds [[keys]] and [tenants.NAME]", rf"\[*{name}")
    entries, tables = values.get("keys", []), values.get("tenants", {})
    if not isinstance(entries, list) or not entries:
        raise _Damage("it holds no [[keys]]; `millrace keys new` makes one", r"\[*keys")
    if not isinstance(tables, dict):
        raise _Damage("`tenants` must be tables, [tenants.NAME]", r"\[*tenants")
    keys: dict[str, Key] = {}
    for index, entry in enumerate(entries):
        try:
            key = Key.model_validate(entry)
        except ValidationError as error:
            raise _Damage(f"key {index + 1}: {_first(error)}", r"\[\[\s*keys\s*\]\]", index) from None
        if key.id in keys:
            raise _Damage(f"a second key has the id {key.id!r}", r"\[\[\s*keys\s*\]\]", index)
        keys[key.id] = key
    tenants: dict[str, Tenant] = {}
    for name, table in tables.items():
        header = rf"\[\s*tenants\s*\.\s*[\"']?{re.escape(name)}"
        if not re.match(TENANT, name):
            raise _Damage(f"{name!r} is no tenant name", header)
        try:
            tenants[name] = Tenant.model_validate(table)
        except ValidationError as error:
            raise _Damage(f"tenant {name!r}: {_first(error)}", header) from None
    return keys, tenants


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'entry'}: {first['msg']}"
