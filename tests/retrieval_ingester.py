"""A process that ingests until it is killed: python retrieval_ingester.py DIRECTORY SEED.

Prints a line of JSON when an operation begins and the same line with "done" after it was acknowledged.
"""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
from retrieval_fakes import document, library, prose

from millrace.retrieval import indexes
from millrace.retrieval.types import SearchRequest
from millrace.server.errors import CollectionNotFound

WORDS = [f"word{n}" for n in range(300)]
TENANTS = ("acme", "other")


async def main(directory: Path, seed: int) -> None:
    indexes.LEAST_CHANGES = 20  # images are written all the time
    random = np.random.default_rng(seed)
    async with library(directory) as lib:
        print("ready", flush=True)
        for step in range(10**6):
            await asyncio.gather(*(work(lib, tenant, random, f"{seed}-{step}") for tenant in TENANTS))


async def work(lib, tenant: str, random: np.random.Generator, mark: str) -> None:
    collection, name = f"c{random.integers(0, 2)}", f"d{random.integers(0, 12)}"
    kind = random.choice(["upsert", "upsert", "upsert", "upsert", "delete", "delete collection", "search"])
    text = f"{mark} {prose(WORDS, int(random.integers(1, 250)), int(random.integers(0, 20)))}"
    entry = [kind, tenant, collection, name, text]
    print(json.dumps(entry), flush=True)
    try:
        match kind:
            case "upsert":
                metadata = {"mark": mark, "list": ("a", mark), "number": len(text), "flag": True}
                await lib.upsert(tenant, collection, document(name, text, metadata=metadata))
            case "delete":
                await lib.delete_documents(tenant, collection, [name])
            case "delete collection":
                await lib.delete_collection(tenant, collection)
            case "search":
                await lib.search(tenant, SearchRequest(collection, text[:100]))
    except CollectionNotFound:
        pass
    print(json.dumps([*entry, "done"]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
