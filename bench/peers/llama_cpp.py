"""llama.cpp, built from the sources in llama-cpp-python's package: for AVX-512, and for AVX2 alone."""

import json
import os
import shutil
import tarfile
from pathlib import Path

from millrace.bench.peers.base import Peer, PeerError, call
from millrace.bench.workload import Speeds, Workload

RELEASE = "0.3.36"
TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
# AMX stays out: that build died of an illegal instruction on the machine with tiles that it was tried on.
BUILDS = {
    "avx2": [],
    "avx512": [f"-DGGML_{name}=ON" for name in ("AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")],
}
OPTIONS = [
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=OFF", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF",
    *(f"-DLLAMA_{part}=OFF" for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP", "BUILD_UI")),
]  # fmt: skip
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

    def install(self, work: Path) -> None:
        self.make_environment(work)
        self.pip(work, "install", "torch==2.13.0", "transformers==5.5.4", "sentencepiece", "pyyaml", "cmake", "ninja")
        sources = self._root(work) / "sources"
        shutil.rmtree(self._root(work), ignore_errors=True)
        sources.mkdir(parents=True)
        package = f"llama-cpp-python=={RELEASE}"
        self.pip(work, "download", "--no-deps", "--no-binary", ":all:", package, "-d", str(sources))
        with tarfile.open(next(sources.glob("*.tar.gz"))) as archive:
            archive.extractall(sources, filter="data")
        for build, flags in BUILDS.items():
            self._build(work, build, flags)
        self.finish_environment(work)

    def _build(self, work: Path, build: str, flags: list[str]) -> None:
        tools = self.python(work).parent
        cmake, to = str(tools / "cmake"), str(self._root(work) / build)
        ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
        call([cmake, "-S", str(self._sources(work)), "-B", to, "-G", "Ninja", ninja, *OPTIONS, *flags], work)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        call([cmake, "--build", to, "-j", jobs, "--target", "llama-batched-bench", "llama-quantize"], work)

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
        build = "avx2" if isa == "avx2" or not has_avx512() else "avx512"
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

    def _root(self, work: Path) -> Path:
        return work / "llama-cpp"

    def _sources(self, work: Path) -> Path:
        return self._root(work) / "sources" / f"llama_cpp_python-{RELEASE}" / "vendor" / "llama.cpp"


def has_avx512() -> bool:
    """Whether this machine runs the build of that name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {"avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16"} <= set(flags)
