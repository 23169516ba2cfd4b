"""Programs whose output must not depend on the hashes of strings."""

import os
import subprocess
import sys


def outputs_under_hash_seeds(*arguments: str) -> set[str]:
    """What `python arguments` prints under each of several hash seeds."""
    return {
        subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "12345")
    }
