"""A worker process over the scripted engine: a program that tests start.

The settings' `model` says how it behaves: `slow-load`, `broken`, `buggy`, `noisy`, or a step time such as `0.02`.
"""

import sys
import time

from link_fakes import ScriptedEngine

from millrace.server.config import EngineConfig
from millrace.server.errors import CheckpointError
from millrace.server.worker.engine_thread import StepEngine
from millrace.server.worker.main import Progress, main


def load(config: EngineConfig, progress: Progress) -> StepEngine:
    progress(50, 200)
    progress(200, 200)
    match config.model:
        case "broken":
            raise CheckpointError("model.safetensors ends too early: fetch it again")
        case "buggy":
            raise KeyError("weights")
        case "slow-load":
            time.sleep(3600)
        case "noisy":
            print("a library says hello")
            print("[1, 2]", flush=True)
    return ScriptedEngine(step_seconds=float(config.model) if config.model[0].isdigit() else 0.002)


if __name__ == "__main__":
    main(sys.argv[1:], load)
