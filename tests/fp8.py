"""fp8 as Triton's interpreter makes it: it is wrong, as the GPU is not, where rounding reaches the next power of two
and below the least normal number. Those are left out of comparisons."""

import torch


def trusted(exact: torch.Tensor) -> torch.Tensor:
    """Which of the numbers (any float, within the range of e4m3) the interpreter rounds as it should."""
    rounded = exact.to(torch.float8_e4m3fn).float()
    mantissa, _ = torch.frexp(rounded)
    return (mantissa.abs() != 0.5) & (rounded.abs() >= 2**-6)
