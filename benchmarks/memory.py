"""Memory of a solve beyond the state and f's own use, measured."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchdeq.solver
from torch import Tensor

import deqcore
from deqcore import DEQError
from deqcore.testing import installed, states_beyond

from .options import Options
from .report import Table

__all__ = ["INTRO", "never", "run"]

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (4, 65536)
INTRO = (
    f"State {SHAPE} in float32, 1 MiB; f = sin(3 z + x), which takes one state and never gets to a fixed point. Peak "
    "of all that the allocator gave out during a whole call of get_deq's result in eval mode, temporaries inside "
    "operations included, less the state and less the peak of one evaluation of f; in states."
)
LIMITS: dict[str, Callable[[int], int]] = {"anderson": lambda m: 2 * m + 2, "broyden": lambda m: 2 * m + 4}
STEPS = (10, 50, 200)
MEMORIES = (5, 10, 20)
#: For the cross-check: 64 MiB a state, so that all else is small beside it.
HUGE = (8, 1 << 21)
#: VmHWM is this process's own; getrusage's peak is inherited from the one that started it.
RSS = """
import torch
from benchmarks import memory
torch.set_num_threads(1)
solve, f, z0 = memory.case({options!r}, memory.HUGE)
before = memory.resident("VmRSS")
solve()
print((memory.resident("VmHWM") - before) / z0.nbytes)
"""


def resident(key: str) -> int:
    """Bytes that this process holds (VmRSS), or the most that it ever held (VmHWM); Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{key}:")[2].split()[0])


def never(
    shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """f, which needs no memory but that of its result, and z0."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float32).to(dtype)
    return lambda z: z.mul(3.0).add_(x).sin_(), torch.zeros(shape, dtype=dtype)


def case(
    options: dict[str, Any], shape: tuple[int, ...] = SHAPE
) -> tuple[Callable[[], Any], Callable[..., Any], Tensor]:
    """A solve that makes all its steps, after a short one like it; f and z0."""
    f, z0 = never(shape)
    settings = {"tol": 1e-12, "divergence_factor": math.inf, **options}
    torch.set_grad_enabled(False)
    short, whole = (
        deqcore.get_deq(solver={**settings, "max_iter": steps}, on_failure="ignore").eval()
        for steps in (1, options["max_iter"])
    )
    short(f, z0)
    return partial(whole, f, z0), f, z0


def run(options: Options) -> list[Table]:
    """The tables; `quick` takes one step limit and leaves the cross-check out."""
    steps = STEPS[1:2] if options.quick else STEPS
    with torch.no_grad():
        tables = [_limits(steps), _all(steps)]
    return tables if options.quick else [*tables, _cross_check()]


def _limits(steps: tuple[int, ...]) -> Table:
    table = Table(
        "States beyond the state, by memory and max_iter",
        ("solver", "memory", *(f"max_iter {n}" for n in steps), "at most", "ok"),
    )
    for name, limit in LIMITS.items():
        for memory in MEMORIES:
            found = [_ours({"name": name, "memory": memory, "max_iter": n}) for n in steps]
            ok = max(found) <= limit(memory) + 0.1  # Gram matrices and residuals
            table.add(name, memory, *(f"{n:.1f}" for n in found), limit(memory), "yes" if ok else "NO")
    return table


def _all(steps: tuple[int, ...]) -> Table:
    table = Table(
        "Default settings",
        ("solver", *(f"max_iter {n}" for n in steps)),
        notes="TorchDEQ: solver functions. Solvers by Newton's method differentiate f, whose tape is counted here.",
    )
    for name in ("fixed_point_iter", "anderson", "broyden"):
        table.add(f"TorchDEQ {name}", *(f"{_theirs(name, n):.1f}" for n in steps))
    for name in installed("solvers"):
        try:
            table.add(f"**{name}**", *(f"{_ours({'name': name, 'max_iter': n}):.1f}" for n in steps))
        except DEQError as error:
            table.add(f"**{name}**", f"refused: {type(error).__name__}", *[""] * (len(steps) - 1))
    return table


def _ours(options: dict[str, Any]) -> float:
    solve, f, z0 = case(options)
    return states_beyond(solve, lambda: f(z0), z0)


def _theirs(name: str, steps: int) -> float:
    f, z0 = never()
    solver = torchdeq.solver.get_solver(name)
    solver(f, z0, max_iter=3, tol=1e-12)
    return states_beyond(lambda: solver(f, z0, max_iter=steps, tol=1e-12), lambda: f(z0), z0)


def _cross_check() -> Table:
    """The allocator's word against the operating system's."""
    table = Table(
        "Cross-check: peak resident memory of a process",
        ("solver", "by the allocator", "by the process"),
        notes=f"State {HUGE}, 64 MiB; 12 steps; the process's peak over what it held before, in states, less the "
        "state and one for f. Blocks of this size are the system's own, which takes them back at once.",
    )
    for options in (
        {"name": "fixed_point_iter", "max_iter": 12},
        {"name": "anderson", "memory": 5, "max_iter": 12},
        {"name": "broyden", "memory": 5, "max_iter": 12},
    ):
        solve, f, z0 = case(options, HUGE)
        found = states_beyond(solve, lambda f=f, z0=z0: f(z0), z0)
        code = RSS.format(options=options)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the measuring process failed:\n{done.stderr}")
        title = options["name"] + (f", memory {options['memory']}" if "memory" in options else "")
        table.add(title, f"{found:.1f}", f"{float(done.stdout) - 2:.1f}")
    return table
