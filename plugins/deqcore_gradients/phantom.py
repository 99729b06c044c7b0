"""The phantom gradient: a few damped steps of f from the equilibrium, differentiated as they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deqcore import GradientBackend, GradientSettings, Problem, Solution, hookimpl


class PhantomSettings(GradientSettings):
    """Settings of the phantom gradient."""

    aliases: ClassVar[dict[str, str]] = {"grad": "steps", "tau": "damping"}

    steps: int = Field(1, ge=1, description="steps of f to differentiate; 1 is the one-step (Jacobian-free) gradient")
    damping: float = Field(1.0, gt=0, le=1, description="z + damping * (f(z) - z) at each; below 1 widens what it sees")
    sup_gap: int = Field(-1, description="return every sup_gap-th of these states as well; off unless positive")
    sup_loc: tuple[int, ...] = Field((), description="return these of the states as well, counted from 1")


class Phantom(GradientBackend[PhantomSettings]):
    """Differentiates `steps` damped applications of f at the state found, and takes that for the gradient.

    Drops the terms of (I - J)^-1 = I + J + J^2 + ... from the `steps`-th on (with damping, it weights them), so the
    gradient is biased unless f contracts strongly; its direction is usually good enough to train with. Can be
    differentiated any number of times, as what it is.

    Moves the state in training: what is returned is the last of the steps. In eval the value stays where it is.

    Costs `steps` evaluations of f with their graphs, and the backward through them.

    Source: Geng et al., On Training Implicit Models (NeurIPS 2021), unrolled form; steps=1: Fung et al., JFB
    (AAAI 2022).
    """

    transforms: ClassVar[bool] = True

    def attach(self, problem: Problem, solution: Solution) -> Tensor | list[Tensor]:
        settings = self.settings
        z: Tensor = solution["z"]
        states: list[Tensor] = []
        for k in range(1, settings.steps + 1):
            fz = problem(z)
            z = fz if settings.damping == 1.0 else torch.lerp(z, fz, settings.damping)
            gap = settings.sup_gap > 0 and k % settings.sup_gap == 0
            if k == settings.steps or gap or (settings.sup_gap <= 0 and k in settings.sup_loc):
                states.append(z)
        return states


@hookimpl
def deqcore_gradient() -> type[Phantom]:
    return Phantom
