"""The exact gradient, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator

from deqcore import GradientBackend, GradientSettings, LinearProblem, Solution, SolverChoice, hookimpl, iterate, registry

#: What solves the adjoint where nobody says: see benchmarks/results/evaluations.md for the comparison behind it.
DEFAULT_SOLVER: dict[str, Any] = {"name": "broyden", "max_iter": 200, "tol": 1e-6, "memory": 50}


class ImplicitSettings(GradientSettings):
    """Settings of implicit differentiation."""

    solver: SolverChoice = Field(
        default_factory=lambda: DEFAULT_SOLVER,  # type: ignore[arg-type]
        validate_default=True,
        description="what solves u = J^T u + cotangent; tolerances, abs and rel, are relative to the cotangent",
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


class Implicit(GradientBackend[ImplicitSettings]):
    """dz*/dx = (I - J)^-1 df/dx: the gradient of the equilibrium itself, however it was found.

    Exact to the tolerance of its own solve, whose status, residual and counts are in ``info["backward"]`` after the
    backward. Drops nothing at first order; gives first derivatives only, and refuses to be differentiated twice.

    Costs one evaluation of f with its graph in the forward, and one product with J^T a step in the backward; memory is
    one evaluation's graph, however many steps the forward took.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models (NeurIPS 2019), theorem 1.
    """

    needs_equilibrium: ClassVar[bool] = True

    def adjoint(self, problem: LinearProblem) -> Solution:
        solver = registry.create("solvers", self.settings.solver)
        sizes = problem.b.norm(dim=1)
        # A sample that has no cotangent of its own still gets one through f where f couples rows.
        scale = sizes.clamp_min(float(sizes.max()) * problem.eps(problem.b))
        return iterate(solver, problem, problem.b, scale=scale).solution


@hookimpl
def deqcore_gradient() -> type[Implicit]:
    return Implicit
