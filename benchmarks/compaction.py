"""Sample evaluations where one sample of a batch needs many more steps than the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchdeq.solver
from torch import Tensor

import deqcore
from deqcore import DEQConfig, DEQError
from deqcore.testing import installed

from .evaluations import OTHER_FORM
from .options import Options
from .report import Table

__all__ = ["INTRO", "run"]

BATCH, D, TOLERANCE, MOST = 64, 64, 1e-6, 2000
MOST_BROYDEN = 300
FAST, SLOW = 0.1, 0.99
LIMIT = 1.1
INTRO = (
    f"f = tanh(s (z @ W.T) + x), s = {SLOW} for one sample of {BATCH} and {FAST} for the others, W Gaussian of "
    f"spectral radius 1, d {D}, x = .1 N(0, 1), z0 = 0, tolerance {TOLERANCE:g} relative, seed 0. A sample evaluation "
    "is one row of one call of f, products in forward mode included. Alone: the sum of what each sample takes by "
    "itself."
)


class Rows:
    """f, and how many rows it was called with altogether."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self.fn = fn
        self.count = 0

    def __call__(self, z: Tensor, *args: Tensor) -> Tensor:
        self.count += z.shape[0]
        return self.fn(z, *args)


class Batch(NamedTuple):
    """The map, which takes one row of each of `args` for a row of the state."""

    fn: Callable[..., Tensor]
    z0: Tensor
    args: tuple[Tensor, ...]

    def alone(self, k: int) -> Batch:
        return Batch(self.fn, self.z0[k : k + 1], tuple(arg[k : k + 1] for arg in self.args))


#: (batch, compact) -> sample evaluations, None where it failed.
Count = Callable[[Batch, bool], int | None]


def _batch(dtype: torch.dtype, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(D, D, generator=g, dtype=torch.float64)
    w = (w / torch.linalg.eigvals(w).abs().max()).to(dtype)
    x = (0.1 * torch.randn(BATCH, D, generator=g, dtype=torch.float64)).to(dtype)
    scale = torch.full((BATCH, 1), FAST, dtype=dtype)
    scale[BATCH // 3] = SLOW
    return Batch(lambda z, scale, x: torch.tanh(scale * (z @ w.mT) + x), torch.zeros_like(x), (scale, x))


def _ours(name: str) -> Count:
    settings = {"name": name, "tol": TOLERANCE, "stop_mode": "rel", "max_iter": MOST}

    def count(batch: Batch, compact: bool) -> int | None:
        given: dict[str, Any] = {"compact": True} if compact else {}
        deq = deqcore.get_deq(solver=settings, on_failure="ignore", **given).eval()
        rows = Rows(batch.fn)
        with torch.no_grad():
            _, info = deq(rows, batch.z0, args=batch.args)
        return rows.count if all(status.ok for status in info.counts()) else None

    return count


def _theirs(name: str) -> Count:
    solver = torchdeq.solver.get_solver(name)
    most = MOST_BROYDEN if name == "broyden" else MOST

    def count(batch: Batch, compact: bool) -> int | None:
        rows = Rows(lambda z: batch.fn(z, *batch.args))
        with torch.no_grad():
            info = solver(rows, batch.z0, max_iter=most, tol=TOLERANCE, stop_mode="rel")[2]
        return rows.count if float(info["rel_lowest"].max()) < TOLERANCE else None

    return count


def run(options: Options) -> list[Table]:
    """The table; `quick` leaves float32 out."""
    table = Table(
        "Sample evaluations with one slow sample in 64",
        ("solver", "dtype", "alone", "together", "over alone", "compact=True", "over alone", "at most", "ok"),
        notes="-: TorchDEQ has no such thing; failed: some sample missed the tolerance.",
    )
    dtypes = {"float64": torch.float64} if options.quick else {"float64": torch.float64, "float32": torch.float32}
    for label, dtype in dtypes.items():
        batch = _batch(dtype)
        for name in ("fixed_point_iter", "anderson", "broyden"):
            alone, together = _alone(_theirs(name), batch), _theirs(name)(batch, False)
            table.add(f"TorchDEQ {name}", label, _cell(alone), *_pair(together, alone), "-", "", "", "")
        for name in installed("solvers"):
            if name not in OTHER_FORM:
                table.add(f"**{name}**", label, *_row(name, batch))
    return [table]


def _row(name: str, batch: Batch) -> list[str]:
    count = _ours(name)
    try:
        alone, together = _alone(count, batch), count(batch, False)
        if "compact" not in DEQConfig.model_fields:
            return [_cell(alone), *_pair(together, alone), "no such setting", "", str(LIMIT), "NO"]
        compact = count(batch, True)
    except DEQError as error:
        return [f"refused: {type(error).__name__}", *[""] * 6]
    ok = alone is not None and compact is not None and compact <= LIMIT * alone
    return [_cell(alone), *_pair(together, alone), *_pair(compact, alone), str(LIMIT), "yes" if ok else "NO"]


def _alone(count: Count, batch: Batch) -> int | None:
    counts = [count(batch.alone(k), False) for k in range(BATCH)]
    return None if None in counts else sum(n for n in counts if n is not None)


def _cell(count: int | None) -> str:
    return "failed" if count is None else str(count)


def _pair(count: int | None, alone: int | None) -> tuple[str, str]:
    return _cell(count), f"{count / alone:.2f}" if count and alone else ""
