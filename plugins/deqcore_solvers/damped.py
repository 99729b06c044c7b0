"""Damped iteration, with a damping that is fixed or found sample by sample."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl

from .aitken import RelaxationState, secant_factor, shortened


class DampedSettings(SolverSettings):
    """Settings of damped iteration."""

    aliases: ClassVar[dict[str, str]] = {"tau": "damping"}

    damping: Annotated[float, Field(gt=0, le=1)] | Literal["adaptive"] = Field(
        "adaptive", description="z + damping * (f(z) - z); adaptive: per sample, as no fixed value suits every map"
    )
    min_damping: float = Field(1e-3, gt=0, le=1, description="smallest damping that adaptive takes")


class Damped(Solver[DampedSettings]):
    """z <- z + t (f(z) - z) with 0 < t <= 1: every state lies between the one before and its image.

    Adaptive damping is each sample's own. With s the last step and y the fall of the residual over it, t is
    <s, y> / <y, y>, the one that would have left the least residual, and 1 at most; also 1 where that is negative, as
    no damping helps along a direction that f stretches. A sample whose residual doesn't change halves it, at
    most to an eighth.

    Use it where plain iteration oscillates or diverges because df/dz has large negative eigenvalues, and where states
    must stay in a convex set that f maps into itself (positive states, probabilities). Prefer `aitken` where they may
    leave it, as that speeds slow maps up too, and `anderson` or `broyden` for fewer evaluations. It doesn't help where
    df/dz has an eigenvalue with a real part above 1.

    A step costs one evaluation, and three inner products if adaptive; memory is 2 states then, and none with a fixed
    damping.

    Source: Krasnoselskij (1955) and Mann (1953) for the iteration; Barzilai and Borwein, IMA J. Numer. Anal. 8 (1988),
    second step length, for the damping.
    """

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> RelaxationState | None:
        if self.settings.damping != "adaptive":
            return None
        return RelaxationState(None, None, torch.ones_like(z[:, :1]))

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: RelaxationState | None) -> Step:
        damping = self.settings.damping
        if isinstance(damping, float):
            return Step(fz if damping == 1.0 else torch.lerp(z, fz, damping), None)
        if state is None:
            raise TypeError("adaptive damping needs the state that init() makes")
        residual = fz - z
        factor, _ = secant_factor(z, residual, state)
        chosen = torch.where(factor > 0, factor, 1.0)
        factor = torch.where(torch.isfinite(factor), chosen, shortened(state.factor))
        factor = factor.clamp(self.settings.min_damping, 1.0)
        state.z, state.residual, state.factor = z, residual, factor
        return Step(torch.addcmul(z, factor, residual), state)


@hookimpl
def deqcore_solver() -> type[Damped]:
    return Damped
