"""Keeps the books of a run of a fixed number of steps (tol=0), without ever waiting for the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .journal import kept_states
from .problem import Problem
from .report import Best, Report, Tolerance, Trace
from .rows import Rows, tensor_rows
from .settings import SolverSettings
from .solution import Solution, Status

__all__ = ["Recorder"]


class Recorder:
    """What :class:`deqcore.monitor.Monitor` is to a run with a tolerance: same methods, but it only takes notes.

    Nothing is retried. At the end, the best step is chosen on the device: of one step for all samples, as f may couple
    them; a sample that is not finite any more gets the best of its last finite states that are still kept, and its
    status says so.
    """

    #: Nobody is retried or frozen in the run.
    frozen: Tensor | None = None
    strikes: Tensor | None = None
    final: Best | None = None

    def __init__(
        self, problem: Problem, z: Tensor, settings: SolverSettings, scale: Tensor | None, keep_trace: bool
    ) -> None:
        self.problem = problem
        self.settings = settings
        self.rows: Rows = tensor_rows(z, settings)
        self.tolerance = Tolerance(settings, self.rows, scale, problem.eps(z))
        self.measure = self.rows.measure
        self.keep_trace = keep_trace
        self.recovers = True
        self.residuals: list[Tensor] = []
        self.sizes: list[Tensor] = []
        self.steps: list[int] = []
        self.limit = kept_states(z)
        nothing = z.new_full((z.shape[0],), math.inf)
        self._window: list[Tensor] = []
        self._head = Best(z, nothing, nothing, torch.zeros(z.shape[0], dtype=torch.int64, device=z.device))
        self._aside = torch.zeros_like(nothing, dtype=torch.bool)

    def judge(self, step: int, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Take note of f(z) at this step."""
        residual, size = self.measure(z, fz)
        self.residuals.append(residual)
        self.sizes.append(size)
        self.steps.append(step)
        self._window.append(z)
        if len(self._window) >= self.limit:
            self._settle()
        return z, fz, False

    def judge_again(self, step: int, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, bool]:
        """As :meth:`judge`, where what was said of the states so far came from estimates of f(z)."""
        del self.residuals[-1], self.sizes[-1], self.steps[-1]
        nothing = torch.full_like(self._head.residual, math.inf)
        self._window, self._head = [], Best(z, nothing, nothing, self._head.step)
        return self.judge(step, z, fz)

    def begin(self, residual: Tensor) -> None:
        """The first evaluation's residuals, of a run that is judged at its end only: nothing to note."""

    def hold(self, z: Tensor) -> Tensor:
        return z

    def _settle(self) -> None:
        """Choose among the head and the states since."""
        count = len(self._window)
        if not count:
            return
        head = self._head
        residuals = torch.stack([head.residual, *self.residuals[-count:]])
        sizes = torch.stack([head.size, *self.sizes[-count:]])
        finite = torch.isfinite(residuals)
        self._aside = self._aside | ~finite[1:].all(0)
        judged = torch.where(finite, residuals, math.inf)
        worst = torch.where(self._aside, 0.0, judged).amax(1)
        which = torch.where(self._aside, judged.argmin(0), worst.argmin(0))
        # Filled in on the device: to copy numbers there is to wait for it.
        steps = torch.stack([which.new_full((), step) for step in (0, *self.steps[-count:])])[which]
        everyone = torch.arange(which.shape[0], device=which.device)
        if count == 1:
            z = torch.where((which == 1)[:, None], self._window[0], head.z)  # one copy of a large state, not three
        else:
            z = torch.stack([head.z, *self._window])[which, everyone]
        self._head = Best(
            z,
            residuals[which, everyone],
            sizes[which, everyone],
            torch.where(which == 0, head.step, steps),
        )
        self._window = []
        if not self.keep_trace:
            del self.residuals[:-1], self.sizes[:-1], self.steps[:-1]

    def best(self) -> Tensor:
        """The best state so far."""
        self._settle()
        return self._head.z

    def residual(self) -> Tensor:
        """(B,) residuals of the last check."""
        return self.residuals[-1]

    def finish(self, z: Tensor, steps: int, keep_last: bool = False) -> Solution:
        """The solution after `steps` steps: the best state, or `z`, the last one, with `keep_last` (the best of a
        sample that is not finite there)."""
        first, last = self.residuals[0], self.residuals[-1]
        size, step = self.sizes[-1], self.steps[-1]
        self._settle()
        final, failed = self._head, self._aside
        if keep_last or self.settings.return_final:
            failed = ~torch.isfinite(last)
            final = Best(
                torch.where(failed[:, None], final.z, z),
                torch.where(failed, final.residual, last),
                torch.where(failed, final.size, size),
                torch.where(failed, final.step, step),
            )
        return self._report(final, (first, last), steps, failed)

    def skipped(self) -> Solution:
        """The solution of a run of no steps: the start, of which nothing is known."""
        unknown = torch.full_like(self._head.residual, math.nan)
        return self._report(Best(self._head.z, unknown, unknown, 0), (math.nan, unknown), 0, None)

    def _report(self, final: Best, ends: tuple[Any, Any], steps: int, failed: Tensor | None) -> Solution:
        trace = Trace(self.rows, self.residuals, self.sizes, self.steps) if self.keep_trace else Trace(self.rows)
        solution = Report(final, ends, steps, None, self.tolerance, trace, failed).solution(self.problem)
        solution.accepted = (Status.MAX_STEPS, Status.STALLED)
        solution.waits = False
        return solution
