"""Conjugate gradients, for I - A symmetric and positive definite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqcore import LinearProblem, LinearSolver, SolverSettings, Step, hookimpl

#: Rounding error of a step beside its length, in spacings: errors of many features are mostly averaged out.
ROUNDING = 0.5


@dataclass
class CgState:
    """Direction, residual, and what the last step returned; per sample, shape (B, 1), the squared norm of the residual,
    the first and the lowest of these, how far rounding errors may have taken the true residual from this one, and
    whether a direction of curvature that isn't positive was met."""

    direction: Tensor
    residual: Tensor
    u: Tensor
    square: Tensor
    first: Tensor
    lowest: Tensor
    gap: Tensor
    indefinite: Tensor


class Cg(LinearSolver[SolverSettings]):
    """The smallest error in the norm of I - A over the Krylov space, with three states of memory.

    It needs I - A symmetric and positive definite, sample by sample: that is A symmetric with all eigenvalues below 1,
    as the Jacobian of a gradient step or of a symmetric monotone layer. Use it there: it needs about as many products
    as `gmres`, and its memory and work a step do not grow. Elsewhere use `gmres` or `bicgstab`: whether I - A is
    symmetric is not checked, and where it isn't, the method stalls or diverges, which the residual tells.

    A direction p with p^T (I - A) p <= 0 proves a sample not positive definite. Its solve ends there, with the best
    state so far and a status that is no success, and ``info["indefinite"]``, shape (B,), is True for it.

    A step costs one product and about ten passes over a state; memory is 6 states.

    Source: Hestenes and Stiefel, J. Res. Nat. Bur. Standards 49 (1952).
    """

    estimates = True

    def init(self, problem: LinearProblem, u: Tensor, fu: Tensor) -> CgState:
        residual = fu - u
        square = _dot(residual, residual)
        none = torch.zeros_like(square, dtype=torch.bool)
        return CgState(residual, residual, u, square, square, square, _rounding(u), none)

    def step(self, problem: LinearProblem, u: Tensor, fu: Tensor, state: CgState) -> Step:
        if u is not state.u:
            self._begin_anew((u != state.u).any(1, keepdim=True), u, fu, state)
        if not u.is_cuda and bool(state.indefinite.all()):  # asking a GPU would cost more than the product
            return Step(u, state, fu)
        direction, residual, square = state.direction, state.residual, state.square
        image = problem.matvec(direction)
        curvature = _dot(direction, image)
        # Below the rounding error of the first residual, a curvature means nothing.
        tells = square > torch.finfo(square.dtype).eps ** 2 * state.first
        state.indefinite = state.indefinite | ((curvature <= 0) & tells)
        length = torch.where(state.indefinite | (curvature == 0), 0.0, square / curvature)
        # A sample whose rounding errors would be as large as what was left to solve stays where it is.
        gap = torch.hypot(state.gap, _rounding(length * direction))
        hurts = gap >= state.lowest.sqrt()
        length = torch.where(hurts, 0.0, length)
        state.gap = torch.where(hurts, state.gap, gap)
        u = torch.addcmul(u, length, direction)
        residual = torch.addcmul(residual, length, image, value=-1)
        state.square = _dot(residual, residual)
        state.lowest = torch.fmin(state.lowest, state.square)
        weight = torch.where(square > 0, state.square / square, 0.0)
        state.direction = torch.addcmul(residual, weight, direction)
        state.u, state.residual = u, residual
        return Step(u, state, u + residual)

    @staticmethod
    def _begin_anew(rows: Tensor, u: Tensor, fu: Tensor, state: CgState) -> None:
        """Go on from the true residual in these samples."""
        state.residual = torch.where(rows, fu - u, state.residual)
        state.direction = torch.where(rows, state.residual, state.direction)
        state.square = torch.where(rows, _dot(state.residual, state.residual), state.square)
        state.lowest = torch.where(rows, state.square, state.lowest)
        state.gap = torch.where(rows, _rounding(u), state.gap)

    def notes(self, state: CgState) -> Mapping[str, Any]:
        return {"indefinite": state.indefinite[:, 0]}


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products, shape (B, 1)."""
    return torch.linalg.vecdot(a, b)[:, None]


def _rounding(step: Tensor) -> Tensor:
    """(B, 1) errors that adding `step` to a state brings."""
    return ROUNDING * torch.finfo(step.dtype).eps * torch.linalg.vector_norm(step, 2, 1, True)


@hookimpl
def deqcore_linear_solver() -> type[Cg]:
    return Cg
