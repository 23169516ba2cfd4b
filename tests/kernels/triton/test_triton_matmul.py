"""Triton's products in its interpreter, against float64."""

import numpy as np
import pytest
import torch

from millrace.kernels.triton.configs import CONFIGS, Config, config_of
from millrace.kernels.triton.matmul import int4_matmul, pack_int4, scaled_matmul

SMALL = Config(16, 32, 32, group=2)


def error(found: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 64), (17, 64, 129), (7, 129, 31), (33, 65, 96)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scaled(m: int, n: int, k: int, dtype: torch.dtype, splits: int) -> None:
    r = torch.Generator().manual_seed(m)
    x, w = (torch.randint(-127, 128, (rows, k), generator=r).float().to(dtype) for rows in (m, n))
    xs, ws = torch.rand(m, generator=r) + 0.1, torch.rand(n, generator=r) + 0.1
    wanted = (x.double() @ w.double().T * xs.double()[:, None] * ws.double()).numpy()
    config = Config(16, 32, 32, splits, group=2)
    found = scaled_matmul(x, w, xs, ws, torch.float32, config)
    assert error(found, wanted) < 1e-6
    assert error(scaled_matmul(x, w, xs, ws, torch.float16, config), wanted) < 1e-3 if wanted.max() < 6e4 else True


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 128), (17, 34, 160), (33, 130, 256)])
def test_int4(m: int, n: int, k: int, group: int, splits: int) -> None:
    r = torch.Generator().manual_seed(n)
    numbers = torch.randint(0, 16, (n, k), generator=r)
    groups = -(-k // group)
    scales = (torch.rand(groups, n, generator=r) + 0.5).half()
    zeros = torch.randint(0, 16, (groups, n), generator=r).half()
    x = torch.randn(m, k, generator=r).half()
    of = torch.arange(k) // group
    weights = ((numbers.T.double() - zeros.double()[of]) * scales.double()[of]).half().double()
    wanted = (x.double() @ weights).numpy()
    found = int4_matmul(x, pack_int4(numbers), scales, zeros, group, Config(16, 32, 32, splits, group=2))
    assert error(found, wanted) < 1e-3
    wide = Config(16, 16, 128, splits, group=1)
    assert error(int4_matmul(x, pack_int4(numbers), scales, zeros, group, wide), wanted) < 1e-3


def test_odd_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        pack_int4(torch.zeros(3, 8))


def test_no_rows() -> None:
    nothing = torch.empty(0, 32, dtype=torch.int8)
    weights = torch.zeros(8, 32, dtype=torch.int8)
    assert scaled_matmul(nothing, weights, torch.empty(0), torch.ones(8), torch.float16).shape == (0, 8)


@pytest.mark.parametrize("kernel", CONFIGS)
def test_every_number_of_rows_has_a_configuration(kernel: str) -> None:
    for m in (1, 16, 17, 64, 65, 100_000):
        config = config_of(kernel, m, 4096, 4096, torch.device("cpu"))
        assert config.splits == 1
        assert config.block_m >= 16
