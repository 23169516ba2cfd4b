"""OpenVINO GenAI: its ContinuousBatchingPipeline on weights that optimum-intel has exported."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millrace.bench.likelihood import log_softmax, loss
from millrace.bench.peers.base import Peer, Windows, call
from millrace.bench.peers.runner import serve, timed
from millrace.bench.workload import Speeds, Workload

GROUP = 128
# bf16 is an fp16 file: the runtime computes in bfloat16 where the machine has it, whatever the file holds.
FORMATS = {"bf16": ["fp16"], "int8": ["int8"], "int4": ["int4", "--group-size", str(GROUP)]}


class OpenVINO(Peer):
    name = "openvino"
    widths = ("bf16", "int8", "int4")
    int4_group = GROUP

    def install(self, work: Path) -> None:
        self.make_environment(work)
        self.pip(work, "install", "torch==2.13.0", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0")
        # One that comes along for CUDA's PyTorch fails to import beside the CPU's; nothing here needs it.
        self.pip(work, "uninstall", "-y", "torchvision")
        self.finish_environment(work)

    def version(self, work: Path) -> str:
        code = "import importlib.metadata as m; print(m.version('openvino-genai'))"
        return f"OpenVINO GenAI {call([str(self.python(work)), '-c', code], work).strip()}"

    def convert(self, checkpoint: Path, label: str, width: str, work: Path) -> Path:
        model = work / "openvino" / f"{label}-{width}"
        if not model.is_dir():
            partial = model.with_name(f"{model.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            command = [str(self.python(work).with_name("optimum-cli")), "export", "openvino"]
            command += ["--model", str(checkpoint), "--task", "text-generation-with-past"]
            command += ["--disable-convert-tokenizer", "--weight-format", *FORMATS[width], str(partial)]
            call(command, work)
            partial.rename(model)
        return model

    def run(self, model: Path, width: str, threads: int, isa: str, workload: Workload, work: Path) -> Speeds:
        return self.run_stepper(model, threads, workload, work, {})

    def losses(self, model: Path, width: str, threads: int, windows: Windows, work: Path) -> list[float]:
        return self.run_scorer(model, threads, windows, work, {})


class Pipeline:
    """A Stepper."""

    def __init__(self, model: Path, threads: int, workload: Workload):
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = workload.step_tokens
        scheduler.max_num_seqs = workload.sequences
        scheduler.cache_size = 2  # GiB
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self._handles: dict[int, Any] = {}

    def add(self, request: int, prompt: Sequence[int], output_tokens: int) -> None:
        import numpy
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = openvino.Tensor(numpy.array([prompt], numpy.int64))
        self._handles[request] = self._pipeline.add_request(request, ids, config)

    def step(self) -> list[int]:
        self._pipeline.step()
        found: list[int] = []
        for request, handle in self._handles.items():
            if handle.can_read():
                found += [request] * sum(len(output.generated_ids) for output in handle.read().values())
        if not self._pipeline.has_non_finished_requests():
            self._handles.clear()
        return found


def losses(model: Path, threads: int, windows: Windows) -> list[float]:
    """By the plugin beneath the pipeline, which itself keeps no logits but those after the last token."""
    import numpy
    import openvino

    properties = {"INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(model / "openvino_model.xml", "CPU", properties).create_infer_request()

    def of(window: Sequence[int]) -> float:
        ids = numpy.array([window], numpy.int64)
        inputs = {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "beam_idx": numpy.zeros(1, numpy.int32)}
        request.reset_state()
        logits = request.infer(inputs | {"position_ids": numpy.arange(len(window))[None]})["logits"][0]
        return loss(log_softmax(logits[:-1]), window)

    return [of(window) for window in windows]


if __name__ == "__main__":
    serve(speeds=timed(Pipeline), losses=losses)
