"""Translates between the words of the engine link and those of the gateway."""

import struct
from collections.abc import Mapping, Sequence

from millrace.engine.v1 import engine_pb2 as pb
from millrace.server.errors import FieldViolation, InvalidRequest, RequestError, from_reason
from millrace.server.types import (
    BackendInfo,
    EmbedderInfo,
    EmbedRequest,
    EngineStats,
    Finish,
    FinishReason,
    Logprobs,
    Sampling,
    TokenRequest,
)

FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_MAX_TOKENS: FinishReason.MAX_TOKENS,
    pb.FINISH_REASON_CONTEXT_LENGTH: FinishReason.CONTEXT_LENGTH,
    pb.FINISH_REASON_TIME_LIMIT: FinishReason.TIME_LIMIT,
}


def link_submit(request: TokenRequest, slots: Mapping[int, int]) -> pb.Submit:
    """Choice i runs in slots[i]."""
    outputs = request.outputs or {}
    return pb.Submit(
        request_id=request.request_id,
        tenant=request.tenant,
        prompt_ids_le32=le32(request.prompt_ids),
        choices=[
            pb.Choice(slot=slot, index=index, output_ids_le32=le32(outputs.get(index, ())))
            for index, slot in slots.items()
        ],
        sampling=link_sampling(request.sampling),
        max_output_tokens=request.max_output_tokens,
        min_output_tokens=request.min_output_tokens,
        stop_token_ids=sorted(request.stop_token_ids),
        logprobs_top_n=request.logprobs_top_n,
        watched=request.watched,
        priority=request.priority,
        tenant_weight=request.tenant_weight,
        queue_timeout_us=microseconds(request.queue_timeout),
        time_limit_us=microseconds(request.time_limit),
        deadline_us=microseconds(request.deadline),
        cache=pb.CachePolicy(
            bypass_read=not request.cache.read, bypass_write=not request.cache.write, salt=request.cache.salt
        ),
        resumes=request.resumes,
    )


def microseconds(seconds: float | None) -> int | None:
    return None if seconds is None else max(0, round(1e6 * seconds))


def link_embeds(request: EmbedRequest, slots: Sequence[int]) -> list[pb.Embed]:
    """Text i is embedded in slots[i]."""
    return [
        pb.Embed(
            slot=slot,
            request_id=request.request_id,
            tenant=request.tenant,
            token_ids_le32=le32(text),
            background=request.background,
        )
        for slot, text in zip(slots, request.texts, strict=True)
    ]


def le32(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def link_sampling(sampling: Sampling) -> pb.Sampling:
    return pb.Sampling(
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


def backend_info(info: pb.EngineInfo) -> BackendInfo:
    return BackendInfo(
        fingerprint=info.fingerprint,
        executor=info.executor,
        architecture=info.architecture,
        parameters=info.parameters,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        kv_block_size=info.kv_block_size,
        kv_total_blocks=info.kv_total_blocks,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        checkpoint_digest=info.checkpoint_digest,
    )


def embedder_info(info: pb.EngineInfo) -> EmbedderInfo | None:
    if not info.HasField("embedder"):
        return None
    embedder = info.embedder
    return EmbedderInfo(
        name=embedder.name,
        revision=embedder.revision,
        dimensions=embedder.dimensions,
        max_tokens=embedder.max_tokens,
        vocab_size=embedder.vocab_size,
    )


def engine_stats(step: int, stats: pb.EngineStats) -> EngineStats:
    return EngineStats(
        step=step,
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


def token_logprobs(entry: pb.SlotLogprobs) -> Logprobs:
    return Logprobs(len(entry.top_token_ids), [entry.sampled], list(entry.top_token_ids), list(entry.top_logprobs))


def token_finish(finished: pb.Finished) -> Finish:
    stop_token_id = finished.stop_token_id if finished.HasField("stop_token_id") else None
    return Finish(FINISH_REASONS[finished.reason], stop_token_id=stop_token_id)


def rejection(rejected: pb.Rejected) -> RequestError:
    error = from_reason(rejected.reason, rejected.message, dict(rejected.metadata))
    if rejected.HasField("retry_after_s"):
        error.retry_after = rejected.retry_after_s
    if isinstance(error, InvalidRequest):
        error.violations = tuple(FieldViolation(v.field, v.description) for v in rejected.violations)
    return error
