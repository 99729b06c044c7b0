"""The spectral radius of df/dz at a state, complex eigenvalues included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .problem import Problem

__all__ = ["power_iterate", "spectral_radius"]

#: A Krylov vector shorter than this, relative to the eigenvalue estimate, is rounding: the first one is an eigenvector.
COLLINEAR = 1e-5


def power_iterate(product: Callable[[Tensor], Tensor], v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Dominant direction and largest |eigenvalue|, sample by sample.

    Power steps turn `v` into the dominant invariant subspace, a line, or a plane where the largest eigenvalues are a complex
    pair (or two real ones of one size). Two Arnoldi steps from there give the map on that plane as a 2 x 2 matrix,
    whose eigenvalues are exact in both cases; a Rayleigh quotient alone is meaningless for a complex pair.

    Args:
        product: v -> J^T v (or J v) on (batch, features) tensors.
        v: start, shape (batch, features).
        steps: power steps, each one product; two more follow.

    Returns:
        unit vectors, shape (batch, features), and radii, shape (batch,).
    """
    for _ in range(max(steps, 0)):
        v = _unit(product(_unit(v)))
    first = _unit(v)
    image = product(first)
    h11 = (first * image).sum(1)
    rest = image - h11[:, None] * first
    h21 = torch.linalg.vector_norm(rest, dim=1)
    second = _unit(rest)
    mapped = product(second)
    h12, h22 = (first * mapped).sum(1), (second * mapped).sum(1)
    line = h21 <= COLLINEAR * torch.linalg.vector_norm(image, dim=1).clamp_min(torch.finfo(v.dtype).tiny)
    plane = torch.stack((torch.stack((h11, h12), 1), torch.stack((h21, h22), 1)), 1)
    radius = torch.linalg.eigvals(plane.nan_to_num()).abs().amax(1)
    return _unit(image), torch.where(line, h11.abs(), radius).to(v.dtype)


def _unit(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)


def spectral_radius(problem: Problem, z: Tensor, steps: int = 100) -> Tensor:
    """Spectral radius of df/dz at packed state `z`, shape (batch,), by `steps` + 2 products with J^T."""
    with torch.enable_grad():
        linearized = problem.linearize(z)
    with torch.no_grad():
        return power_iterate(linearized.vjp, torch.randn_like(z), steps)[1]
