"""The roof is measured with what the machine has; what it has not is an error."""

import pytest

from millrace.bench import roof
from millrace.bench.ours import read_rate
from millrace.kernels import _C
from millrace.server.config import EngineConfig
from millrace.server.model.executors import create_executor


def test_every_loop_and_both_memories_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "DRAM_BYTES", 1 << 27)
    found = roof.measure_roof(threads=2, seconds=0.01)
    assert [(loop.what, loop.isa) for loop in found.loops] == _C.roof_loops()
    assert {loop.isa for loop in found.loops} <= set(_C.available_isas())
    for rate in (found.dram, found.l3, *found.loops):
        assert min(rate.one, rate.all) > 1e8
        assert max(rate.one, rate.all) < 1e15
    table = roof.roof_table(found)
    assert table.row_count == 2 + len(found.loops)


def test_int8_products_are_wider_than_fp32_ones() -> None:
    """The same registers hold four times as many: a loop that the compiler had emptied would not show it."""
    best = {
        arithmetic: _C.roof_compute(arithmetic=arithmetic, isa=isa, threads=1, seconds=0.05)
        for arithmetic, isa in _C.roof_loops()
        if isa == "avx512"
    }
    if not best:
        pytest.skip("no AVX-512 here")
    assert best["int8"] / best["fp32"] == pytest.approx(4, rel=0.5)


def test_only_loops_of_the_allowed_instruction_sets_count() -> None:
    rates = (roof.Rate("bf16", "amx", 1, 9), roof.Rate("fp32", "avx512", 1, 4), roof.Rate("fp32", "avx2", 1, 2))
    some = roof.Rate("DRAM read", "", 1, 1)
    found = roof.Roof(1, some, some, rates)
    assert found.compute(("bf16", "fp32"), ["avx2", "avx512", "amx"]) == 9
    assert found.compute(("bf16", "fp32"), ["avx2", "avx512"]) == 4
    assert found.compute(("int8",), ["avx2"]) == 0


def test_sets_up_to_one() -> None:
    found = _C.available_isas()
    assert roof.isas_up_to(found[0]) == found[:1]
    assert roof.isas_up_to("amx_emulated") == found


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="threads must be 1 to 1024"):
        _C.roof_read(bytes=1, threads=0, seconds=0.01)
    with pytest.raises(ValueError, match=r"seconds must be in \[0, 3600\]"):
        _C.roof_read(bytes=1, threads=1, seconds=float("nan"))
    with pytest.raises(ValueError, match="no loop of int3 with avx2"):
        _C.roof_compute(arithmetic="int3", isa="avx2", threads=1, seconds=0.01)


def test_reading_the_weights_of_a_model() -> None:
    config = EngineConfig(model="builtin", embedding_model="off", quantization="int8")
    executor = create_executor(config, lambda done, total: None).executor
    for threads in (1, 2):
        rate = read_rate(executor, threads, 0.01)
        assert rate
        assert 0 < rate < 1e15
    executor.close()
    assert read_rate(executor, 1, 0.01) is None
