"""Losses and estimates under TorchDEQ's names (``torchdeq.loss``); the regularizers of the registry do the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import FunctionError
from .registry import registry
from .spectrum import power_iterate

__all__ = ["fp_correction", "jac_reg", "power_method", "register_weight_func"]


def jac_reg(f0: Tensor, z0: Tensor, vecs: int = 1, create_graph: bool = True) -> Tensor:
    """Hutchinson's estimate of ||df/dz||_F^2 over the number of entries of z0.

    Args:
        f0: f(z0), with its graph to z0.
        z0: the state, requiring grad, shape (B, ...).
        vecs: random normal vectors to average over; the error falls as one over its root.
        create_graph: keep the graph, to train on the result.

    Returns:
        a scalar.

    Raises:
        FunctionError: `f0` has no graph to `z0`.
        ConfigError: `vecs` is below 1.
    """
    _check(f0, z0)
    return registry.get("regularizers", "jacobian").estimate(f0, z0, vecs, create_graph)


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 100) -> tuple[Tensor, Tensor]:
    """Spectral radius of df/dz, sample by sample, complex eigenvalues included.

    Args:
        f0: f(z0), with its graph to z0.
        z0: the state, requiring grad, shape (B, ...).
        n_iters: power steps; up to 12 steps of Arnoldi's method follow, which tell eigenvalues of one size apart.

    Returns:
        dominant directions, shaped like z0 (with a complex pair: one of their plane), and radii, shape (B,).

    Raises:
        FunctionError: `f0` has no graph to `z0`, or another shape.
    """
    _check(f0, z0)
    batch = z0.shape[0] if z0.dim() else 1
    pairs = z0.is_complex()

    def pack(v: Tensor) -> Tensor:
        return (torch.view_as_real(v) if pairs else v).detach().reshape(batch, -1)

    def unpack(v: Tensor) -> Tensor:
        return torch.view_as_complex(v.reshape(*z0.shape, 2)) if pairs else v.reshape(z0.shape)

    def product(v: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(f0, z0, unpack(v).to(f0.dtype), retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if found is None else pack(found)  # pyright: ignore[reportUnnecessaryComparison]

    vectors, radii = power_iterate(product, pack(torch.randn_like(z0)), n_iters)
    return unpack(vectors), radii


def _check(f0: Tensor, z0: Tensor) -> None:
    if not (z0.requires_grad and f0.requires_grad):
        raise FunctionError(
            "f0 has no graph to z0; evaluate f with grad enabled on a state that requires it: "
            "z0.requires_grad_(); f0 = f(z0)."
        )
    if f0.shape != z0.shape:
        raise FunctionError(
            f"f0 has shape {tuple(f0.shape)} and z0 {tuple(z0.shape)}; a fixed-point map keeps the shape."
        )


def fp_correction(
    crit: Callable[..., Tensor],
    args: Sequence[Any],
    weight_func: str = "exp",
    return_loss_values: bool = False,
    **kwargs: Any,
) -> Any:
    """A criterion summed over the sampled states, later ones weighing more.

    Args:
        crit: called with one element of each of `args`; returns a scalar.
        args: each a list over states, or one thing for all; shorter lists repeat.
        weight_func: ``exp`` (gamma ** (n - k - 1)), ``linear``, ``const``, or one registered with
            :func:`register_weight_func`.
        return_loss_values: also return the list of unweighted values as floats.
        kwargs: options of the weight function (``gamma``).

    Returns:
        the loss, or (loss, values).

    Raises:
        ConfigError, ConfigTypeError: no such weight function, an option it doesn't have, or no states at all.
    """
    return registry.get("regularizers", "fixed_point_correction").correct(
        crit, args, weight_func, return_loss_values, **kwargs
    )


def register_weight_func(name: str, func: Callable[..., float]) -> None:
    """Register ``func(n, k, **options) -> weight of the k-th of n states`` for :func:`fp_correction`."""
    registry.get("regularizers", "fixed_point_correction").register_weight(name, func)
