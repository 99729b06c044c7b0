"""Per-sample numbers of one check: Python floats for the smallest batches, tensors on the state's device otherwise.

One number costs a tenth of a microsecond in plain Python and two as a tensor operation; from about ten samples on,
tensors win. Either way a check asks for one number, the worst sample's, and waits for the device once.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from operator import sub
from typing import Any, Protocol

import torch
from torch import Tensor

from .settings import SolverSettings

__all__ = ["Rows", "rows_for", "tensor_rows"]

#: Batches up to this size are judged as Python floats.
LIST_BATCH = 8
#: States up to this many numbers are measured in Python as well: no tensor operation is as fast.
TINY_STATE = 64

#: Norms of states of so many numbers are written side by side: small tensors that stay, scattered between large ones
#: that come and go, keep the allocator from giving these the same memory again.
LARGE_STATE = 16384
#: Differences of states of so many numbers are made in PARTS, so that no second state is needed for them.
HUGE_STATE = 1 << 18
PARTS = 16
#: Pairs of norms to a piece of memory.
PLACES = 64

Measure = Callable[[Tensor, Tensor], tuple[Any, Any]]


class Rows(Protocol):
    """What is asked of one number a sample. The numbers are opaque but for `to64`, `stack` and `from64`."""

    measure: Measure

    def full(self, value: float) -> Any:
        """`value` for every sample."""
        ...

    def excess(self, residual: Any, size: Any, atol: Any, rtol: float) -> float:
        """Largest residual - atol - rtol * size, atol one number or rows; not finite where some residual isn't."""
        ...

    def largest(self, rows: Any) -> float:
        """The largest one; not finite where some isn't."""
        ...

    def lower(self, a: Any, b: Any) -> Any:
        """The smaller of a and b, sample by sample; a where b is NaN."""
        ...

    def to64(self, rows: Any) -> Tensor:
        """The numbers as a (B,) float64 tensor on the CPU."""
        ...

    def stack(self, rows: Sequence[Any]) -> Tensor:
        """The numbers of K checks as a (B, K) float64 tensor on the CPU."""
        ...

    def from64(self, rows: Tensor) -> Any:
        """The inverse of :meth:`to64`."""
        ...


def rows_for(z: Tensor, settings: SolverSettings) -> Rows:
    """The cheaper of the two forms for states like `z`."""
    return _Lists(z, settings) if z.shape[0] <= LIST_BATCH else _Tensors(z, settings)


def tensor_rows(z: Tensor, settings: SolverSettings) -> Rows:
    """The form that never waits for the device by itself."""
    return _Tensors(z, settings)


def _norms(z: Tensor, settings: SolverSettings) -> Measure:
    """(z, f(z)) -> norms of f(z) - z and of f(z), shape (B,) each."""
    vector_norm = torch.linalg.vector_norm
    order = math.inf if settings.residual_norm == "max" else 2
    if settings.residual_norm == "rms":
        factor = z.shape[1] ** -0.5
        return lambda z, fz: (vector_norm(fz - z, 2, 1) * factor, vector_norm(fz, 2, 1) * factor)
    if z.numel() < LARGE_STATE:
        return lambda z, fz: (vector_norm(fz - z, order, 1), vector_norm(fz, order, 1))
    places: list[Tensor] = []
    part = z.shape[1] if z.numel() < HUGE_STATE else -(-z.shape[1] // PARTS)

    def into_place(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
        if not places:
            places.extend(z.new_empty(2 * PLACES, z.shape[0]).unbind())
        first, second = places.pop(), places.pop()
        if part == z.shape[1]:
            return vector_norm(fz - z, order, 1, out=first), vector_norm(fz, order, 1, out=second)
        pieces = [vector_norm(a - b, order, 1) for a, b in zip(fz.split(part, 1), z.split(part, 1), strict=True)]
        return vector_norm(torch.stack(pieces), order, 0, out=first), vector_norm(fz, order, 1, out=second)

    return into_place


class _Lists:
    """Rows as lists of Python floats."""

    def __init__(self, z: Tensor, settings: SolverSettings) -> None:
        self.batch = z.shape[0]
        norms = _norms(z, settings)

        def measure(z: Tensor, fz: Tensor) -> tuple[list[float], list[float]]:
            residual, size = torch.stack(norms(z, fz)).tolist()
            return residual, size

        tiny = z.numel() <= TINY_STATE and z.device.type == "cpu" and settings.residual_norm == "l2"
        self.measure: Measure = _measure_in_python() if tiny else measure

    def full(self, value: float) -> list[float]:
        return [value] * self.batch

    def excess(self, residual: list[float], size: list[float], atol: list[float] | float, rtol: float) -> float:
        total = sum(residual)  # tells of a NaN, which max() may lose
        if total - total != 0.0:
            return math.nan
        if rtol:
            residual = [r - rtol * n for r, n in zip(residual, size, strict=True)]
        return max(map(sub, residual, atol)) if isinstance(atol, list) else max(residual) - atol

    def largest(self, rows: list[float]) -> float:
        return self.excess(rows, rows, 0.0, 0.0)

    def lower(self, a: list[float], b: list[float]) -> list[float]:
        return [y if y < x else x for x, y in zip(a, b, strict=True)]

    def to64(self, rows: list[float]) -> Tensor:
        return torch.frombuffer(array("d", rows), dtype=torch.float64)  # torch.tensor looks at every element's type

    def stack(self, rows: Sequence[list[float]]) -> Tensor:
        flat = torch.frombuffer(array("d", chain.from_iterable(rows)), dtype=torch.float64)
        return flat.view(len(rows), self.batch).mT

    def from64(self, rows: Tensor) -> list[float]:
        return rows.tolist()


def _measure_in_python() -> Measure:
    latest: list[Any] = [None, None]  # an image, and its numbers

    def measure(z: Tensor, fz: Tensor) -> tuple[list[float], list[float]]:
        # Of plain iteration, z is the last image.
        values: list[list[float]] = latest[1] if z is latest[0] else z.tolist()
        images: list[list[float]] = fz.tolist()
        latest[:] = fz, images
        return list(map(math.dist, values, images)), [math.hypot(*image) for image in images]

    return measure


class _Tensors:
    """Rows as (B,) tensors on the state's device."""

    def __init__(self, z: Tensor, settings: SolverSettings) -> None:
        self.like = z.new_empty(z.shape[0])  # not z, which would live as long as the solution
        self.measure: Measure = _norms(z, settings)

    def full(self, value: float) -> Tensor:
        return self.like.new_full((self.like.shape[0],), value)

    def excess(self, residual: Tensor, size: Tensor, atol: Tensor | float, rtol: float) -> float:
        if rtol:
            residual = residual.sub(size, alpha=rtol)
        return residual.max().item() - atol if type(atol) is float else (residual - atol).max().item()

    def largest(self, rows: Tensor) -> float:
        return rows.max().item()

    def lower(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.fmin(a, b)

    def to64(self, rows: Tensor) -> Tensor:
        return rows.cpu().double()

    def stack(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(rows), 1).cpu().double()

    def from64(self, rows: Tensor) -> Tensor:
        return rows.to(self.like)
