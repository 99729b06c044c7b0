"""Evaluations of f, and products with J^T, until 1e-6: deqcore's solvers beside torchdeq's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchdeq.solver
from torch import Tensor

import deqcore.solver

from . import adjoint, exact
from .maps import SIX, Counted, six
from .report import Table
from .tally import LEGEND, Tally, says

__all__ = ["INTRO", "run"]

INTRO = (
    "Batch 32, z0 = 0, seeds 0-3 (G512: seed 0). Counted by wrapping f, to the call's return; what is returned is checked by a "
    "float64 evaluation of its own."
)
TOLERANCE = 1e-6
MOST = 2000
#: A state counts as within the tolerance up to this factor: the check's own rounding in float32.
SLACK = {torch.float64: 1.001, torch.float32: 1.2}

Solve = Callable[[Callable[..., Any], Tensor], tuple[Tensor, Any]]


class Column(NamedTuple):
    """A solver as a column of the table."""

    title: str
    solve: Solve
    dtype: torch.dtype = torch.float64


def _ours(name: str, **options: Any) -> Solve:
    solver = deqcore.solver.get_solver(name)
    return lambda f, z0: solver(f, z0, max_iter=MOST, tol=TOLERANCE, stop_mode="rel", **options)[::2]


def _theirs(name: str, most: int = MOST, **options: Any) -> Solve:
    solver = torchdeq.solver.get_solver(name)
    return lambda f, z0: solver(f, z0, max_iter=most, tol=TOLERANCE, stop_mode="rel", **options)[::2]


def _columns() -> list[Column]:
    columns = [Column(f"TorchDEQ {name}", _theirs(name)) for name in ("fixed_point_iter", "anderson")]
    # its buffers hold max_iter states each: 2000 would be half a gigabyte
    columns.append(Column("TorchDEQ broyden", _theirs("broyden", 300)))
    for dtype, label in ((torch.float64, ""), (torch.float32, ", float32")):
        columns += [
            Column(f"{name}{label}", _ours(name), dtype) for name in ("fixed_point_iter", "anderson", "broyden")
        ]
    return columns


def run(quick: bool = False) -> list[Table]:
    """The tables; `quick` takes one seed and leaves the largest map out."""
    torch.set_num_threads(1)
    names = [name for name in SIX if not (quick and name == "G512")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [_forward(names, quick), *adjoint.tables(names, quick), exact.table()]


def _forward(names: list[str], quick: bool) -> Table:
    table = Table(
        "Evaluations of f until the worst sample has ||f(z) - z|| / ||f(z)|| <= 1e-6",
        ("solver", *names),
        notes=f"float64 where nothing else is said; memory: each library's default (anderson 6 there, 10 here; broyden unlimited "
        f"there, 30 here). Lowest-highest of the seeds, at most {MOST} steps (torchdeq's broyden: 300). {LEGEND} "
        "simple_fixed_point_iter has no stop test; its steps are fixed_point_iter's. In float32 plain iteration, either library's, "
        "comes to rest where a step is less than the spacing of the state's numbers.",
    )
    for column in _columns():
        cells = [_cell(column, name, 1 if quick else SIX[name].seeds) for name in names]
        table.add(column.title, *cells)
    return table


def _cell(column: Column, name: str, seeds: int) -> Tally:
    tally = Tally()
    for seed in range(seeds):
        tanh = six(name, seed, column.dtype)
        counted = Counted(tanh.fn())
        with torch.no_grad():
            z, info = column.solve(counted, torch.zeros_like(tanh.x))
        true = tanh.relative_residual(z) <= SLACK[column.dtype] * TOLERANCE
        tally.add(counted.calls, says(info, "rel_lowest", TOLERANCE), true)
    return tally
