"""Wall time of a training step's forward and backward at equal accuracy of its gradient, beside other libraries."""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from collections.abc import Iterator

from .gradients_search import KEPT, LIBRARIES, Step, counted, search
from .gradients_training import BATCH, Training, training
from .options import Options
from .report import Table

__all__ = ["tables"]

LIMIT = 0.5


def tables(options: Options) -> list[Table]:
    """The times, a row a library, a column a problem."""
    sizes = [(d, rho) for d in ((64,) if options.quick else (64, 512)) for rho in (0.9, 0.99)]
    times = Table(
        "Forward and backward of one training step, gradient accurate to 1e-4",
        (
            "problem",
            "library",
            "solved by",
            "forward",
            "backward",
            "ms",
            "over TorchDEQ",
            "error",
            "evaluations, passes",
        ),
        notes=f"z = tanh(W z + U x), batch {BATCH}, float32, loss |z - y|^2 / 2 summed over the batch. The error "
        "is that of the gradient to W and U together, relative, against a dense solve in float64. Each library's "
        "fastest configuration that is accurate enough, out of a grid searched in the same way: each forward solver "
        "with the loosest tolerance that does beside an exact backward, each backward solver likewise, the fastest "
        f"{KEPT} of both combined at these and at the next tighter levels. *by tolerance*: solvers that stop by "
        "themselves. *by count*: also plain loops and unrolled steps whose number was found beforehand, for this very "
        "W and x. TorchDEQ's step limits are no higher than needed (its buffers grow with them), and its Anderson may "
        "have a ridge that its own configuration can't set. jax: the whole step under jit, the batch as one system, "
        f"compiling not counted. Wall time, median of interleaved rounds, one process. At most {LIMIT} is asked for.",
    )
    for d, rho in sizes:
        _measure(training(d, rho), times, rounds=3 if options.quick else 21)
    return [times]


def _measure(task: Training, table: Table, rounds: int) -> None:
    rows: dict[tuple[str, str], tuple[Step, list[str]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in LIBRARIES:
            found = search(task, library)
            for how, one in zip(("by tolerance", "by count"), found, strict=False):
                calls, passes, _ = counted(task, library, *one.halves)
                cells = [*map(str, one.halves), f"{one.error:.1e}", f"{calls}, {passes}"]
                rows[library.title, how] = one.step, cells
        for title, step, cells in _jax(task):
            rows[title, "by tolerance"] = step, cells
        spent: dict[tuple[str, str], list[float]] = {key: [] for key in rows}
        for _ in range(rounds):
            for key, (step, _) in rows.items():
                start = time.perf_counter()
                step()
                spent[key].append(time.perf_counter() - start)
    for (title, how), (_, cells) in rows.items():
        ratios = [mine / theirs for mine, theirs in zip(spent[title, how], spent["TorchDEQ", how], strict=True)]
        middle = f"{1e3 * statistics.median(spent[title, how]):.1f}"
        table.add(task.title, title, how, *cells[:2], middle, f"{statistics.median(ratios):.2f}", *cells[2:])


def _jax(task: Training) -> Iterator[tuple[str, Step, list[str]]]:
    """The fastest of each of these libraries that is accurate enough, where it is installed."""
    for package in ("jaxopt", "optimistix"):
        if importlib.util.find_spec(package) is not None:
            from . import gradients_jax

            found = gradients_jax.fastest(package, task)
            if found is not None:
                yield f"{package}, jit", found.step, [found.forward, found.backward, f"{found.error:.1e}", ""]
