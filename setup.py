"""Maps the top-level folders to `millrace.*`, generates the gRPC stubs and builds the native extension.

`pyproject.toml` holds the metadata; this file holds only what needs code.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
ROOTS = ("server", "kernels", "retrieval", "bench")
STUBS = {"millrace.v1": "proto/millrace/v1", "millrace.engine.v1": "proto/millrace/engine/v1"}


def present(roots: tuple[str, ...]) -> list[str]:
    return [root for root in roots if (HERE / root).is_dir()]


class GenerateStubs(Command):
    """Run protoc over `proto/`; the stubs land beside their sources and are not committed."""

    description = "generate the Python gRPC stubs"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        import google.rpc  # ships google/rpc/*.proto beside its Python modules
        import grpc_tools
        from grpc_tools import protoc

        well_known = Path(grpc_tools.__file__).parent / "_proto"
        googleapis = Path(next(iter(google.rpc.__path__))).parent.parent
        sources = sorted(str(p.relative_to(HERE / "proto")) for p in (HERE / "proto").rglob("*.proto"))
        out = HERE / "proto"
        self.remove_stale(out)
        flags = [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
        includes = [f"-I{HERE / 'proto'}", f"-I{well_known}", f"-I{googleapis}"]
        if protoc.main(["protoc", *includes, *flags, *sources]) != 0:
            raise SystemExit("setup.py: protoc failed; its message is above")

    @staticmethod
    def remove_stale(out: Path) -> None:
        """Stubs whose source is gone would otherwise live on in every later wheel."""
        for stub in out.rglob("*_pb2*.py*"):
            if not stub.with_name(stub.name.split("_pb2")[0] + ".proto").exists():
                stub.unlink()

    def get_source_files(self) -> list[str]:
        return sorted(str(p.relative_to(HERE)) for p in (HERE / "proto").rglob("*.proto"))

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar = [("generate_stubs", None), *build.sub_commands]


class CMakeBuild(build_ext):
    """One CMake build makes every extension; setuptools copies them where the install wants them."""

    def build_extensions(self) -> None:
        import pybind11

        cmake, ninja = self.find("cmake"), self.find("ninja")
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        output = Path(self.build_lib).resolve() / "millrace"
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake, "-S", str(HERE), "-B", str(work), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            # Said every time: an isolated build's ninja is gone by the next build, the cache remembers it.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMILLRACE_OUTPUT_DIR={output}",
            f"-DMILLRACE_EXT_SUFFIX={suffix}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(work), "-j", jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "setup.py: the native build failed; its message is above. "
                "It needs a C++20 compiler (Debian: apt-get install g++) and the Python headers (python3-dev)."
            ) from error

    @staticmethod
    def find(tool: str) -> str:
        """The environment's own tool before the system's, also when the environment is not activated."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        found = shutil.which(tool, path=path)
        if found is None:
            raise SystemExit(f"setup.py: `{tool}` is missing: pip install {tool}")
        return found


packages = [
    *STUBS,
    "millrace.examples",
    *(f"millrace.{root}" for root in present(ROOTS)),
    *(f"millrace.{root}.{name}" for root in present(ROOTS) for name in find_packages(root)),
]

setup(
    packages=packages,
    package_dir={f"millrace.{root}": root for root in (*present(ROOTS), "examples")} | STUBS,
    package_data={
        "": ["py.typed", "*.pyi", "*.proto", "*.json", "*.safetensors", "*.jinja"],
        "millrace.examples": ["docs/*", "questions.jsonl"],
    },
    ext_modules=[Extension("millrace.kernels._C", [])],
    cmdclass={"build": Build, "build_ext": CMakeBuild, "generate_stubs": GenerateStubs},
)
