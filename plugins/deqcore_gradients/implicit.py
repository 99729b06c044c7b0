"""The exact gradient, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from deqcore import (
    AnySolverChoice,
    GradientBackend,
    GradientSettings,
    LinearProblem,
    Solution,
    Solver,
    SolverSettings,
    Status,
    hookimpl,
    iterate,
    registry,
)
from deqcore.linear import tolerance_scale

#: What solves the adjoint where nobody says: see benchmarks/results/evaluations.md for the comparison behind it.
DEFAULT_SOLVER: dict[str, Any] = {"name": "gmres", "max_iter": 200, "tol": 1e-6}


class ImplicitSettings(GradientSettings):
    """Settings of implicit differentiation."""

    solver: AnySolverChoice = Field(
        default_factory=lambda: DEFAULT_SOLVER,  # type: ignore[arg-type]
        validate_default=True,
        description="linear or fixed-point solver of u = J^T u + cotangent; tolerances, abs and rel, are relative to "
        "the cotangent",
    )
    rtol: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="residual allowed, over the cotangent's norm; in place of the solver's own tolerance, 1e-6",
    )
    warm_start: bool = Field(
        False, description="begin where the last backward ended, a product more; pays where batches come again in order"
    )

    @field_validator("solver", mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        """The adjoint has TorchDEQ's own tolerance, 1e-6, unless another is given."""
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            return value
        if "name" not in given:
            base = dict(DEFAULT_SOLVER)
        else:
            base = {"tol": DEFAULT_SOLVER["tol"]}
        if given.keys() & {"rtol", "atol"}:
            del base["tol"]
        return {**base, **given}

    @model_validator(mode="after")
    def _one_tolerance(self) -> ImplicitSettings:
        solver = self.solver
        of_its_own = solver.tol not in (DEFAULT_SOLVER["tol"], self.rtol)
        if self.rtol is not None and (of_its_own or solver.rtol is not None or solver.atol is not None):
            raise ValueError(
                f"give rtol={self.rtol!r} or a tolerance of the solver, not both: tol={solver.tol!r}, "
                f"rtol={solver.rtol!r}, atol={solver.atol!r}"
            )
        return self

    def chosen(self) -> SolverSettings:
        """The solver with the tolerance that counts."""
        if self.rtol is None:
            return self.solver
        return self.solver.model_copy(update={"tol": self.rtol, "stop_mode": "abs"})


def _solve(solver: Any, problem: LinearProblem, scale: Tensor, start: Tensor | None = None) -> Solution:
    """Solve from u = 0, where J^T u + b is b; where no step is allowed, b itself is the best guess."""
    if solver.settings.max_iter == 0:
        return iterate(solver, problem, problem.b).solution
    if start is not None:
        return iterate(solver, problem, start, scale=scale).solution
    return iterate(solver, problem, torch.zeros_like(problem.b), problem.b, scale=scale).solution


class Jointly(Solver[SolverSettings]):
    """Another solver, applied to all rows as one sample.

    Where f couples rows, a row's history says little about the way to its solution, and quasi-Newton steps go astray.
    """

    def __init__(self, solver: Any, scale: Tensor) -> None:
        super().__init__(solver.settings)
        self.solver = solver
        self.scale = scale

    def solve(self, problem: Any, z: Tensor, sample_at: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        joint = problem.as_one()
        found = _solve(self.solver, joint, self.scale)
        problem.nfe += joint.nfe
        return found["z"].view_as(z), []


class Implicit(GradientBackend[ImplicitSettings]):
    """dz*/dx = (I - J)^-1 df/dx: the gradient of the equilibrium itself, however it was found.

    Exact to the tolerance of its own solve, whose status, residual and counts are in ``info["backward"]`` after the
    backward. Drops nothing: second and further derivatives are made of further such solves, to the same tolerance, and
    with :func:`deqcore.fixed_point` so are forward mode and torch.func's transforms.

    Costs one evaluation of f with its graph in the forward, and one product with J^T a step in the backward (of most
    solvers); memory is one evaluation's graph and what the solver takes, however many steps the forward took. Where f
    couples rows and the solver fails row by row, the adjoint is solved once more for all rows as one sample. A second
    derivative costs two more evaluations with their graphs, and as many products again as the first.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models (NeurIPS 2019), theorem 1.
    """

    needs_equilibrium: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    #: True once a backward has found that f couples rows and that going row by row fails.
    coupled = False
    #: What the last backward found, for a warm start.
    last: Tensor | None = None

    def adjoint(self, problem: LinearProblem) -> Solution:
        settings = self.settings.chosen()
        solver = registry.create("any_solvers", settings)
        found = self._solve(solver, problem, tolerance_scale(problem.b, settings))
        if self.settings.warm_start:
            self.last = found["z"] / problem.b.abs().amax()
        return found

    def _solve(self, solver: Any, problem: LinearProblem, scale: Tensor) -> Solution:
        if not self.coupled:
            found = _solve(solver, problem, scale, self._start(problem.b))
            if not found.failed() or bool((found["status"] == Status.NON_FINITE).any()) or not problem.couples_rows():
                return found
            self.coupled = True
        return _solve(Jointly(solver, scale.min()[None]), problem, scale)

    def _start(self, b: Tensor) -> Tensor | None:
        """Where the last backward ended, if that fits and is a number throughout."""
        last = self.last
        if last is None or (last.shape, last.dtype, last.device) != (b.shape, b.dtype, b.device):
            return None
        return last * b.abs().amax() if bool(torch.isfinite(last).all()) else None


@hookimpl
def deqcore_gradient() -> type[Implicit]:
    return Implicit
