"""Aitken's extrapolation for vectors: a relaxation factor that follows the map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl

__all__ = ["Aitken", "AitkenSettings", "RelaxationState", "secant_factor", "shortened"]

#: Squared cosine between a step and the residual's change above which they count as parallel. From 0.5 to 0.99 nothing
#: differed on the maps tried.
PARALLEL = 0.9
#: Smallest factor that repeated halving leads to.
SHORTEST = 0.125


class AitkenSettings(SolverSettings):
    """Settings of Aitken's extrapolation."""

    first_factor: float = Field(1.0, gt=0, description="relaxation factor of the first step; 1 is a plain step")
    max_factor: float = Field(
        1e3, gt=0, description="largest size of a factor; 1 / (1 - rho) is the useful one for an eigenvalue rho of J"
    )


@dataclass
class RelaxationState:
    """The last state and its residual, (B, F) each, and the factors of the last step, (B, 1)."""

    z: Tensor | None
    residual: Tensor | None
    factor: Tensor


def secant_factor(z: Tensor, residual: Tensor, state: RelaxationState) -> tuple[Tensor, Tensor]:
    """Relaxation factors w that make w times the residual's last change cancel the last step, in least squares.

    Returns:
        factors, NaN where the residual didn't change, and the squared cosine of the angle between the two; (B, 1) each.
    """
    if state.z is None or state.residual is None:
        return state.factor, torch.ones_like(state.factor)
    step, fall = z - state.z, state.residual - residual
    product = torch.linalg.vecdot(step, fall)[:, None]
    square = torch.linalg.vecdot(fall, fall)[:, None]
    factor = product / square
    return factor, factor * product / torch.linalg.vecdot(step, step)[:, None]


def shortened(factor: Tensor) -> Tensor:
    """The factors for samples whose residual didn't change: half, as they may have been put back from NaN, and no
    smaller than an eighth, below which 1 is next, as the last step may have been lost in rounding."""
    half = 0.5 * factor.abs().clamp_max(1.0)
    return torch.where(half < SHORTEST, 1.0, half)


class Aitken(Solver[AitkenSettings]):
    """z <- z + w (f(z) - z), where w is what would have made the last step end at a residual of 0 if J were a number.

    With s the last step and y the fall of the residual over it, w = <s, y> / <y, y>: for one feature Aitken's delta
    squared, the secant method. Factors are each sample's own. They grow above 1 where the map is slow, shrink where
    it oscillates. A negative one is taken where s and y are nearly parallel (the map repels along a line); elsewhere it
    says nothing of the other directions, and the step is a plain one.

    Use it where memory or time beside f is scarce: it keeps two states, and on slow maps with real eigenvalues it needs
    a fifth of the evaluations of plain iteration. It also solves maps with large negative eigenvalues, on which plain
    iteration diverges. `anderson` and `broyden` need fewer evaluations on most maps. Prefer `damped` where states must
    stay between z and f(z); where the largest eigenvalues of J are a complex pair, neither gains on plain iteration.

    A step costs one evaluation and three inner products; memory is 2 states. A sample whose residual doesn't change
    halves its factor, at most to an eighth.

    Source: Irons and Tuck, Int. J. Numer. Methods Eng. 1 (1969); it is Barzilai and Borwein's second step length (IMA
    J. Numer. Anal. 8, 1988) for f(z) - z. Of the vector forms compared by Ramiere and Helfer (2015), and of squared and
    cyclic extrapolation, it was the only one to solve every map with eigenvalues down to -30.
    """

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> RelaxationState:
        return RelaxationState(None, None, z.new_full((z.shape[0], 1), self.settings.first_factor))

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: RelaxationState) -> Step:
        residual, most = fz - z, self.settings.max_factor
        factor, along = secant_factor(z, residual, state)
        chosen = torch.where((factor > 0) | (along > PARALLEL), factor, 1.0).clamp(-most, most)
        factor = torch.where(torch.isfinite(factor), chosen, shortened(state.factor))
        state.z, state.residual, state.factor = z, residual, factor
        return Step(torch.addcmul(z, factor, residual), state)


@hookimpl
def deqcore_solver() -> type[Aitken]:
    return Aitken
