"""llama.cpp, built from the sources in llama-cpp-python's package: for AVX-512, and for AVX2 alone."""

import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from millrace.bench.likelihood import log_softmax, loss
from millrace.bench.peers.base import Peer, PeerError, Windows, call
from millrace.bench.peers.runner import serve
from millrace.bench.workload import Speeds, Workload

RELEASE = "0.3.36"
# Beside Q4_0 it keeps an embedding that is also the head as Q6_K, by itself; ours has int8 there, as OpenVINO has.
TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
# AMX stays out: that build died of an illegal instruction on the machine with tiles that it was tried on.
BUILDS = {
    "avx2": [],
    "avx512": [f"-DGGML_{name}=ON" for name in ("AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")],
}
OPTIONS = [
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=OFF", "-DLLAMA_OPENSSL=OFF",
    *(f"-DLLAMA_{part}=OFF" for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP", "BUILD_UI")),
]  # fmt: skip
TOOLS = ["llama-batched-bench", "llama-quantize"]
ATTEMPTS = 5  # to read its results: a thread of its own writes them, and the end of the process may come first
# The converter knows tokenizers by what they make of a text; ours is nobody's, and no text is read here.
CONVERTER = """
import runpy, sys
root = sys.argv.pop(1)
sys.path[:0] = [root, root + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[0] = "convert_hf_to_gguf.py"
runpy.run_path(root + "/convert_hf_to_gguf.py", run_name="__main__")
"""


class LlamaCpp(Peer):
    name = "llama-cpp"
    widths = ("bf16", "int8", "int4")
    isas = ("avx2", "avx512_bf16")
    int4_group = 32

    def install(self, work: Path) -> None:
        self.make_environment(work)
        self.pip(work, "install", "torch==2.13.0", "transformers==5.5.4", "sentencepiece", "pyyaml", "cmake", "ninja")
        # What its Python package imports; that itself stays where its sources are.
        self.pip(work, "install", "numpy", "typing_extensions", "diskcache", "jinja2")
        sources = self._root(work) / "sources"
        shutil.rmtree(self._root(work), ignore_errors=True)
        sources.mkdir(parents=True)
        package = f"llama-cpp-python=={RELEASE}"
        self.pip(work, "download", "--no-deps", "--no-binary", ":all:", package, "-d", str(sources))
        with tarfile.open(next(sources.glob("*.tar.gz"))) as archive:
            archive.extractall(sources, filter="data")
        for build, flags in BUILDS.items():
            self._build(work, build, ["-DBUILD_SHARED_LIBS=OFF", *flags], TOOLS)
        # What its Python package loads. The tools stay static: linked to it, one took 3 to 6 % more processor time.
        self._build(work, "library", ["-DBUILD_SHARED_LIBS=ON", *BUILDS[best_build()]], ["llama"])
        self.finish_environment(work)

    def _build(self, work: Path, build: str, flags: list[str], targets: list[str]) -> None:
        tools = self.python(work).parent
        cmake, to = str(tools / "cmake"), str(self._root(work) / build)
        ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
        call([cmake, "-S", str(self._sources(work)), "-B", to, "-G", "Ninja", ninja, *OPTIONS, *flags], work)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        call([cmake, "--build", to, "-j", jobs, "--target", *targets], work)

    def version(self, work: Path) -> str:
        return f"llama.cpp of llama-cpp-python {RELEASE}"

    def convert(self, checkpoint: Path, label: str, width: str, work: Path) -> Path:
        models = work / "gguf"
        models.mkdir(exist_ok=True)
        model = models / f"{label}-{width}.gguf"
        if not model.is_file():
            partial = model.with_suffix(".partial")
            if width == "bf16":
                arguments = [str(self._sources(work)), str(checkpoint), "--outtype", "bf16", "--outfile", str(partial)]
                call([str(self.python(work)), "-c", CONVERTER, *arguments], work)
            else:
                whole = self.convert(checkpoint, label, "bf16", work)
                quantize = self._root(work) / "avx2" / "bin" / "llama-quantize"
                call([str(quantize), str(whole), str(partial), TYPES[width]], work)
            partial.rename(model)
        return model

    def run(self, model: Path, width: str, threads: int, isa: str, workload: Workload, work: Path) -> Speeds:
        build = "avx2" if isa == "avx2" else best_build()
        program = self._root(work) / build / "bin" / "llama-batched-bench"

        def measure(prompt: int, output: int, batch: int) -> dict[str, float]:
            """What it printed; all in a process of its own."""
            context = batch * -(-(prompt + output) // 256) * 256  # it gives each sequence a multiple of 256
            command = [str(program), "-m", str(model), "-c", str(context), "-b", str(workload.step_tokens)]
            command += ["-t", str(threads), "-tb", str(threads), "--output-format", "jsonl"]
            command += ["-npp", str(prompt), "-ntg", str(output), "-npl", str(batch)]
            for _ in range(ATTEMPTS):
                rows = [json.loads(line) for line in call(command, work).splitlines() if line.startswith("{")]
                if rows:
                    return dict(rows[0])
            raise PeerError(f"{program.name} printed no results")

        speeds = Speeds()
        runs = [measure(workload.prefill, 1, 1) for _ in range(workload.repeats)]
        speeds.prefill = max(run["speed_pp"] for run in runs)
        for batch in workload.batches:
            runs = [
                measure(workload.decode_prompt, workload.decode_output, batch)
                for _ in range(workload.repeats_of(batch))
            ]
            speeds.decode[batch] = max(run["speed_tg"] for run in runs)
        # All prompts, then all outputs together: what its own server does at best.
        mixed = measure(workload.request_prompt, workload.request_output, workload.requests)
        speeds.mixed = workload.requests * workload.request_output / mixed["t"]
        return speeds

    def losses(self, model: Path, width: str, threads: int, windows: Windows, work: Path) -> list[float]:
        library = self._root(work) / "library" / "bin"
        variables = {"PYTHONPATH": str(self._package(work)), "LLAMA_CPP_LIB_PATH": str(library)}
        return self.run_scorer(model, threads, windows, work, variables)

    def _root(self, work: Path) -> Path:
        return work / "llama-cpp"

    def _sources(self, work: Path) -> Path:
        return self._package(work) / "vendor" / "llama.cpp"

    def _package(self, work: Path) -> Path:
        return self._root(work) / "sources" / f"llama_cpp_python-{RELEASE}"


def best_build() -> str:
    """Of BUILDS, for this machine."""
    return "avx512" if has_avx512() else "avx2"


def has_avx512() -> bool:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {"avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16"} <= set(flags)


def losses(model: Path, threads: int, windows: Windows) -> list[float]:
    from llama_cpp import Llama

    longest = max(map(len, windows))
    # Flash attention, which its own tools use and the Python package does not unless told.
    llama = Llama(
        str(model),
        n_ctx=longest,
        n_batch=longest,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        logits_all=True,
        verbose=False,
    )

    def of(window: Sequence[int]) -> float:
        llama.reset()
        llama.eval(window)
        return loss(log_softmax(llama.scores[: len(window) - 1]), window)

    return [of(window) for window in windows]


if __name__ == "__main__":
    serve(losses=losses)
