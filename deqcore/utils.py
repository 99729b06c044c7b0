"""Small helpers under TorchDEQ's names (``torchdeq.utils``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .legacy import add_deq_args

__all__ = ["add_deq_args", "mem_gc", "mixed_init"]


def mem_gc(func: Callable[..., Any], in_args: Sequence[Any] | None = None) -> Any:
    """``func(*in_args)`` that keeps no activations: the backward evaluates func again.

    Args:
        func: a module or function; gradients flow to its parameters and to tensors in `in_args`.
        in_args: its arguments; none if not given.

    Returns:
        what `func` returns. Random numbers in it are drawn alike both times.
    """
    return checkpoint(func, *(in_args or ()), use_reentrant=False)


def mixed_init(
    z_shape: Sequence[int], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """A start whose entries are standard normal or zero, each with probability one half.

    Starting from both kinds makes a trained equilibrium depend less on where the solver begins. Source: Anil et al.,
    Path Independent Equilibrium Models (NeurIPS 2022).

    Args:
        z_shape: shape of the state.
        device: device of the state; torch's default if None.
        dtype: floating dtype of the state; torch's default if None.
    """
    z = torch.randn(*z_shape, device=device, dtype=dtype)
    return z * torch.empty_like(z).bernoulli_(0.5)
