"""Muon for the matrices of the layers, AdamW for embeddings and norms, and the learning-rate schedule.

Muon: K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024): momentum, then an
approximate orthogonalisation of the update by a quintic Newton-Schulz iteration.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Stochastic gradient descent on matrices whose update has all singular values near one."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever used
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Drive the singular values of a matrix towards one; the coefficients are those of the paper."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def learning_rate_scale(progress: float, warmup: float = 0.02, decay: float = 0.4) -> float:
    """Warm-up, constant, then linear decay to zero; `progress` in [0, 1] is the share of tokens seen."""
    return max(0.0, min(1.0, progress / warmup, (1 - progress) / decay))
