"""Translates between the words of the engine link and those of the engine."""

import struct
from collections.abc import Iterable, Sequence

from millrace.engine.v1 import engine_pb2 as pb
from millrace.server.engine.sequence import SequenceFinished, SequenceRequest, SequenceToken
from millrace.server.engine.texts import TextRequest, TextVector
from millrace.server.errors import InvalidRequest, RequestError
from millrace.server.types import (
    BackendInfo,
    CachePolicy,
    EmbedderInfo,
    EngineStats,
    FinishReason,
    Priority,
    Sampling,
)

MAX_WEIGHT = 1000

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.MAX_TOKENS: pb.FINISH_REASON_MAX_TOKENS,
    FinishReason.CONTEXT_LENGTH: pb.FINISH_REASON_CONTEXT_LENGTH,
    FinishReason.TIME_LIMIT: pb.FINISH_REASON_TIME_LIMIT,
}


def engine_info(info: BackendInfo, embedder: EmbedderInfo | None) -> pb.EngineInfo:
    return pb.EngineInfo(
        fingerprint=info.fingerprint,
        executor=info.executor,
        architecture=info.architecture,
        parameters=info.parameters,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        kv_block_size=info.kv_block_size,
        kv_total_blocks=info.kv_total_blocks,
        checkpoint_digest=info.checkpoint_digest,
        embedder=embedder_info(embedder) if embedder else None,
    )


def embedder_info(info: EmbedderInfo) -> pb.EmbedderInfo:
    return pb.EmbedderInfo(
        name=info.name,
        revision=info.revision,
        dimensions=info.dimensions,
        max_tokens=info.max_tokens,
        vocab_size=info.vocab_size,
    )


def sequence_requests(submit: pb.Submit, sequence_ids: Iterable[int]) -> list[SequenceRequest]:
    """One for each choice. Raises InvalidRequest."""
    prompt_ids = token_ids("prompt_ids_le32", submit.prompt_ids_le32)
    sampling = engine_sampling(submit.sampling)
    priority = submit.priority if submit.HasField("priority") else Priority.NORMAL
    weight = submit.tenant_weight if submit.HasField("tenant_weight") else 1.0
    if priority not in set(Priority):
        raise InvalidRequest.at("scheduling.priority", f"is {priority}, must be in [0, {max(Priority)}]")
    if not 0 < weight <= MAX_WEIGHT:
        raise InvalidRequest.at("tenant_weight", f"is {weight:g}, must be in (0, {MAX_WEIGHT}]")
    cache = submit.cache
    return [
        SequenceRequest(
            sequence_id=sequence_id,
            request_id=submit.request_id,
            tenant=submit.tenant,
            prompt_ids=prompt_ids,
            sampling=sampling,
            choice=choice.index,
            output_ids=token_ids("output_ids_le32", choice.output_ids_le32),
            resumes=submit.resumes,
            max_output_tokens=submit.max_output_tokens,
            min_output_tokens=submit.min_output_tokens,
            stop_token_ids=frozenset(submit.stop_token_ids),
            logprobs_top_n=submit.logprobs_top_n if submit.HasField("logprobs_top_n") else None,
            priority=Priority(priority),
            tenant_weight=weight,
            queue_timeout_us=submit.queue_timeout_us if submit.HasField("queue_timeout_us") else None,
            time_limit_us=submit.time_limit_us if submit.HasField("time_limit_us") else None,
            deadline_us=submit.deadline_us if submit.HasField("deadline_us") else None,
            cache=CachePolicy(not cache.bypass_read, not cache.bypass_write, cache.salt),
            watched=submit.watched,
        )
        for choice, sequence_id in zip(submit.choices, sequence_ids, strict=False)
    ]


def text_requests(embeds: Sequence[pb.Embed], sequence_ids: Iterable[int]) -> list[TextRequest]:
    """One for each text. Raises InvalidRequest."""
    return [
        TextRequest(
            sequence_id=sequence_id,
            request_id=embed.request_id,
            tenant=embed.tenant,
            token_ids=token_ids("token_ids_le32", embed.token_ids_le32),
            background=embed.background,
        )
        for embed, sequence_id in zip(embeds, sequence_ids, strict=False)
    ]


def token_ids(field: str, le32: bytes) -> tuple[int, ...]:
    """Raises InvalidRequest."""
    if len(le32) % 4:
        raise InvalidRequest.at(field, f"{len(le32)} bytes are no array of uint32")
    return struct.unpack(f"<{len(le32) // 4}I", le32)


def engine_sampling(sampling: pb.Sampling) -> Sampling:
    return Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        logit_bias=dict(sampling.logit_bias),
    )


def add_token(update: pb.StepUpdate, slot: int, token: SequenceToken) -> None:
    update.slots.append(slot)
    update.token_ids.append(token.token_id)
    if token.logprob is not None:
        update.logprobs.add(
            slot=slot, sampled=token.logprob, top_token_ids=token.top_ids, top_logprobs=token.top_logprobs
        )


def add_vector(update: pb.StepUpdate, slot: int, embedded: TextVector) -> None:
    update.embedded.add(slot=slot, vector_f32le=embedded.vector.astype("<f4", copy=False).tobytes())


def add_finished(update: pb.StepUpdate, slot: int, finished: SequenceFinished) -> None:
    if finished.error is not None and not finished.started:
        add_rejected(update, slot, finished.error)
        return
    message = update.finished.add(
        slot=slot,
        stop_token_id=finished.stop_token_id,
        queue_us=finished.queue_us,
        preemptions=finished.preemptions,
        cached_prompt_tokens=finished.cached_prompt_tokens,
    )
    if finished.error is not None:
        message.error_reason, message.error_message = finished.error.reason, finished.error.message
    elif finished.reason is not None:
        message.reason = FINISH_REASONS[finished.reason]


def add_rejected(update: pb.StepUpdate, slot: int, error: RequestError) -> None:
    message = update.rejected.add(
        slot=slot,
        reason=error.reason,
        message=error.message,
        metadata=error.metadata,
        retry_after_s=error.retry_after,
    )
    if isinstance(error, InvalidRequest):
        for violation in error.violations:
            message.violations.add(field=violation.field, description=violation.description)


def engine_stats(stats: EngineStats) -> pb.EngineStats:
    return pb.EngineStats(
        running=stats.running,
        waiting=stats.waiting,
        waiting_tokens=stats.waiting_tokens,
        free_blocks=stats.free_blocks,
        total_blocks=stats.total_blocks,
        prefill_tokens=stats.prefill_tokens,
        decode_tokens=stats.decode_tokens,
        step_us=stats.step_us,
        preemptions_total=stats.preemptions_total,
    )
