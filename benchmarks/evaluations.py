"""Evaluations of f, and products with J^T, until 1e-6: deqcore's solvers beside torchdeq's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchdeq.solver
from torch import Tensor

import deqcore.solver
from deqcore import registry

from . import adjoint, exact
from .maps import SIX, Counted, six
from .report import Table
from .tally import LEGEND, Tally, says

__all__ = ["INTRO", "run"]

INTRO = (
    "Batch 32, z0 = 0, seeds 0-3 (G512: seed 0). Counted by wrapping f, to the call's return; what is returned is "
    "checked by a float64 evaluation of its own."
)
TOLERANCE = 1e-6
MOST = 2000
#: torchdeq's broyden keeps two states a step, all allocated at the start.
MOST_BROYDEN = 300
#: A state counts as within the tolerance up to this factor: the check's own rounding.
SLACK = {torch.float64: 1.001, torch.float32: 1.2}

Solve = Callable[[Callable[..., Any], Tensor], tuple[Tensor, Any]]


class Row(NamedTuple):
    """A solver as a row of the table."""

    title: str
    solve: Solve
    dtype: torch.dtype = torch.float64


def run(quick: bool = False) -> list[Table]:
    """The tables; `quick` takes one seed and leaves the largest map out."""
    names = [name for name in SIX if not (quick and name == "G512")]
    return [_forward(names, quick), *adjoint.tables(names, quick), exact.table()]


def _solver(library: Any, name: str, most: int = MOST) -> Solve:
    solver = library.get_solver(name)

    def solve(f: Callable[..., Any], z0: Tensor) -> tuple[Tensor, Any]:
        z, _, info = solver(f, z0, max_iter=most, tol=TOLERANCE, stop_mode="rel")
        return z, info

    return solve


def _rows() -> list[Row]:
    names = ("fixed_point_iter", "anderson", "broyden")
    rows: list[Row] = []
    for name in names:
        rows.append(
            Row(f"TorchDEQ {name}", _solver(torchdeq.solver, name, MOST_BROYDEN if name == "broyden" else MOST))
        )
    for dtype, label in ((torch.float64, ""), (torch.float32, ", float32")):
        rows += [Row(name + label, _solver(deqcore.solver, name), dtype) for name in names]
    return rows


def _memory(name: str) -> Any:
    return registry.get("solvers", name).settings_type.model_fields["memory"].default


def _forward(names: list[str], quick: bool) -> Table:
    table = Table(
        "Evaluations of f until the worst sample has ||f(z) - z|| / ||f(z)|| <= 1e-6",
        ("solver", *names),
        notes="float64 where nothing else is said. Memory: each library's default, for anderson 6 there and "
        f"{_memory('anderson')} here, for broyden max_iter there and {_memory('broyden')} here. Lowest-highest of the "
        f"seeds, at most {MOST} steps (torchdeq's broyden: {MOST_BROYDEN}). {LEGEND} simple_fixed_point_iter has no "
        "stop test; its states are those of fixed_point_iter. In float32 plain iteration, of either library, comes to "
        "rest where a step is smaller than the spacing of the state's numbers.",
    )
    for row in _rows():
        table.add(row.title, *(_cell(row, name, 1 if quick else SIX[name].seeds) for name in names))
    return table


def _cell(row: Row, name: str, seeds: int) -> Tally:
    tally = Tally()
    for seed in range(seeds):
        tanh = six(name, seed, row.dtype)
        counted = Counted(tanh.fn())
        with torch.no_grad():
            z, info = row.solve(counted, torch.zeros_like(tanh.x))
        true = tanh.relative_residual(z) <= SLACK[row.dtype] * TOLERANCE
        tally.add(counted.calls, says(info, "rel_lowest", TOLERANCE), true)
    return tally
