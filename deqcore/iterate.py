"""The only loop: it steps a solver, has every state judged, and returns the best one with how each sample ended."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .compact import Compaction
from .errors import ConfigError
from .interfaces import LinearSolver, Solver
from .monitor import Monitor
from .problem import Problem
from .recorder import Recorder
from .settings import SolverSettings
from .solution import Solution, Status

__all__ = ["Run", "check_loop", "iterate"]

Callback = Callable[[int, Tensor, Tensor], Any]


class Run(NamedTuple):
    """A finished run of the loop: what is known about it, the states at the steps asked for, in order, and whether a
    callback ended it."""

    solution: Solution
    samples: list[Tensor]
    ended: bool = False


def _has_own_loop(kind: Any) -> bool:
    return kind.solve not in (Solver.solve, LinearSolver.solve)


def check_loop(kind: type, settings: SolverSettings, compact: bool, batch_dims: int) -> None:
    """Refuse what a loop with this kind of solver can't do.

    Raises:
        ConfigError: compact=True with another batch_dims than 1, or with a solver that isn't judged at every step; a
            bound that only the kernel's loop keeps, for a solver that brings its own.
    """
    own = _has_own_loop(kind)
    if compact and batch_dims != 1:
        raise ConfigError(
            f"compact=True needs batch_dims=1, one equilibrium a row of the batch; got batch_dims={batch_dims}."
        )
    if compact and (own or not kind.monitored):  # type: ignore[attr-defined]
        raise ConfigError(
            f"compact=True needs a solver that is judged at every step; {settings.name!r} is not. Pick another, or set "
            "compact=False."
        )
    for bound in ("max_nfe", "patience"):
        takes: Collection[str] = getattr(kind, "takes", ())  # of a plain function, which may have such an argument
        if own and bound not in takes and getattr(settings, bound) is not None:
            raise ConfigError(
                f"solver.{bound}={getattr(settings, bound)!r}: {settings.name!r} brings its own loop, which "
                f"doesn't know of {bound}. Leave it out, or pick another solver."
            )


class Options(NamedTuple):
    """What a run is asked for besides its solver and its problem; see :func:`iterate`."""

    sample_at: Collection[int] = ()
    scale: Tensor | None = None
    check_every: int = 1
    keep_trace: bool = True
    keep_state: bool = False
    warm_state: Any = None
    callback: Callback | None = None
    compact: bool = False


def iterate(
    solver: Solver[Any] | LinearSolver[Any],
    problem: Problem,
    z: Tensor,
    fz: Tensor | None = None,
    **options: Any,
) -> Run:
    """Solve `problem` from `z` with `solver`.

    Args:
        solver: gives the step; its settings give tolerance and step limit.
        problem: f on packed states.
        z: packed start, shape (B, F); not changed.
        fz: f(z), where it is known already.
        sample_at: steps whose state (the best so far) to return as well.
        scale: (B,) factor of each sample's absolute tolerance; the adjoint solve gives its cotangents' norms.
        check_every: judge every k-th step only; between checks nothing waits for the device.
        keep_trace: whether to keep the residuals of all checks.
        keep_state: whether the solution keeps the solver's state.
        warm_state: solver state of an earlier solve to resume from.
        callback: called as callback(step, z, residual) after each check, residual of shape (B,); ends the run by
            returning True.
        compact: have finished samples leave the batch; see :class:`deqcore.DEQ`.

    Returns:
        the solution, whose residual is that of the state it holds, and the sampled states.
    """
    device = z.device.type
    # f is called under the autocast that is on; solvers compute in full precision.
    off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with off:
        return _Loop(cast("Solver[Any]", solver), problem, Options(**options)).run(z, fz)


class _Loop:
    """One run. A linear solver is stepped like any other: what it is given is a linear problem."""

    def __init__(self, solver: Solver[Any], problem: Problem, options: Options) -> None:
        self.solver = solver
        self.problem = problem
        self.options = options
        self.settings = cast(SolverSettings, solver.settings)

    def run(self, z: Tensor, fz: Tensor | None) -> Run:
        solver, problem, settings, options = self.solver, self.problem, self.settings, self.options
        start = z
        z = problem.round(z)
        if z is not start:
            fz = None
        kind = Recorder if settings.is_fixed else Monitor
        self.monitor = monitor = kind(problem, z, settings, options.scale, options.keep_trace)
        if settings.max_iter == 0:
            return Run(monitor.skipped(), [z] * len(options.sample_at))
        if _has_own_loop(type(solver)):
            return self._own_loop(z)
        monitor.recovers = solver.monitored
        self.compaction: Compaction | None = None
        self.ended = False  # by a callback
        self.samples: list[Tensor] = []
        step, z, state = self._steps(z, problem(z) if fz is None else fz)
        return self._result(step, z, state, start)

    def _steps(self, z: Tensor, fz: Tensor | None) -> tuple[int, Tensor, Any]:
        """Step until the run ends. Returns the number of steps, the last state, and the solver's.

        No name outlives its step here: states may be large.
        """
        solver, problem, settings, monitor = self.solver, self.problem, self.settings, self.monitor
        compact = self.options.compact and isinstance(monitor, Monitor) and not settings.return_final
        k, stop = 0, False
        if isinstance(monitor, Monitor):
            monitor.apart = compact
        if solver.monitored:
            z, fz, stop = monitor.judge(0, z, cast(Tensor, fz))
        else:
            monitor.begin(monitor.measure(z, cast(Tensor, fz))[0])
        if stop:
            return 0, z, self.options.warm_state
        state = self._begin(z, cast(Tensor, fz))
        last, rounds, sample_at, budget = settings.max_iter, problem.rounds, self.options.sample_at, settings.max_nfe
        check_every = self.options.check_every if solver.monitored else last
        while not stop and k < last and (budget is None or problem.work < budget):
            z, state, fz = solver.step(problem, z, cast(Tensor, fz), state)
            k += 1
            if monitor.frozen is not None:
                z, fz = monitor.hold(z), None
            if rounds:
                z, fz = problem.round(z), None
            estimated = fz is not None and solver.estimates
            if fz is None:
                fz = problem(z)
            spent = budget is not None and problem.work >= budget
            if check_every == 1 or k % check_every == 0 or k == last or k in sample_at or spent:
                strikes = monitor.strikes
                z, fz, stop = monitor.judge(k, z, fz)
                if stop and estimated:
                    z, fz, stop = monitor.judge_again(k, z, problem(z))
                    state = state if stop else solver.init(problem, z, fz)
                elif check_every > 1 and monitor.strikes is not strikes:  # NaN may have got into the history unseen
                    state = solver.init(problem, z, fz)
                stop = self._tell(k, z, stop)
                # Only where another step follows (f is called once more for them): what ends the run was judged whole.
                if compact and not stop and k < last and (budget is None or problem.work + 1 < budget):
                    z, fz, state = self._drop_finished(k, z, fz, state)
                    monitor = self.monitor
        if not k and not solver.monitored:  # the budget is spent already
            z, fz, _ = monitor.judge(0, z, cast(Tensor, fz))
        return k, z, state

    def _begin(self, z: Tensor, fz: Tensor) -> Any:
        """The solver's state before the first step."""
        if self.options.warm_state is None:
            return self.solver.init(self.problem, z, fz)
        kept = deepcopy(self.options.warm_state)  # the solution that it comes from may be used again
        return self.solver.resume(self.problem, z, fz, kept)

    def _drop_finished(self, k: int, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """Have finished samples leave the batch. Returns what is left of the state, of f there, and of the solver's."""
        monitor = cast(Monitor, self.monitor)
        leave = monitor.leavers(k)
        if leave is None or bool(leave.all()):
            return z, fz, state
        books = self.compaction or Compaction(monitor, z)
        if not books.worth(leave):
            return z, fz, state
        keep = (~leave).nonzero()[:, 0]
        self.problem.narrow(keep, z, fz)
        self.compaction = books
        books.drop(monitor, leave, keep)
        self.monitor = monitor.narrowed(keep)
        there = keep.to(z.device)
        return z[there], fz[there], self.solver.select(state, there)

    def _tell(self, k: int, z: Tensor, stop: bool) -> bool:
        """Hand the state judged to who asked for it; whether to stop."""
        callback, monitor = self.options.callback, self.monitor
        if k in self.options.sample_at and not stop:
            self.samples.append(self._whole(z if self._keeps_last() else monitor.best()))
        if callback is None:
            return stop
        residual = monitor.residual() if self.compaction is None else self.compaction.residuals(cast(Monitor, monitor))
        self.ended = callback(k, self._whole(z), residual.to(z)) is True
        return self.ended or stop

    def _whole(self, z: Tensor) -> Tensor:
        """The state of all samples, whoever has left."""
        return z if self.compaction is None else self.compaction.whole(z)

    def _keeps_last(self) -> bool:
        return self.settings.return_final or not self.solver.monitored

    def _result(self, step: int, z: Tensor, state: Any, start: Tensor) -> Run:
        monitor, solver = self.monitor, self.solver
        if solver.estimates and monitor.final is None:
            z = monitor.best()
            z, _, _ = monitor.judge_again(step, z, self.problem(z))
        self.problem.widen()
        if self.compaction is None:
            solution = monitor.finish(z, step, self._keeps_last())
        else:
            solution = self.compaction.finish(cast(Monitor, monitor), z, step, self._keeps_last())
            solution["sample_nfe"] = self.problem.sample_nfe().to(z.device)
        if solution["z"].untyped_storage().data_ptr() == start.untyped_storage().data_ptr():
            solution["z"] = solution["z"].clone()  # the start, or a view of it that f gave back
        if not solver.monitored:
            solution.accepted = (Status.MAX_STEPS, Status.STALLED)
        if self.options.keep_state and self.compaction is None:  # the state of a part is of no use
            solution.solver_state = state
        if state is not None:
            solution.update(solver.notes(state))
        samples = self.samples + [solution["z"]] * (len(self.options.sample_at) - len(self.samples))
        return Run(solution, samples, self.ended)

    def _own_loop(self, z: Tensor) -> Run:
        """A solver that brings its own loop: run it, then judge what it returned by one evaluation."""
        problem, monitor, sample_at = self.problem, self.monitor, self.options.sample_at
        before, monitor.recovers = problem.nfe, False
        final, samples = self.solver.solve(problem, z, sorted(sample_at))
        final = problem.round(final)
        steps = problem.nfe - before
        final, _, _ = monitor.judge(steps, final, problem(final))
        samples = samples[: len(sample_at)]
        return Run(monitor.finish(final, steps, keep_last=True), samples + [final] * (len(sample_at) - len(samples)))
