"""Solvers by name, as functions and for registration (TorchDEQ's ``torchdeq.solver``)."""

from __future__ import annotations

from typing import Any

from .errors import UnknownPluginError
from .functions import FunctionSolver, register_solver, solver_function
from .registry import registry
from .solution import from_final_step as solver_stat_from_final_step

__all__ = ["get_solver", "register_solver", "solver_stat_from_final_step"]


def get_solver(key: str) -> Any:
    """The solver `key` as a function of TorchDEQ's signature,
    ``solver(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, **options)``.

    Args:
        key: any installed or registered solver's name.

    Returns:
        the function; it returns (z, states at the steps in `indexing`, info). A function that was registered with
        :func:`register_solver` is returned as it is.

    Raises:
        UnknownPluginError: nothing has that name.

    Example:
        >>> import torch
        >>> z, _, info = get_solver("anderson")(torch.cos, torch.zeros(1), tol=1e-6)
        >>> round(z.item(), 4)
        0.7391
    """
    solver = registry.get("solvers", key)
    return solver.function if issubclass(solver, FunctionSolver) else solver_function(key)


def __getattr__(name: str) -> Any:
    """``anderson_solver``, ``broyden_solver``, ``fixed_point_iter`` and the like, as TorchDEQ's module has them."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return get_solver(name.removesuffix("_solver"))
    except UnknownPluginError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
