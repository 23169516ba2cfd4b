from pathlib import Path

import pytest
from engine_workload import Workload
from hash_seeds import outputs_under_hash_seeds

SCRIPT = """
import sys, hashlib
sys.path.insert(0, sys.argv[1])
from engine_workload import Workload
from hash_seeds import outputs_under_hash_seeds
trace = [Workload(seed, 1 + seed % 2).run() for seed in range(10)]
print(hashlib.sha256(repr(trace).encode()).hexdigest())
"""


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_every_output_is_that_of_the_solo_run(steps_in_flight):
    preemptions = rejected = 0
    for seed in range(100):
        workload = Workload(seed, steps_in_flight)
        workload.run()
        preemptions += workload.preemptions
        rejected += workload.rejected
    assert preemptions > 100
    assert rejected > 100


@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_beginnings_that_are_shared_change_no_output(steps_in_flight, faults, caplog):
    preemptions = cached = 0
    for seed in range(100):
        workload = Workload(seed, steps_in_flight, faults, shared=True)
        workload.run()
        preemptions += workload.preemptions
        cached += workload.cached
    assert preemptions > 100
    assert cached > 1000


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_faults_end_only_the_sequences_that_cause_them(steps_in_flight, caplog):
    failed = 0
    for seed in range(40):
        workload = Workload(seed, steps_in_flight, faults=True)
        workload.run()
        failed += workload.failed
    assert failed > 40


def test_one_seed_is_one_trace_whatever_the_hash_seed():
    digests = outputs_under_hash_seeds("-c", SCRIPT, str(Path(__file__).parent.parent))
    assert len(digests) == 1
