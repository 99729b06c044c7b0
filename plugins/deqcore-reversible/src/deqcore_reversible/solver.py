"""The coupled iteration: two sequences of states, each damped towards f of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl

__all__ = ["DAMPING", "Pair", "Reversible", "ReversibleSettings", "deqcore_solver"]

#: The damping where nobody says. A given accuracy costs about as many checkpoints with any other, and more steps with
#: a smaller one.
DAMPING = 0.5


class ReversibleSettings(SolverSettings):
    """Settings of the coupled iteration."""

    aliases: ClassVar[dict[str, str]] = {"beta": "damping"}

    damping: float = Field(DAMPING, gt=0, lt=1, description="beta; at 1 a step could not be undone")


@dataclass
class Pair:
    """The second sequence's state y, and the first one's, z, which is the one that counts; (B, F) each."""

    y: Tensor
    z: Tensor


class Reversible(Solver[ReversibleSettings]):
    """y <- (1 - damping) y + damping f(z), then z <- (1 - damping) z + damping f(y), from y = z.

    The fixed point is f's, and each step can be undone. Use it with ``gradient="reversible"``; by itself it is a slow
    solver: it converges where ``damped`` does on a contraction, at twice the evaluations a step.

    A step costs two evaluations of f; memory is one state.

    Source: McCallum, Arora and Foster, Reversible Deep Equilibrium Models (arXiv 2509.12917).
    """

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> Pair:
        return Pair(z, z)

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: Pair) -> Step:
        state = self.paired(problem, z, state)
        y = torch.lerp(state.y, fz, self.settings.damping)
        z = torch.lerp(z, problem(y), self.settings.damping)
        return Step(z, Pair(y, z))

    def paired(self, problem: Problem, z: Tensor, state: Pair) -> Pair:
        """The pair to go on from, where the loop hands back `z`: samples that it has put back begin anew there."""
        if z is state.z:
            return state
        other = (z != problem.round(state.z)).any(1, keepdim=True)
        return Pair(torch.where(other, z, state.y), z)


@hookimpl
def deqcore_solver() -> type[Reversible]:
    return Reversible
