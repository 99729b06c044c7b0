"""The Neumann series, damped: plain iteration of u <- A u + b."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from deqcore import LinearProblem, LinearSolver, SolverSettings, Step, hookimpl


class NeumannSettings(SolverSettings):
    """Settings of the Neumann series."""

    damping: float = Field(1.0, gt=0, le=2, description="how far to go towards A u + b; 1 sums the series itself")


class Neumann(LinearSolver[NeumannSettings]):
    """u <- u + damping * (A u + b - u), which from u = 0 sums b + A b + A^2 b + ...

    Use it where A is strongly contractive, where memory for a second state is all there is, or as a truncated series
    (``max_iter=5, tol=0``), whose error is A^5 times the solution. It converges where the spectral radius of
    (1 - damping) I + damping A is below 1; elsewhere it diverges, and says so. `gmres` never needs more products.

    A step costs one product; memory is 2 states.

    Source: C. Neumann (1877); the damped form is Richardson's iteration (1911).
    """

    def step(self, problem: LinearProblem, u: Tensor, fu: Tensor, state: Any) -> Step:
        damping = self.settings.damping
        return Step(fu if damping == 1.0 else torch.lerp(u, fu, damping), state)


@hookimpl
def deqcore_linear_solver() -> type[Neumann]:
    return Neumann
