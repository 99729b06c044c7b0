"""Peaceman-Rachford splitting for monotone operator equilibria."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deqcore import Problem, Solver, SolverSettings, Step, hookimpl

from .monotone import Operator

NEEDS = ("linear", "inject", "prox", "inverse_step")


class PeacemanRachfordSettings(SolverSettings):
    """Settings of Peaceman-Rachford splitting."""

    alpha: float | None = Field(
        None,
        gt=0,
        description="step size; any converges. None: 1 / sqrt(m L) where f gives its monotonicity m and lipschitz L, "
        "the best for a symmetric W, else 1",
    )


@dataclass
class PeacemanRachfordState:
    """U x + b, the last state returned, and the reflected point u that the next step starts from, (B, F) each."""

    bias: Tensor
    z: Tensor
    u: Tensor


class PeacemanRachford(Solver[PeacemanRachfordSettings]):
    """Alternates the proximal operator and (I + alpha (I - W))^-1, each reflected, for z = prox(W z + U x + b).

    Use it for monotone operator equilibrium networks (monDEQ) where that inverse is cheap: it converges for every
    alpha, in far fewer steps than `forward_backward`. f must provide its parts, see
    :class:`deqcore_solvers.monotone.ResolventMap`.

    A step costs one solve with I + alpha (I - W), counted as an evaluation. It gives W z too, so the residual costs
    nothing; the loop evaluates f itself before it calls a result converged. Memory is 3 states, and what f keeps. The
    states are those that the inverse gives: relu's zeros are zeros up to the residual there, and exact in f(z).

    Source: Winston and Kolter, Monotone operator equilibrium networks (NeurIPS 2020), algorithm 2; Ryu and Boyd, Appl.
    Comput. Math. 15 (2016), section 5, for alpha.

    Raises:
        FunctionError: f lacks one of its parts, or they make another map than f.
    """

    traceable: ClassVar[bool] = False

    estimates = True

    def init(self, problem: Problem, z: Tensor, fz: Tensor) -> PeacemanRachfordState:
        operator = Operator(problem, NEEDS, "peaceman_rachford")
        bias = operator.inject()
        image = operator.linear(z) + bias
        operator.check(z, fz, image)
        return PeacemanRachfordState(bias, z, torch.lerp(z, image, self._alpha(operator)))

    def step(self, problem: Problem, z: Tensor, fz: Tensor, state: PeacemanRachfordState) -> Step:
        operator = Operator(problem, NEEDS, "peaceman_rachford")
        alpha, u = self._alpha(operator), state.u
        if z is not state.z:  # the loop repaired a sample: start anew from its state
            other = (z != state.z).any(1, keepdim=True)
            u = torch.where(other, torch.lerp(z, operator.linear(z) + state.bias, alpha), u)
        half = 2 * operator.prox(u, alpha) - u
        pushed = half + alpha * state.bias
        moved = operator.inverse_step(pushed, alpha)
        # moved + alpha (I - W) moved = pushed, which gives W moved for no product.
        image = moved + (moved - pushed) / alpha + state.bias
        state.z, state.u = moved, 2 * moved - half
        return Step(moved, state, operator.prox(image, 1.0))

    def _alpha(self, operator: Operator) -> float:
        if self.settings.alpha is not None:
            return self.settings.alpha
        m, lipschitz = operator.number("monotonicity"), operator.number("lipschitz")
        return 1.0 if m is None or lipschitz is None else (m * lipschitz) ** -0.5


@hookimpl
def deqcore_solver() -> type[PeacemanRachford]:
    return PeacemanRachford
