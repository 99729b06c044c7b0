"""A third-party gradient backend for deqcore: the first terms of the Neumann series of the exact gradient."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from deqcore import GradientBackend, GradientModeError, GradientSettings, Linearization, Problem, Solution, hookimpl

__all__ = ["Neumann", "NeumannSettings", "deqcore_gradient"]


class NeumannSettings(GradientSettings):
    """Settings of the truncated series."""

    terms: int = Field(5, ge=1, description="terms of 1 + J + J^2 + ... to keep; 1 is the one-step gradient")


class Neumann(GradientBackend[NeumannSettings]):
    """dz*/dx = (1 + J + ... + J^(terms - 1)) df/dx, with J = df/dz at the state found.

    Drops all further terms, so the error falls like ||J||^terms; where f does not contract, more terms make it worse.
    The value of the state is not moved. First derivatives only: create_graph=True is refused.

    Costs one evaluation of f with its graph in the forward, and terms - 1 products with J^T in the backward.

    Source: Lorraine, Vicol and Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation
    (AISTATS 2020).
    """

    def attach(self, problem: Problem, solution: Solution) -> Tensor:
        linearized = problem.linearize(solution["z"])
        return _Series.apply(linearized.fz, linearized, self.settings.terms)


class _Series(torch.autograd.Function):
    """Forward: the state. Backward: the cotangent times the series, handed on to the graph of f."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, linearized: Linearization, terms: int) -> Tensor:
        ctx.linearized, ctx.terms = linearized, terms
        return linearized.z.detach().clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the terms depend on z* and on f's parameters, and nothing here records how
            raise GradientModeError(
                "example_neumann gives first derivatives only; use another gradient with create_graph=True."
            )
        term = total = cotangents[0]
        for _ in range(ctx.terms - 1):
            term = ctx.linearized.vjp(term)
            total = total + term
        return total, None, None


@hookimpl
def deqcore_gradient() -> type[Neumann]:
    return Neumann
