"""Variational dropout: one mask a solve, so that f stays one function while its fixed point is sought."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .errors import ConfigError, ConfigTypeError, FunctionError
from .scope import SolveScope, current_scope

__all__ = [
    "VariationalDropToken1d",
    "VariationalDropToken2d",
    "VariationalDropToken3d",
    "VariationalDropout",
    "VariationalDropout1d",
    "VariationalDropout2d",
    "VariationalDropout3d",
    "reset_dropout",
]

#: Spatial dimensions by their number, as documentation writes them.
SPATIAL = {1: ("L",), 2: ("H", "W"), 3: ("T", "H", "W")}


def mask_of(
    scope: SolveScope, owner: nn.Module, x: Tensor, draw: Callable[[Tensor], Tensor], shape: tuple[int, ...] = ()
) -> Tensor:
    """The solve's mask of `owner` for `x`; where finished samples have left the batch, that of those still there.

    Args:
        scope: of the solve.
        owner: the module that the mask is for.
        x: its input.
        draw: makes the mask for an input.
        shape: of the mask for `x`, where it is not that of `x`.
    """
    kind = (owner, x.dtype, x.device)
    if scope.rows is None or x.shape[0] != len(scope.rows[0]):
        return scope.once((*kind, shape or x.shape), lambda: draw(x))
    rows, batch = scope.rows
    whole = x[:1].expand(batch, *x.shape[1:])
    alike = (batch, *shape[1:]) if shape and shape[0] == len(rows) else shape or whole.shape
    mask: Tensor = scope.once((*kind, alike), lambda: draw(whole))
    return mask[rows.to(mask.device)] if mask.shape[0] == batch else mask


class VariationalDropout(nn.Module):
    """Zeroes entries at random in training and scales the others up, with the same mask through a whole solve.

    Every call of a DEQ draws a new mask, which holds for all evaluations of f in that call, its gradient included; a
    DEQ inside f shares the outer one's. Outside of a solve a mask holds until :func:`reset_dropout`, a solve, or an
    input of another shape, dtype or device. In eval mode the input is returned as it is. Masks are in no state_dict.

    Args:
        dropout: probability of an entry to be zeroed, from 0 to 1; 0.5 by default, as in TorchDEQ.

    Shape: any, floating point or complex; the output is like the input.

    Raises:
        ConfigError, ConfigTypeError: `dropout` is no number from 0 to 1.

    Source: Gal and Ghahramani, A Theoretically Grounded Application of Dropout in Recurrent Neural Networks (NeurIPS
    2016); for DEQs: Bai, Kolter and Koltun, Deep Equilibrium Models (NeurIPS 2019).
    """

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        if not isinstance(dropout, Real) or isinstance(dropout, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigTypeError(f"dropout must be a number from 0 to 1, got {dropout!r} ({type(dropout).__name__}).")
        if not 0 <= dropout <= 1:
            raise ConfigError(f"dropout must be a probability from 0 to 1, got {dropout}.")
        self.dropout = dropout
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` times the mask.

        Raises:
            FunctionError: `x` has not as many dimensions as this layer is for.
        """
        shape = self.mask_shape(x)
        if not self.training or self.dropout == 0:
            return x
        scope = current_scope()
        if scope is not None:
            return x * mask_of(scope, self, x, self.reset_mask, shape)
        mask = self.mask
        if mask is None or not self._fits(mask, shape, x):
            mask = self.reset_mask(x)
        return x * mask

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of the mask for `x`."""
        return tuple(x.shape)

    def reset_mask(self, x: Tensor) -> Tensor:
        """Draw a new mask for inputs like `x`, on its device and of its (real) dtype, and return it."""
        keep = 1 - self.dropout
        mask = torch.empty(self.mask_shape(x), dtype=x.real.dtype, device=x.device).bernoulli_(keep)
        self.mask = mask / keep if keep > 0 else mask
        return self.mask

    @staticmethod
    def _fits(mask: Tensor, shape: tuple[int, ...], x: Tensor) -> bool:
        if mask.is_inference() and not torch.is_inference_mode_enabled():
            return False  # autograd can't save it
        return mask.shape == shape and mask.dtype == x.dtype.to_real() and mask.device == x.device

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mask": None}

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


class _Structured(VariationalDropout):
    """Dropout of whole channels or tokens of an input with `spatial` dimensions besides batch and channels."""

    spatial: ClassVar[int]
    drops: ClassVar[Literal["channels", "tokens"]]

    def __init__(self, dropout: float = 0.5, token_first: bool = True) -> None:
        super().__init__(dropout)
        self.token_first = token_first

    def mask_shape(self, x: Tensor) -> tuple[int, ...]:
        if x.dim() != self.spatial + 2:
            raise FunctionError(
                f"{type(self).__name__}(token_first={self.token_first}) takes an input of shape "
                f"({', '.join(self._axes())}), got {tuple(x.shape)}. Use the class for its number of dimensions, or "
                "VariationalDropout, which takes any."
            )
        channels = x.dim() - 1 if self.token_first else 1
        kept = {0, channels} if self.drops == "channels" else set(range(x.dim())) - {channels}
        return tuple(size if d in kept else 1 for d, size in enumerate(x.shape))

    def _axes(self) -> tuple[str, ...]:
        return ("B", *SPATIAL[self.spatial], "D") if self.token_first else ("B", "D", *SPATIAL[self.spatial])

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, token_first={self.token_first}"


class VariationalDropout1d(_Structured):
    """Zeroes whole channels of a sequence, the same at all its positions; see :class:`VariationalDropout`.

    Args:
        dropout: probability of a channel to be zeroed.
        token_first: whether inputs are (B, L, D), the default, or (B, D, L).
    """

    spatial, drops = 1, "channels"


class VariationalDropout2d(_Structured):
    """Zeroes whole channels of an image, the same at all its positions; see :class:`VariationalDropout`.

    Args:
        dropout: probability of a channel to be zeroed.
        token_first: whether inputs are (B, H, W, D), the default, or (B, D, H, W).
    """

    spatial, drops = 2, "channels"


class VariationalDropout3d(_Structured):
    """Zeroes whole channels of a video or volume, the same at all its positions; see :class:`VariationalDropout`.

    Args:
        dropout: probability of a channel to be zeroed.
        token_first: whether inputs are (B, T, H, W, D), the default, or (B, D, T, H, W).
    """

    spatial, drops = 3, "channels"


class VariationalDropToken1d(_Structured):
    """Zeroes whole positions of a sequence, in all its channels; see :class:`VariationalDropout`.

    Args:
        dropout: probability of a position to be zeroed.
        token_first: whether inputs are (B, L, D), the default, or (B, D, L).
    """

    spatial, drops = 1, "tokens"


class VariationalDropToken2d(_Structured):
    """Zeroes whole positions of an image, in all its channels; see :class:`VariationalDropout`.

    Args:
        dropout: probability of a position to be zeroed.
        token_first: whether inputs are (B, H, W, D), the default, or (B, D, H, W).
    """

    spatial, drops = 2, "tokens"


class VariationalDropToken3d(_Structured):
    """Zeroes whole positions of a video or volume, in all its channels; see :class:`VariationalDropout`.

    Args:
        dropout: probability of a position to be zeroed.
        token_first: whether inputs are (B, T, H, W, D), the default, or (B, D, T, H, W).
    """

    spatial, drops = 3, "tokens"


def reset_dropout(model: nn.Module) -> None:
    """Have every variational dropout in `model` draw a new mask at its next use; in a solve it does so by itself."""
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigTypeError(f"reset_dropout takes a torch.nn.Module, got {type(model).__name__}.")
    for module in model.modules():
        if isinstance(module, VariationalDropout):
            module.mask = None
