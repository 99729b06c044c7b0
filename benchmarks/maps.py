"""The maps that are solved: f(z) = tanh(W z + x), one linear map W, one x a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SIX", "Counted", "TanhMap", "even", "six", "uneven"]


class Counted:
    """A function, and how often it was called."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self.fn = fn
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.fn(*args, **kwargs)


class TanhMap:
    """f(z) = tanh(z W^T + x), on states of shape (B, d), with what is needed to check a solver's word.

    Args:
        weight: W, shape (d, d).
        x: shape (B, d).
    """

    def __init__(self, weight: Tensor, x: Tensor) -> None:
        self.weight = weight
        self.x = x

    def fn(self) -> Callable[..., Tensor]:
        """f as a plain function. `tau` damps it: torchdeq's simple_fixed_point_iter leaves the damping to f."""
        weight, x = self.weight, self.x

        def f(z: Tensor, tau: float = 1.0) -> Tensor:
            fz = torch.tanh(z @ weight.T + x)
            return fz if tau == 1.0 else tau * fz + (1 - tau) * z

        return f

    def relative_residual(self, z: Tensor) -> float:
        """||f(z) - z|| / ||f(z)|| of the worst sample, in float64."""
        z = z.double()
        fz = torch.tanh(z @ self.weight.double().T + self.x.double())
        return float(((fz - z).norm(dim=1) / fz.norm(dim=1)).max())

    def transposed_product(self, z: Tensor, u: Tensor) -> Tensor:
        """J^T u, with J = diag(1 - tanh^2) W at `z`, in float64."""
        fz = torch.tanh(z.double() @ self.weight.double().T + self.x.double())
        return (u.double() * (1 - fz**2)) @ self.weight.double()


@dataclass(frozen=True)
class Recipe:
    """How one of the six maps is made: W's maker, its size (spectral radius or norm), and x's standard deviation."""

    make: Callable[[int, torch.Generator], Tensor]
    d: int
    size: float
    x: float
    norm: bool = False
    seeds: int = 4


def _gaussian(d: int, g: torch.Generator) -> Tensor:
    return torch.randn(d, d, generator=g, dtype=torch.float64)


def _symmetric(d: int, g: torch.Generator) -> Tensor:
    a = _gaussian(d, g)
    return a + a.T


def _negative(d: int, g: torch.Generator) -> Tensor:
    a = _gaussian(d, g)
    return -(a @ a.T)


def _convolution(d: int, g: torch.Generator) -> Tensor:
    """A circular 3x3 convolution of 4 channels of 8x8, as a matrix."""
    kernel = torch.randn(4, 4, 3, 3, generator=g, dtype=torch.float64)
    images = torch.nn.functional.pad(torch.eye(d, dtype=torch.float64).view(d, 4, 8, 8), (1, 1, 1, 1), mode="circular")
    return torch.nn.functional.conv2d(images, kernel).reshape(d, d).T


#: Gaussian, symmetric, negative definite (not contractive), convolutional; all but N64 are hard near radius 1.
SIX = {
    "G64a": Recipe(_gaussian, 64, 0.9, 1.0),
    "G64b": Recipe(_gaussian, 64, 0.99, 0.1),
    "S64": Recipe(_symmetric, 64, 0.99, 0.02),
    "N64": Recipe(_negative, 64, 3.0, 0.3),
    "C256": Recipe(_convolution, 256, 0.95, 0.1, norm=True),
    "G512": Recipe(_gaussian, 512, 0.99, 0.1, seeds=1),
}


def six(name: str, seed: int, dtype: torch.dtype = torch.float64, batch: int = 32) -> TanhMap:
    """One of the six maps, made in float64 and then rounded."""
    recipe = SIX[name]
    g = torch.Generator().manual_seed(seed)
    w = recipe.make(recipe.d, g)
    size = torch.linalg.matrix_norm(w, 2) if recipe.norm else torch.linalg.eigvals(w).abs().max()
    x = recipe.x * torch.randn(batch, recipe.d, generator=g, dtype=torch.float64)
    return TanhMap((w * (recipe.size / size)).to(dtype), x.to(dtype))


def even(batch: int, d: int, seed: int = 0) -> TanhMap:
    """A hard map, float32: .99 times an orthogonal matrix. Every residual falls a little at every iteration."""
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=g))
    return TanhMap(0.99 * q, 0.01 * torch.randn(batch, d, generator=g))


def uneven(batch: int, d: int, seed: int = 0) -> TanhMap:
    """A hard map, float32: Gaussian, spectral radius .99. Samples get better and worse at different iterations."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(d, d, generator=g)
    return TanhMap(w * (0.99 / torch.linalg.eigvals(w).abs().max()), 0.1 * torch.randn(batch, d, generator=g))
