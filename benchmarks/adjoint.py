"""Products with J^T until the backward is at 1e-6, and their time, for the solvers that could be the default."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchdeq.solver
from torch import Tensor

from deqcore import DEQError, LinearProblem, Problem, StateSpec, iterate, registry
from deqcore.solver import get_solver
from deqcore.testing import installed

from .maps import Counted, TanhMap, six
from .options import Options
from .report import Table
from .tally import LEGEND, Tally, says

__all__ = ["tables"]

TOLERANCE = 1e-6
MOST = 2000
MOST_BROYDEN = 300
SLACK = {torch.float64: 1.001, torch.float32: 2.0}

#: title of a row -> the fixed-point solver as implicit differentiation would be given it; linear ones come by name.
CANDIDATES: dict[str, dict[str, Any]] = {
    "fixed_point_iter": {"name": "fixed_point_iter"},
    **{f"anderson, memory {memory}": {"name": "anderson", "memory": memory} for memory in (10, 20, 50)},
    **{f"broyden, memory {memory}": {"name": "broyden", "memory": memory} for memory in (30, 50)},
}

Product = Callable[[Tensor], Tensor]


class Row(NamedTuple):
    """A way to solve u = J^T u + g, from (product, g) to (u, info), and the dtype to do it in."""

    solve: Callable[[Product, Tensor], tuple[Tensor, Any]]
    dtype: torch.dtype = torch.float64


class Point(NamedTuple):
    """Where a backward starts: the map, its equilibrium, u -> J^T u there as autograd gives it, and cotangents."""

    tanh: TanhMap
    z: Tensor
    product: Product
    cotangent: Tensor


def tables(options: Options) -> list[Table]:
    """Products and milliseconds, a row a candidate."""
    rows, names = _rows(), options.maps()
    first = "solver of u = J^T u + g"
    products = Table(
        "Products with J^T until the backward's relative residual is 1e-6",
        (first, *names),
        notes="J at the equilibrium, g = N(0, 1), a norm of 1 for each sample; worst sample. Counted by wrapping the "
        "product, checked in float64 by the closed form of J. Lowest-highest of the seeds, at most "
        f"{MOST} steps (torchdeq's broyden: {MOST_BROYDEN}). {LEGEND}",
    )
    seconds = Table(
        "Time of these solves, milliseconds",
        (first, *names),
        notes="The thread's time on its core, median of interleaved rounds and seeds; -: not solved for every seed. A "
        "product is cheap here: with a larger f, its number counts for more.",
    )
    columns = [_measure(name, rows, options.of(name), 1 if options.quick else 3) for name in names]
    for title in rows:
        products.add(title, *(tallies[title] for tallies, _ in columns))
        seconds.add(title, *(_milliseconds(tallies[title], spent[title]) for tallies, spent in columns))
    return [products, seconds]


def _milliseconds(tally: Tally, spent: list[float]) -> str:
    return f"{statistics.median(spent) * 1e3:.1f}" if tally.whole else "-"


def _rows() -> dict[str, Row]:
    rows = {f"TorchDEQ {name}": Row(_theirs(name)) for name in ("fixed_point_iter", "anderson", "broyden")}
    ours = {f"{name} (linear)": {"name": name} for name in installed("linear_solvers")} | CANDIDATES
    for dtype, label in ((torch.float64, ""), (torch.float32, ", float32")):
        rows |= {f"**{title}**{label}": Row(_ours(options), dtype) for title, options in ours.items()}
    return rows


def _ours(options: dict[str, Any]) -> Callable[[Product, Tensor], tuple[Tensor, Any]]:
    solver = registry.create("any_solvers", {**options, "max_iter": MOST, "tol": TOLERANCE})

    def solve(product: Product, cotangent: Tensor) -> tuple[Tensor, Any]:
        problem = LinearProblem(product, None, cotangent)
        # As implicit differentiation does: from u = 0, where J^T u + g is known to be g.
        solution = iterate(
            solver, problem, torch.zeros_like(cotangent), cotangent, scale=cotangent.norm(dim=1)
        ).solution
        return solution["z"], solution

    return solve


def _theirs(name: str) -> Callable[[Product, Tensor], tuple[Tensor, Any]]:
    solver = torchdeq.solver.get_solver(name)
    most = MOST_BROYDEN if name == "broyden" else MOST

    def solve(product: Product, cotangent: Tensor) -> tuple[Tensor, Any]:
        def f(u: Tensor) -> Tensor:
            return product(u) + cotangent

        u, _, info = solver(f, torch.zeros_like(cotangent), max_iter=most, tol=TOLERANCE, stop_mode="abs")
        return u, info

    return solve


def _measure(
    name: str, rows: dict[str, Row], seeds: tuple[int, ...], rounds: int
) -> tuple[dict[str, Tally], dict[str, list[float]]]:
    """Products and seconds of every row on one map."""
    tallies = {title: Tally() for title in rows}
    spent: dict[str, list[float]] = {title: [] for title in rows}
    for seed in seeds:
        points = {dtype: _at_equilibrium(name, seed, dtype) for dtype in (torch.float64, torch.float32)}
        for repeat in range(rounds):
            for title, row in rows.items():
                if repeat and not tallies[title].whole:
                    continue
                point = points[row.dtype]
                counted = Counted(point.product)
                start = time.thread_time()
                try:
                    with torch.no_grad():
                        u, info = row.solve(counted, point.cotangent)
                except (DEQError, NotImplementedError):  # it needs what this problem doesn't have
                    tallies[title].add(0, "refused", True)
                    continue
                spent[title].append(time.thread_time() - start)
                if not repeat:
                    true = _residual(point, u) <= SLACK[row.dtype] * TOLERANCE
                    tallies[title].add(counted.calls, says(info, "abs_lowest", TOLERANCE), true)
    return tallies, spent


def _residual(point: Point, u: Tensor) -> float:
    """Worst sample's ||J^T u + g - u||, in float64."""
    residual = point.tanh.transposed_product(point.z, u) + point.cotangent.double() - u.double()
    return float(residual.norm(dim=1).max())


def _at_equilibrium(name: str, seed: int, dtype: torch.dtype) -> Point:
    """The point of one map's backward, solved to rounding error in float64."""
    exact = six(name, seed)
    z, _, _ = get_solver("broyden")(exact.fn(), torch.zeros_like(exact.x), max_iter=MOST, tol=1e-13, stop_mode="rel")
    tanh = six(name, seed, dtype)
    z = z.to(dtype)
    generator = torch.Generator().manual_seed(100 + seed)
    g = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    product = Problem.of(tanh.fn(), StateSpec(z)).linearize(z).vjp
    return Point(tanh, z, product, (g / g.norm(dim=1, keepdim=True)).to(dtype))
