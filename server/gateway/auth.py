"""API keys: who may call, and as which tenant.

A key is `mk-ID-SECRET`, with 256 random bits in the secret, so a fast hash is enough.
"""

import hashlib
import hmac
import re
import secrets
from pathlib import Path

from millrace.server.errors import ConfigError, Unauthenticated
from millrace.server.gateway.keyfile import PRIORITIES, TENANT, Key, Tenant, read_keys
from millrace.server.types import Caller

DEFAULT_TENANT = "default"
MAX_KEY_BYTES = 128
KEY = re.compile(r"mk-([0-9a-z]{1,32})-([0-9A-Za-z_-]{16,90})", re.ASCII)
NO_DIGEST = bytes(32)


class KeyStore:
    """Decides who calls. Without a file everybody is the tenant `default`."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self._keys: dict[str, Key] = {}
        self._tenants: dict[str, Tenant] = {}

    @classmethod
    def load(cls, path: Path | None) -> "KeyStore":
        """Raises ConfigError with the line that is wrong."""
        store = cls(path)
        store.reload()
        return store

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
        tenant = self.tenant(key.tenant)
        return Caller(key.tenant, key.id, tenant.weight, PRIORITIES[tenant.max_priority])


def new_key(tenant: str) -> tuple[str, str]:
    """Return a new key, to be shown once, and the text to append to the file. Raises ConfigError."""
    if not re.fullmatch(TENANT, tenant):
        raise ConfigError(f"{tenant!r} is no tenant name: use 1 to 64 characters of [A-Za-z0-9._-]")
    key_id = secrets.token_hex(4)
    key = f"mk-{key_id}-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    return key, f'[[keys]]\nid = "{key_id}"\nsha256 = "{digest}"\ntenant = "{tenant}"\n'
