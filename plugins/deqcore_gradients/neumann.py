"""The truncated Neumann series of the adjoint equation."""

from __future__ import annotations

from pydantic import Field
from torch import zeros_like

from deqcore import GradientBackend, GradientSettings, LinearProblem, Solution, hookimpl, iterate, registry


class NeumannSettings(GradientSettings):
    """Settings of the Neumann-series gradient."""

    terms: int = Field(
        5,
        ge=1,
        description="terms of the series; on the digits model the cosine with the exact gradient is .996 with 5",
    )
    damping: float = Field(
        1.0,
        gt=0,
        le=1,
        description="damping of the series: below 1 it also converges where J has eigenvalues below -1, and is slower "
        "elsewhere",
    )


class Neumann(GradientBackend[NeumannSettings]):
    """u = damping * sum over k < terms of (damping J^T + (1 - damping) I)^k g takes the place of (I - J^T)^-1 g.

    Drops the terms of the series from the `terms`-th on: with damping 1, (J^T)^terms of the solution. ``terms=1`` with
    damping 1 is the one-step gradient, as many terms as steps are the `phantom` gradient in its other form: all
    products are taken at z*, and the value is not moved. Where the series diverges, more terms make it worse:
    ``info["backward"]`` says so by its status, and the failure policy hears of it.

    Costs one evaluation of f with its graph in the forward, and `terms` products with J^T in the backward, the last of
    which tells the residual of u that is reported; memory is that graph and three states. Gives first derivatives, in
    reverse mode, and refuses others.

    ``info["backward"]["status"]`` is never CONVERGED, unless the residual is zero: no tolerance is aimed at. MAX_STEPS
    is the usual end and no failure; DIVERGED is one (the last term left ten times the least residual on the way).

    Source: Geng et al., On Training Implicit Models (NeurIPS 2021), the Neumann-series form of the phantom gradient.
    """

    def adjoint(self, problem: LinearProblem) -> Solution:
        settings = self.settings
        # From u = 0, where J^T u + g is g, every step of the damped iteration adds a term.
        series = {"name": "neumann", "damping": settings.damping, "max_iter": settings.terms}
        solver = registry.create("linear_solvers", {**series, "tol": 0.0, "return_final": True})
        found = iterate(solver, problem, zeros_like(problem.b), problem.b).solution
        found.waits = True  # a series that diverges is news, where a forward solve of a fixed number of steps is none
        return found


@hookimpl
def deqcore_gradient() -> type[Neumann]:
    return Neumann
