"""Spectral normalisation: the weight over its largest singular value."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from deqcore import NormError, hookimpl

from .scaling import Scaling, ScalingNorm, ScalingSettings, wide

#: Power iterations for a weight that is new: as many as torch's own spectral_norm starts with.
START = 15


class SpectralNormSettings(ScalingSettings):
    """Settings of spectral normalisation."""

    n_power_iterations: int = Field(1, ge=1, description="power iterations a solve, in training (TorchDEQ's default)")
    eps: float = Field(1e-12, gt=0, description="least length that singular vectors are divided by")


class SpectralNorm(ScalingNorm[SpectralNormSettings]):
    """W = g V / sigma(V), sigma the largest singular value and g a learned factor of each output channel.

    g starts at `target_norm`; with ``learn_scale=False`` it stays there.

    Bound, once the power iteration has converged: ``learn_scale=False`` gives ||W||_2 = target_norm (at most that with
    `clip`) for a Linear, which with target_norm < 1 and a 1-Lipschitz nonlinearity is a contraction. With g learned,
    ||W||_2 <= max |g_i|, which training may raise above 1. For convolutions sigma is that of the (out, in * kernel)
    matrix; the layer itself is bounded by sqrt(kernel elements) times as much, transposed ones alike. Power iteration
    approaches sigma from below: a weight that moves fast is above the bound by what sigma lags behind.

    Costs two matrix-vector products an iteration in training (none in eval) and one for sigma, once a solve, and two
    vectors of memory, kept as buffers. The weight stays the parameter it was (``parametrizations.weight.original``).

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks (ICLR 2018), algorithm 1. Bound of
    convolutions: Tsuzuku, Sato and Sugiyama, Lipschitz-Margin Training (NeurIPS 2018).
    """

    starts_at_target: ClassVar[bool] = True

    def parametrization(self, weight: Tensor, dim: int | None) -> nn.Module:
        """The parametrization of `weight`, any floating or complex dtype; draws random numbers.

        Raises:
            NormError: the weight is all zeros: it has no singular value to divide by.
        """
        if not weight.is_meta and not bool(weight.detach().any()):
            raise NormError(
                f"a weight of shape {tuple(weight.shape)} is all zeros and has no singular value to divide by; "
                "initialise it otherwise, or filter the layer out."
            )
        return SpectralScaling(weight, dim, self.settings)


class SpectralScaling(Scaling):
    """V scaled as a matrix, with singular vectors `u` and `v` as buffers; `g` is a parameter, None if not learned."""

    u: Tensor
    v: Tensor
    g: nn.Parameter | None
    settings: SpectralNormSettings

    def __init__(self, weight: Tensor, dim: int | None, settings: SpectralNormSettings) -> None:
        super().__init__(weight, dim, settings)
        height, width = self._matrix(weight).shape
        self.register_buffer("u", normalize(torch.randn_like(weight.detach().new_empty(height)), dim=0))
        self.register_buffer("v", normalize(torch.randn_like(weight.detach().new_empty(width)), dim=0))
        g = None
        if settings.learn_scale:
            shape = [height if d == self.dim else 1 for d in range(weight.ndim)]
            g = nn.Parameter(weight.detach().abs().new_full(shape, settings.target_norm), weight.requires_grad)
        self.register_parameter("g", g)
        self._iterate(self._matrix(weight), START)

    def own(self) -> tuple[Tensor, ...]:
        return () if self.g is None else (self.g,)

    def _matrix(self, weight: Tensor) -> Tensor:
        """`weight` as (output channels, the rest)."""
        if self.dim is not None:
            weight = weight.movedim(self.dim, 0)
        return weight.reshape(1 if self.dim is None else weight.shape[0], -1).to(wide(weight.dtype))

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, steps: int) -> None:
        u, v = self.u.to(matrix.dtype), self.v.to(matrix.dtype)
        for _ in range(steps):
            v = normalize(matrix.mH @ u, dim=0, eps=self.settings.eps)
            u = normalize(matrix @ v, dim=0, eps=self.settings.eps)
        self.u.copy_(u)
        self.v.copy_(v)

    def scale(self, *originals: Tensor) -> Tensor:
        (weight,) = originals
        matrix = self._matrix(weight)
        if self.training:
            self._iterate(matrix, self.settings.n_power_iterations)
        # Copies: the next solve changes the buffers in place, and this one's graph still needs them.
        u, v = self.u.to(matrix.dtype, copy=True), self.v.to(matrix.dtype, copy=True)
        sigma = torch.vdot(u, matrix @ v).real
        return self.scaled(weight, self.settings.target_norm if self.g is None else self.g, sigma)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """`weight` itself, with singular vectors found anew: assigning a weight sets its direction, not its norm."""
        self._iterate(self._matrix(weight), START)
        return weight


@hookimpl
def deqcore_norm() -> type[SpectralNorm]:
    return SpectralNorm
