"""What is said of a finished run: every sample's status, and the numbers that Solution offers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from .problem import Problem
from .rows import Rows
from .settings import SolverSettings
from .solution import Solution, Status

__all__ = ["Best", "Pieces", "Report", "Tolerance", "Trace", "worst"]

#: A residual this many spacings of the dtype, relative to ||f(z)||, is rounding error.
FLOOR_SPACINGS = 4.0
#: Steps without improvement after which an unfinished sample is called stalled rather than cut short.
STALLED_AFTER = 20
#: An unfinished sample whose last residual is this many times its lowest is called diverged.
DIVERGED_BY = 10.0
#: Residuals up to this many times the rounding error come and go where a run goes on after it has got there.
JITTER = 100.0
#: A residual up to this factor above the lowest one is as low.
SAME = 1.000001


class Best:
    """A state and what is known about each of its samples. `step` is one int while all come from one step."""

    __slots__ = ("residual", "size", "step", "z")

    def __init__(self, z: Tensor, residual: Any, size: Any, step: Any) -> None:
        self.z = z
        self.residual = residual
        self.size = size
        self.step = step

    def to64(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Residual and size as (B,) float64 tensors on the CPU."""
        return rows.to64(self.residual), rows.to64(self.size)

    def steps(self, batch: int) -> Tensor:
        """(B,) int64 steps that the samples come from."""
        if isinstance(self.step, int):
            return torch.full((batch,), self.step, dtype=torch.int64)
        return torch.as_tensor(self.step, dtype=torch.int64)


