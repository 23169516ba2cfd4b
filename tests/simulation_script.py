"""What happens to a scheduler, as data: made from a seed, shrunk when it fails, kept in the corpus as JSON."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from simulation_device import VOCABULARY

CORPUS = Path(__file__).parent / "simulation" / "corpus"
HOUR = 3_600_000_000
Event = list[Any]  # a name and its values


@dataclass
class Script:
    """`setting` is what the scheduler is made with; events are executed in order."""

    setting: dict[str, Any]
    events: list[Event] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=None, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Script":
        return cls(**json.loads(path.read_text()))


def write_script(seed: int, steps: int = 300) -> Script:
    """The script of a seed: the same on every machine."""
    r = random.Random(seed)
    script = Script(write_setting(r))
    calm = r.choice((0.05, 0.15, 0.4, 0.9))  # arrivals per step
    faults = r.random() < 0.5
    arrivals = 0
    while sum(event[0] == "step" for event in script.events) < steps:
        if r.random() < calm:
            arrivals += 1
            script.events.append(["arrive", arrivals, write_request(r, script.setting)])
        if arrivals and r.random() < 0.06:
            recent = max(1, arrivals - r.choice((3, 30)))
            script.events.append(["cancel", r.randint(recent, arrivals), r.randrange(3)])
        if faults and r.random() < 0.04:
            script.events.append(write_fault(r, script.setting))
        script.events.append(["step", r.choice((1, 10, 10, 100, 100, 1000))])
    return script


def write_setting(r: random.Random) -> dict[str, Any]:
    max_model_len, block_size = r.randint(8, 40), r.randint(1, 5)
    queue = r.choice((2, 8, 100))
    return {
        "max_model_len": max_model_len,
        "block_size": block_size,
        "blocks": -(-max_model_len // block_size) + r.choice((0, 0, 2, 8, 20)),
        "depth": r.choice((1, 2, 2, 3)),
        "max_num_seqs": r.randint(1, 6),
        "max_num_batched_tokens": r.choice((r.randint(1, 16), r.randint(1, 16), 64)),
        "max_queued_requests": queue,
        "max_queued_tokens": queue * 10,
        "max_queued_of_tenant": r.choice((3, 1000)),
        "max_running_of_tenant": r.choice((1, 2, 1000)),
        "prefix_caching": r.random() < 0.8,
        "max_step_us": r.choice((None, 20, 200)),
        "ageing_us": r.choice((1_000, 20_000)),
        "weights": [r.choice((1.0, 1.0, 0.5, 3.0)) for _ in range(r.choice((1, 2, 3, 8)))],
        "idle_tenants": r.choice((2, 1000)),
    }


def write_request(r: random.Random, setting: dict[str, Any]) -> dict[str, Any]:
    length = r.randint(1, setting["max_model_len"] - 1)
    output = r.randint(1, 20)
    alike, stride = r.randint(0, length), r.choice((1, 1, 7))
    rare = lambda low, high: r.randint(low, high) if r.random() < 0.2 else None  # noqa: E731
    return {
        "prompt": [i * stride % VOCABULARY if i < alike else r.randrange(VOCABULARY) for i in range(length)],
        "tenant": r.randrange(len(setting["weights"])),
        "n": r.choice((1, 1, 1, 2, 3)),
        "seed": r.randrange(1 << 32),
        "max_output_tokens": output,
        "min_output_tokens": r.choice((0, r.randint(0, output))),
        "stop_token_ids": r.sample(range(VOCABULARY), r.choice((0, 3, 10))),
        "history": r.random() < 0.3,
        "priority": r.choice((0, 1, 1, 1, 2)),
        "queue_timeout_us": rare(1, 5_000),
        "time_limit_us": rare(1, 5_000),
        "deadline_us": rare(1, r.choice((60, 10_000))),
        "read": r.random() < 0.9,
        "write": r.random() < 0.9,
        "salt": r.choice(("", "", "", "x")),
        "given": r.choice((0, 0, 0, r.randint(1, 8))),  # tokens that it has from another worker
    }


def write_fault(r: random.Random, setting: dict[str, Any]) -> Event:
    return r.choice(
        (
            ["lose", r.randrange(1 << 16)],  # a step fails, and what it held runs again one by one
            ["break", r.randrange(1 << 16)],  # one row of a step is an error
            ["hold", r.randint(1, setting["blocks"])],  # blocks are in transfer for a while
            ["unhold"],
            ["jump", r.choice((-HOUR, HOUR))],
            ["repeat"],  # a completion comes a second time
            ["resubmit"],  # a live number is used again
        )
    )


def shrink(script: Script, fails: Callable[[Script], bool]) -> Script:
    """A script that still fails and from which no piece can be left out (delta debugging, Zeller 1999)."""
    size, before = len(script.events) // 2, len(script.events) + 1
    while size or len(script.events) < before:
        if not size:  # once more: what needed another piece may do without it now
            size, before = len(script.events) // 2 or 1, len(script.events)
        start = 0
        while start < len(script.events):
            shorter = Script(script.setting, script.events[:start] + script.events[start + size :])
            if fails(shorter):
                script = shorter
            else:
                start += size
        size //= 2
    return script
