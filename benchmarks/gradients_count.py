"""Counts of what a backward does, taken from inside f."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Counter"]


class _Told(torch.autograd.Function):
    """The identity, whose backward is counted."""

    @staticmethod
    def forward(ctx: Any, counter: Counter, z: Tensor) -> Tensor:
        ctx.counter = counter
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, Tensor]:
        ctx.counter.passes += 1
        return None, cotangents[0]


class Counter:
    """f, which counts how often it is evaluated and how often a backward goes through an evaluation of it.

    Every product with J^T is a pass back, and so is the last one, to the parameters, which every method makes.

    Args:
        fn: takes the state first and returns one tensor.
    """

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self.fn = fn
        self.calls = self.passes = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return _Told.apply(self, self.fn(*args, **kwargs))
