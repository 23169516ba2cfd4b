"""The package as others get it: from a source distribution, as a wheel installed elsewhere, without PyTorch."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from millrace.server.local import local_server

ROOT = Path(__file__).parent.parent
SITE = Path(sysconfig.get_path("purelib"))
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
FOLDERS = ("proto", "server", "kernels", "retrieval", "bench")
MODULES = "millrace.kernels._C, millrace.server.client, millrace.v1.model_pb2, millrace.engine.v1.engine_pb2"
FILES = f"print({', '.join(f'{module.strip()}.__file__' for module in MODULES.split(','))})"
ONLY_STUBS = (
    "import importlib.util as u, runpy, sys; assert u.find_spec('millrace.server') is None;"
    "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")

slow = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*command: object, cwd: Path, check: bool = True, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MILLRACE_"))}
    # The build's own tools, as an isolated build has them.
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0 or not check, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would hand to somebody: no generated file, nothing built."""
    copy = tmp_path_factory.mktemp("checkout")
    listed = run(
        "git", "ls-files", "--cached", "--others", "--exclude-per-directory=.gitignore", cwd=ROOT
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    script = f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})"
    run(sys.executable, "-c", script, cwd=checkout)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in isolation: only `build-system.requires` is there."""
    out = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-deps", "--wheel-dir", out, sdist, cwd=out)
    return next(out.glob("*.whl"))


@dataclass(frozen=True)
class Environment:
    """A virtual environment that shares our dependencies, but neither our package nor PyTorch."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> "Environment":
        venv.create(directory / "venv", with_pip=False)
        made = cls(directory)
        (directory / "deps").mkdir()
        made.share(lambda name: not name.startswith(("torch", "millrace", "__editable__", "distutils-precedence")))
        site = next((directory / "venv").glob("lib/python*/site-packages"))
        (site / "deps.pth").write_text(f"{directory / 'deps'}\n")
        return made

    def share(self, wanted) -> None:
        for entry in SITE.iterdir():
            if wanted(entry.name) and not entry.name.endswith(".pth"):
                (self.directory / "deps" / entry.name).symlink_to(entry)

    @property
    def python(self) -> Path:
        return self.directory / "venv" / "bin" / "python"

    def install(self, *what: object, **options: str) -> None:
        run(*PIP, "--python", self.python, "install", "--no-deps", *what, cwd=self.directory, **options)

    def run(self, *command: object, **options) -> "subprocess.CompletedProcess[str]":
        return run(self.python, *command, cwd=self.directory, **options)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment.make(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    return environment


class TestBuilt:
    pytestmark = slow

    def test_source_distribution(self, sdist: Path) -> None:
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert {"CMakeLists.txt", "csrc/bindings/module.cpp", "proto/millrace/v1/generation.proto"} <= names
        assert not [n for n in names if n.startswith("tests") or "_pb2" in n or n.endswith(".so")]

    def test_wheel_holds_what_serving_needs(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        stubs = {
            f"millrace/{proto.relative_to(ROOT / 'proto' / 'millrace').with_suffix('')}{suffix}"
            for proto in (ROOT / "proto").rglob("*.proto")
            for suffix in (".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
        }
        model = {
            f"millrace/server/model/builtin/{path.name}"
            for path in (ROOT / "server/model/builtin").iterdir()
            if path.suffix in (".json", ".safetensors", ".jinja")
        }
        typed = {f"millrace/{part}/py.typed" for part in ("server", "kernels", "v1", "engine/v1")}
        assert "millrace/server/model/builtin/model.safetensors" in model
        assert stubs | model | typed | {f"millrace/kernels/_C{SUFFIX}"} <= names
        assert {name.split("/")[0].split("-")[0] for name in names} == {"millrace"}
        assert not [n for n in names if "test" in n.lower() or n == "millrace/__init__.py"]

    def test_command(self, installed: Environment) -> None:
        command = installed.python.with_name("millrace")
        assert run(command, "--version", cwd=installed.directory).stdout.startswith("millrace 0.")

    def test_import_path_is_file_path(self, installed: Environment) -> None:
        script = f"import importlib.util as u, {MODULES}; assert not any(map(u.find_spec, {FOLDERS})); {FILES}"
        site = installed.python.parent.parent
        assert all(Path(file).is_relative_to(site) for file in installed.run("-c", script).stdout.split())

    def test_the_reference_executor_says_what_to_install(self, installed: Environment) -> None:
        flags = ("--port", "0", "--metrics-port", "0", "--executor", "reference")
        done = installed.run("-m", "millrace.server.cli", "serve", *flags, check=False)
        complaints = [line for line in done.stderr.splitlines() if line.startswith("millrace:")]
        assert done.returncode == 1, done.stderr
        assert len(complaints) == 1, done.stderr
        assert "pip install torch" in complaints[0]
        assert "Traceback" not in done.stdout + done.stderr

    def test_types_of_the_wheel(self, installed: Environment) -> None:
        """mypy finds the package typed, its stubs too."""
        script = installed.directory / "caller.py"
        script.write_text(
            "from millrace.server.client import Client\n"
            "with Client() as client:\n"
            "    reveal_type(client.generate('hello', temperature=0.5).usage.output_tokens)\n"
        )
        options = ("--python-executable", installed.python, "--cache-dir", installed.directory / "cache")
        config = ("--config-file", os.devnull, "--ignore-missing-imports")
        done = run(sys.executable, "-m", "mypy", *options, *config, script, cwd=installed.directory, check=False)
        assert 'Revealed type is "int"' in done.stdout.replace("builtins.", ""), done.stdout

    def test_demo_of_the_wheel_without_pytorch(self, installed: Environment) -> None:
        done = installed.run("-m", "millrace.server.demo")
        assert "tokens/s" in done.stdout

    def test_client_of_a_stranger(self, tmp_path: Path) -> None:
        """Stubs made from `proto/` by plain protoc, where nothing of ours is installed."""
        environment = Environment.make(tmp_path)
        stubs = tmp_path / "stubs"
        stubs.mkdir()
        protos = sorted((ROOT / "proto/millrace/v1").glob("*.proto"))
        out = (f"--python_out={stubs}", f"--grpc_python_out={stubs}")
        environment.run("-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *out, *protos)
        with local_server(f"--data-dir={tmp_path / 'data'}") as address:
            client = ("-c", ONLY_STUBS, ROOT / "examples/plain_client.py", address, "A queue keeps")
            assert environment.run(*client, PYTHONPATH=str(stubs)).stdout.strip()

    def test_editable(self, checkout: Path, tmp_path: Path) -> None:
        environment = Environment.make(tmp_path)
        quick = "-DCMAKE_CXX_FLAGS_RELEASE=-O1"  # the wheel has been built as users build it
        environment.install("--no-build-isolation", "--editable", checkout, CMAKE_ARGS=quick)
        files = environment.run("-c", f"import {MODULES}; {FILES}").stdout.split()
        assert all(Path(file).is_relative_to(checkout) for file in files)


def test_folders_are_portions_of_one_namespace() -> None:
    """With an `__init__.py` of its own, `kernels/` would be what transformers imports under that name."""
    assert not [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()]
    assert not (ROOT / "conftest.py").exists()
    script = f"import importlib.util as u; print([s.origin for n in {FOLDERS} if (s := u.find_spec(n))])"
    origins = run(sys.executable, "-c", script, cwd=ROOT).stdout
    assert set(origins.strip("[]\n").split(", ")) <= {"None", ""}


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_imports_beside_our_folders() -> None:
    run(sys.executable, "-W", "ignore", "-c", "import transformers; transformers.LlamaConfig()", cwd=ROOT)
