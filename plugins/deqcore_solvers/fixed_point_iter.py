"""Plain fixed-point iteration, damped if asked."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl


class FixedPointSettings(SolverSettings):
    """Settings of plain iteration."""

    aliases: ClassVar[dict[str, str]] = {"tau": "damping"}

    damping: float = Field(1.0, gt=0, le=2, description="z + damping * (f(z) - z); 1 is plain iteration")


class FixedPointIter(Solver[FixedPointSettings]):
    """z <- z + damping * (f(z) - z).

    Use it when f contracts well (spectral radius of df/dz up to about 0.8), or to do exactly what an unrolled network
    does. Near radius 1 it needs hundreds of steps where `anderson` and `broyden` need dozens, and above 1 it diverges.

    A step costs one evaluation of f and no memory of its own.

    Source: Banach's fixed-point theorem; Krasnoselskij (1955) for damping below 1.
    """

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: Any) -> Step:
        damping = self.settings.damping
        return Step(fz if damping == 1.0 else torch.lerp(z, fz, damping), None)


@hookimpl
def deqcore_solver() -> type[FixedPointIter]:
    return FixedPointIter
