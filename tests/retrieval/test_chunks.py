"""What the rows of chunks guard by themselves, whatever is asked of them."""

import numpy as np
from retrieval_fakes import document, library

from millrace.retrieval import catalog, chunks
from millrace.retrieval.database import transaction


async def test_labels_of_others_are_no_chunks_of_mine(tmp_path) -> None:
    async with library(tmp_path) as lib:
        for tenant in ("acme", "other"):
            await lib.upsert(tenant, "c", document("d", f"plans of {tenant}"))
        database = lib._database
        mine = await database.read(lambda db: catalog.find(db, "acme", "c"))
        assert await database.read(lambda db: chunks.present(db, mine, [2, 3, 1])) == [1]
        assert list(await database.read(lambda db: chunks.hydrate(db, mine, [1, 2, 3]))) == [1]
        found, vectors, damaged = await database.read(
            lambda db: chunks.vectors_of(db, mine, np.arange(4, dtype=np.uint64))
        )
        assert (found.tolist(), damaged) == ([1], [])
        assert vectors.shape == (1, 16)


async def test_vectors_of_a_model_that_was_given_up_are_not_taken(tmp_path) -> None:
    async with library(tmp_path) as lib:
        await lib.upsert("t", "c", document("d", "word1"))
        database = lib._database
        now = await database.read(lambda db: catalog.find(db, "t", "c"))
        query = "SELECT vector FROM chunks"
        before = await database.read(lambda db: db.execute(query).fetchall())

        def renew(db, collection):
            with transaction(db):
                chunks.renew(db, collection, [(1, b"input", b"vector")])

        await database.write(lambda db: renew(db, now._replace(embedder=now.embedder + 1)))
        assert await database.read(lambda db: db.execute(query).fetchall()) == before
        await database.write(lambda db: renew(db, now))
        assert await database.read(lambda db: db.execute(query).fetchall()) == [(b"vector",)]
