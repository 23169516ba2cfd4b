"""`millrace bench NAME`: the benchmarks of `millrace.bench`, each with options of its own."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

ANY = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def names() -> list[str]:
    """The benchmarks that can be run by themselves."""
    found = find_spec("millrace.bench")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    files = [path for folder in folders for path in Path(folder).glob("*.py")]
    return sorted(path.stem for path in files if '__name__ == "__main__"' in path.read_text())


def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="which; without one, all are listed")] = "--help",
) -> None:
    """Measure this machine and the engine on it: `millrace bench engine`, beside peers and the roof.

    Options after the name are the benchmark's: `millrace bench engine --help`.
    """
    known = names()
    if name in ("-h", "--help"):
        print("millrace bench NAME [OPTIONS]; `millrace bench NAME --help` tells what NAME measures and its options")
        print("\n".join(f"  {known_name}" for known_name in known))
        return
    if name not in known:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint="NAME")
    sys.argv = [f"millrace bench {name}", *context.args]
    runpy.run_module(f"millrace.bench.{name}", run_name="__main__")
