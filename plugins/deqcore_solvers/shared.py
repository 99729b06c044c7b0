"""What the Newton-type solvers share: products with J, the linear solve for a step, the line search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from deqcore import (
    AnySolverChoice,
    Linearization,
    LinearProblem,
    Problem,
    SolverSettings,
    iterate,
    registry,
)
from deqcore.report import FLOOR_SPACINGS

__all__ = ["LinearStepSettings", "LinearSteps", "Products", "advance", "done_at", "norms", "search", "set_otherwise"]

#: Residual decrease that a step must bring to be taken (Armijo's constant).
DECREASE = 1e-4
#: Lengths that a line search tries before it gives up on a direction.
TRIALS = 8
#: A linear solve that leaves more of its residual than this has failed: what it found is next to nothing.
LOWER = 0.99
#: Settings of a linear solver that the outer method sets.
OURS = ("max_iter", "tol", "stop_mode", "rtol", "atol", "residual_norm", "return_final")


def norms(x: Tensor) -> Tensor:
    """Euclidean norms of the samples, shape (B, 1)."""
    return torch.linalg.vector_norm(x, 2, 1, True)


def done_at(settings: SolverSettings, problem: Problem, fz: Tensor) -> Tensor:
    """Euclidean residual norms, shape (B, 1), at which the samples are done or at rounding error."""
    atol, rtol = settings.thresholds()
    if settings.residual_norm == "rms":
        atol *= fz.shape[1] ** 0.5
    order = math.inf if settings.residual_norm == "max" else 2
    size = torch.linalg.vector_norm(fz, order, 1, True)
    return torch.maximum(atol + rtol * size, FLOOR_SPACINGS * problem.eps(fz) * size)


def set_otherwise(settings: SolverSettings, keys: Iterable[str]) -> str:
    """Those of `keys` that are not at their defaults, as text; a configuration that was written out holds those too."""
    fields = type(settings).model_fields
    return ", ".join(
        f"{key}={getattr(settings, key)!r}" for key in keys if getattr(settings, key) != fields[key].default
    )


class Products:
    """Products with J = df/dz: in forward mode, or by the graph of one evaluation once forward mode has failed.

    Part of a solver's state. It remembers which of the two works, and keeps the graph of the last point evaluated, so
    that the next step's products need no further evaluation; copies and pickles leave the graph out.
    """

    def __init__(self) -> None:
        self.forward = True
        self._linearized: Linearization | None = None
        self._point: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"forward": self.forward, "_linearized": None, "_point": None}

    def forget(self) -> None:
        """Let the graph go."""
        self._linearized = self._point = None

    def evaluate(self, problem: Problem, z: Tensor) -> Tensor:
        """f(z), with its graph kept where products need it."""
        if self.forward or isinstance(problem, LinearProblem):
            return problem(z)
        return self._linearize(problem, z).fz.detach()

    def at(self, problem: Problem, z: Tensor) -> Callable[[Tensor], Tensor]:
        """u -> J u at `z`, shapes (B, F).

        Raises:
            GradientModeError: under ``torch.inference_mode()``, where torch gives no derivative.
        """
        if isinstance(problem, LinearProblem):
            return lambda u: u - problem.matvec(u)

        def product(u: Tensor) -> Tensor:
            if self.forward:
                try:
                    return problem.jvp(z, u)
                except (NotImplementedError, RuntimeError):  # something in f has no forward derivative
                    self.forward = False
            return self._linearize(problem, z).jvp(u)

        return product

    def dense(self, problem: Problem, z: Tensor) -> Tensor:
        """J of every sample, shape (B, F, F), for an f that doesn't couple rows: one product a feature."""
        units = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        product = self.at(problem, z)
        columns: list[Tensor] = []
        for unit in units:
            columns.append(product(unit.expand_as(z)))
            if not (self.forward or isinstance(problem, LinearProblem)):
                break
        else:
            return torch.stack(columns, 2)
        linearized = self._linearize(problem, z)  # a vjp is one backward, a jvp by double vjp two
        return torch.stack([linearized.vjp(unit.expand_as(z)) for unit in units], 1)

    def _linearize(self, problem: Problem, z: Tensor) -> Linearization:
        found = self._linearized
        if found is None or self._point is not z or found.problem is not problem:
            self._linearized = found = problem.linearize(z)
            self._point = z
        return found


