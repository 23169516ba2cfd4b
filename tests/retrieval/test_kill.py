"""SIGKILL at random moments of ingestion: what was acknowledged is there, nothing is there by half."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from retrieval_audit import audit
from retrieval_fakes import library

from millrace.retrieval.index.auto import AutoIndex
from millrace.retrieval.types import SearchMode, SearchRequest

TESTS = Path(__file__).parent.parent
Texts = dict[tuple[str, str, str], str]


def killed_after(directory: Path, seed: int, seconds: float) -> list[list[str]]:
    """Run the ingester, kill it `seconds` after it is ready; return what it said."""
    command = [sys.executable, str(TESTS / "retrieval_ingester.py"), str(directory), str(seed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
        assert child.stdout
        assert child.stderr
        try:
            assert child.stdout.readline() == b"ready\n", child.stderr.read().decode()
            time.sleep(seconds)
            assert child.poll() is None, child.stderr.read().decode()
        finally:
            child.kill()
        lines = child.stdout.read().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]


def check(said: list[list[str]], before: Texts, after: Texts) -> int:
    """Every document is as its last acknowledged change left it, or as one begun and not acknowledged would have.

    Returns how many changes were acknowledged.
    """
    expected: dict[tuple[str, str, str], set[str | None]] = {key: {text} for key, text in before.items()}
    acknowledged = 0
    pending = []
    for line in said:
        if line[-1] != "done":
            pending.append(line)
            continue
        pending.remove(line[:-1])
        acknowledged += 1
        apply(expected, line, certain=True)
    for line in pending:
        apply(expected, line, certain=False)
    for key in expected.keys() | after.keys():
        assert after.get(key) in expected.get(key, {None}), key
    return acknowledged


def apply(expected: dict[tuple[str, str, str], set[str | None]], line: list[str], *, certain: bool) -> None:
    kind, tenant, collection, name, text = line[:5]
    if kind == "delete collection":
        keys = [key for key in expected if key[:2] == (tenant, collection)]
        outcome = None
    else:
        keys = [(tenant, collection, name)] if kind != "search" else []
        outcome = text if kind == "upsert" else None
    for key in keys:
        expected[key] = {outcome} | (set() if certain else expected.get(key, {None}))


async def check_indexes(directory: Path) -> None:
    """What a search by vector finds, image and all, is what an index built from the vectors finds."""
    stored = audit(directory)
    async with library(directory) as lib:
        for tenant, collection in {key[:2] for key in stored}:
            query = np.random.default_rng(0).standard_normal(16).astype("<f4")
            request = SearchRequest(
                collection, vector=query.tobytes(), top_k=100, candidates=1000, mode=SearchMode.VECTOR
            )
            hits = (await lib.search(tenant, request)).hits
            found = await lib._database.read(
                lambda db, key=(tenant, collection): db.execute(
                    "SELECT label, vector FROM chunks WHERE collection = "
                    "(SELECT id FROM collections WHERE tenant = ? AND name = ?)",
                    key,
                ).fetchall()
            )
            rebuilt = AutoIndex(16)
            rebuilt.add([label for label, _ in found], np.stack([np.frombuffer(v, "<f4") for _, v in found]))
            assert [hit.chunk.label for hit in hits] == rebuilt.search(query, 100).labels.tolist()
            assert {hit.chunk.document_id for hit in hits} <= {
                key[2] for key in stored if key[:2] == (tenant, collection)
            }


@pytest.mark.parametrize(
    "kills", [6, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["quick", "long"]
)
async def test_killed_at_random_moments(tmp_path, kills: int) -> None:
    moments = random.Random(kills)
    before: Texts = {}
    acknowledged = 0
    for seed in range(kills):
        said = killed_after(tmp_path, seed, moments.uniform(0, 0.6))
        after = {key: text for key, (text, _) in audit(tmp_path).items()}
        acknowledged += check(said, before, after)
        if seed % 4 == 3:
            await check_indexes(tmp_path)
        before = after
    assert acknowledged > 5 * kills
