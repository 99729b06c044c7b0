"""Newton's method with a dense Jacobian a sample, for small states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from deqcore import ConfigError, Problem, Solver, SolverSettings, Step, hookimpl

from .shared import Products, advance, done_at, norms


class NewtonSettings(SolverSettings):
    """Settings of Newton's method with a dense Jacobian."""

    max_features: int = Field(
        256, ge=1, description="largest state a sample; this one's Jacobian is half a megabyte a sample in float64"
    )
    line_search: bool = Field(
        True, description="shorten a sample's step while its residual doesn't fall; costs nothing while it does"
    )


NewtonS = TypeVar("NewtonS", bound=NewtonSettings)


@dataclass
class NewtonState:
    """How products are made; the LU factors of I - J (B, F, F) and their pivots (B, F), made `age` steps ago; and the
    residual norms of the step before, (B, 1)."""

    products: Products
    factor: Tensor | None
    pivots: Tensor | None
    norm: Tensor | None
    age: int


class DenseNewton(Solver[NewtonS]):
    """Steps (I - J)^-1 (f(z) - z) with a factored Jacobian; `is_stale` says when it is made anew."""

    traceable: ClassVar[bool] = False

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> NewtonState:
        features, most = z.shape[1], self.settings.max_features
        if features > most:
            name = self.settings.name or type(self).__name__.lower()
            raise ConfigError(
                f"solver {name!r} makes a dense Jacobian of every sample, and this state has {features} features a "
                f"sample, more than max_features={most}. Use solver='newton_krylov', which needs no matrix, or set "
                f"max_features={features} if {features} products with J a step and {features} x {features} numbers a "
                "sample are no trouble."
            )
        return NewtonState(Products(), None, None, None, 0)

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: NewtonState) -> Step:
        residual = fz - z
        norm, limit = norms(residual), done_at(self.settings, problem, fz)
        if state.factor is None or self.is_stale(state, norm, limit):
            self._factorize(problem, z, state)
        state.age, state.norm = state.age + 1, norm
        direction = self._solve(state, residual)
        finite = torch.isfinite(direction).all(1, keepdim=True)  # a sample whose I - J is singular takes a plain step
        direction = torch.where(finite, direction, residual)

        searched = self.settings.line_search
        trial, fz = advance(problem, state.products, z, residual, direction, limit, searched)
        return Step(trial, state, fz)

    def is_stale(self, state: NewtonState, norm: Tensor, limit: Tensor) -> bool:
        """Whether to make the Jacobian anew, given the residual norms, and those that are low enough, (B, 1) each."""
        raise NotImplementedError(f"{type(self).__name__} defines no is_stale()")

    @staticmethod
    def _factorize(problem: Problem, z: Tensor, state: NewtonState) -> None:
        identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        matrix = identity - state.products.dense(problem, z)
        finite = torch.isfinite(matrix).all(2, keepdim=True).all(1, keepdim=True)
        state.factor, state.pivots, _ = torch.linalg.lu_factor_ex(torch.where(finite, matrix, identity))
        state.age = 0

    @staticmethod
    def _solve(state: NewtonState, x: Tensor) -> Tensor:
        if state.factor is None or state.pivots is None:
            return x
        return torch.linalg.lu_solve(state.factor, state.pivots, x[:, :, None])[:, :, 0]

    def inverse(self, state: NewtonState) -> Callable[[Tensor], Tensor]:
        return lambda x: self._solve(state, x)

    def notes(self, state: NewtonState) -> Mapping[str, Any]:
        state.products.forget()  # a solution holds no graph
        return {}


class Newton(DenseNewton[NewtonSettings]):
    """z <- z + (I - J)^-1 (f(z) - z), with every sample's Jacobian as a matrix, made anew each step.

    Use it for states of up to a few dozen features: it converges quadratically whatever the spectrum of J. Prefer
    `chord` where a few Jacobians would do, `newton_krylov` for larger states. It takes the rows to be independent;
    where f couples them (a graph, batch statistics), use ``batch_dims=0``.

    A step costs one evaluation (more where the line search shortens it), as many products with J as there are features,
    and an LU factor a sample; memory is features states. Products are made in forward mode, and by vjps where something
    in f has no forward derivative. A sample whose I - J is singular takes a plain step.

    Source: Newton's method; Dennis and Schnabel, Numerical Methods for Unconstrained Optimization and Nonlinear
    Equations (1983), ch. 6, for the line search.

    Raises:
        ConfigError: the state has more than `max_features` features a sample.
    """

    def is_stale(self, state: NewtonState, norm: Tensor, limit: Tensor) -> bool:
        return True


@hookimpl
def deqcore_solver() -> type[Newton]:
    return Newton
