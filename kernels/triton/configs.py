"""How kernels are launched on which shapes. Never tuned while a request waits."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Config:
    """A launch of a matmul: its tiles, the parts of k, and the rows of tiles that are visited together."""

    block_m: int
    block_n: int
    block_k: int
    splits: int = 1
    group: int = 8
    warps: int = 4
    stages: int = 3

    @property
    def arguments(self) -> dict[str, int]:
        """Of the kernel."""
        return {
            "SPLITS": self.splits,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# By kernel: the most rows that a configuration is for, ascending.
CONFIGS = {
    "scaled": (
        (16, Config(16, 128, 256, stages=4)),
        (64, Config(64, 128, 128, stages=4)),
        (1 << 30, Config(128, 256, 128, warps=8)),
    ),
    "int4": (
        (16, Config(16, 64, 128, stages=4)),
        (64, Config(64, 64, 64, stages=4)),
        (1 << 30, Config(128, 64, 64, warps=8)),
    ),
}
MOST_SPLITS = 8


def config_of(kernel: str, m: int, n: int, k: int, device: torch.device) -> Config:
    """Of a product [m, n] over k; k is split where the tiles are fewer than the multiprocessors."""
    found = next(config for rows, config in CONFIGS[kernel] if m <= rows)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    columns = n // 2 if kernel == "int4" else n
    tiles = -(-m // found.block_m) * -(-columns // found.block_n)
    splits = 1
    while splits < MOST_SPLITS and 2 * splits * tiles <= processors and k >= 4 * splits * found.block_k:
        splits *= 2
    return Config(found.block_m, found.block_n, found.block_k, splits, found.group, found.warps, found.stages)
