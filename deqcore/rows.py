"""Per-sample numbers of one check, as Python floats for small batches and as CPU tensors for large ones.

A comparison of 64 numbers costs about as much in plain Python as one tensor operation does, and one of a single number
a tenth of that; from a few hundred samples on, tensors win.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import lt
from typing import Any, Protocol

import torch
from torch import Tensor

from .settings import SolverSettings

__all__ = ["Rows", "rows_for"]

#: Batches up to this size are judged as Python floats.
LIST_BATCH = 64
#: States up to this many numbers are measured in Python as well: no tensor operation is as fast.
TINY_STATE = 64

Measure = Callable[[Tensor, Tensor], tuple[Any, Any]]


class Rows(Protocol):
    """What is asked of one number a sample at every check. The numbers are opaque but for `to64` and `from64`."""

    measure: Measure

    def all_below(self, a: Any, b: Any) -> bool:
        """Whether a < b for every sample; False where NaN."""
        ...

    def none_below(self, a: Any, b: Any, slack: float) -> bool:
        """Whether a < slack * b for no sample, and every a is finite."""
        ...

    def within(self, residual: Any, size: Any, atol: Any, rtol: float, floor: float) -> bool:
        """Whether residual <= atol + rtol * size, or <= floor * size, for every sample."""
        ...

    def to64(self, rows: Any) -> Tensor:
        """The numbers as a (B,) float64 tensor on the CPU."""
        ...

    def from64(self, rows: Tensor) -> Any:
        """The inverse of :meth:`to64`."""
        ...


def rows_for(z: Tensor, settings: SolverSettings) -> Rows:
    """The cheaper of the two forms for states like `z`."""
    return _Lists(z, settings) if z.shape[0] <= LIST_BATCH else _Tensors(z, settings)


def _norms(z: Tensor, settings: SolverSettings) -> Callable[[Tensor, Tensor], Tensor]:
    """(z, f(z)) -> stacked norms of f(z) - z and of f(z), shape (2, B)."""
    vector_norm, stack = torch.linalg.vector_norm, torch.stack
    order = math.inf if settings.residual_norm == "max" else 2
    if settings.residual_norm == "rms":
        factor = z.shape[1] ** -0.5
        return lambda z, fz: stack((vector_norm(fz - z, 2, 1), vector_norm(fz, 2, 1))) * factor
    return lambda z, fz: stack((vector_norm(fz - z, order, 1), vector_norm(fz, order, 1)))


class _Lists:
    """Rows as lists of Python floats."""

    def __init__(self, z: Tensor, settings: SolverSettings) -> None:
        if z.numel() <= TINY_STATE and z.device.type == "cpu" and settings.residual_norm == "l2":
            self.measure: Measure = self._measure_tiny
        else:
            norms = _norms(z, settings)
            self.measure = lambda z, fz: norms(z, fz).tolist()

    @staticmethod
    def _measure_tiny(z: Tensor, fz: Tensor) -> tuple[list[float], list[float]]:
        images: list[list[float]] = fz.tolist()
        return list(map(math.dist, z.tolist(), images)), [math.hypot(*image) for image in images]

    def all_below(self, a: list[float], b: list[float]) -> bool:
        return all(map(lt, a, b))

    def none_below(self, a: list[float], b: list[float], slack: float) -> bool:
        for x, y in zip(a, b, strict=True):
            if not (x >= slack * y and x < math.inf):
                return False
        return True

    def within(self, residual: list[float], size: list[float], atol: list[float], rtol: float, floor: float) -> bool:
        for r, n, a in zip(residual, size, atol, strict=True):
            if not (r <= a + rtol * n or r <= floor * n):
                return False
        return True

    def to64(self, rows: list[float]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    def from64(self, rows: Tensor) -> list[float]:
        return rows.tolist()


class _Tensors:
    """Rows as float64 tensors on the CPU: one transfer a check, whatever the device."""

    def __init__(self, z: Tensor, settings: SolverSettings) -> None:
        norms = _norms(z, settings)

        def measure(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
            residual, size = norms(z, fz).cpu().double().unbind()
            return residual, size

        self.measure: Measure = measure

    def all_below(self, a: Tensor, b: Tensor) -> bool:
        return bool((a < b).all())

    def none_below(self, a: Tensor, b: Tensor, slack: float) -> bool:
        return bool(((a >= slack * b) & (a < math.inf)).all())

    def within(self, residual: Tensor, size: Tensor, atol: Tensor, rtol: float, floor: float) -> bool:
        return bool((residual <= torch.maximum(atol + rtol * size, floor * size)).all())

    def to64(self, rows: Tensor) -> Tensor:
        return rows

    def from64(self, rows: Tensor) -> Tensor:
        return rows
