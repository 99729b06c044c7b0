"""What weight normalisations share: weight = v * factor, where they go, their settings, one computation a solve."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from deqcore import DEQWarning, Norm, NormError, NormSettings, once

__all__ = ["Scaling", "ScalingNorm", "ScalingSettings", "wide"]

#: Layers whose weight is normalised, with the dimension of its output channels.
TARGETS: dict[type[nn.Module], tuple[tuple[str, int | None], ...]] = {
    nn.Linear: (("weight", 0),),
    nn.Conv1d: (("weight", 0),),
    nn.Conv2d: (("weight", 0),),
    nn.Conv3d: (("weight", 0),),
    nn.ConvTranspose1d: (("weight", 1),),
    nn.ConvTranspose2d: (("weight", 1),),
    nn.ConvTranspose3d: (("weight", 1),),
}


class ScalingSettings(NormSettings):
    """Settings of a norm that scales a weight to a norm."""

    learn_scale: bool = Field(True, description="learn the norm that the weight is scaled to, one an output channel")
    target_norm: float = Field(1.0, gt=0, allow_inf_nan=False, description="norm to scale to where it is not learned")
    clip: bool = Field(False, description="never scale by more than clip_value")
    clip_value: float = Field(1.0, gt=0, allow_inf_nan=False, description="largest factor, with clip")


ScalingS = TypeVar("ScalingS", bound=ScalingSettings)


class ScalingNorm(Norm[ScalingS]):
    """Base of the norms of this package: the usual layers, and a warning for a setting that does nothing."""

    targets: ClassVar[dict[type[nn.Module], tuple[tuple[str, int | None], ...]]] = TARGETS
    #: Whether target_norm is of use where the scale is learned (as its start).
    starts_at_target: ClassVar[bool] = False

    def __init__(self, settings: ScalingS | None = None, **options: Any) -> None:
        super().__init__(settings, **options)
        chosen = self.settings
        useless = {
            "clip_value": "needs clip=True" if not chosen.clip else "",
            "target_norm": "needs learn_scale=False" if chosen.learn_scale and not self.starts_at_target else "",
        }
        for field, need in useless.items():
            value = getattr(chosen, field)
            if need and value != type(chosen).model_fields[field].default:
                warnings.warn(
                    f"norm {chosen.name!r}: {field}={value} has no effect: it {need}.", DEQWarning, stacklevel=4
                )


class Scaling(nn.Module):
    """Base of the parametrizations: the weight is made at its first use in a solve and stays until the solve is over.

    Outside a solve it is made at each use, so that it is never stale.

    Args:
        weight: the tensor to normalise.
        dim: dimension of its output channels; None takes the whole tensor as one channel.
        settings: the norm's settings.

    Raises:
        NormError: the tensor has no such dimension, or is not floating point or complex.
    """

    def __init__(self, weight: Tensor, dim: int | None, settings: ScalingSettings) -> None:
        super().__init__()
        if not (weight.is_floating_point() or weight.is_complex()):
            raise NormError(
                f"a {weight.dtype} tensor can't be normalised; norms need floating point or complex weights."
            )
        if dim is not None and not -weight.ndim <= dim < weight.ndim:
            raise NormError(f"a tensor of shape {tuple(weight.shape)} has no dimension {dim} to normalise along.")
        self.dim = dim if dim is None else dim % weight.ndim
        self.settings = settings

    def forward(self, *originals: Tensor) -> Tensor:
        """The normalised weight, differentiable in `originals` whatever the grad mode of its first use in a solve."""

        def make() -> Tensor:
            with _full_precision(originals[0]):
                return self.scale(*originals)

        return once((self, *originals, *self.own()), make)

    def own(self) -> tuple[Tensor, ...]:
        """Parameters of the scaling itself: what they are decides with the originals which weight it is."""
        return ()

    def scale(self, *originals: Tensor) -> Tensor:
        """Make the weight."""
        raise NotImplementedError

    def scaled(self, v: Tensor, target: Tensor | float, norm: Tensor) -> Tensor:
        """`v` scaled by target / norm, clipped as the settings say; where `norm` is 0, so is `v`, and it stays."""
        factor = target / torch.where(norm == 0, 1.0, norm)
        if self.settings.clip:
            factor = factor.clamp(max=self.settings.clip_value)
        return (v * factor).to(v.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, {', '.join(f'{key}={value}' for key, value in self.settings if key != 'name')}"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms are computed in: at least single precision."""
    return torch.promote_types(dtype, torch.float32)


def _full_precision(weight: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: products in half precision are too coarse for a norm."""
    device = weight.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
