"""Evaluations of f, and products with its Jacobian, until 1e-6: deqcore's solvers beside every peer installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchdeq.solver

import deqcore.solver
from deqcore import DEQError, Solution
from deqcore.testing import installed

from . import adjoint, exact
from .maps import Counted, TanhMap, six
from .options import Options
from .peers import PEERS, Peer
from .report import Table
from .tally import LEGEND, Tally, says

__all__ = ["INTRO", "OTHER_FORM", "of_ours", "run", "work"]

INTRO = (
    "Batch 32, z0 = 0, seeds 0-3 (G512: seed 0) or those of `--seeds`. Counted by wrapping f, to the call's return; "
    "what is returned is checked by a float64 evaluation of its own. Products with J and J^T count like evaluations."
)
TOLERANCE = 1e-6
MOST = 2000
#: torchdeq's broyden keeps two states a step, all allocated at the start.
MOST_BROYDEN = 300
#: A state counts as within the tolerance up to this factor: the check's own rounding.
SLACK = {torch.float64: 1.001, torch.float32: 1.2}
LABEL = {torch.float64: "float64", torch.float32: "float32"}
#: Solvers that take another f than these maps, or that look at no residual.
OTHER_FORM = ("forward_backward", "peaceman_rachford", "simple_fixed_point_iter")
#: At most so many, by default settings.
LIMITS = {
    "anderson": {"G64a": 27, "G64b": 120, "S64": 95, "N64": 20, "C256": 36, "G512": 130},
    "broyden": {"G64a": 26, "G64b": 72, "S64": 74, "N64": 26, "C256": 33, "G512": 115},
}
#: `auto` over the best single solver: geometric mean and worst.
AUTO_LIMITS = (1.15, 1.5)
THEIRS = ("fixed_point_iter", "anderson", "broyden")

#: (map, seed, tally) -> evaluations, None where it failed.
Solve = Callable[[TanhMap, Tally], int | None]


class Row(NamedTuple):
    """A solver as a row of the table; `solver` is its name if it is one of ours."""

    title: str
    solve: Solve
    dtype: torch.dtype
    solver: str = ""


def work(info: Any, calls: int) -> int:
    """Evaluations and products of a solve: by its own counts, and never less than the calls of f."""
    if not isinstance(info, Solution):
        return calls
    return max(calls, info["nfe"] + info["nvjp"] + info["njvp"])


def run(options: Options) -> list[Table]:
    """The tables; `quick` takes one seed and leaves the largest map out."""
    forward, counts = _forward(options)
    return [forward, _limits(options, counts), *_auto(counts), *adjoint.tables(options), exact.table()]


# ---- rows


def _of_library(library: Any, name: str, most: int, dtype: torch.dtype) -> Solve:
    solver = library.get_solver(name)

    def solve(tanh: TanhMap, tally: Tally) -> int | None:
        counted = Counted(tanh.fn())
        try:
            with torch.no_grad():
                z, _, info = solver(counted, torch.zeros_like(tanh.x), max_iter=most, tol=TOLERANCE, stop_mode="rel")
        except DEQError:  # a state that is too large for it
            tally.add(0, "refused", True)
            return None
        claim, spent = says(info, "rel_lowest", TOLERANCE), work(info, counted.calls)
        true = tanh.relative_residual(z) <= SLACK[dtype] * TOLERANCE
        tally.add(spent, claim, true)
        return spent if claim != "failed" and true else None

    return solve


def of_ours(name: str, dtype: torch.dtype = torch.float64) -> Solve:
    """The solver `name` of ours: it takes a map and the tally that notes how it went."""
    return _of_library(deqcore.solver, name, MOST, dtype)


def _of_peer(peer: Peer) -> Solve:
    def solve(tanh: TanhMap, tally: Tally) -> int | None:
        spent = peer.solve(tanh, TOLERANCE)
        tally.add(spent or 0, "failed" if spent is None else "reached", True)
        return spent

    return solve


def _rows() -> list[Row]:
    rows: list[Row] = []
    for dtype, label in LABEL.items():
        end = "" if dtype is torch.float64 else f", {label}"
        for name in THEIRS:
            most = MOST_BROYDEN if name == "broyden" else MOST
            rows.append(Row(f"TorchDEQ {name}{end}", _of_library(torchdeq.solver, name, most, dtype), dtype))
        rows += [Row(peer.title + end, _of_peer(peer), dtype) for peer in _present() if dtype in peer.dtypes]
        for name in installed("solvers"):
            if name not in OTHER_FORM:
                rows.append(Row(f"**{name}**{end}", of_ours(name, dtype), dtype, name))
    return rows


def _present() -> list[Peer]:
    return [peer for peer in PEERS if peer.installed]


# ---- tables

#: (solver, dtype) -> (map, seed) -> evaluations, for ours.
Counts = dict[tuple[str, torch.dtype], dict[tuple[str, int], int | None]]


def _forward(options: Options) -> tuple[Table, Counts]:
    names = options.maps()
    table = Table(
        "Evaluations of f until the worst sample has ||f(z) - z|| / ||f(z)|| <= 1e-6",
        ("solver", *names),
        notes="Bold: here. float64 where nothing else is said; every library's default settings. Lowest-highest of "
        f"the seeds, at most {MOST} steps (torchdeq's broyden: {MOST_BROYDEN}; scipy, jaxopt, optimistix: {MOST} "
        f"evaluations). {LEGEND} TorchDEQ and the solvers here stop themselves; the other peers are watched and "
        "stopped once every sample has been there. scipy solves one sample at a time, the worst counts; optimistix's "
        "Newton and Dogleg build J, d products a step. simple_fixed_point_iter has no stop test. In float32 plain "
        "iteration comes to rest where a step is smaller than the spacing of the state's numbers.",
    )
    counts: Counts = {}
    for row in _rows():
        cells: list[Tally] = []
        for name in names:
            tally = Tally()
            for seed in options.of(name):
                found = row.solve(six(name, seed, row.dtype), tally)
                if row.solver:
                    counts.setdefault((row.solver, row.dtype), {})[name, seed] = found
            cells.append(tally)
        table.add(row.title, *cells)
    for peer in PEERS:
        if not peer.installed:
            table.add(f"{peer.title}: {peer.package} is not installed (extra `bench`)", *[""] * len(names))
    return table, counts


def _limits(options: Options, counts: Counts) -> Table:
    names = options.maps()
    table = Table(
        "Worst of the seeds against the limits",
        ("solver", *names, "ok"),
        notes="Worst/limit; NO where it is above, or a seed failed.",
    )
    for solver, limits in LIMITS.items():
        for dtype, label in LABEL.items():
            cells: list[str] = []
            for name in names:
                found = [n for (of, _), n in counts.get((solver, dtype), {}).items() if of == name]
                worst = math.inf if None in found or not found else max(n for n in found if n is not None)
                cells.append(f"{worst:g}/{limits[name]}" + ("" if worst <= limits[name] else " NO"))
            table.add(f"{solver}, {label}", *cells, "NO" if any("NO" in cell for cell in cells) else "yes")
    return table


def _auto(counts: Counts) -> list[Table]:
    """`auto` over the best other solver, map by map and seed by seed; no table where there is no `auto`."""
    if ("auto", torch.float64) not in counts:
        return []
    table = Table(
        "`auto` over the best single solver",
        ("dtype", "geometric mean", "worst", "where", "at most", "ok"),
        notes="Evaluations and products, of every map and seed; the best is another one for each.",
    )
    for dtype, label in LABEL.items():
        ratios: dict[str, float] = {}
        for (name, seed), mine in counts["auto", dtype].items():
            others = [found[name, seed] for (of, kind), found in counts.items() if of != "auto" and kind is dtype]
            best = min((n for n in others if n is not None), default=None)
            if best is not None:
                ratios[f"{name}, seed {seed}"] = math.inf if mine is None else mine / best
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        where = max(ratios, key=lambda key: ratios[key])
        ok = mean <= AUTO_LIMITS[0] and ratios[where] <= AUTO_LIMITS[1]
        limits = " and ".join(map(str, AUTO_LIMITS))
        table.add(label, f"{mean:.2f}", f"{ratios[where]:.2f}", where, limits, "yes" if ok else "NO")
    return [table]
