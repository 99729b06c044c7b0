"""The same training step with jaxopt and optimistix, compiled as a whole."""

from __future__ import annotations

import math
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # jaxopt says at import that nobody maintains it
    import jax  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

from .gradients_training import ACCURACY, MOST, Training

__all__ = ["Fastest", "fastest"]

#: Relative tolerances of both solves; every one is compiled anew.
LEVELS = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5)

Loss = Callable[[Any, Any], Any]


class Fastest(NamedTuple):
    """A step, called for its time only, what it is made of, and the relative error of its gradient."""

    step: Callable[[], Any]
    forward: str
    backward: str
    error: float


def _f(z: Any, args: Any) -> Any:
    w, injected = args
    return jnp.tanh(z @ w.T + injected)


def _jaxopt(forward: str, backward: str, level: float, size: float) -> Callable[[Any, Any], Any]:
    """(z0, args) -> z. jaxopt's tolerance of the forward is absolute: `size` is that of the state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jaxopt  # pyright: ignore[reportMissingImports]

    kinds = {
        "FixedPointIteration": jaxopt.FixedPointIteration,
        "AndersonAcceleration": partial(jaxopt.AndersonAcceleration, history_size=5, ridge=1e-7),
    }
    linear = partial(getattr(jaxopt.linear_solve, f"solve_{backward}"), tol=level, maxiter=MOST)
    solver = kinds[forward](_f, maxiter=MOST, tol=level * size, implicit_diff=True, implicit_diff_solve=linear)
    return lambda z, args: solver.run(z, args).params


def _optimistix(forward: str, backward: str, level: float, size: float) -> Callable[[Any, Any], Any]:
    import lineax as lx  # pyright: ignore[reportMissingImports]
    import optimistix as optx  # pyright: ignore[reportMissingImports]

    adjoint = optx.ImplicitAdjoint(getattr(lx, backward)(rtol=level, atol=0.1 * level))
    solver = getattr(optx, forward)(rtol=level, atol=0.1 * level, norm=optx.two_norm)

    def solve(z: Any, args: Any) -> Any:
        return optx.fixed_point(_f, solver, z, args, adjoint=adjoint, max_steps=MOST, throw=False).value

    return solve


#: What is tried: (forward, backward) by package. optimistix' BiCGStab breaks down on these systems.
TRIED: dict[str, tuple[Callable[..., Any], tuple[tuple[str, str], ...]]] = {
    "jaxopt": (
        _jaxopt,
        (
            ("FixedPointIteration", "normal_cg"),
            ("AndersonAcceleration", "normal_cg"),
            ("AndersonAcceleration", "bicgstab"),
            ("AndersonAcceleration", "gmres"),
        ),
    ),
    "optimistix": (_optimistix, (("FixedPointIteration", "NormalCG"), ("FixedPointIteration", "GMRES"))),
}


def fastest(package: str, task: Training) -> Fastest | None:
    """The fastest of the combinations of `package`, at the loosest level that is accurate enough; None if none is."""
    make, tried = TRIED[package]
    w, u, x, y = (jnp.asarray(t.numpy()) for t in (task.w, task.u, task.x, task.y))
    size = float(task.z.norm())
    found: list[tuple[float, Fastest]] = []
    for forward, backward in tried:
        made: dict[float, tuple[Callable[[], Any], float]] = {}

        def step_at(
            level: float, forward: str = forward, backward: str = backward, made: Any = made
        ) -> tuple[Any, float]:
            if level not in made:
                solve = make(forward, backward, level, size)

                def loss(w: Any, u: Any) -> Any:
                    return 0.5 * ((solve(jnp.zeros_like(y), (w, x @ u.T)) - y) ** 2).sum()

                gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
                made[level] = (lambda: jax.block_until_ready(gradient(w, u))), _error(task, gradient, w, u)
            return made[level]

        at = bisect_left(LEVELS, True, key=lambda level: step_at(level)[1] <= ACCURACY)
        if at < len(LEVELS):
            step, error = step_at(LEVELS[at])
            start = time.process_time()
            step()
            one = Fastest(step, f"{forward} ({LEVELS[at]:g})", f"{backward} ({LEVELS[at]:g})", error)
            found.append((time.process_time() - start, one))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _error(task: Training, gradient: Callable[[Any, Any], Any], w: Any, u: Any) -> float:
    try:
        error = task.error(torch.tensor(np.asarray(part)) for part in gradient(w, u))
    except Exception:  # each library has errors of its own
        return math.inf
    return error if math.isfinite(error) else math.inf
