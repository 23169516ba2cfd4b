"""How much memory this process can still get."""

import os
from collections.abc import Iterable
from pathlib import Path

# Limit, use and statistics of the control group, as containers see them: version 2, then version 1.
GROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes: what the machine has free or can reclaim, or less where a control group allows less."""
    return min([_machine(root), *_groups(root / "sys/fs/cgroup")])


def _machine(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _groups(mount: Path) -> Iterable[int]:
    for limit, use, statistics in GROUPS:
        try:
            allowed, used = (mount / limit).read_text().strip(), int((mount / use).read_text())
            lines = (mount / statistics).read_text().splitlines()
        except OSError:
            continue
        if allowed != "max":
            reclaimable = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
            yield max(int(allowed) - used + reclaimable, 0)
