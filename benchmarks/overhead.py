"""Time per iteration over a plain loop of the same evaluations of f, deqcore's beside torchdeq's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchdeq
import torchdeq.solver

import deqcore
import deqcore.solver

from .maps import Counted, TanhMap, even, uneven
from .options import Options
from .report import Table
from .timing import Spread, paired_ratios, per_call

__all__ = ["INTRO", "run"]

#: Out of reach, so that every step is made, but not 0, which would switch the stop test off.
TOLERANCE = 1e-12
STEPS = 40
INTRO = (
    f"f = tanh(z @ W.T + x), float32, no_grad, tolerance {TOLERANCE:g}, which nothing reaches, seed 0. A figure is the "
    "time of a whole call, its start and end included, over its number of evaluations of f (counted beforehand by "
    "wrapping f), divided by the same of a plain loop z = f(z) timed right before it. Time is the thread's on its "
    "core. Median (lowest..highest) of interleaved rounds."
)
SOLVERS = ("simple_fixed_point_iter", "fixed_point_iter", "anderson", "broyden")
SHAPES = ((1, 16), (64, 64), (64, 512), (64, 4096))
LIMITS = {
    "fixed_point_iter": {(1, 16): 3.0, (64, 64): 1.7, (64, 512): 1.08, (64, 4096): 1.02},
    "anderson": {(1, 16): 14.0, (64, 64): 7.0, (64, 512): 1.7, (64, 4096): 1.1},
    "broyden": {(1, 16): 20.0, (64, 64): 9.0, (64, 512): 2.0, (64, 4096): 1.15},
}

Key = tuple[str, str, str]


def run(options: Options) -> list[Table]:
    """The tables; `quick` leaves out the largest state, one stop mode and most rounds."""
    quick = options.quick
    shapes = SHAPES[:-1] if quick else SHAPES
    with torch.no_grad():
        return [_even_table(shapes, quick), _uneven_table(SHAPES[:3], quick), _fixed_cost(quick)]


def _calls(f: Callable[..., Any], z0: torch.Tensor, name: str, steps: int, stop: str) -> dict[str, Callable[[], Any]]:
    """One solve each: by solver function and by DEQ module, torchdeq's and ours."""
    options = {"max_iter": steps, "tol": TOLERANCE, "stop_mode": stop}
    theirs = torchdeq.get_deq(f_solver=name, f_max_iter=steps, f_tol=TOLERANCE, f_stop_mode=stop).eval()
    ours = deqcore.get_deq(solver={"name": name, **options}, on_failure="ignore").eval()
    return {
        "theirs": partial(torchdeq.solver.get_solver(name), f, z0, **options),
        "ours": partial(deqcore.solver.get_solver(name), f, z0, **options),
        "theirs deq": partial(theirs, f, z0),
        "ours deq": partial(ours, f, z0),
    }


def _ratios(
    tanh: TanhMap, shape: tuple[int, int], solvers: tuple[str, ...], stops: tuple[str, ...], steps: int, rounds: int
) -> tuple[float, dict[Key, Spread]]:
    """Microseconds of one evaluation in the plain loop; (solver, stop, who) -> time per evaluation over it."""
    f, z0 = tanh.fn(), torch.zeros(shape)

    def plain() -> None:
        z = z0
        for _ in range(steps):
            z = f(z)

    cases: dict[Key, Callable[[], Any]] = {}
    evaluations: dict[Key, int] = {}
    for name in solvers:
        for stop in stops:
            counted = Counted(f)
            for who, case in _calls(counted, z0, name, steps, stop).items():
                counted.calls = 0
                case()
                evaluations[name, stop, who] = counted.calls
            for who, case in _calls(f, z0, name, steps, stop).items():
                cases[name, stop, who] = case
    base, ratios = paired_ratios(plain, cases, rounds)
    return base.median / steps * 1e6, {key: ratio.times(steps / evaluations[key]) for key, ratio in ratios.items()}


def _even_table(shapes: tuple[tuple[int, int], ...], quick: bool) -> Table:
    table = Table(
        "Every residual falls at every iteration",
        ("state", "f, us", "solver", "stop", "TorchDEQ", "here", "TorchDEQ, get_deq", "here, get_deq", "at most", "ok"),
        notes=f"W = .99 x orthogonal, x = .01 N(0, 1); {STEPS} steps, so that plain iteration and Anderson stay far "
        "from the rounding error (Broyden gets there at (1, 16)). Memory: each library's default. "
        "ok: both medians here are within the limit.",
    )
    for shape in shapes:
        large = shape[1] > 1000
        rounds = 3 if large else 5 if quick else 11
        stops = ("rel",) if large or quick else ("abs", "rel")
        micro, found = _ratios(even(*shape), shape, SOLVERS, stops, STEPS, rounds)
        for name in SOLVERS:
            for stop in stops:
                spreads = [found[name, stop, who] for who in ("theirs", "ours", "theirs deq", "ours deq")]
                limit = LIMITS.get(name, {}).get(shape)
                worst = max(spreads[1].median, spreads[3].median)
                verdict = "" if limit is None else "yes" if worst <= limit else "NO"
                table.add(shape, f"{micro:.1f}", name, stop, *spreads, limit or "", verdict)
    return table


def _uneven_table(shapes: tuple[tuple[int, int], ...], quick: bool) -> Table:
    table = Table(
        "Some samples get better while others get worse",
        ("state", "f, us", "solver", "TorchDEQ", "here"),
        notes=f"W Gaussian of spectral radius .99, x = .1 N(0, 1); {STEPS} steps, stop mode rel, solver functions.",
    )
    solvers = SOLVERS[1:]
    for shape in shapes:
        micro, found = _ratios(uneven(*shape), shape, solvers, ("rel",), STEPS, 3 if quick else 9)
        for name in solvers:
            table.add(shape, f"{micro:.1f}", name, found[name, "rel", "theirs"], found[name, "rel", "ours"])
    return table


def _fixed_cost(quick: bool) -> Table:
    table = Table(
        "A short call, microseconds",
        ("solver", "TorchDEQ", "here", "TorchDEQ, get_deq", "here, get_deq"),
        notes="A whole call with 3 steps at (1, 16): what starting and ending costs.",
    )
    f, z0 = even(1, 16).fn(), torch.zeros(1, 16)
    for name in SOLVERS:
        spreads = per_call(_calls(f, z0, name, 3, "rel"), 5 if quick else 15)
        table.add(name, *(spread.times(1e6) for spread in spreads.values()))
    return table