def advance(
    problem: Problem,
    products: Products,
    z: Tensor,
    residual: Tensor,
    direction: Tensor,
    limit: Tensor,
    line_search: bool,
) -> tuple[Tensor, Tensor]:
    """The state that `direction` leads to, by a line search if asked, and f there."""

    def evaluate(trial: Tensor) -> Tensor:
        return products.evaluate(problem, trial)

    if line_search:
        return search(evaluate, z, residual, direction, limit)
    trial = z + direction
    return trial, evaluate(trial)


class LinearStepSettings(SolverSettings):
    """Settings of a method whose every step solves a linear system by another solver."""

    linear_solver: AnySolverChoice = Field(
        default_factory=lambda: {"name": "gmres"},  # type: ignore[arg-type]
        validate_default=True,
        description="what solves for the step, by name; gmres needs the fewest products with J",
    )
    max_linear: int = Field(
        50, ge=1, description="most products with J a step; gmres keeps 2 states for each, so this bounds its memory"
    )

    @field_validator("linear_solver", mode="after")
    @classmethod
    def _leave_the_end_to_us(cls, value: SolverSettings) -> SolverSettings:
        given = set_otherwise(value, OURS)
        if given:
            raise ValueError(
                f"{given} can't be set for linear_solver: every step sets how closely it is solved. Use "
                "forcing and max_linear of the solver itself"
            )
        return value


class LinearSteps:
    """Solves the linear systems of all steps of one solver, each sample to its own tolerance."""

    def __init__(self, settings: LinearStepSettings) -> None:
        chosen = settings.linear_solver
        ours = {"max_iter": settings.max_linear, "atol": 1.0, "rtol": 0.0, "residual_norm": "l2", "return_final": False}
        self.solver = registry.get("any_solvers", chosen.name)(chosen.model_copy(update=ours))
        # The outer method evaluates f at what comes out; checking a recurrence's residual first is a product wasted.
        self.solver.estimates = False

    def solve(
        self, product: Callable[[Tensor], Tensor], b: Tensor, tolerance: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """u with ||b - (I - A) u|| <= tolerance, where that takes no more than `max_linear` products.

        Args:
            product: u -> A u.
            b: shape (B, F); samples that aren't finite are solved for zero.
            tolerance: shape (B, 1).
            eps: relative rounding error of the products.

        Returns:
            u (B, F), and the samples whose residual is lower than that of 0, (B, 1).
        """
        size = norms(b)
        finite = torch.isfinite(size)
        b = torch.where(finite, b, 0.0)
        scale = torch.where(finite, tolerance, 1.0)[:, 0]
        linear = LinearProblem(product, None, b, eps)
        found = iterate(self.solver, linear, torch.zeros_like(b), b, scale=scale, keep_trace=False).solution
        return found["z"], found["abs_lowest"][:, None] < LOWER * size


def search(
    evaluate: Callable[[Tensor], Tensor], z: Tensor, residual: Tensor, direction: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Per sample, the first of ever shorter steps along `direction` that lowers the residual, and f there.

    Lengths are minima of the parabola through what is known of the squared residual, within a tenth and a half of the
    last length. A sample for which none of them lowers it takes a plain step to f(z) instead.

    Args:
        evaluate: z -> f(z).
        z: where to start, (B, F).
        residual: f(z) - z.
        direction: approximate Newton steps, (B, F).
        limit: residual norms that are low enough in any case, (B, 1).
    """
    start = norms(residual)
    free = (start == 0) | ~torch.isfinite(start)  # a sample that is frozen, or that has nothing to go by
    length = torch.ones_like(start)
    for _ in range(TRIALS):
        trial = z + length * direction
        fz = evaluate(trial)
        size = norms(fz - trial)
        taken = (size <= (1 - DECREASE * length) * start) | (size <= limit) | free
        if bool(taken.all()):
            return trial, fz
        share = length / ((size / start) ** 2 - 1 + 2 * length)
        length = torch.where(taken, length, length * share.nan_to_num(0.0).clamp(0.1, 0.5))
    trial = torch.where(taken, trial, z + residual)  # pyright: ignore[reportPossiblyUnboundVariable]
    return trial, evaluate(trial)
