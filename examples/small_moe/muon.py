"""Muon: steepest descent for matrices, by orthogonalized momentum (Jordan et al., 2024).

The scale of an update is that of an AdamW step, so that both take one learning rate (Liu et al., 2025).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# Coefficients of the odd polynomial whose iteration drives all singular values towards 1.
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def orthogonalized(g: Tensor) -> Tensor:
    """The nearest matrices with all singular values near 1, of g [..., m, n]."""
    x = g.bfloat16() if g.is_cuda else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = A * x + (B * square + C * square @ square) @ x
    return (x if wide else x.mT).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """For parameters that are matrices, or stacks of them."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ):
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                alike[p.shape].append(p)
            for shape, parameters in alike.items():
                gradients = [p.grad for p in parameters]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                # Nesterov's look ahead.
                ahead = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
                scale = 0.2 * max(shape[-2:]) ** 0.5
                updates = list((orthogonalized(ahead) * scale).unbind(0))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates, alpha=-group["lr"])
