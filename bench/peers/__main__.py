"""Install other engines to compare with: `python -m millrace.bench.peers [NAME ...]`.

Each gets a virtual environment of its own under the work directory, from PyPI; llama.cpp is compiled there. About
10 GB and, on two cores, twenty-five minutes. PyTorch comes from where pip finds it: point PIP_EXTRA_INDEX_URL at its
index of CPU builds to save the download of CUDA's.
"""

import argparse
import sys
from pathlib import Path

from millrace.bench.checkpoints import work_directory
from millrace.bench.peers.base import PeerError
from millrace.bench.peers.registry import PEERS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m millrace.bench.peers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PEERS)}; default: those not installed")
    parser.add_argument("--work-dir", type=Path, default=work_directory(), help="default: %(default)s")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - PEERS.keys()
    if unknown:
        parser.error(f"there is no peer {min(unknown)!r}; there are {', '.join(PEERS)}")
    work = arguments.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in arguments.names or [name for name, peer in PEERS.items() if not peer.installed(work)]:
        print(f"{name}: installing into {PEERS[name].environment(work)}", flush=True)
        try:
            PEERS[name].install(work)
        except PeerError as error:
            print(f"{name}: cannot be installed: {error}", file=sys.stderr)
            failed = True
        else:
            print(f"{name}: {PEERS[name].version(work)}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
