import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hash_seeds import outputs_under_hash_seeds
from simulation_bugs import BUGS
from simulation_script import CORPUS, Script, shrink, write_script
from simulation_world import World

SOAK = Path(__file__).parent / "soak.py"
ENGINE = Path(__file__).parent.parent.parent / "server" / "engine"
JUDGED = (
    *("admission", "budget", "deadlines", "heap", "plan", "preemption"),
    *("queue", "running", "scheduler", "sharing", "step_time", "tenants"),
)
ENDS = ("stop", "max_tokens", "context_length", "time_limit", "cancelled", "preempted", "lost", "repeated")
REFUSALS = ("QueueFull", "TenantQueueFull", "QueueTimeout", "DeadlineExceeded", "DeadlineUnattainable", "InternalError")


def soak(*arguments, **environment):
    result = subprocess.run(
        [sys.executable, str(SOAK), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_seeds_violate_nothing():
    told = soak("--seeds", 1000, "--steps", 300)
    counts = {name: int(count) for name, count in re.findall(r"(\w+) (\d+)", told)}
    assert "1000 seeds x 300 steps" in told
    assert "0 failed" in told
    assert all(counts.get(name, 0) > 200 for name in ENDS + REFUSALS), "something hardly ever happens"


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_what_failed_once_fails_no_more(path):
    World(Script.load(path)).run()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_noticed(bug):
    for seed in range(2000):
        world = World(write_script(seed))
        bug(world)
        try:
            world.run()
        except Exception:
            return
    pytest.fail("2,000 seeds saw nothing")


def test_a_failing_script_is_shrunk_to_what_it_takes(tmp_path):
    (bug,) = (bug for bug in BUGS if bug.__name__ == "a_cancelled_one_that_was_turned_away_has_a_last_word")

    def fails(script):
        world = World(script)
        bug(world)
        try:
            world.run()
        except AssertionError as error:
            return "two ends" in str(error)
        return False

    script = next(script for script in (write_script(seed, 60) for seed in range(2000)) if fails(script))
    small = shrink(script, fails)
    assert fails(small)
    assert {event[0] for event in small.events} <= {"arrive", "cancel", "step"}
    assert len(small.events) < len(script.events) / 3
    small.save(tmp_path / "script.json")
    assert Script.load(tmp_path / "script.json") == small
    World(small).run()


def test_one_seed_is_one_trace_whatever_the_hash_seed():
    code = (
        f"import sys; sys.path.insert(0, {str(SOAK.parent.parent)!r});"
        "from simulation_world import *; print([World(write_script(seed)).run() for seed in range(50)])"
    )
    traces = outputs_under_hash_seeds("-c", code)
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_branch_of_the_scheduler_is_reached(tmp_path):
    data = tmp_path / "coverage"
    include = ",".join(str(ENGINE / f"{name}.py") for name in JUDGED)
    (tmp_path / "rc").write_text(
        "[run]\nbranch = true\n[report]\nexclude_also =\n    raise AssertionError\n    ^ *def check\n    def __iter__\n"
    )
    rc = f"--rcfile={tmp_path / 'rc'}"
    code = (
        f"import sys; sys.path.insert(0, {str(SOAK.parent.parent)!r});"
        "from simulation_world import *; run_seeds([*range(160), 236])"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    cover = [sys.executable, "-m", "coverage"]
    subprocess.run([*cover, "run", rc, f"--data-file={data}", f"--include={include}", str(script)], check=True)
    told = tmp_path / "coverage.json"
    subprocess.run([*cover, "json", rc, f"--data-file={data}", "-q", "-o", str(told)], check=True)
    files = json.loads(told.read_text())["files"]
    assert len(files) == len(JUDGED)
    missing = {Path(name).stem: (file["missing_lines"], file["missing_branches"]) for name, file in files.items()}
    assert {name: lines for name, lines in missing.items() if lines != ([], [])} == {}
