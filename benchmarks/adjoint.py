"""Products with J^T until the backward's relative residual is 1e-6, and their time, for each solver that could be the default."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchdeq.solver
from torch import Tensor

from deqcore import LinearProblem, Problem, StateSpec, iterate, registry
from deqcore.solver import get_solver

from .maps import SIX, Counted, TanhMap, six
from .report import Table
from .tally import LEGEND, Tally, says

__all__ = ["tables"]

TOLERANCE = 1e-6
MOST = 2000
SLACK = {torch.float64: 1.001, torch.float32: 2.0}

#: name of a row -> what implicit differentiation would be given as its solver
CANDIDATES: dict[str, dict[str, Any]] = {
    "fixed_point_iter": {"name": "fixed_point_iter"},
    **{f"anderson, memory {memory}": {"name": "anderson", "memory": memory} for memory in (10, 20, 50)},
    **{f"broyden, memory {memory}": {"name": "broyden", "memory": memory} for memory in (30, 50)},
}

Adjoint = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Any]]


def _ours(options: dict[str, Any]) -> Adjoint:
    solver = registry.create("solvers", {**options, "max_iter": MOST, "tol": TOLERANCE})

    def solve(product: Callable[[Tensor], Tensor], cotangent: Tensor) -> tuple[Tensor, Any]:
        problem = LinearProblem(product, None, cotangent)
        solution = iterate(solver, problem, cotangent, scale=cotangent.norm(dim=1)).solution
        return solution["z"], solution

    return solve


def _theirs(name: str) -> Adjoint:
    solver = torchdeq.solver.get_solver(name)
    most = 300 if name == "broyden" else MOST

    def solve(product: Callable[[Tensor], Tensor], cotangent: Tensor) -> tuple[Tensor, Any]:
        def f(u: Tensor) -> Tensor:
            return product(u) + cotangent

        return solver(f, torch.zeros_like(cotangent), max_iter=most, tol=TOLERANCE, stop_mode="abs")[::2]

    return solve


def tables(names: list[str], quick: bool) -> list[Table]:
    """Products and milliseconds, a row a candidate."""
    rows: dict[str, tuple[Adjoint, torch.dtype]] = {}
    for name in ("fixed_point_iter", "anderson", "broyden"):
        rows[f"TorchDEQ {name}"] = (_theirs(name), torch.float64)
    for dtype, label in ((torch.float64, ""), (torch.float32, ", float32")):
        rows |= {title + label: (_ours(options), dtype) for title, options in CANDIDATES.items()}
    products = Table(
        "Products with J^T until the backward's relative residual is 1e-6",
        ("solver of u = J^T u + g", *names),
        notes="J at the equilibrium, g = N(0, 1) of unit norm, a row a sample; worst sample. Counted by wrapping the "
        f"product, checked by the closed form of J in float64. Lowest-highest of the seeds, at most {MOST} steps (torchdeq's "
        f"broyden: 300). {LEGEND}",
    )
    seconds = Table(
        "Time of these solves, milliseconds",
        ("solver of u = J^T u + g", *names),
        notes="The thread's time on its core, median over interleaved rounds and seeds; `-`: not solved for every seed.",
    )
    cells: dict[str, list[str]] = {title: [] for title in rows}
    times: dict[str, list[str]] = {title: [] for title in rows}
    for name in names:
        found = _measure(name, rows, 1 if quick else SIX[name].seeds, 1 if quick else 3)
        for title, (count, milliseconds) in found.items():
            cells[title].append(count)
            times[title].append(milliseconds)
    for title in rows:
        products.add(title, *cells[title])
        seconds.add(title, *times[title])
    return [products, seconds]


def _measure(
    name: str, rows: dict[str, tuple[Adjoint, torch.dtype]], seeds: int, rounds: int
) -> dict[str, tuple[str, str]]:
    """Row -> products as text, milliseconds as text, for one map."""
    tallies = {title: Tally() for title in rows}
    spent: dict[str, list[float]] = {title: [] for title in rows}
    for seed in range(seeds):
        points = {dtype: _at_equilibrium(name, seed, dtype) for dtype in (torch.float64, torch.float32)}
        for repeat in range(rounds):
            for title, (solve, dtype) in rows.items():
                if repeat and not tallies[title].whole:
                    continue
                tanh, z, product, g = points[dtype]
                counted = Counted(product)
                start = time.thread_time()
                with torch.no_grad():
                    u, info = solve(counted, g)
                spent[title].append(time.thread_time() - start)
                if not repeat:
                    residual = tanh.transposed_product(z, u) + g.double() - u.double()
                    true = float(residual.norm(dim=1).max()) <= SLACK[dtype] * TOLERANCE
                    tallies[title].add(counted.calls, says(info, "abs_lowest", TOLERANCE), true)
    return {
        title: (str(tally), f"{statistics.median(spent[title]) * 1e3:.1f}" if tally.whole else "-")
        for title, tally in tallies.items()
    }


def _at_equilibrium(
    name: str, seed: int, dtype: torch.dtype
) -> tuple[TanhMap, Tensor, Callable[[Tensor], Tensor], Tensor]:
    """The map, z* of it to rounding error, u -> J^T u by autograd as a backward does it, and the cotangents."""
    exact = six(name, seed)
    z, _, _ = get_solver("broyden")(exact.fn(), torch.zeros_like(exact.x), max_iter=MOST, tol=1e-13, stop_mode="rel")
    tanh = six(name, seed, dtype)
    z = z.to(dtype)
    problem = Problem.of(tanh.fn(), StateSpec(z))
    generator = torch.Generator().manual_seed(100 + seed)
    g = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    return tanh, z, problem.linearize(z).vjp, (g / g.norm(dim=1, keepdim=True)).to(dtype)
