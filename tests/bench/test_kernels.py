"""The table of kernels: every case runs, and the arithmetic of its line."""

from functools import partial
from types import SimpleNamespace

import pytest

from millrace.bench.kernel_cases import attention, rows, sampling
from millrace.bench.kernel_cases.case import Case
from millrace.bench.kernels import OUT_OF_CACHE, fastest, line, measure
from millrace.bench.roof import Rate, Roof

ROOF = Roof(
    threads=2,
    dram=Rate("DRAM read", "", 10e9, 15e9),
    l3=Rate("L3 read", "", 50e9, 90e9),
    loops=(Rate("fp32", "avx2", 100e9, 200e9), Rate("bf16", "avx512_bf16", 400e9, 800e9)),
)


@pytest.mark.parametrize("module", [attention, rows, sampling], ids=lambda module: module.__name__.rpartition(".")[2])
def test_cases_run_here_and_with_the_peer(module: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    if module is attention:
        monkeypatch.setattr(
            attention, "SHAPES", [attention.Shape("tiny", 2, 3, 5, 4, 2, 64, threads=n) for n in (1, 2)]
        )
    if module is sampling:
        monkeypatch.setattr(sampling, "VOCABS", (8192,))
    found = list(module.cases())
    assert found
    for case in found:
        assert case.bytes > 0
        for run in (*case.ours, *case.peer):
            run()


@pytest.mark.parametrize(
    ("read", "computed", "isas", "share", "bound"),
    [
        (5e9, 1e9, ["avx2"], "50%", "memory"),
        (1e9, 50e9, ["avx2"], "50%", "compute"),
        (1e9, 100e9, ["avx2", "avx512_bf16"], "25%", "compute"),
    ],
)
def test_the_line_names_the_roof_that_binds(read, computed, isas, share, bound) -> None:
    text = line(Case("k", "c", [], [], read, computed), 1.0, 3.0, ROOF, 10e9, isas).split()
    assert text[2:5] == ["3.00", share, bound]


def test_the_roof_is_that_of_as_many_threads() -> None:
    case = Case("k", "c", [], [], 1e9, 100e9, threads=2)
    assert line(case, 1.0, 3.0, ROOF, 10e9, ["avx2"]).split()[3] == "50%"
    case = case._replace(bytes=OUT_OF_CACHE - 1, ours=[lambda: None])
    assert measure(case, ROOF, 0.0)[1] == 15e9
    assert measure(case._replace(threads=1), ROOF, 0.0)[1] == 10e9


def test_memory_is_measured_beside_what_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1.0, 4.0, 3.0, 2.0])
    monkeypatch.setattr("millrace.bench.kernels._C", SimpleNamespace(roof_read=lambda **_: next(rates)))
    case = Case("k", "c", [lambda: None], [], OUT_OF_CACHE, 0)
    assert measure(case, ROOF, 0.0)[1] == 4.0


def test_the_fastest_of_runs_in_turn() -> None:
    seen: list[int] = []
    assert fastest([partial(seen.append, 0), partial(seen.append, 1)], 0.0) < 1
    assert seen == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="nothing to run"):
        fastest([], 0.1)
