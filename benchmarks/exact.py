"""Problems whose answer is known: evaluations of f and error, by every solver and by torchdeq's."""

from __future__ import annotations

from typing import Any

import torch
import torchdeq.solver

import deqcore
from deqcore import DEQError, Status
from deqcore.testing import ExactProblem, exact_problems, installed

from .maps import Counted
from .report import Table

__all__ = ["cell", "table"]

TOLERANCE = 1e-12
MOST = 2000
ERROR = 1e-9
THEIRS = ("fixed_point_iter", "anderson", "broyden")
#: torchdeq's Broyden keeps two states a step, all allocated at the start.
MOST_BROYDEN = 400


def table() -> Table:
    """A row a solver, a column a problem."""
    problems = exact_problems()
    result = Table(
        "Problems with exact answers, relative residual 1e-12",
        ("solver", *(problem.name for problem in problems)),
        notes=f"float64, default settings, at most {MOST} steps (torchdeq's broyden: {MOST_BROYDEN}). Evaluations of f "
        f"and products with J until the end, where the error is at most {ERROR:g}; else how it ended. Bold: here.",
    )
    for name in THEIRS:
        result.add(f"TorchDEQ {name}", *(_theirs(name, problem) for problem in problems))
    for name in installed("solvers"):
        result.add(f"**{name}**", *(cell(name, problem) for problem in problems))
    return result


def cell(name: str, problem: ExactProblem) -> str:
    """What the solver `name` does on a problem: evaluations and products, or the status it ends with."""
    counted = Counted(problem.fn)
    settings: dict[str, Any] = {"name": name, "max_iter": MOST, "tol": TOLERANCE, "stop_mode": "rel"}
    try:
        deq = deqcore.get_deq(solver=settings, batch_dims=problem.batch_dims, on_failure="ignore").eval()
        with torch.no_grad():
            (z,), info = deq(counted, problem.z0, args=problem.args)
    except DEQError:
        return "another f"
    if problem.error(z) <= ERROR:
        return str(max(counted.calls, info["nfe"] + info["nvjp"] + info["njvp"]))
    worst = max(info.counts(), key=lambda status: (not status.ok, int(status)))
    return "WRONG" if worst is Status.CONVERGED else worst.name.lower()


def _theirs(name: str, problem: ExactProblem) -> str:
    if not problem.batched or problem.z0.is_complex():
        return "-"
    counted = Counted(lambda z: problem.fn(z, *problem.args))
    most = MOST_BROYDEN if name == "broyden" else MOST
    solver = torchdeq.solver.get_solver(name)
    z = solver(counted, problem.z0, max_iter=most, tol=TOLERANCE, stop_mode="rel")[0]
    error = problem.error(z)
    return str(counted.calls) if error <= ERROR else f"error {error:.0e}"
