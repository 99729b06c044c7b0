"""Judges the states of one run: residuals, the best so far, who is finished, who must be retried or frozen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .problem import Problem
from .rows import Rows, rows_for
from .settings import SolverSettings
from .solution import Solution, Status

__all__ = ["Monitor"]

#: A residual this many spacings of the dtype, relative to ||f(z)||, is rounding error.
FLOOR_SPACINGS = 4.0
#: Residuals that differ by less than this many spacings are equal: a copy of the best state would gain nothing.
EQUAL_SPACINGS = 8.0
#: Steps without improvement after which an unfinished sample is called stalled rather than cut short.
STALLED_AFTER = 20
#: An unfinished sample whose last residual is this many times its lowest is called diverged.
DIVERGED_BY = 10.0
#: Failures after which a sample with a non-finite residual is frozen at its best state.
STRIKES = 3
#: How much larger the residual of a state put together from several steps may be than its parts' were.
COUPLED_BY = 2.0


class Best:
    """A state and what is known about each of its samples. `step` is one int while all come from one step."""

    def __init__(self, z: Tensor, residual: Any, size: Any, step: int | Tensor) -> None:
        self.z = z
        self.residual = residual
        self.size = size
        self.step = step


class Monitor:
    """One run's judge.

    In the usual case, every sample better than ever or none, it keeps references and compares plain numbers. All else
    (some got worse, some not finite) takes the careful path, on float64 tensors on the CPU.

    Args:
        problem: f on packed states; evaluated again only to retry samples and to check a composed state.
        z: the packed start.
        settings: tolerances and limits.
        scale: (B,) factor of each sample's absolute tolerance, or None.
        keep_trace: whether to keep the residuals of all checks.
    """

    def __init__(
        self, problem: Problem, z: Tensor, settings: SolverSettings, scale: Tensor | None, keep_trace: bool
    ) -> None:
        self.problem = problem
        self.settings = settings
        self.rows: Rows = rows_for(z, settings)
        atol, self.rtol = settings.thresholds()
        self.fixed = atol == 0 and self.rtol == 0
        self.never_stops = self.fixed or settings.return_final
        limits = torch.full((z.shape[0],), atol, dtype=torch.float64)
        if scale is not None:
            limits = limits * scale.detach().cpu().double()
        self.atol64 = limits
        self.atol: Any = self.rows.from64(limits)
        self.floor = FLOOR_SPACINGS * problem.eps(z)
        self.slack = 1 - EQUAL_SPACINGS * torch.finfo(z.dtype).eps
        self.keep_trace = keep_trace
        self.trace: list[tuple[Any, Any]] = []
        self.checked: list[int] = []
        nothing = self.rows.from64(torch.full_like(limits, math.inf))
        self.now = self.best = Best(z, nothing, nothing, 0)
        self.common: Best | None = None  # the best state of one step, once `best` holds rows of several
        self.improved_at = 0
        self.coupled = False  # rows of a composed state turned out to depend on each other
        self.strikes: Tensor | None = None
        self.frozen: Tensor | None = None
        self.final: Best | None = None

    # ---- during the run

    def judge(self, step: int, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Take in f(z) at this step. Returns z and f(z), repaired where they were not finite, and whether to stop."""
        rows = self.rows
        residual, size = rows.measure(z, fz)
        best = self.best
        if rows.all_below(residual, best.residual):
            self.now = self.best = Best(z, residual, size, step)
            self.improved_at, self.common = step, None
        elif self.frozen is None and self.common is None and rows.none_below(residual, best.residual, self.slack):
            self.now = Best(z, residual, size, step)
        else:
            z, fz = self._judge_carefully(step, z, fz, residual, size)
        if self.keep_trace:
            self.trace.append((self.now.residual, self.now.size))
            self.checked.append(step)
        return z, fz, not self.never_stops and self._over(step)

    def _over(self, step: int) -> bool:
        """Whether all samples are within tolerance, here or each at its best, or none gets any further."""
        now, best, settings = self.now, self.best, self.settings
        if self._within(now):
            self.final = now
            return True
        if now is best:
            return False
        if self.common is not None and not self.coupled and self._within(best):
            if self._confirm():
                return True
            self.coupled = True
        if settings.patience is not None and step - self.improved_at >= settings.patience:
            return True
        return self._all_gone(settings.divergence_factor)

    def _within(self, state: Best) -> bool:
        residual = state.residual
        if self.frozen is not None:
            residual = self.rows.from64(torch.where(self.frozen, 0.0, self.rows.to64(residual)))
        return self.rows.within(residual, state.size, self.atol, self.rtol, self.floor)

    def _all_gone(self, factor: float) -> bool:
        """Whether every sample has diverged, been frozen, or is within tolerance."""
        worst = max(self.now.residual) if isinstance(self.now.residual, list) else float(self.now.residual.max())
        if worst <= factor * float(self.atol64.max()):
            return False
        now, best = self.rows.to64(self.now.residual), self.rows.to64(self.best.residual)
        gone = now > factor * torch.maximum(best, self.atol64)
        settled = self._limit(self.rows.to64(self.now.size)) >= now
        if self.frozen is not None:
            settled = settled | self.frozen
        return bool(gone.any()) and bool((gone | settled).all())

    def _limit(self, size: Tensor) -> Tensor:
        return torch.maximum(self.atol64 + self.rtol * size, self.floor * size)

    # ---- the careful path

    def _judge_carefully(self, step: int, z: Tensor, fz: Tensor, residual: Any, size: Any) -> tuple[Tensor, Tensor]:
        rows = self.rows
        r, n = rows.to64(residual), rows.to64(size)
        if self.frozen is not None or not bool(torch.isfinite(r).all()):
            z, fz, r, n = self._repair(z, fz, r, n)
            residual, size = rows.from64(r), rows.from64(n)
        now = self.now = Best(z, residual, size, step)
        best = self.best
        better = r < rows.to64(best.residual) * self.slack
        if bool(better.all()):
            self.best, self.common, self.improved_at = now, None, step
            return z, fz
        if self.common is None:
            self.common = best
        if bool(better.any()):
            mask = better.to(z.device)[:, None]
            before = best.step if isinstance(best.step, Tensor) else torch.full_like(better, best.step, dtype=torch.int64)
            self.best = Best(
                torch.where(mask, z, best.z),
                rows.from64(torch.where(better, r, rows.to64(best.residual))),
                rows.from64(torch.where(better, n, rows.to64(best.size))),
                torch.where(better, step, before),
            )
            self.improved_at = step
        if self._worst(now) < self._worst(self.common):
            self.common = now
        return z, fz

    def _worst(self, state: Best) -> float:
        """Largest residual of a state in units of its tolerance (of its own size where there is none)."""
        r, n = self.rows.to64(state.residual), self.rows.to64(state.size)
        limit = n if self.fixed else self._limit(n)
        ratio = r / torch.where(limit > 0, limit, 1.0)
        if self.frozen is not None:
            ratio = torch.where(self.frozen, 0.0, ratio)
        return float(ratio.nan_to_num(math.inf).max())

    def _confirm(self) -> bool:
        """Evaluate f at a state composed of several steps' best rows; take it as final if it is what its rows were."""
        best = self.best
        residual, size = self.rows.measure(best.z, self.problem(best.z))
        r, claimed = self.rows.to64(residual), self.rows.to64(best.residual)
        holds = (r <= COUPLED_BY * claimed) & ((r <= self._limit(self.rows.to64(size))) | (claimed > self._limit(self.rows.to64(best.size))))
        if self.frozen is not None:
            holds = holds | self.frozen
            residual = self.rows.from64(torch.where(self.frozen, claimed, r))
        if not bool(holds.all()):
            return False
        self.final = Best(best.z, residual, size, best.step)
        return True

    def _repair(self, z: Tensor, fz: Tensor, r: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Retry samples whose residual is not finite from their best state; freeze them there after three failures."""
        frozen = self.frozen if self.frozen is not None else torch.zeros_like(r, dtype=torch.bool)
        strikes = self.strikes if self.strikes is not None else torch.zeros_like(r, dtype=torch.int64)
        bad = ~torch.isfinite(r) & ~frozen
        while bool(bad.any()):
            strikes = strikes + bad
            frozen = frozen | (strikes >= STRIKES)
            z = torch.where(bad.to(z.device)[:, None], self.best.z, z)
            fz = self.problem(z)
            r, n = map(self.rows.to64, self.rows.measure(z, fz))
            bad = ~torch.isfinite(r) & ~frozen
        self.strikes = strikes
        if bool(frozen.any()):
            self.frozen = frozen
            fz = torch.where(frozen.to(z.device)[:, None], z, fz)
            r = torch.where(frozen, self.rows.to64(self.best.residual), r)
            n = torch.where(frozen, self.rows.to64(self.best.size), n)
        return z, fz, r, n

    def hold(self, z: Tensor) -> Tensor:
        """`z` with frozen samples put back to their best state."""
        if self.frozen is None:
            return z
        return torch.where(self.frozen.to(z.device)[:, None], self.best.z, z)

    # ---- the result

    def finish(self, steps: int, keep_last: bool = False) -> Solution:
        """The solution after `steps` steps: the state returned, and the residual that it has.

        Args:
            steps: solver updates made.
            keep_last: return the last state judged, whatever the best was.
        """
        if self.final is None:
            if keep_last or self.settings.return_final:
                self.final = self.now
            elif self.common is None:
                self.final = self.best
            elif self.coupled or not self._confirm():
                self.final = self.common
        final = self.final or self.best
        r, n = self.rows.to64(final.residual), self.rows.to64(final.size)
        return self._solution(final, r, n, self._status(final, r, n, steps), steps)

    def skipped(self) -> Solution:
        """The solution of a run of no steps: z0, of which nothing is known."""
        unknown = torch.full_like(self.atol64, math.nan)
        status = torch.full_like(unknown, int(Status.SKIPPED), dtype=torch.int64)
        return self._solution(self.best, unknown, unknown, status, 0)

    def _status(self, final: Best, r: Tensor, n: Tensor, steps: int) -> Tensor:
        step = final.step if isinstance(final.step, Tensor) else torch.full_like(r, final.step, dtype=torch.int64)
        last = self.rows.to64(self.now.residual)
        stale = steps - step >= min(STALLED_AFTER, self.settings.patience or STALLED_AFTER)
        status = torch.full_like(step, int(Status.MAX_STEPS))
        status[stale] = int(Status.STALLED)
        status[last > DIVERGED_BY * r] = int(Status.DIVERGED)
        status[r <= self.floor * n] = int(Status.AT_PRECISION)
        status[r <= self.atol64 + self.rtol * n] = int(Status.CONVERGED)
        status[~torch.isfinite(r)] = int(Status.NON_FINITE)
        if self.frozen is not None:
            status[self.frozen] = int(Status.NON_FINITE)
        return status

    def _solution(self, final: Best, r: Tensor, n: Tensor, status: Tensor, steps: int) -> Solution:
        z = final.z
        batch = z.shape[0]

        def rows(values: Tensor) -> Tensor:
            return values.to(device=z.device, dtype=z.dtype)

        step = final.step if isinstance(final.step, Tensor) else torch.full((batch,), final.step)
        values = {
            "abs_lowest": rows(r),
            "rel_lowest": rows(_relative(r, n)),
            "abs_trace": lambda: rows(self._traces(0, r)),
            "rel_trace": lambda: rows(self._traces(1, _relative(r, n))),
            "nstep": step.to(device=z.device, dtype=torch.float32),
            "sradius": torch.full((1,), -1.0, device=z.device),
            "status": status.to(z.device),
            "steps": lambda: self._steps(steps).to(z.device),
            "nfe": self.problem.nfe,
            "sample_nfe": torch.full((batch,), self.problem.nfe, device=z.device),
            "nvjp": self.problem.nvjp,
            "njvp": self.problem.njvp,
            "z": z,
        }
        solution = Solution(values, self.problem.spec)
        if self.never_stops:
            solution.accepted = (Status.MAX_STEPS, Status.STALLED)
        return solution

    def _traces(self, which: int, lowest: Tensor) -> Tensor:
        """(B, N) residuals of all checks, absolute (0) or relative (1); the final ones where no trace was kept."""
        if not self.trace:
            return lowest[:, None]
        residual = torch.stack([self.rows.to64(r) for r, _ in self.trace], 1)
        if which == 0:
            return residual
        return _relative(residual, torch.stack([self.rows.to64(n) for _, n in self.trace], 1))

    def _steps(self, steps: int) -> Tensor:
        """(B,) steps each sample took until it was first within its tolerance; all of them where it never was."""
        count = torch.full_like(self.atol64, steps, dtype=torch.int64)
        for step, (residual, size) in zip(reversed(self.checked), reversed(self.trace), strict=True):
            n = self.rows.to64(size)
            done = self.rows.to64(residual) <= self._limit(n)
            count = torch.where(done, step, count)
        return count


def _relative(residual: Tensor, size: Tensor) -> Tensor:
    """residual / size; 0 where both are 0."""
    return torch.where(residual == 0, 0.0, residual / size)
