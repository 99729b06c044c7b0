"""SHINE: the forward solver's own estimate of (I - J)^-1, used again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from deqcore import (
    ConfigError,
    GradientBackend,
    GradientSettings,
    LinearProblem,
    LinearSolver,
    Problem,
    Solution,
    Solver,
    Status,
    attach_adjoint,
    hookimpl,
    iterate,
    registry,
)
from deqcore.linear import tolerance_scale

Apply = Callable[[Tensor], Tensor]

#: Most steps of the solve that poor samples fall back to: as many as `implicit` makes by default.
MOST_STEPS = 200


class ShineSettings(GradientSettings):
    """Settings of SHINE."""

    refine: int = Field(
        4,
        ge=0,
        description="steps of GMRES from the estimate, with the estimate as its preconditioner; on the digits model "
        "the lowest cosine with the exact gradient was .75 without, and .98 with 4 (benchmarks gradients)",
    )
    threshold: float = Field(
        0.2,
        gt=0,
        allow_inf_nan=False,
        description="a sample is poor where ||J^T u + g - u|| exceeds this times ||g||; at .2 no "
        "sample's u is far from solving its equation, for a few products",
    )
    fallback: Literal["solve", "one_step", "none"] = Field(
        "solve",
        description="for poor samples. solve: go on until none is poor; one_step: u = g, the paper's; none: u as it is",
    )


class Shine(GradientBackend[ShineSettings]):
    """u = B^T g in place of (I - J^T)^-1 g, with B the estimate of (I - J)^-1 that the forward solver ended with.

    A quasi-Newton solver (`broyden`, `auto` where it has gone over to it, `newton`, `chord`) knows (I - J)^-1 along its
    own steps. Elsewhere B is the identity, so that B^T g alone is seldom much better than the one-step gradient; what
    `refine` steps of GMRES, from B^T g and preconditioned by B^T, make of it is measured in docs/gradients.md and by
    ``python -m benchmarks gradients``. A tighter forward solve makes a better B.

    Drops what the residual says that is left: J^T u + g - u, in ``info["backward"]``. It is measured, by one product.
    A sample is poor where it exceeds `threshold` times ||g||. What is done then is `fallback`:

    - ``"solve"``: GMRES goes on until no sample is poor, as `implicit` would to a tolerance of `threshold`.
    - ``"one_step"``: poor samples get u = g, as in the paper. No sample is refined further; one product more.
    - ``"none"``: u is used as it is.

    ``info["backward"]["fallback"]`` (B,) says which samples were poor after `refine` steps. Status CONVERGED means not
    poor; MAX_STEPS is no failure with ``"one_step"``, and one with ``"none"``, so that the failure policy hears of it.

    Costs one evaluation of f with its graph in the forward, and 1 + `refine` products with J^T in the backward, more
    where it falls back; memory is that graph, the forward solver's state until the backward is done, and 2 states a
    step. Gives first derivatives, in reverse mode, and refuses others.

    Source: Ramzi et al., SHINE: SHaring the INverse Estimate from the forward pass for bi-level optimization and
    implicit models (ICLR 2022), section 2.1 and, for refining, 2.3.

    Raises:
        ConfigError: the forward solver has no such estimate, or its state is not kept (``compact=True``, states
            before the last one).
    """

    needs_equilibrium: ClassVar[bool] = True
    needs_state: ClassVar[bool] = True

    def check(self, solver: Solver[Any], compact: bool = False) -> None:
        """Refuse a solver without an estimate, and calls that keep none.

        Raises:
            ConfigError: it is one.
        """
        if type(solver).inverse is Solver.inverse:
            raise ConfigError(
                f"gradient='shine' takes the forward solver's estimate of (I - J)^-1, and solver="
                f"{_name(solver)!r} has none. Use solver='broyden', 'auto', 'newton' or 'chord', or gradient="
                "'implicit', which needs none."
            )
        if compact:
            raise ConfigError(
                "gradient='shine' takes the solver's state of all samples, and with compact=True those that are done "
                "leave it. Set compact=False, or use gradient='implicit'."
            )

    def attach(self, problem: Problem, solution: Solution) -> Tensor:
        if not torch.is_grad_enabled():  # in inference mode there is not even a graph to take the transpose by
            return solution["z"]
        solver = solution.solver
        if solver is None:
            raise ConfigError(
                "gradient='shine' takes the solver's state at the end of a solve, and states before the last one have "
                "none. Give them another gradient: core={'intermediate': ['phantom']}."
            )
        made_steps = "steps" in solution and bool((solution["steps"] > 0).any())
        self.check(solver, compact=solution.solver_state is None and made_steps)
        inverse = solution.inverse()  # None of a solve that made no step, or none that taught it anything
        estimate = _same if inverse is None else _transposed(inverse, solution["z"])
        return attach_adjoint(problem, solution, partial(self._solve, estimate))

    def _solve(self, estimate: Apply, problem: LinearProblem) -> Solution:
        settings, b = self.settings, problem.b
        goes_on = settings.fallback == "solve"
        solver = _gmres(settings, MOST_STEPS if goes_on else settings.refine, estimate)
        scale = tolerance_scale(b, solver.settings)
        poor = torch.zeros(b.shape[0], dtype=torch.bool)

        def judge(step: int, u: Tensor, residual: Tensor) -> bool:
            nonlocal poor
            above = (residual > settings.threshold * scale.to(residual)).cpu() & torch.isfinite(residual).cpu()
            if step == settings.refine:
                poor = above
            return step >= settings.refine and not (goes_on and bool(above.any()))

        start = estimate(b)
        if settings.refine == 0:
            poor, image = self._poor(problem, start, scale)
            found = iterate(solver, problem, start, image, scale=scale).solution
        else:
            found = iterate(solver, problem, start, scale=scale, callback=judge).solution
        found["fallback"] = poor.to(b.device)
        if settings.fallback == "one_step":
            _take_one_step(found, problem)
        return found

    def _poor(self, problem: LinearProblem, u: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) bool of the samples that are poor at `u`, on the CPU, and J^T u + g."""
        image = problem(u)
        residual = torch.linalg.vector_norm(image - u, 2, 1)
        return (residual > self.settings.threshold * scale).cpu(), image


