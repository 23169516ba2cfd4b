"""Which peers a benchmark runs: those it is asked for, or those that are there."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from millrace.bench.peers.registry import PEERS


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: names with commas between them."""

    def split(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(f"there is no {min(unknown)!r}; there are {', '.join(known)}")
        return found

    return split


def chosen(asked: Sequence[str] | None, work: Path, tell: Callable[[str], object]) -> list[str]:
    """Those asked for, installed now if they are not; for None those that are installed. Raises PeerError."""
    found = []
    for name in PEERS if asked is None else asked:
        peer = PEERS[name]
        if not peer.installed(work):
            if asked is None:
                tell(f"{name} is not installed: python -m millrace.bench.peers {name} --work-dir {work}")
                continue
            tell(f"{name}: installing, which takes minutes")
            peer.install(work)
        found.append(name)
    return found
