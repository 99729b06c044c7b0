"""A third-party solver for deqcore: plain iteration with a step length taken from the last secant."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl

__all__ = ["Secant", "SecantSettings", "deqcore_solver"]


class SecantSettings(SolverSettings):
    """Settings of the secant step."""

    start: float = Field(0.5, gt=0, le=1, description="step length until there is a secant; 1 is plain iteration")
    limit: float = Field(50.0, gt=0, description="largest step length; a secant of a curved map can ask for any")


class SecantState(NamedTuple):
    """Each sample's step length, shape (batch, 1), and the residual that it was used on."""

    length: Tensor
    residual: Tensor | None


class Secant(Solver[SecantSettings]):
    """z <- z + length * (f(z) - z), one length a sample, such that the last step would have been right for it.

    Use it where one number is enough: maps whose Jacobian has real eigenvalues. Where they are complex, `anderson` is
    the better choice. The residual does not fall at every step.

    A step costs one evaluation of f and two inner products; memory is one state.

    Source: Irons and Tuck, Int. J. Numer. Methods Eng. 1 (1969); Barzilai and Borwein, IMA J. Numer. Anal. 8 (1988).
    """

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> SecantState:
        return SecantState(z.new_full((z.shape[0], 1), self.settings.start), None)

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: SecantState) -> Step:
        residual, length = fz - z, state.length
        if state.residual is not None:
            change = residual - state.residual
            size = change.square().sum(1, keepdim=True)
            along = -(state.residual * change).sum(1, keepdim=True) * length
            secant = (along / size).clamp(-self.settings.limit, self.settings.limit)
            length = torch.where((size > 0) & (secant != 0), secant, self.settings.start)
        return Step(z + length * residual, SecantState(length, residual))


@hookimpl
def deqcore_solver() -> type[Secant]:
    return Secant
