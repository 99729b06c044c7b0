"""Pseudo-transient continuation: implicit time steps to the steady state, ever longer ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deqcore import Problem, Solver, Step, hookimpl

from .shared import LinearSteps, LinearStepSettings, Products, done_at, norms

#: Largest change of a time step from one step to the next, either way.
CHANGE = 10.0
#: A step after which the residual is this many times larger is taken back.
TAKEN_BACK = 100.0


class PseudoTransientSettings(LinearStepSettings):
    """Settings of pseudo-transient continuation."""

    first_step: float = Field(
        10.0, gt=0, description="first pseudo-time step: 10 is near a Newton step on mild maps, 0.1 follows the flow"
    )
    forcing: float = Field(
        0.1, gt=0, le=0.9, description="relative tolerance of each linear solve; early steps are no better for more"
    )


@dataclass
class PseudoTransientState:
    """How products are made, and every sample's pseudo-time step, (B, 1)."""

    products: Products
    dt: Tensor


class PseudoTransient(Solver[PseudoTransientSettings]):
    """Implicit Euler steps on dz/dt = f(z) - z, with time steps that grow as the residual falls, sample by sample.

    A step solves ((1 / dt + 1) I - J) d = f(z) - z. For small dt it follows the flow, for large dt it is Newton's; dt
    grows by the factor by which the residual fell (switched evolution relaxation) and shrinks where it rose.

    Use it where Newton's method stalls far from the solution: it doesn't ask the residual to fall at every step, and
    ends at equilibria that the flow is attracted to. Prefer `newton_krylov` near a solution, and for equilibria that
    the flow is repelled from (df/dz has an eigenvalue with a real part above 1).

    A step costs one evaluation (two where a sample's step is taken back) and up to `max_linear` products with J;
    memory is that of the linear solver, 2 * max_linear + 4 states with gmres. A sample whose step ends in NaN, or at a
    residual a hundred times larger, goes back and takes a tenth of the time.

    Source: Kelley and Keyes, SIAM J. Numer. Anal. 35 (1998); Mulder and van Leer (1985) for the time steps.
    """

    traceable: ClassVar[bool] = False

    def __init__(self, settings: PseudoTransientSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._linear = LinearSteps(self.settings)

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> PseudoTransientState:
        return PseudoTransientState(Products(), z.new_full((z.shape[0], 1), self.settings.first_step))

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: PseudoTransientState) -> Step:
        residual = fz - z
        norm, limit = norms(residual), done_at(self.settings, problem, fz)
        share = state.dt / (1 + state.dt)  # (I - share J) d = share residual, with a unit diagonal as solvers expect
        product = state.products.at(problem, z)
        tolerance = share * torch.maximum(self.settings.forcing * norm, (0.5 * limit).minimum(0.9 * norm))
        direction, better = self._linear.solve(
            lambda u: share * product(u), share * residual, tolerance, problem.eps(z)
        )
        trial = z + torch.where(better, direction, share * residual)
        fz = state.products.evaluate(problem, trial)
        size = norms(fz - trial)
        change = (norm / size).nan_to_num(1 / CHANGE).clamp(1 / CHANGE, CHANGE)
        state.dt = (state.dt * change).clamp(torch.finfo(z.dtype).tiny ** 0.5, torch.finfo(z.dtype).max ** 0.5)
        bad = ~(size <= TAKEN_BACK * norm) & (size > limit) & (norm > 0) | ~torch.isfinite(size)
        if bool(bad.any()):
            return Step(torch.where(bad, z, trial), state)
        return Step(trial, state, fz)

    def notes(self, state: PseudoTransientState) -> Mapping[str, Any]:
        state.products.forget()  # a solution holds no graph
        return {}


@hookimpl
def deqcore_solver() -> type[PseudoTransient]:
    return PseudoTransient
