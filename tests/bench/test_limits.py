"""The limits of a known machine and model, worked out by hand."""

from dataclasses import replace

import pytest

from millrace.bench.checkpoints import SHAPES
from millrace.bench.limits import Work, limits
from millrace.bench.roof import Rate, Roof
from millrace.bench.workload import Workload
from millrace.server.model.fields import Fields
from millrace.server.model.registry import model_spec

ROOF = Roof(
    threads=2,
    dram=Rate("DRAM read", "", 15.7e9, 29.3e9),
    l3=Rate("L3 read", "", 50e9, 100e9),
    loops=(
        Rate("fp32", "avx2", 0.1e12, 0.2e12),
        Rate("int8", "avx2", 0.2e12, 0.4e12),
        Rate("bf16", "amx", 3.3e12, 6.55e12),
        Rate("int8", "amx", 6.7e12, 13.3e12),
    ),
)
WORK = Work.of(model_spec(Fields(SHAPES["llama-3.2-1b"], "config.json")))
ISAS = ["baseline", "avx2", "amx"]


def test_weights_that_are_read() -> None:
    assert (WORK.layers, WORK.head) == (973_078_528, 262_668_288)
    read = {width: WORK.step_bytes(width) / 1e9 for width in ("bf16", "int8", "int4")}
    assert read == pytest.approx({"bf16": 2.471, "int8": 1.236, "int4": 0.768}, abs=0.001)


@pytest.mark.parametrize(
    ("width", "prefill", "one", "many"),
    [("bf16", 3366, 11.86, 379), ("int8", 6834, 23.7, 759), ("int4", 6834, 38.1, 1221)],
)
def test_prefill_is_bound_by_products_and_decode_by_memory(width: str, prefill: float, one: float, many: float) -> None:
    found = limits(WORK, ROOF, width, ISAS, Workload())
    assert (found.prefill, found.decode[1], found.decode[32]) == pytest.approx((prefill, one, many), rel=0.002)
    seconds = 32 * 256 / prefill + 64 * 32 / many
    assert found.mixed == pytest.approx(32 * 64 / seconds, rel=0.002)


def test_large_batches_are_bound_by_products_where_those_are_slow() -> None:
    found = limits(WORK, ROOF, "int8", ["avx2"], Workload())
    assert found.decode[8] == pytest.approx(0.4e12 / (2 * 1_235_746_816))
    assert found.decode[32] == found.decode[8]


def test_a_machine_without_a_measured_loop_has_no_limits() -> None:
    found = limits(WORK, replace(ROOF, loops=()), "bf16", ISAS, Workload())
    assert (found.prefill, found.decode, found.mixed) == (None, {}, None)


def test_memory_beside_a_batch_bounds_that_batch() -> None:
    everywhere, beside = (limits(WORK, ROOF, "int8", ISAS, Workload(), dram) for dram in ({}, {1: 10e9}))
    assert beside.decode[1] == pytest.approx(10e9 / WORK.step_bytes("int8"))
    assert beside.decode[8] == everywhere.decode[8]
