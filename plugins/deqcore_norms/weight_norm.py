"""Weight normalisation: each output channel's weights are a direction times a norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deqcore import NormError, hookimpl

from .scaling import Scaling, ScalingNorm, ScalingSettings, wide


class WeightNorm(ScalingNorm[ScalingSettings]):
    """W_i = g_i V_i / ||V_i||_2 for each output channel i, with g learned (from ||W_i|| on, so W starts unchanged).

    Bound: with ``learn_scale=False`` every channel's weights have 2-norm `target_norm` exactly (at most that with
    `clip`), so a Linear has ||W||_2 <= target_norm * sqrt(out_features); with g learned, max g_i takes its place. That
    is no contraction by itself, and of a convolution it bounds the same of its (out, in * kernel) matrix only. Use
    spectral_norm where a bound on the layer's Lipschitz constant is wanted. ``clip`` bounds the factor g_i / ||V_i||.

    Costs one pass over the weight a solve. g and V replace the weight as parameters, ``original0`` and ``original1`` of
    ``parametrizations.weight``, so make the optimizer afterwards. A channel of zeros starts at g_i = 0 in a fixed
    direction.

    Source: Salimans and Kingma, Weight Normalization (NeurIPS 2016), eq. 2.
    """

    def parametrization(self, weight: Tensor, dim: int | None) -> nn.Module:
        """The parametrization of `weight`, any floating or complex dtype.

        Raises:
            NormError: ``learn_scale=False`` and some channel is all zeros: it has no direction to scale.
        """
        scaling = ChannelScaling(weight, dim, self.settings)
        if not self.settings.learn_scale and not weight.is_meta:
            zeros = int((scaling.norm(weight.detach()) == 0).sum())
            if zeros:
                raise NormError(
                    f"{zeros} output channel(s) are zeros, which no factor scales to norm {self.settings.target_norm}; "
                    "use learn_scale=True, initialise them otherwise, or filter the layer out."
                )
        return scaling


class ChannelScaling(Scaling):
    """V scaled channel by channel; originals are (g, V), or V alone where g is not learned."""

    def norm(self, weight: Tensor) -> Tensor:
        """2-norm of each channel, of size 1 in all dimensions but `dim`."""
        others = tuple(d for d in range(weight.ndim) if d != self.dim)
        if not others:  # to torch, no dimensions would mean all
            return weight.abs().to(wide(weight.abs().dtype))
        return torch.linalg.vector_norm(weight, dim=others, keepdim=True, dtype=wide(weight.dtype))

    def scale(self, *originals: Tensor) -> Tensor:
        v = originals[-1]
        return self.scaled(v, originals[0] if len(originals) == 2 else self.settings.target_norm, self.norm(v))

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The originals that make `weight`, up to what clip and a fixed norm forbid."""
        if not self.settings.learn_scale:
            return weight
        g = self.norm(weight)
        zero = g == 0
        if not weight.is_meta and bool(zero.any()):
            weight = torch.where(zero, (g.numel() / weight.numel()) ** 0.5, weight)
        return g.to(weight.abs().dtype), weight


@hookimpl
def deqcore_norm() -> type[WeightNorm]:
    return WeightNorm
