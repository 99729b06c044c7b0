"""What a user could pick instead, each as a function that says after how many evaluations it was there."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .maps import TanhMap

__all__ = ["PEERS", "Peer", "Watched"]

MOST = 2000


class Reached(Exception):
    """Every sample has been within the tolerance at some evaluation."""


class Spent(Exception):
    """As many evaluations were made as there may be."""


class Watched:
    """f, counted, which ends the run of whoever calls it once every sample has been within the tolerance."""

    def __init__(self, fn: Callable[[Tensor], Tensor], tolerance: float, most: int) -> None:
        self.fn = fn
        self.tolerance = tolerance
        self.most = most
        self.calls = 0
        self.lowest: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self.calls == self.most:
            raise Spent
        self.calls += 1
        fz = self.fn(z)
        relative = (fz - z).norm(dim=-1) / fz.norm(dim=-1)
        self.lowest = relative if self.lowest is None else torch.fmin(self.lowest, relative)
        if bool((self.lowest <= self.tolerance).all()):
            raise Reached
        return fz

    def run(self, solve: Callable[[], Any], failures: tuple[type[Exception], ...]) -> int | None:
        """Evaluations until the tolerance; None where `solve` did not reach it, which it may say by `failures`."""
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                solve()
        except Reached:
            return self.calls
        except (Spent, *failures):
            pass
        return None


class Peer(NamedTuple):
    """A solver of another library.

    Attributes:
        title: of its row.
        package: what must be installed.
        solve: (map, tolerance) -> evaluations until the worst sample is within it, None where it never is.
        dtypes: what it computes in.
    """

    title: str
    package: str
    solve: Callable[[TanhMap, float], int | None]
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def _xitorch(tanh: TanhMap, tolerance: float) -> int | None:
    """anderson_acc with its defaults (5 states, an absolute ridge of 1e-4); it works sample by sample."""
    from xitorch.optimize import equilibrium  # pyright: ignore[reportMissingImports]

    watched = Watched(tanh.fn(), tolerance, MOST)
    never = dict.fromkeys(("f_tol", "f_rtol", "x_tol", "x_rtol"), 1e-30)

    def solve() -> None:  # it takes plain functions only
        equilibrium(lambda z: watched(z), torch.zeros_like(tanh.x), method="anderson_acc", maxiter=MOST, **never)

    return watched.run(solve, (torch.linalg.LinAlgError,))  # pyright: ignore[reportPrivateImportUsage]


def _scipy(method: str, tanh: TanhMap, tolerance: float) -> int | None:
    """The worst of the samples, each solved by itself; an evaluation for a finite difference is one."""
    import scipy.optimize

    solver, worst = getattr(scipy.optimize, method), 0
    failures = (scipy.optimize.NoConvergence, ValueError, ArithmeticError, np.linalg.LinAlgError)
    for x in tanh.x:
        watched = Watched(TanhMap(tanh.weight, x).fn(), tolerance, MOST)

        def residual(z: np.ndarray, f: Watched = watched) -> np.ndarray:
            state = torch.from_numpy(z)
            return (f(state) - state).numpy()

        found = watched.run(lambda: solver(residual, np.zeros(len(x)), f_tol=1e-30, maxiter=MOST), failures)  # noqa: B023
        if found is None:
            return None
        worst = max(worst, found)
    return worst


def _jax(name: str, tanh: TanhMap, tolerance: float) -> int | None:
    from . import peers_jax

    return peers_jax.solve(name, tanh, tolerance, MOST)


PEERS = (
    Peer("xitorch anderson_acc", "xitorch", _xitorch),
    Peer("jaxopt AndersonAcceleration", "jaxopt", partial(_jax, "jaxopt anderson")),
    Peer("jaxopt Broyden, gamma -1", "jaxopt", partial(_jax, "jaxopt broyden")),
    Peer("optimistix FixedPointIteration", "optimistix", partial(_jax, "optimistix fixed point")),
    Peer("optimistix Newton, d products a step", "optimistix", partial(_jax, "optimistix newton")),
    Peer("optimistix Dogleg, d products a step", "optimistix", partial(_jax, "optimistix dogleg")),
    Peer("scipy newton_krylov", "scipy", partial(_scipy, "newton_krylov"), (torch.float64,)),
    Peer("scipy anderson", "scipy", partial(_scipy, "anderson"), (torch.float64,)),
    Peer("scipy broyden1", "scipy", partial(_scipy, "broyden1"), (torch.float64,)),
)
