"""Problems whose answer is known: error and evaluations of f."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchdeq.solver
from torch import Tensor

import deqcore.solver

from .maps import Counted
from .report import Table

__all__ = ["table"]

TOLERANCE = 1e-12
MOST = 400


@dataclass(frozen=True)
class Exact:
    """A map, where to start, and the distance of a state from what is known of the answer."""

    title: str
    fn: Callable[[Tensor], Tensor]
    z0: Tensor
    error: Callable[[Tensor], float]


def _chandrasekhar(c: float, mean: float) -> Exact:
    """h_i = 1 / (1 - (c / 2n) sum_j mu_i h_j / (mu_i + mu_j)), whose mean is (2 / c)(1 - sqrt(1 - c)) for any nodes."""
    n = 10
    mu = torch.arange(1, n + 1, dtype=torch.float64) / n
    kernel = c / (2 * n) * mu[:, None] / (mu[:, None] + mu)
    return Exact(
        f"Chandrasekhar H, c = {c}",
        lambda h: 1 / (1 - h @ kernel.T),
        torch.ones(1, n, dtype=torch.float64),
        lambda h: abs(float(h.mean()) - mean),
    )


def _affine() -> Exact:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(64, 64, generator=g, dtype=torch.float64)
    w *= 0.9 / torch.linalg.eigvals(w).abs().max()
    b = torch.randn(8, 64, generator=g, dtype=torch.float64)
    answer = torch.linalg.solve(torch.eye(64, dtype=torch.float64) - w, b.T).T
    return Exact(
        "affine, d 64, radius .9", lambda z: z @ w.T + b, torch.zeros_like(b), lambda z: float((z - answer).abs().max())
    )


def table() -> Table:
    """A row a problem, two columns a solver: evaluations, and error."""
    names = ("fixed_point_iter", "anderson", "broyden")
    result = Table(
        "Problems with exact answers, relative residual 1e-12",
        ("problem", *(f"{who}{name}" for name in names for who in ("TorchDEQ ", ""))),
        notes="float64. Evaluations of f, and the error of what is returned (of the mean for Chandrasekhar's H, else "
        f"the largest of all elements); at most {MOST} steps.",
    )
    problems = [
        Exact(
            "cos z = z", torch.cos, torch.zeros(1, 1, dtype=torch.float64), lambda z: abs(float(z) - 0.7390851332151607)
        ),
        _chandrasekhar(0.5, 1.17157287525381),
        _chandrasekhar(0.9, 1.519493853295915),
        _affine(),
    ]
    for problem in problems:
        cells: list[str] = []
        for name in names:
            for library in (torchdeq.solver, deqcore.solver):
                counted = Counted(problem.fn)
                z = library.get_solver(name)(counted, problem.z0, max_iter=MOST, tol=TOLERANCE, stop_mode="rel")[0]
                cells.append(f"{counted.calls}, {problem.error(z):.0e}")
        result.add(problem.title, *cells)
    return result
