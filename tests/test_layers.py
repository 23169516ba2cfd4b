"""Who may import whom, and what keeps out of which process."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOTS = [name for name in ("server", "kernels", "retrieval", "bench") if (ROOT / name).is_dir()]

WORDS = {"types", "errors", "config"}
# Each part of server/, and the other roots, with the parts that it may import.
MAY_IMPORT = {
    "types": {"retrieval"},  # its words only: `retrieval/types.py` imports nothing
    "errors": set(),
    "config": {"errors"},
    "kernels": set(),
    "retrieval": WORDS,
    "telemetry": WORDS,
    "model": WORDS | {"kernels"},
    "engine": WORDS | {"model", "kernels"},
    "worker": WORDS | {"engine", "model", "stubs"},
    "text": WORDS,
    "backends": WORDS | {"stubs"},
    "gateway": WORDS | {"text", "backends", "retrieval", "telemetry"},
    "api": WORDS | {"gateway", "retrieval", "telemetry", "stubs"},
    "tuning": WORDS | {"gateway", "text", "model", "kernels"},
    "client": {"types", "errors", "stubs", "retrieval"},  # of retrieval its words, which import nothing
    "chat": {"client", "errors"},
    "demo": {"ask", "client", "errors", "ingest", "local", "stubs"},
    "flags": {"config"},
    # Asks the very functions that serving calls; stubs: prints the bounds that protos declare.
    "doctor": WORDS | {"kernels", "app", "api", "backends", "gateway", "model", "retrieval", "telemetry", "stubs"},
    "terminal": set(),
    "ingest": {"client", "errors", "stubs", "terminal"},
    "ask": {"client", "stubs", "terminal"},
    "local": {"errors"},
    "commands": {"ask", "client", "ingest", "local"},  # of the command line, a file for each subject
    "ending": set(),
    "app": WORDS | {"ending", "api", "gateway", "retrieval", "text", "backends", "model", "telemetry"},
    "start": WORDS | {"app", "ending", "backends", "model"},
    "cli": WORDS | {"start", "client", "chat", "commands", "doctor", "flags", "gateway", "worker"},
    "__main__": {"cli"},
    "bench": None,  # measures any part
}
TORCH_LIVES_IN = ("server/model/executors/", "server/tuning/", "kernels/", "bench/", "tests/")
# Functions that import when they run: what is optional, or slow and not always needed.
LATE_IMPORTS = {
    "bench/kernels.py": "PyTorch is no dependency: the benchmark says that it needs it",
    "bench/logits.py": "the same: the reference executor has said so before",
    "bench/peers/llama_cpp.py": "it is installed in the peer's own environment, where this file runs",
    "bench/peers/openvino.py": "the same",
    "bench/peers/vllm_cpu.py": "the same",
    "server/cli.py": "`millrace --version` must not wait for gRPC",
    "server/commands/documents.py": "as server/cli.py, which imports it",
    "server/commands/options.py": "the same: only tables need what draws them",
    "server/model/executors/__init__.py": "PyTorch is no dependency: the executor that needs it says so",
    "server/model/hub.py": "most models are directories, and the hub's library takes long to import",
    "server/start.py": "the worker is started before the rest of the gateway is imported, which takes as long",
    "server/worker/main.py": "tests of the worker give it another engine",
}
UNSAFE = {"pickle.load", "pickle.loads", "yaml.load", "torch.load", "marshal.loads"}


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str
    late: bool
    relative: bool


def sources() -> Iterator[tuple[str, ast.Module]]:
    for root in ROOTS:
        for path in sorted((ROOT / root).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def imports() -> Iterator[Import]:
    for file, tree in sources():
        inside = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            late = id(node) in inside
            if isinstance(node, ast.Import):
                yield from (Import(file, node.lineno, alias.name, late, False) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield Import(file, node.lineno, node.module or "", late, node.level > 0)


def part_of_file(file: str) -> str:
    root, _, rest = file.partition("/")
    return rest.split("/")[0].removesuffix(".py") if root == "server" else root


def part_of_module(module: str) -> str | None:
    """None: not ours."""
    match module.split("."):
        case ["millrace", "v1" | "engine", *_]:
            return "stubs"
        case ["millrace", "server", part, *_]:
            return part
        case ["millrace", root, *_]:
            return root
    return None


FOUND = list(imports())


def test_every_part_has_a_place() -> None:
    assert {part_of_file(file) for file, _ in sources()} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_down(part: str) -> None:
    allowed = MAY_IMPORT[part]
    if allowed is None:
        return
    wrong = [
        f"{i.file}:{i.line} imports {i.module}"
        for i in FOUND
        if part_of_file(i.file) == part and part_of_module(i.module) not in {None, part, *allowed}
    ]
    assert not wrong


def test_no_part_imports_itself_in_a_circle() -> None:
    """Between files: the graph of imports at load time has an order."""
    known = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file, _ in sources()}
    edges = {file: set() for file in known.values()}
    for i in FOUND:
        target = known.get(i.module.removeprefix("millrace."))
        if target and not i.late and target != i.file:
            edges[i.file].add(target)
    while leaves := {file for file, targets in edges.items() if not targets}:
        edges = {file: targets - leaves for file, targets in edges.items() if file not in leaves}
    assert not edges


def test_pytorch_stays_where_tensors_are() -> None:
    wrong = [i for i in FOUND if i.module.split(".")[0] == "torch" and not i.file.startswith(TORCH_LIVES_IN)]
    assert not wrong


def test_no_relative_imports() -> None:
    assert not [i for i in FOUND if i.relative]


def test_late_imports_are_listed() -> None:
    late = {i.file for i in FOUND if i.late}
    assert late == set(LATE_IMPORTS)


def test_nothing_is_unpickled() -> None:
    wrong = [
        f"{file}:{node.lineno}"
        for file, tree in sources()
        if not file.startswith("server/tuning/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE
    ]
    assert not wrong


def test_only_bindings_know_pybind11() -> None:
    users = {
        path.relative_to(ROOT).parts[1]
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and "pybind11" in path.read_text()
    }
    assert users <= {"bindings"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("server.app", {"torch", "transformers"}),
        ("server.api.server", {"torch", "transformers"}),
        ("server.worker.main", {"torch", "transformers", "jinja2"}),
        ("server.engine.scheduler", {"torch", "numpy"}),
        ("server.engine.blocks", {"torch", "numpy"}),
        ("server.engine.sequence", {"torch", "numpy"}),
        ("server.client", {"torch", "numpy", "pydantic", "rich"}),
        ("server.cli", {"torch", "numpy", "grpc", "uvloop"}),
        ("server.start", {"numpy", "grpc", "structlog", "tokenizers"}),
    ],
)
def test_process_stays_light(module: str, absent: set[str]) -> None:
    script = f"import sys, millrace.{module}; print(*sorted(set(sys.modules) & {absent!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
