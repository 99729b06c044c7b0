"""Implicit differentiation: the one autograd function, whose backward solves u = J^T u + cotangent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import GradientModeError
from .problem import Linearization, LinearProblem, Problem
from .solution import Solution

__all__ = ["attach_adjoint"]

SolveAdjoint = Callable[[LinearProblem], Solution]


def attach_adjoint(problem: Problem, solution: Solution, solve: SolveAdjoint, exact: bool = False) -> Tensor:
    """The state in `solution` as an implicit function of whatever f depends on.

    One evaluation of f with its graph, at the state: its derivative in f's inputs is used as it is, and the one in z
    for the products J^T u of the adjoint solve. The value is the state itself, unmoved.

    Args:
        problem: f on packed states.
        solution: holds the packed state under ``"z"``; told about the backward solve by :meth:`Solution.report`.
        solve: solves u = J^T u + b for the problem it is given.
        exact: whether `solve` solves it, and what I - J puts in J^T's place, to a tolerance. Further derivatives are
            made of further such solves; what takes something else for the solution gives first derivatives only.

    Returns:
        the state, shape (batch, features), differentiable once.
    """
    z: Tensor = solution["z"]
    if not torch.is_grad_enabled():
        return z
    linearized = problem.linearize(z)
    if not _depends_on_more(linearized):
        return z
    return _Equilibrium.apply(linearized.fz, linearized, solution, solve)


def _depends_on_more(linearized: Linearization) -> bool:
    """Whether f(z) has a gradient to anything but z itself."""
    start = linearized.fz.grad_fn
    waiting = [start] if start is not None else []
    seen: set[Any] = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not linearized.z:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return False


class _Equilibrium(torch.autograd.Function):
    """Forward: z. Backward: cotangent -> (I - J^T)^-1 cotangent, handed on to f's own graph."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, linearized: Linearization, solution: Solution, solve: SolveAdjoint) -> Tensor:
        ctx.parts = (linearized, solution, solve)
        return linearized.z.detach().clone()  # a caller may change it in place; f's graph needs z as it is

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        linearized, solution, solve = ctx.parts
        with torch.no_grad():
            adjoint = _solve(cotangents[0].detach(), linearized, solution, solve)
        if torch.is_grad_enabled():  # create_graph=True: a second derivative may follow
            adjoint = _FirstOrderOnly.apply(adjoint, linearized.fz, cotangents[0])
        return adjoint, None, None, None


def _solve(cotangent: Tensor, linearized: Linearization, solution: Solution, solve: SolveAdjoint) -> Tensor:
    """u = J^T u + cotangent, scaled so that neither tolerance nor range depend on the loss's scale."""
    peak = cotangent.abs().amax()  # not a norm, whose squares overflow and underflow long before the cotangent does
    if not bool(torch.isfinite(peak)) or not bool(peak > 0):
        return cotangent  # nothing to solve for; an overflow is handed on, as a gradient scaler expects
    z = linearized.z
    adjoint = LinearProblem(linearized.vjp, linearized.jvp, cotangent / peak, linearized.problem.eps(z))
    found = solve(adjoint)
    solution.report(found)
    return found["z"] * peak


class _FirstOrderOnly(torch.autograd.Function):
    """Lets a value through and refuses to be differentiated, in whatever the anchors depend on.

    ``autograd.grad`` runs only what lies between its inputs and outputs: unless all that the value depends on can be
    reached from here, a second derivative would silently lack its part.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *anchors: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise GradientModeError(
            "this gradient backend gives first derivatives only, and a second one was asked for (create_graph=True and "
            "another backward). Use gradient='phantom', whose graph can be differentiated again, or unroll f."
        )
