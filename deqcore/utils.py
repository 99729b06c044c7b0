"""Small helpers under TorchDEQ's names (``torchdeq.utils``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .errors import FunctionTypeError
from .legacy import add_deq_args
from .scope import current_scope

__all__ = ["add_deq_args", "mem_gc", "mixed_init"]


def mem_gc(func: Callable[..., Any], in_args: Sequence[Any] | None = None) -> Any:
    """``func(*in_args)`` that keeps no activations: the backward evaluates func again.

    Args:
        func: a module or function; gradients flow to its parameters and to tensors in `in_args`.
        in_args: its arguments; none if not given.

    Returns:
        what `func` returns. Random numbers in it are drawn alike both times. In a solve, normalised weights and dropout
        masks are those of the solve both times, which torch's own checkpoint can't know.

    Raises:
        FunctionTypeError: `in_args` is no tuple or list.
    """
    args = () if in_args is None else in_args
    if not isinstance(args, tuple | list):
        raise FunctionTypeError(f"in_args must be a tuple of func's arguments, got {type(args).__name__}; write (x,).")
    scope = current_scope()
    if scope is None or not torch.is_grad_enabled():
        return checkpoint(func, *args, use_reentrant=False)

    def run() -> Any:
        return checkpoint(func, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), scope))

    made = scope._made  # pyright: ignore[reportPrivateUsage]
    before = set(made)
    out = run()
    fresh = [key for key in made.keys() - before if not isinstance(made[key], Tensor) or made[key].requires_grad]
    if fresh:
        # What func was the first to make has a graph inside the checkpoint, and would be missing when func runs again.
        for key in fresh:
            del made[key]
        with torch.no_grad():
            func(*args)
        out = run()
    return out


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
    return z * torch.empty(z.shape, device=z.device, dtype=z.dtype.to_real()).bernoulli_(0.5)
