"""Newton's method without a matrix: every step is solved for by products with the Jacobian."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from deqcore import Problem, Solver, Step, hookimpl

from .shared import LinearSteps, LinearStepSettings, Products, advance, done_at, norms

#: Eisenstat and Walker's choice 2: forcing = GAMMA * (residual / residual before)^2.
GAMMA = 0.9
#: A forcing term whose own square is still above this must not fall faster than that.
SLOWLY = 0.1


class NewtonKrylovSettings(LinearStepSettings):
    """Settings of Newton-Krylov."""

    forcing: float | None = Field(
        None,
        gt=0,
        le=0.9,
        description="relative tolerance of each linear solve; None: by each sample's own progress, which wastes no "
        "products on steps that are still far from the solution (Eisenstat and Walker's choice 2)",
    )
    first_forcing: float = Field(0.1, gt=0, le=0.9, description="the first of these tolerances")
    min_forcing: float = Field(
        0.05, ge=0, le=0.9, description="the smallest; finer ones saved few steps and cost up to a fifth more products"
    )
    max_forcing: float = Field(
        0.9, gt=0, le=0.9, description="the largest of these tolerances (Eisenstat and Walker's)"
    )
    line_search: bool = Field(
        True, description="shorten a sample's step while its residual doesn't fall; costs nothing while it does"
    )

    @model_validator(mode="after")
    def _in_order(self) -> NewtonKrylovSettings:
        if self.min_forcing > self.max_forcing:
            raise ValueError(f"min_forcing={self.min_forcing} is above max_forcing={self.max_forcing}")
        return self


@dataclass
class NewtonKrylovState:
    """How products are made; residual norms and forcing terms of the step before, (B, 1) each."""

    products: Products
    norm: Tensor | None
    forcing: Tensor | None


class NewtonKrylov(Solver[NewtonKrylovSettings]):
    """Inexact Newton steps on f(z) - z = 0: (I - J) d = f(z) - z is solved by a Krylov method, then z <- z + d.

    Use it where evaluations are cheap to differentiate and the spectral radius of J is near or above 1: it needs few
    steps whatever the spectrum, and converges faster than linearly. Where `anderson` or `broyden` need a dozen
    evaluations they are cheaper, as products with J count like evaluations. For a few dozen features see `newton`.

    A step costs one evaluation (more where the line search shortens it) and up to `max_linear` products with J, each
    about two evaluations of time; memory is that of the linear solver, 2 * max_linear + 4 states with gmres. Products
    are made in forward mode, and by two vjps where something in f has no forward derivative.

    A sample whose linear solve fails takes a plain step; so does one whose residual falls nowhere along its direction.

    Source: Eisenstat and Walker, SIAM J. Sci. Comput. 17 (1996); Knoll and Keyes, J. Comput. Phys. 193 (2004).
    """

    traceable: ClassVar[bool] = False

    def __init__(self, settings: NewtonKrylovSettings | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self._linear = LinearSteps(self.settings)

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> NewtonKrylovState:
        return NewtonKrylovState(Products(), None, None)

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: NewtonKrylovState) -> Step:
        residual = fz - z
        norm, limit = norms(residual), done_at(self.settings, problem, fz)
        tolerance = self._forcing(state, norm, limit) * norm
        product = state.products.at(problem, z)
        direction, better = self._linear.solve(product, residual, tolerance, problem.eps(z))
        direction = torch.where(better, direction, residual)

        searched = self.settings.line_search
        trial, fz = advance(problem, state.products, z, residual, direction, limit, searched)
        return Step(trial, state, fz)

    def _forcing(self, state: NewtonKrylovState, norm: Tensor, limit: Tensor) -> Tensor:
        """Relative tolerances of the linear solve, shape (B, 1), and none finer than the solve as a whole needs."""
        settings = self.settings
        if settings.forcing is not None:
            forcing = torch.full_like(norm, settings.forcing)
        elif state.norm is None or state.forcing is None:
            forcing = torch.full_like(norm, settings.first_forcing)
        else:
            least = GAMMA * state.forcing**2
            forcing = GAMMA * (norm / state.norm) ** 2
            forcing = torch.where(least > SLOWLY, torch.maximum(forcing, least), forcing)
            forcing = forcing.nan_to_num(settings.max_forcing).clamp(settings.min_forcing, settings.max_forcing)
        state.norm, state.forcing = norm, forcing
        enough = (0.5 * limit / norm).nan_to_num(0.0).clamp_max(settings.max_forcing)
        return torch.maximum(forcing, enough)

    def notes(self, state: NewtonKrylovState) -> Mapping[str, Any]:
        state.products.forget()  # a solution holds no graph
        return {}


@hookimpl
def deqcore_solver() -> type[NewtonKrylov]:
    return NewtonKrylov
