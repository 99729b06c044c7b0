"""Problems for the tests of gradient backends, and independent truths about their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deqcore import registry
from deqcore_gradients import neumann, one_step, shine, unrolled

DOUBLE = torch.float64
NAMES = {"one_step": one_step, "neumann": neumann, "shine": shine, "unrolled": unrolled}
EXACT = {"name": "implicit", "solver": {"name": "gmres", "tol": 1e-13}}


@pytest.fixture(autouse=True)
def backends():
    """The four under their names, whether or not the installed metadata knows them yet."""
    with registry.scope():
        for name, module in NAMES.items():
            registry.register("gradients", name, module.deqcore_gradient(), replace=True)
        yield


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def orthogonal(size: int, rho: float = 0.8, seed: int = 1) -> Tensor:
    """A matrix whose singular values are all `rho`."""
    return torch.linalg.qr(rand(size, size, seed=seed))[0] * rho


def of_radius(size: int, rho: float, seed: int = 1) -> Tensor:
    """A Gaussian matrix of spectral radius `rho`."""
    w = rand(size, size, seed=seed)
    return w * (rho / torch.linalg.eigvals(w).abs().max())


class Layer:
    """f(z) = tanh(z w + x), which counts its calls, with the exact adjoint by a dense solve."""

    def __init__(self, w: Tensor, x: Tensor) -> None:
        self.w = w.clone().requires_grad_()
        self.x = x.clone().requires_grad_()
        self.calls = 0

    @property
    def inputs(self) -> list[Tensor]:
        return [self.w, self.x]

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.x).detach()

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(z @ self.w + self.x)

    def jacobians(self, z: Tensor) -> Tensor:
        """(B, F, F), df_i/dz_j at `z`."""
        slope = 1 - torch.tanh(z.detach() @ self.w.detach() + self.x.detach()) ** 2
        return slope[:, :, None] * self.w.detach().T

    def adjoint(self, z: Tensor, cotangent: Tensor) -> Tensor:
        """u = (I - J^T)^-1 cotangent."""
        j = self.jacobians(z)
        return torch.linalg.solve(torch.eye(z.shape[1], dtype=z.dtype) - j.mT, cotangent[:, :, None])[:, :, 0]

    def pulled(self, z: Tensor, u: Tensor) -> list[Tensor]:
        """The gradients that the adjoint state `u` makes."""
        return list(torch.autograd.grad(torch.tanh(z.detach() @ self.w + self.x), self.inputs, u))


def layer(batch: int = 4, size: int = 6, rho: float = 0.8) -> Layer:
    return Layer(orthogonal(size, rho), rand(batch, size, seed=3))


def close(found: Any, expected: Any, tol: float = 1e-8) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(a - b) <= tol * torch.linalg.vector_norm(b), (a, b)


def cosine(a: Any, b: Any) -> float:
    x, y = (torch.cat([t.reshape(-1) for t in side]) for side in (a, b))
    return float(x @ y / (x.norm() * y.norm()))
