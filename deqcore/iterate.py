"""The only loop: it steps a solver, has every state judged, and returns the best one with how each sample ended."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .interfaces import LinearSolver, Solver
from .monitor import Monitor
from .problem import Problem
from .settings import SolverSettings
from .solution import Solution, Status

__all__ = ["Run", "iterate"]

Callback = Callable[[int, Tensor, Tensor], Any]


class Run(NamedTuple):
    """A finished run of the loop: what is known about it, and the states at the steps asked for, in order."""

    solution: Solution
    samples: list[Tensor]


def iterate(
    solver: Solver[Any] | LinearSolver[Any],
    problem: Problem,
    z: Tensor,
    *,
    sample_at: Collection[int] = (),
    scale: Tensor | None = None,
    check_every: int = 1,
    keep_trace: bool = True,
    keep_state: bool = False,
    warm_state: Any = None,
    callback: Callback | None = None,
) -> Run:
    """Solve `problem` from `z` with `solver`.

    Args:
        solver: gives the step; its settings give tolerance and step limit.
        problem: f on packed states.
        z: packed start, shape (B, F); not changed.
        sample_at: steps whose state (the best so far) to return as well.
        scale: (B,) factor of each sample's absolute tolerance; the adjoint solve gives its cotangents' norms.
        check_every: judge every k-th step only; between checks nothing waits for the device.
        keep_trace: whether to keep the residuals of all checks.
        keep_state: whether the solution keeps the solver's state.
        warm_state: solver state of an earlier solve to resume from.
        callback: called as callback(step, z, residual) after each check, residual of shape (B,).

    Returns:
        the solution, whose residual is that of the state it holds, and the sampled states.
    """
    device = z.device.type
    if torch.is_autocast_enabled(device):  # for f, which the problem calls under it; solvers compute in full precision
        with torch.autocast(device, enabled=False):
            return iterate(
                solver,
                problem,
                z,
                sample_at=sample_at,
                scale=scale,
                check_every=check_every,
                keep_trace=keep_trace,
                keep_state=keep_state,
                warm_state=warm_state,
                callback=callback,
            )
    settings = cast(SolverSettings, solver.settings)
    last = settings.max_iter
    z = start = problem.round(z)
    monitor = Monitor(problem, z, settings, scale, keep_trace)
    if last == 0:
        return Run(monitor.skipped(), [z] * len(sample_at))
    if type(solver).solve not in (Solver.solve, LinearSolver.solve):
        return _own_loop(solver, problem, z, monitor, sample_at)
    monitor.recovers = solver.monitored
    keep_last = settings.return_final or not solver.monitored
    check_every = check_every if solver.monitored else last
    fz, stop, rounds = problem(z), False, problem.rounds
    if solver.monitored:
        z, fz, stop = monitor.judge(0, z, fz)
    else:
        monitor.begin(monitor.rows.measure(z, fz)[0])
    method = cast("Solver[Any]", solver)  # a linear solver is given a linear problem
    kept = deepcopy(warm_state)  # the solution that it comes from may be used again
    state: Any = method.resume(problem, z, fz, kept) if kept is not None else method.init(problem, z, fz)
    samples: list[Tensor] = []
    k = 0
    while not stop and k < last:
        z, state, fz = method.step(problem, z, fz, state)
        k += 1
        if monitor.frozen is not None:
            z, fz = monitor.hold(z), None
        if rounds:
            z, fz = problem.round(z), None
        if fz is None:
            fz = problem(z)
        if k % check_every == 0 or k == last or k in sample_at:
            strikes = monitor.strikes
            z, fz, stop = monitor.judge(k, z, fz)
            if check_every > 1 and monitor.strikes is not strikes:  # NaN may have got into the history unseen
                state = method.init(problem, z, fz)
            if callback is not None:
                callback(k, z, monitor.rows.to64(monitor.now.residual).to(z))
        if k in sample_at and not stop:
            samples.append(z if keep_last else monitor.journal.best().z)
    solution = monitor.finish(k, keep_last)
    if solution["z"].untyped_storage().data_ptr() == start.untyped_storage().data_ptr():
        solution["z"] = solution["z"].clone()  # the start, or a view of it that f gave back
    if not solver.monitored:
        solution.accepted = (Status.MAX_STEPS, Status.STALLED)
    if keep_state:
        solution.solver_state = state
    samples += [solution["z"]] * (len(sample_at) - len(samples))
    return Run(solution, samples)


def _own_loop(
    solver: Solver[Any] | LinearSolver[Any], problem: Problem, z: Tensor, monitor: Monitor, sample_at: Collection[int]
) -> Run:
    """A solver that brings its own loop: run it, then judge what it returned by one evaluation."""
    before, monitor.recovers = problem.nfe, False
    final, samples = solver.solve(problem, z, sorted(sample_at))
    final = problem.round(final)
    steps = problem.nfe - before
    monitor.judge(steps, final, problem(final))
    samples = samples[: len(sample_at)]
    return Run(monitor.finish(steps, keep_last=True), samples + [final] * (len(sample_at) - len(samples)))
