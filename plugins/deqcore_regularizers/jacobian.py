"""Jacobian regularization: a penalty on ||df/dz||_F at the equilibrium."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from deqcore import ConfigError, Problem, Regularizer, RegularizerSettings, hookimpl


class JacobianSettings(RegularizerSettings):
    """Settings of Jacobian regularization."""

    vecs: int = Field(1, ge=1, description="random vectors of the estimate; 1 is enough over a batch")


class Jacobian(Regularizer[JacobianSettings]):
    """||J||_F^2 over the number of entries of z, by Hutchinson's estimator: the mean of ||J^T v||^2 over normal v.

    Keeps f contractive in training, so that the solver goes on converging. Costs one evaluation of f, and one product
    with J^T a vector, differentiated again.

    Source: Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization (ICML 2021), eq. 5.
    """

    def penalty(self, problem: Problem, states: Sequence[Tensor]) -> Tensor:
        linearized = problem.linearize(states[-1])
        if not linearized.fz.requires_grad:
            return linearized.z.new_zeros(())
        return self.estimate(linearized.fz, linearized.z, self.settings.vecs, create_graph=True)

    @staticmethod
    def estimate(f0: Tensor, z0: Tensor, vecs: int = 1, create_graph: bool = True) -> Tensor:
        """The estimate for f0 = f(z0); see :func:`deqcore.loss.jac_reg`."""
        if vecs < 1:
            raise ConfigError(f"vecs must be at least 1, got {vecs}.")
        total = z0.new_zeros((), dtype=z0.dtype.to_real())
        for _ in range(vecs):
            v = torch.randn_like(f0)
            (product,) = torch.autograd.grad(f0, z0, v, retain_graph=True, create_graph=create_graph, allow_unused=True)
            if product is not None:  # pyright: ignore[reportUnnecessaryComparison]  # None: f0 doesn't depend on z0
                total = total + product.abs().square().sum()
        return total / vecs / z0.numel()


@hookimpl
def deqcore_regularizer() -> type[Jacobian]:
    return Jacobian
