"""Keys: what opens, what never does, and what a damaged file says."""

import hashlib
import hmac
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from millrace.server.errors import ConfigError, Unauthenticated
from millrace.server.gateway import auth
from millrace.server.gateway.auth import KeyStore, new_key
from millrace.server.types import Caller


@pytest.fixture
def keyed(tmp_path):
    """A store of two tenants with a key each: (store, {tenant: key})."""
    path = tmp_path / "keys.toml"
    keys, text = {}, "[tenants.acme]\nweight = 2.5\nmax_concurrent_requests = 7\n\n"
    for tenant in ("acme", "other"):
        keys[tenant], entry = new_key(tenant)
        text += entry + "\n"
    path.write_text(text)
    return KeyStore.load(path), keys


def test_keys_open(keyed) -> None:
    store, keys = keyed
    for tenant, key in keys.items():
        for scheme in ("Bearer", "bearer"):
            assert store.authenticate(f"{scheme} {key}") == Caller(tenant, key.split("-")[1])
    assert (store.tenant("acme").weight, store.tenant("acme").max_concurrent_requests) == (2.5, 7)
    assert (store.tenant("other").weight, store.tenant("other").max_concurrent_requests) == (1, None)


def test_the_file_holds_no_key(keyed) -> None:
    store, keys = keyed
    text = store.path.read_text()
    for key in keys.values():
        assert key not in text
        assert key.split("-", 2)[2] not in text
        assert len(key) <= auth.MAX_KEY_BYTES


def test_without_a_file_there_is_one_tenant() -> None:
    store = KeyStore.load(None)
    assert store.authenticate(None) == store.authenticate("Bearer whatever") == Caller("default")


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.none() | st.text() | st.text().map("Bearer {}".format) | st.from_regex(r"Bearer mk-[0-9a-z]+-[\w-]{43}"))
@example("Bearer " + "x" * 100_000)
@example("Bearer mk-\0-' OR 1=1 --")
@example("Bearer \ud800")
def test_nothing_else_opens(keyed, header) -> None:
    with pytest.raises(Unauthenticated):
        keyed[0].authenticate(header)


def test_near_misses_do_not_open(keyed) -> None:
    store, keys = keyed
    key, other = keys["acme"], keys["other"]
    prefix, _, secret = key.split("-", 2)
    swapped = f"{prefix}-{other.split('-')[1]}-{secret}"
    changed = key[:-1] + ("A" if key[-1] != "A" else "B")
    for wrong in (swapped, changed, key + "A", key + "\n", f" {key}", key[:-1], key.upper(), f"{key} "):
        with pytest.raises(Unauthenticated):
            store.authenticate(f"Bearer {wrong}")
    with pytest.raises(Unauthenticated):
        store.authenticate(key)


def test_every_key_takes_the_same_work(keyed, monkeypatch) -> None:
    """Known id, unknown id, malformed: one hash and one constant-time comparison each."""
    store, keys = keyed
    work: list[str] = []
    sha256, compare = hashlib.sha256, hmac.compare_digest
    monkeypatch.setattr(auth.hashlib, "sha256", lambda data: work.append("hash") or sha256(data))
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: work.append("compare") or compare(a, b))
    for token in (keys["acme"], keys["acme"][:-1] + "!", "mk-00000000-" + "a" * 43, "nonsense"):
        work.clear()
        with suppress(Unauthenticated):
            store.authenticate(f"Bearer {token}")
        assert work == ["hash", "compare"]


def test_reload(keyed) -> None:
    store, keys = keyed
    key, entry = new_key("third")
    good = store.path.read_text()
    store.path.write_text("[[keys]\n")
    with pytest.raises(ConfigError):
        store.reload()
    assert store.authenticate(f"Bearer {keys['acme']}").tenant == "acme", "what was known stays in force"
    store.path.write_text(good + entry)
    store.reload()
    assert store.authenticate(f"Bearer {key}").tenant == "third"


DIGEST = "0" * 64
GOOD = f'[[keys]]\nid = "a"\nsha256 = "{DIGEST}"\ntenant = "acme"\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[keys]\n", "line 1"),
        ("", "no [[keys]]"),
        ("\nkey = 3\n", "line 2: there is no setting `key`"),
        (f"{GOOD}\n{GOOD}", "line 6: a second key has the id 'a'"),
        (GOOD + GOOD.replace('"a"', '"B!"'), "line 5: key 2: id"),
        (GOOD.replace("00", "", 1), "line 1: key 1: sha256"),
        (GOOD.replace('"acme"', '"a b"'), "line 1: key 1: tenant"),
        (GOOD + "secret = 1\n", "line 1: key 1: secret"),
        (GOOD + "\n[tenants.acme]\nweight = -1\n", "line 6: tenant 'acme': weight"),
        (GOOD + "\n[tenants.acme]\nwait = 1\n", "line 6: tenant 'acme': wait"),
        (GOOD + '\n[tenants."a b"]\n', "line 6: 'a b' is no tenant name"),
        ("keys = 3\n", "line 1"),
        (GOOD + "[tenants]\nacme = 3\n", "tenant 'acme'"),
        ("tenants = 3\n" + GOOD, "line 1"),
    ],
)
def test_a_damaged_file_says_where(tmp_path, text: str, complaint: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        KeyStore.load(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path) -> None:
    for content in (None, b"\xff\xfe\x00"):
        path = tmp_path / "keys.toml"
        if content:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match="--api-keys"):
            KeyStore.load(path)


@pytest.mark.parametrize("tenant", ["", "a b", "a\n", "x" * 65, "é"])
def test_bad_tenant_names(tenant: str) -> None:
    with pytest.raises(ConfigError):
        new_key(tenant)
