"""BiCGSTAB, which solves any linear system with seven states of memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deqcore import LinearProblem, LinearSolver, SolverSettings, Step, hookimpl

#: A sample whose residual is this near to orthogonal to its shadow, in spacings, begins anew.
BREAKDOWN = 10.0
#: Rounding error of a step beside its length, in spacings: errors of many features are mostly averaged out.
ROUNDING = 0.5
#: A step whose rounding error is this much of the lowest residual is a leap into a direction that I - A annihilates.
LEAP = 0.01
#: Steps after which the true residual is asked for, if a sample can't go on without it.
REFRESH = 25


@dataclass
class BicgstabState:
    """The shadow residual, the direction and its image, the residual; (B, 1) numbers of the last step; the samples
    that begin anew in the next one; the lowest norm of the residual; how far rounding errors may have taken the true
    residual from this one; and what the last step returned."""

    shadow: Tensor
    direction: Tensor
    image: Tensor
    residual: Tensor
    rho: Tensor
    alpha: Tensor
    omega: Tensor
    anew: Tensor
    lowest: Tensor
    gap: Tensor
    u: Tensor
    steps: int = 0


class Bicgstab(LinearSolver[SolverSettings]):
    """Biconjugate gradients with a step of smallest residual after each, sample by sample.

    Use it for systems that are not symmetric where `gmres` would need more directions than there is memory for. It
    needs no transposed product. Prefer `gmres` wherever its memory fits: it needs fewer products and its residual
    never rises; this one's jumps, and on strongly indefinite or skew-symmetric systems it may not get there at all.

    A step costs two products and about fifteen passes over a state; memory is 9 states, whatever the number of steps.

    A sample whose recurrence breaks down (its residual is orthogonal to the shadow residual, or the second half of a
    step does nothing) begins anew from where it is. The loop checks the recurrence's residual by a product before it
    calls a sample converged.

    Source: van der Vorst, SIAM J. Sci. Stat. Comput. 13 (1992).
    """

    estimates = True

    def init(self, problem: LinearProblem, u: Tensor, fu: Tensor) -> BicgstabState:
        residual = fu - u
        one = torch.ones_like(residual[:, :1])
        anew = torch.ones_like(one, dtype=torch.bool)
        return BicgstabState(
            residual, residual, residual, residual, one, one, one, anew, _norm(residual), _rounding(u), u
        )

    def step(self, problem: LinearProblem, u: Tensor, fu: Tensor, state: BicgstabState) -> Step:
        if u is not state.u:  # the loop has repaired a sample
            self._begin_anew((u != state.u).any(1, keepdim=True), u, fu, state)
        elif state.steps == REFRESH:
            stuck = state.lowest <= state.gap
            if bool(stuck.any()):
                self._begin_anew(stuck, u, problem(u), state)
            state.steps = 0
        self._turn(state)
        direction, residual, shadow = state.direction, state.residual, state.shadow
        image = problem.matvec(direction)
        alpha, _ = _quotient(state.rho, _dot(shadow, image), _norm(shadow) * _norm(image))
        half = torch.addcmul(residual, alpha, image, value=-1)
        turned = problem.matvec(half)
        omega, still = _quotient(_dot(turned, half), _dot(turned, turned), _norm(turned) ** 2)
        step = torch.addcmul(alpha * direction, omega, half)
        left = torch.addcmul(half, omega, turned, value=-1)
        # A sample whose rounding errors would be as large as what was left to solve stays where it is.
        error = _rounding(step)
        gap = torch.hypot(state.gap, error)
        hurts = (gap >= state.lowest) | (error >= LEAP * state.lowest)
        u = u + torch.where(hurts, 0.0, step)
        state.residual = torch.where(hurts, residual, left)
        state.gap = torch.where(hurts, state.gap, gap)
        state.lowest = torch.fmin(state.lowest, _norm(state.residual))
        state.image, state.alpha, state.omega = image, alpha, omega
        state.anew = still | hurts | (alpha == 0) | (omega == 0)
        state.u, state.steps = u, state.steps + 1
        return Step(u, state, u + state.residual)

    @staticmethod
    def _begin_anew(rows: Tensor, u: Tensor, fu: Tensor, state: BicgstabState) -> None:
        """Go on from the true residual in these samples."""
        state.residual = torch.where(rows, fu - u, state.residual)
        state.lowest = torch.where(rows, _norm(state.residual), state.lowest)
        state.gap = torch.where(rows, _rounding(u), state.gap)
        state.anew = state.anew | rows

    @staticmethod
    def _turn(state: BicgstabState) -> None:
        """The next direction; the residual itself where a sample begins anew."""
        residual, before = state.residual, state.rho
        rho = _dot(state.shadow, residual)
        least = BREAKDOWN * torch.finfo(rho.dtype).eps * _norm(state.shadow) * _norm(residual)
        anew = state.anew | (rho.abs() <= least)
        state.shadow = torch.where(anew, residual, state.shadow)
        state.rho = torch.where(anew, _dot(residual, residual), rho)
        weight = (rho / before) * (state.alpha / state.omega)
        turned = torch.addcmul(residual, weight, torch.addcmul(state.direction, state.omega, state.image, value=-1))
        state.direction = torch.where(anew, residual, turned)


def _quotient(above: Tensor, below: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """above / below, and where `below` is nothing beside `scale`; 0 there."""
    nothing = below.abs() <= torch.finfo(below.dtype).eps * scale
    return torch.where(nothing, 0.0, above / below), nothing


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products, shape (B, 1)."""
    return torch.linalg.vecdot(a, b)[:, None]


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, 2, 1, True)


def _rounding(step: Tensor) -> Tensor:
    """(B, 1) errors that adding `step` to a state brings."""
    return ROUNDING * torch.finfo(step.dtype).eps * _norm(step)


@hookimpl
def deqcore_linear_solver() -> type[Bicgstab]:
    return Bicgstab
