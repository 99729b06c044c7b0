"""The matrix itself, and its LU factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from deqcore import ConfigError, LinearProblem, LinearSolver, SolverSettings, Step, hookimpl


class DenseSettings(SolverSettings):
    """Settings of the dense solver."""

    max_features: int = Field(
        512, ge=1, description="largest number of features for which the matrix is built: that many products"
    )


@dataclass
class Factored:
    """LU factors of every sample's I - A, shape (B, F, F) and (B, F), and the samples that they are of no use to."""

    factors: Tensor
    pivots: Tensor
    singular: Tensor
    broken: Tensor


@dataclass
class DenseState:
    """The factors, once a first step has needed them: where the start is good enough nothing is built."""

    factored: Factored | None = None


class Dense(LinearSolver[DenseSettings]):
    """Builds every sample's I - A by one product a feature, and solves with its LU factors.

    Use it for small states, for ill-conditioned systems on which `gmres` needs about as many products as there are
    features, and to check other solvers. One step is the solution; further ones refine it. Prefer `gmres` elsewhere.

    It takes each sample to be a system of its own: column j of all samples is asked for by one product. Where f couples
    rows (batch statistics, a graph whose nodes are the batch) the matrices so found are not the system's, and the
    residual tells; make the whole state one sample there (``batch_dims=0``), which implicit differentiation does by
    itself. A singular sample keeps its start, and its status says that it failed.

    The first step costs F products and O(F^3) work, each step one product and O(F^2); memory is F + 2 states.

    Raises:
        ConfigError: there are more features than `max_features`.
    """

    def init(self, problem: LinearProblem, u: Tensor, fu: Tensor) -> DenseState:
        return DenseState()

    def _factor(self, problem: LinearProblem, u: Tensor) -> Factored:
        batch, features = u.shape
        most = self.settings.max_features
        if features > most:
            raise ConfigError(
                f"solver 'dense' would need {features} products and a matrix of {features} x {features} for each of "
                f"{batch} samples; max_features is {most}. Use solver='gmres', or raise max_features."
            )
        columns = torch.eye(features, dtype=u.dtype, device=u.device)
        rows = [problem.matvec(column.expand_as(u).contiguous()) for column in columns]
        matrix = torch.stack(rows, 2)
        broken = ~torch.isfinite(matrix).flatten(1).all(1, keepdim=True)
        factors, pivots, info = torch.linalg.lu_factor_ex(torch.where(broken[..., None], columns, matrix))
        return Factored(factors, pivots, (info != 0)[:, None], broken)

    def step(self, problem: LinearProblem, u: Tensor, fu: Tensor, state: DenseState) -> Step:
        factored = state.factored
        if factored is None:
            factored = state.factored = self._factor(problem, u)
        better = u + self._solve(factored, fu - u)
        # A sample whose products were not finite says so by a state that isn't either: the loop reports it.
        return Step(torch.where(factored.broken, torch.nan, better), state)

    @staticmethod
    def _solve(factored: Factored, x: Tensor) -> Tensor:
        solved = torch.linalg.lu_solve(factored.factors, factored.pivots, x[..., None])[..., 0]
        return torch.where(factored.singular, 0.0, solved)

    def inverse(self, state: DenseState) -> Callable[[Tensor], Tensor] | None:
        factored = state.factored
        return None if factored is None else lambda x: self._solve(factored, x)


@hookimpl
def deqcore_linear_solver() -> type[Dense]:
    return Dense