def _name(solver: Solver[Any]) -> str:
    return solver.settings.name or type(solver).__name__


def _same(x: Tensor) -> Tensor:
    return x


def _transposed(inverse: Apply, like: Tensor) -> Apply:
    """x -> B^T x, by the vector-Jacobian product of the linear map x -> B x."""
    with torch.enable_grad():
        point = torch.zeros_like(like, requires_grad=True)
        image = inverse(point)
    if not image.requires_grad:
        raise ConfigError(
            "gradient='shine' transposes the solver's inverse() by autograd, and what it returned has no graph: it "
            "must be made of differentiable operations on its argument."
        )

    def apply(x: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(image, point, x, retain_graph=True, allow_unused=True)
        return torch.zeros_like(x) if product is None else product  # pyright: ignore[reportUnnecessaryComparison]

    return apply


def _gmres(settings: ShineSettings, steps: int, preconditioner: Apply) -> LinearSolver[Any]:
    """GMRES that makes `refine` steps at least, whatever the residual is, and no product to confirm the last one."""
    kind = registry.get("linear_solvers", "gmres")
    given: dict[str, Any] = {"max_iter": max(steps, 1), "tol": settings.threshold}
    if steps == 0:
        given["max_nfe"] = 1  # the estimate is judged, and no step made
    solver = kind(kind.settings_type(name="gmres", return_final=settings.refine > 0, **given), preconditioner)
    solver.estimates = False  # of few steps from a known residual, the recurrence is right to rounding
    return solver


def _take_one_step(found: Solution, problem: LinearProblem) -> None:
    """Put u = g in the place of poor samples, and its residual in the place of theirs."""
    found.accepted = (Status.MAX_STEPS, Status.STALLED, Status.DIVERGED)  # that they are poor is provided for
    poor: Tensor = found["fallback"]
    if not bool(poor.any()):
        return
    b = problem.b
    image = problem(b)
    residual = torch.linalg.vector_norm(image - b, 2, 1)
    relative = residual / torch.linalg.vector_norm(image, 2, 1)
    found["z"] = torch.where(poor[:, None], b, found["z"])
    found["abs_lowest"] = torch.where(poor, residual, found["abs_lowest"])
    found["rel_lowest"] = torch.where(poor, relative, found["rel_lowest"])
    found["nfe"] = problem.nfe


@hookimpl
def deqcore_gradient() -> type[Shine]:
    return Shine
