"""One training step whose exact gradient is known: what the libraries' times are taken of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from deqcore.solver import get_solver

from .maps import TanhMap

__all__ = ["ACCURACY", "BATCH", "MOST", "Gradient", "Training", "training"]

ACCURACY = 1e-4
BATCH = 64
#: Steps of any solve, at most.
MOST = 1500

Gradient = tuple[Tensor, ...]


class Training(NamedTuple):
    """One step of training: z = tanh(W z + U x), loss |z - y|^2 / 2, all in float32, and its gradient to W and U."""

    d: int
    rho: float
    w: Tensor
    u: Tensor
    x: Tensor
    y: Tensor
    exact: Gradient
    z: Tensor

    @property
    def title(self) -> str:
        return f"d {self.d}, radius {self.rho}"

    def error(self, gradient: Iterable[Tensor]) -> float:
        """Of a gradient, relative, in the l2 norm over all parameters."""
        pairs = list(zip(gradient, self.exact, strict=True))
        off = sum(float((given.double() - right).square().sum()) for given, right in pairs)
        return math.sqrt(off / sum(float(right.square().sum()) for _, right in pairs))


def training(d: int, rho: float, seed: int = 0) -> Training:
    """The step for `d` features, W Gaussian of spectral radius `rho`. Its answer is a dense solve in float64."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(d, d, generator=g, dtype=torch.float64)
    w = (w * (rho / torch.linalg.eigvals(w).abs().max())).float()
    scale = 1.0 if rho < 0.95 else 0.1
    u = (torch.randn(d, d, generator=g, dtype=torch.float64) * (scale / math.sqrt(d))).float()
    x, y = torch.randn(BATCH, d, generator=g), torch.randn(BATCH, d, generator=g)
    tanh = TanhMap(w.double(), x.double() @ u.double().T)
    z, _, info = get_solver("broyden")(tanh.fn(), torch.zeros_like(tanh.x), max_iter=MOST, tol=1e-13, stop_mode="rel")
    if not info.converged.all():
        raise RuntimeError(f"no exact equilibrium: {info}")
    slope = 1 - z.square()
    cotangents: list[Tensor] = []
    for k in range(BATCH):  # one by one: all Jacobians at once are large
        jacobian = slope[k][:, None] * w.double()
        cotangents.append(torch.linalg.solve(torch.eye(d, dtype=z.dtype) - jacobian.T, z[k] - y[k].double()))
    through = torch.stack(cotangents) * slope
    return Training(d, rho, w, u, x, y, (through.T @ z, through.T @ x.double()), z.float())
