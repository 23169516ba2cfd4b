"""The lexical stage: from a question to BM25 over the collection's full-text table."""

import sqlite3
import unicodedata
from typing import NamedTuple

from millrace.retrieval.filters import Where
from millrace.retrieval.schema import fulltext

MAX_TERMS = 64  # of one question; later words are left out
CONTEXT_WEIGHT = 0.5  # of a word in title or headings, where one in the text has 1

# English words that say nothing of what a text is about, and the pieces that "don't" and "we'll" fall into.
SMALL_WORDS = """
a about after all also am an and any are as at be because been before being but by can could d did do does doing don
for from had has have having he her here hers him his how i if in into is isn it its just ll m may me might more most
must my no nor not of off on once only or other our ours out over own re s shall she should so some such t than that
the their theirs them then there these they this those through to too under until up ve very was we were what when
where which while who whom whose why will with would you your yours
"""
STOP_WORDS = frozenset(SMALL_WORDS.split())


class Ranked(NamedTuple):
    """Best first."""

    labels: list[int]
    scores: list[float]


def terms(question: str) -> list[str]:
    """The words to look for, each once, lower case: stop words only if there is nothing else.

    A word is a run of letters, digits and the marks that belong to them, in any script.
    """
    spaced = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in question)
    words = list(dict.fromkeys(word for word in spaced.lower().split() if any(map(str.isalnum, word))))
    return ([word for word in words if word not in STOP_WORDS] or words)[:MAX_TERMS]


def match_expression(question: str) -> str:
    """An FTS5 query: any of the words. Each is quoted, so that none is an operator, a column or an error.

    Empty where the question has no word; FTS5 has no expression for that.
    """
    return " OR ".join(f'"{word}"' for word in terms(question))


def search(db: sqlite3.Connection, collection: int, question: str, k: int, where: Where) -> Ranked:
    """The k best chunks of a collection that pass the filter, by BM25 (higher is better), equals by label."""
    expression = match_expression(question)
    if not expression:
        return Ranked([], [])
    table = fulltext(collection)
    # The plus keeps the filter out of FTS5, which would run the query once for each label.
    allowed = f"AND +rowid IN ({where.labels})" if where.labels else ""
    rows = db.execute(
        f"SELECT rowid, -rank FROM {table} WHERE {table} MATCH ? "
        f"AND rank MATCH 'bm25(1.0, {CONTEXT_WEIGHT})' {allowed} ORDER BY rank, rowid LIMIT ?",
        (expression, *where.values, k),
    ).fetchall()
    return Ranked([label for label, _ in rows], [score for _, score in rows])
