"""Vector-Jacobian products of the default backward, called as users call it, beside TorchDEQ's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchdeq
from torch import Tensor

import deqcore
from deqcore.solver import get_solver

from .gradients_count import Counter
from .maps import TanhMap, six
from .options import Options
from .report import Table
from .tally import Tally

__all__ = ["tables"]

TOLERANCE = 1e-6
#: Of rounding, in the residual that is computed afterwards.
SLACK = 1.001
MOST = 2000
#: What issue and docs promise of the default.
LIMITS = {"G64a": 24, "G64b": 48, "S64": 38, "N64": 16, "C256": 32, "G512": 105}

#: Fewer can't be had of any Krylov method, but for the last one, which confirms what its recurrence says.
FULL = "implicit, gmres that keeps all directions"

#: (f, z*) -> the state with its gradient, z* being where the solve starts and ends.
Solve = Callable[[Callable[..., Tensor], Tensor], Tensor]


def tables(options: Options) -> list[Table]:
    """Products by map, and whether the default's limits hold."""
    names = options.maps()
    table = Table(
        "Products with J^T of the default backward, to 1e-6",
        ("backward", *names),
        notes="A whole call of get_deq's result and `.backward()`, float64, from z* (max_iter=0, no forward solve), "
        "cotangents N(0, 1) of norm 1; worst of 32 samples, lowest-highest of the seeds. Counted inside f, by an "
        "identity whose backward counts; the pass to the parameters, which every method makes once, left out. The "
        "solution u of u = J^T u + g is read off the gradient in x, u (1 - z*^2), and its residual checked by J's "
        f"closed form. TorchDEQ with b_max_iter={MOST} in place of its 40, and a tolerance that is absolute. "
        "n F: of n seeds it ended without 1e-6. Other solvers, on the bare linear system: evaluations.md.",
    )
    most: dict[str, int] = {}
    for title, solve in (("TorchDEQ, ift", _theirs), (FULL, _full), ("**deqcore**, implicit", _ours)):
        cells = {name: _tally(name, solve, options.of(name)) for name in names}
        table.add(title, *cells.values())
        most = {name: max(tally.counts) for name, tally in cells.items() if tally.whole}
    table.add("at most", *(LIMITS[name] for name in names))
    table.add("ok", *("yes" if most.get(name, MOST) <= LIMITS[name] else "NO" for name in names))
    return [table]


def _full(f: Callable[..., Tensor], z: Tensor) -> Tensor:
    solver = {"name": "gmres", "restart": MOST, "max_iter": MOST}
    deq = deqcore.get_deq(gradient={"name": "implicit", "solver": solver}, on_failure="ignore")
    return deq(f, z, solver_kwargs={"max_iter": 0})[0][-1]


def _ours(f: Callable[..., Tensor], z: Tensor) -> Tensor:
    return deqcore.get_deq(gradient="implicit", on_failure="ignore")(f, z, solver_kwargs={"max_iter": 0})[0][-1]


def _theirs(f: Callable[..., Tensor], z: Tensor) -> Tensor:
    deq: Any = torchdeq.get_deq(ift=True, b_max_iter=MOST)
    return deq(f, z, solver_kwargs={"f_max_iter": 0})[0][-1]


def _tally(name: str, solve: Solve, seeds: tuple[int, ...]) -> Tally:
    tally = Tally()
    for seed in seeds:
        products, residual = _backward(name, seed, solve)
        tally.add(products, "reached" if residual <= SLACK * TOLERANCE else "failed", True)
    return tally


def _backward(name: str, seed: int, solve: Solve) -> tuple[int, float]:
    """Products with J^T of one backward, and the worst sample's residual of what it found."""
    tanh = six(name, seed)
    z, _, _ = get_solver("broyden")(tanh.fn(), torch.zeros_like(tanh.x), max_iter=MOST, tol=1e-13, stop_mode="rel")
    generator = torch.Generator().manual_seed(100 + seed)
    g = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    g = g / g.norm(dim=1, keepdim=True)
    x = tanh.x.clone().requires_grad_()
    counter = Counter(TanhMap(tanh.weight, x).fn())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (solve(counter, z) * g).sum().backward()
    slope = 1 - torch.tanh(z @ tanh.weight.T + tanh.x).square()
    u = torch.zeros_like(x) if x.grad is None else x.grad / slope
    residual = (tanh.transposed_product(z, u) + g - u).norm(dim=1)
    return counter.passes - 1, float(residual.max())
