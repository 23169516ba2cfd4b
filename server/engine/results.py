"""Reads what an executor returned."""

import numpy as np

from millrace.server.engine import loops
from millrace.server.engine.row import Row
from millrace.server.engine.sequence import SequenceToken
from millrace.server.model.executors.base import StepResult


def checked_result(rows: list[Row], result: StepResult) -> StepResult:
    """The result itself. ValueError unless every row that samples yielded one token or an error, and no other."""
    yielded, due = np.diff(result.offsets), loops.columns(rows)[3]
    due[list(result.errors)] = False
    if not np.array_equal(yielded, due):
        raise ValueError(
            f"the rows of a step should yield {due.astype(int).tolist()} tokens and yielded {yielded.tolist()}"
        )
    return result


def failed_row(error: Exception) -> StepResult:
    """The result of a step whose only row failed."""
    ids, reals, none = np.empty(0, np.int32), np.empty(0, np.float32), np.zeros(2, np.int32)
    return StepResult(none, ids, reals, none[:1], ids, reals, errors={0: repr(error)})


def row_tokens(result: StepResult) -> list[int]:
    """The token of each row; where a row yielded none the number has no meaning."""
    ids = [*result.token_ids.tolist(), -1]
    return [ids[offset] for offset in result.offsets[:-1].tolist()]


def sequence_tokens(rows: list[Row], accepted: list[int], tokens: list[int], result: StepResult) -> list[SequenceToken]:
    """The news of the accepted rows, log-probabilities where they were asked for."""
    news: list[SequenceToken] = []
    for row, token in zip(accepted, loops.tokens_of(rows, accepted, tokens), strict=True):
        news.append(token or token_with_logprobs(rows[row], result.offsets[row], tokens[row], result))
    return news


def token_with_logprobs(row: Row, at: int, token: int, result: StepResult) -> SequenceToken:
    top = slice(result.top_offsets[at], result.top_offsets[at + 1])
    ids, logprobs = result.top_token_ids[top].tolist(), result.top_logprobs[top].tolist()
    return SequenceToken(row.sequence.request.sequence_id, token, float(result.logprobs[at]), ids, logprobs)
