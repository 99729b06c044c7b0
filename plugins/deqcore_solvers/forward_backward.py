"""Forward-backward splitting for monotone operator equilibria."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl

from .monotone import ROUNDING, Operator


class ForwardBackwardSettings(SolverSettings):
    """Settings of forward-backward splitting."""

    alpha: float | None = Field(
        None,
        gt=0,
        description="step size, below 2 m / L^2. None finds each sample's own, which is never below m / L^2 and was "
        "several times larger on all monDEQs tried",
    )


@dataclass
class ForwardBackwardState:
    """U x + b, the last state and W z + U x + b there, (B, F) each; step sizes (B, 1)."""

    bias: Tensor
    z: Tensor
    image: Tensor
    alpha: Tensor


class ForwardBackward(Solver[ForwardBackwardSettings]):
    """z <- prox(z - alpha ((I - W) z - U x - b), alpha), for z = prox(W z + U x + b) with a monotone I - W.

    Use it for monotone operator equilibrium networks (monDEQ), where it converges whatever the spectrum of W; f must
    provide its parts, see :class:`deqcore_solvers.monotone.MonotoneMap`. Prefer `peaceman_rachford` where solving with
    I + alpha (I - W) is cheap (a small or structured W): it needs far fewer steps.

    A step costs one product with W, which gives the residual too; memory is 3 states. The loop evaluates f itself
    before it calls a result converged.

    alpha starts at 1, plain iteration, and falls to <A d, d> / |A d|^2, A = I - W and d the last step, where that is
    less: along every step seen, z - alpha A z is then a contraction. It stays above m / L^2, and so the method
    converges for every strongly monotone A.

    Source: Winston and Kolter, Monotone operator equilibrium networks (NeurIPS 2020), algorithm 1.

    Raises:
        FunctionError: f lacks one of its parts, or they make another map than f.
    """

    traceable: ClassVar[bool] = False

    estimates = True

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> ForwardBackwardState:
        operator = Operator(problem, ("linear", "inject", "prox"), "forward_backward")
        bias = operator.inject()
        image = operator.linear(z) + bias
        operator.check(z, fz, image)
        return ForwardBackwardState(bias, z, image, z.new_full((z.shape[0], 1), self.settings.alpha or 1.0))

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: ForwardBackwardState) -> Step:
        operator = Operator(problem, ("linear", "inject", "prox"), "forward_backward")
        image = state.image if z is state.z else operator.linear(z) + state.bias  # else the loop repaired a sample
        moved = operator.prox(torch.lerp(z, image, state.alpha), state.alpha)
        after = operator.linear(moved) + state.bias
        if self.settings.alpha is None:
            d = moved - z
            fall = d - (after - image)  # A d
            alpha = torch.linalg.vecdot(fall, d)[:, None] / torch.linalg.vecdot(fall, fall)[:, None]
            size = torch.linalg.vector_norm(torch.stack([d, moved]), 2, 2, True)
            known = size[0] > ROUNDING * problem.eps(z) * size[1]  # shorter steps are rounding error
            state.alpha = torch.where(known & (alpha > 0) & (alpha < state.alpha), alpha, state.alpha)
        state.z, state.image = moved, after
        return Step(moved, state, operator.prox(after, 1.0))


@hookimpl
def deqcore_solver() -> type[ForwardBackward]:
    return ForwardBackward