class Tolerance:
    """When a sample is done: residual <= atol + rtol * size, or at the rounding error of the numbers f computes with.

    Args:
        settings: where the tolerance comes from.
        rows: form of one number a sample.
        scale: (B,) factor of each sample's absolute tolerance, or None.
        eps: relative spacing of the numbers that f computes with.
    """

    def __init__(self, settings: SolverSettings, rows: Rows, scale: Tensor | None, eps: float) -> None:
        atol, self.rtol = map(float, settings.thresholds())
        self.rows = rows
        self.floor = FLOOR_SPACINGS * eps
        self.peak = atol if scale is None else atol * float(scale.max())  # the largest absolute tolerance
        self._atol64: Tensor | None = None
        self.fixed = atol == 0 and self.rtol == 0
        #: One number for all samples, or rows.
        self.atol: Any = atol if scale is None else rows.from64(atol * scale.detach().cpu().double())

    def limit(self, size: Tensor) -> Tensor:
        """Residuals at which the samples are done, float64, for sizes of shape (B,) or (B, K)."""
        return torch.maximum(self.target(size), self.floor * size)

    def limits(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`limit` and :meth:`target`."""
        target = self.target(size)
        return torch.maximum(target, self.floor * size), target

    def select(self, rows: Rows, keep: Tensor) -> Tolerance:
        """The tolerance of the samples `keep` (int64, on the CPU), whose numbers have the form `rows`."""
        chosen = copy(self)
        chosen.rows = rows
        if not isinstance(self.atol, float):
            chosen.atol = rows.from64(self.rows.to64(self.atol)[keep])
        chosen._atol64 = None
        return chosen

    def target(self, size: Tensor) -> Tensor:
        """Residuals that were asked for, float64, for sizes of shape (B,) or (B, K)."""
        if self._atol64 is None:
            one = isinstance(self.atol, float)
            self._atol64 = size.new_full(size.shape[:1], self.atol) if one else self.rows.to64(self.atol)
        atol = self._atol64 if size.dim() == 1 else self._atol64[:, None]
        return atol + self.rtol * size if self.rtol else atol


class Trace:
    """Residuals of all checks of a run, stacked when somebody asks."""

    def __init__(
        self, rows: Rows, residuals: Sequence[Any] = (), sizes: Sequence[Any] = (), steps: Sequence[int] = ()
    ) -> None:
        self.rows = rows
        self.residuals = residuals
        self.sizes = sizes
        self.steps = steps

    def stacked(self) -> tuple[Tensor, Tensor]:
        """(B, N) residuals and sizes, float64, on the CPU."""
        return self.rows.stack(self.residuals), self.rows.stack(self.sizes)


class Pieces(Trace):
    """The trace of a run whose samples left one after the other: those that are gone keep their last residual.

    Args:
        rows: form of one number a sample.
        pieces: (samples that were there, their trace) one after the other; the first has all samples.
    """

    def __init__(self, rows: Rows, pieces: Sequence[tuple[Tensor, Trace]]) -> None:
        super().__init__(rows, steps=[step for _, trace in pieces for step in trace.steps])
        self.pieces = pieces

    def stacked(self) -> tuple[Tensor, Tensor]:
        whole = [torch.zeros(len(self.pieces[0][0]), len(self.steps), dtype=torch.float64) for _ in range(2)]
        at = 0
        for index, trace in self.pieces:
            end = at + len(trace.steps)
            if end > at:
                for table, part in zip(whole, trace.stacked(), strict=True):
                    table[:, at:end] = table[:, max(at - 1, 0), None]
                    table[index, at:end] = part
            at = end
        return whole[0], whole[1]


class Report:
    """The numbers of one finished run, which hold neither f nor any state but the one returned.

    Args:
        final: the state returned.
        ends: the worst residual at the first evaluation (NaN if there was none), or all of them as rows; and every
            sample's at the last judged step.
        steps: solver updates made.
        patience: judged steps without improvement after which the run would stop, or None.
        tolerance: when a sample is done.
        trace: residuals of all checks; without any where no trace was kept.
        failed: (B,) bool of samples whose values can't be had, or None.
    """

    def __init__(
        self,
        final: Best,
        ends: tuple[Any, Any],
        steps: int,
        patience: int | None,
        tolerance: Tolerance,
        trace: Trace,
        failed: Tensor | None,
    ) -> None:
        self.final = final
        self.start, self.last = ends
        self.step_count = steps
        self.stale_after = min(STALLED_AFTER, patience or STALLED_AFTER)
        self.tolerance = tolerance
        self.rows = tolerance.rows
        self.trace = trace
        self.failed = failed
        self.batch = final.z.shape[0]

    def solution(self, problem: Problem) -> Solution:
        """The solution of `problem`; what is worth a tensor only if somebody looks is made when somebody does."""
        z, final, batch = self.final.z, self.final, self.batch

        def floats(values: Tensor) -> Tensor:
            return values.to(device=z.device, dtype=z.dtype)

        nfe = problem.nfe
        return Solution(
            {
                "abs_lowest": lambda: floats(final.to64(self.rows)[0]),
                "rel_lowest": lambda: floats(_relative(*final.to64(self.rows))),
                "abs_trace": lambda: floats(self.traces()[0]),
                "rel_trace": lambda: floats(_relative(*self.traces())),
                "nstep": lambda: final.steps(batch).to(device=z.device, dtype=torch.float32),
                "sradius": lambda: torch.full((1,), -1.0, device=z.device),
                "status": lambda: self.status().to(z.device),
                "steps": lambda: self.steps().to(z.device),
                "nfe": nfe,
                "sample_nfe": lambda: torch.full((batch,), nfe, device=z.device),
                "nvjp": problem.nvjp,
                "njvp": problem.njvp,
                "z": z,
            },
            spec=problem.spec,
        )

    def status(self) -> Tensor:
        """(B,) int64, how each sample ended."""
        start = self.start if isinstance(self.start, float) else worst(self.rows.to64(self.start))
        if math.isnan(start):
            return torch.full((self.batch,), int(Status.SKIPPED))
        tolerance, final = self.tolerance, self.final
        if self.failed is None and self.rows.excess(final.residual, final.size, tolerance.atol, tolerance.rtol) <= 0:
            return torch.zeros(self.batch, dtype=torch.int64)  # the usual end: all converged
        residual, size = final.to64(self.rows)
        trace = self.traces()[0].nan_to_num(torch.inf)
        lowest = trace.amin(1).clamp_max(start)
        found = final.steps(self.batch)
        if self.trace.steps:  # the first of equals: `final` is the last of them
            found = torch.tensor(self.trace.steps)[(trace <= SAME * lowest[:, None]).int().argmax(1)]
        stale = self.step_count - found >= self.stale_after
        failed = ~torch.isfinite(residual)
        if self.failed is not None:
            failed = failed | self.failed.cpu()
        # Each line overrules the ones above it.
        status = torch.where(stale, int(Status.STALLED), int(Status.MAX_STEPS))
        diverged = self.rows.to64(self.last) > DIVERGED_BY * torch.maximum(lowest, JITTER * tolerance.floor * size)
        status = torch.where(diverged, int(Status.DIVERGED), status)
        status = torch.where(residual <= tolerance.floor * size, int(Status.AT_PRECISION), status)
        status = torch.where(residual <= tolerance.target(size), int(Status.CONVERGED), status)
        return torch.where(failed, int(Status.NON_FINITE), status)

    def traces(self) -> tuple[Tensor, Tensor]:
        """(B, N) residuals and sizes of all checks, float64; the final ones where no trace was kept."""
        if self.trace.steps:
            return self.trace.stacked()
        residual, size = self.final.to64(self.rows)
        return residual[:, None], size[:, None]

    def steps(self) -> Tensor:
        """(B,) int64 steps each sample took until it was first done; all of them where it never was."""
        if not self.trace.steps:
            return torch.full((self.batch,), self.step_count)
        residual, size = self.traces()
        done = residual <= self.tolerance.limit(size)
        first = torch.tensor(self.trace.steps)[done.int().argmax(1)]
        return torch.where(done.any(1), first, self.step_count)


def worst(residual: Tensor) -> float:
    """The largest finite one of the first residuals; inf, nothing to go by, where there is none or it is 0."""
    return float(residual.nan_to_num(0.0, 0.0, 0.0).max()) or math.inf


def _relative(residual: Tensor, size: Tensor) -> Tensor:
    """residual / size; 0 where both are 0."""
    return torch.where(residual == 0, 0.0, residual / size)
