"""Solvers of jaxopt and optimistix, stepped one by one on the same maps, a sample a lane of vmap."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .maps import TanhMap

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # jaxopt says at import that nobody maintains it
    import jax  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

__all__ = ["solve"]

#: step(z, state, x, w) -> (z, state), and the state before the first; batched.
Stepper = tuple[Callable[..., Any], Callable[..., Any]]


class _Count:
    """Executions of f, told by the device."""

    def __init__(self) -> None:
        self.calls = 0

    def add(self) -> None:
        self.calls += 1


COUNT = _Count()
#: Compiled steppers by name and dtype.
MADE: dict[tuple[str, torch.dtype], Stepper] = {}


def _f(z: Any, x: Any, w: Any) -> Any:
    jax.debug.callback(COUNT.add)
    return jnp.tanh(w @ z + x)


def _quiet(z: Any, x: Any, w: Any) -> Any:
    return jnp.tanh(z @ w.T + x)


def _jaxopt(name: str) -> Stepper:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jaxopt  # pyright: ignore[reportMissingImports]

    if name.endswith("anderson"):
        solver = jaxopt.AndersonAcceleration(_f, tol=0.0, implicit_diff=False)
    else:  # it keeps as many pairs as it may make steps, by default 500
        solver = jaxopt.Broyden(lambda z, x, w: _f(z, x, w) - z, tol=0.0, gamma=-1.0, implicit_diff=False)

    def init(z: Any, x: Any, w: Any) -> Any:
        return solver.init_state(z, x, w)

    def step(z: Any, state: Any, x: Any, w: Any) -> Any:
        return tuple(solver.update(z, state, x, w))

    lanes = (0, 0, 0, None)
    return jax.jit(jax.vmap(init, lanes[1:])), jax.jit(jax.vmap(step, lanes))


def _optimistix(name: str) -> Stepper:
    import equinox as eqx  # pyright: ignore[reportMissingImports]
    import optimistix as optx  # pyright: ignore[reportMissingImports]

    kinds = {"point": optx.FixedPointIteration, "newton": optx.Newton, "dogleg": optx.Dogleg}
    solver = kinds[name.split()[-1]](rtol=1e-30, atol=1e-30)
    plain = name.endswith("point")

    def fn(z: Any, args: Any) -> Any:
        fz = _f(z, *args)
        return (fz if plain else fz - z), None

    def init(z: Any, x: Any, w: Any) -> Any:
        struct = jax.ShapeDtypeStruct(z.shape, z.dtype)
        return solver.init(fn, z, (x, w), {}, struct, None, frozenset())

    def step(z: Any, state: Any, x: Any, w: Any) -> Any:
        z, state, _ = solver.step(fn, z, (x, w), {}, state, frozenset())
        return z, state

    lanes = (0, eqx.if_array(0), 0, None)
    first = eqx.filter_vmap(init, in_axes=(0, 0, None))
    return eqx.filter_jit(first), eqx.filter_jit(eqx.filter_vmap(step, in_axes=lanes))


def solve(name: str, tanh: TanhMap, tolerance: float, most: int) -> int | None:
    """Evaluations, and d products with J a step where it builds J, until every sample has been within `tolerance`."""
    with jax.enable_x64(tanh.x.dtype is torch.float64):
        return _solve(name, tanh, tolerance, most)


def _solve(name: str, tanh: TanhMap, tolerance: float, most: int) -> int | None:
    key = name, tanh.x.dtype
    if key not in MADE:
        MADE[key] = _jaxopt(name) if name.startswith("jaxopt") else _optimistix(name)
    init, step = MADE[key]
    x, w = (jnp.asarray(t.numpy()) for t in (tanh.x, tanh.weight))
    products = 0 if name.endswith(("anderson", "broyden", "point")) else x.shape[1]
    z, lowest = jnp.zeros_like(x), np.full(len(x), np.inf)
    COUNT.calls = 0
    state, spent = init(z, x, w), 0
    while COUNT.calls + spent < most:
        fz = _quiet(z, x, w)
        relative = np.asarray(jnp.linalg.norm(fz - z, axis=1) / jnp.linalg.norm(fz, axis=1))
        lowest = np.fmin(lowest, relative)
        jax.effects_barrier()
        if (lowest <= tolerance).all():
            return COUNT.calls + spent
        if not np.isfinite(np.asarray(z)).any():
            return None
        z, state = step(z, state, x, w)
        spent += products
    return None
