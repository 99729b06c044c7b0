"""Linear systems A u = b, a batch of them, by any linear or fixed-point solver."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, FunctionError, FunctionTypeError, GradientModeError, StateError, StateTypeError
from .frames import caller
from .interfaces import LinearSolver, Solver
from .iterate import iterate
from .problem import HALF_NOISE, LinearProblem
from .registry import registry
from .settings import Settings, SolverSettings
from .solution import OnFailure, Solution
from .state import StateSpec
from .tree import describe

__all__ = ["linear_solve", "tolerance_scale"]

#: What a solve is asked for where nothing else is given: what implicit differentiation asks for.
DEFAULTS: dict[str, Any] = {"max_iter": 200, "tol": 1e-6}

Apply = Callable[[Tensor], Tensor]


def linear_solve(
    matvec: Apply,
    b: Tensor,
    solver: Any = "gmres",
    rmatvec: Apply | None = None,
    u0: Tensor | None = None,
    *,
    on_failure: OnFailure = "warn",
    **settings: Any,
) -> tuple[Tensor, Solution]:
    """Solve A u = b for every sample of a batch.

    Args:
        matvec: u -> A u, on tensors like `b`; linear, and each sample's result from that sample alone.
        b: right-hand sides, shape (B, ...), floating point or complex. Complex ones are solved as pairs of real
            numbers, where any real-linear A will do.
        solver: name of a linear or fixed-point solver, a dict with a name and settings, or a solver itself (one with
            a preconditioner of your own, say). gmres by default: it takes any A and needs the fewest products.
        rmatvec: u -> A^T u (A^H u for complex), for solvers that need it; none of the built-in ones does.
        u0: start, of b's shape; zero by default, which saves a product.
        on_failure: what a sample that misses its tolerance does: "ignore", "warn" or "raise".
        settings: settings of the solver. `tol` (default 1e-6) and `atol` are relative to each sample's ||b||; a sample
            with b = 0 is solved as closely as the most demanding of the others. `max_iter` is 200 by default.

    Returns:
        (u, info): u like `b`, detached, and a :class:`deqcore.Solution` whose ``abs_lowest`` and ``abs_trace`` are
        ||b - A u||, ``rel_lowest`` and ``rel_trace`` the same over ||b||, and ``nfe`` the number of products.

    Where A u = b is solved by a recurrence (gmres, bicgstab, cg), one product more, A b, tells A's size: both sides are
    divided by it, so that rounding errors, which are relative to u, don't drown a residual which is relative to b.

    Raises:
        StateError, StateTypeError: `b` or `u0` is no dense floating point or complex tensor, is empty, holds NaN or
            inf, or `u0` is not like `b`.
        FunctionError, FunctionTypeError: `matvec` is not callable, or does not return what it takes.
        UnknownPluginError, ConfigError and its kin: a solver or setting that doesn't exist, or a wrong value.
        GradientModeError: `b` or `u0` requires grad. The result has no gradient; that of a loss in b is the solution
            of the system with A^T for the loss's gradient in u.
        ConvergenceError: ``on_failure="raise"`` and some sample missed its tolerance.

    Example:
        >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
        >>> u, info = linear_solve(lambda u: u @ matrix.T, torch.tensor([[1.0, 2.0]]))
        >>> [round(x, 4) for x in (matrix @ u[0]).tolist()]
        [1.0, 2.0]
    """
    if on_failure not in typing.get_args(OnFailure):
        raise ConfigError(f"on_failure must be 'ignore', 'warn' or 'raise', got {on_failure!r}.")
    chosen = _solver(solver, settings)
    _check("b", b)
    if u0 is not None:
        _check("u0", u0, b)
    spec = StateSpec(b)
    with torch.no_grad():
        solution = _solve(chosen, matvec, rmatvec, b, u0, spec)
    solution.spec = spec
    if on_failure != "ignore" and solution.failed():
        solution.apply_policy(on_failure, "linear solve", stacklevel=caller() + 1)
    return spec.unpack(solution["z"]), solution


def tolerance_scale(b: Tensor, settings: SolverSettings) -> Tensor:
    """(B,) factor that makes an absolute tolerance relative to each sample's size of `b`, in its residual norm.

    A sample with b = 0 gets the smallest factor of the others: where rows are coupled, it has something to solve too.
    """
    order = math.inf if settings.residual_norm == "max" else 2
    sizes = torch.linalg.vector_norm(b, order, 1)
    if settings.residual_norm == "rms":
        sizes = sizes * b.shape[1] ** -0.5
    least = sizes.masked_fill(sizes == 0, math.inf).min().clamp_max(torch.finfo(sizes.dtype).max)
    return torch.where(sizes > 0, sizes, least)


def _solver(solver: Any, settings: Mapping[str, Any]) -> Solver[Any] | LinearSolver[Any]:
    if isinstance(solver, Solver | LinearSolver):
        if settings:
            raise ConfigError(
                f"the solver given has settings of its own; give {', '.join(settings)} where it is made, as in "
                f"{type(solver).__name__}({next(iter(settings))}=...)."
            )
        return solver  # pyright: ignore[reportUnknownVariableType]
    if isinstance(solver, Settings):
        if settings:
            raise ConfigError(f"the settings given are complete; give {', '.join(settings)} there.")
        return registry.create("any_solvers", solver)
    given: Mapping[str, Any] = solver if isinstance(solver, Mapping) else {"name": solver}  # pyright: ignore
    twice = [key for key in settings if key in given]
    if twice:
        raise ConfigError(f"{', '.join(twice)} is given twice: in solver=... and as a keyword. Give one.")
    values = {**given, **settings}
    defaults = dict(DEFAULTS)
    if values.keys() & {"rtol", "atol"}:
        del defaults["tol"]
    return registry.create("any_solvers", {**defaults, **values})


def _check(what: str, tensor: Any, like: Tensor | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise StateTypeError(f"{what} must be a tensor, got {describe(tensor)}; torch.as_tensor makes one.")
    dense = tensor.layout == torch.strided and not tensor.is_nested
    if not dense or not (tensor.is_floating_point() or tensor.is_complex()) or tensor.dtype.itemsize < 2:
        raise StateTypeError(
            f"{what} must be a dense floating point (16 bits at least) or complex tensor, got {describe(tensor)}."
        )
    if not tensor.numel():
        raise StateError(f"{what} is empty, of shape {tuple(tensor.shape)}: there is nothing to solve for.")
    if like is not None and (tensor.shape, tensor.dtype, tensor.device) != (like.shape, like.dtype, like.device):
        raise StateError(
            f"{what} must be like b, {describe(like)} on {like.device}; got {describe(tensor)} on {tensor.device}."
        )
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise GradientModeError(
            f"{what} requires grad, and linear_solve gives no gradient. Pass {what}.detach(), or call it under "
            "torch.no_grad(); the gradient of a loss in b is the solution of the system with A^T for its gradient in u."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise StateError(f"{what} holds NaN or inf; there is no solution to find. Leave those samples out.")


def _solve(
    solver: Solver[Any] | LinearSolver[Any],
    matvec: Apply,
    rmatvec: Apply | None,
    b: Tensor,
    u0: Tensor | None,
    spec: StateSpec,
) -> Solution:
    """The solution on packed tensors, with its residuals in b's own scale."""
    right = spec.pack(b)
    peak = right.abs().amax()
    peak = torch.where(peak > 0, peak, 1.0)  # norms square what they are given
    right = right / peak
    apply = _packed(matvec, "matvec", spec)
    size, products = _size(apply, right) if solver.estimates else (torch.ones_like(right[:, :1]), 0)
    problem = _Scaled(apply, _packed(rmatvec, "rmatvec", spec) if rmatvec is not None else None, right, size, spec)
    problem.nfe = products
    start, image = torch.zeros_like(right), problem.b
    if u0 is not None:
        start, image = spec.pack(u0) / peak, None
    scale = tolerance_scale(problem.b, solver.settings)
    found = iterate(solver, problem, start, image, scale=scale).solution
    unit = (size * peak)[:, 0]
    lengths = torch.linalg.vector_norm(right, 2, 1) * peak
    for absolute, relative in (("abs_lowest", "rel_lowest"), ("abs_trace", "rel_trace")):
        residual: Tensor = found[absolute]
        one = residual.dim() == 1
        found[absolute] = residual = residual * (unit if one else unit[:, None])
        found[relative] = torch.where(residual == 0, 0.0, residual / (lengths if one else lengths[:, None]))
    found["z"] = found["z"] * peak
    return found


def _size(apply: Apply, b: Tensor) -> tuple[Tensor, int]:
    """(B, 1) sizes of A, as far as one product tells, and the number of products."""
    size = torch.linalg.vector_norm(apply(b), 2, 1, True) / torch.linalg.vector_norm(b, 2, 1, True)
    return torch.where(torch.isfinite(size) & (size > 0), size, 1.0), 1


def _packed(apply: Apply, name: str, spec: StateSpec) -> Apply:
    """`apply` on packed tensors.

    Raises:
        FunctionTypeError, FunctionError: it can't be called, or doesn't return what it takes.
    """
    if not callable(apply):
        raise FunctionTypeError(f"{name} must be a function u -> A u, got {describe(apply)}.")
    shape, kind = spec.shapes[0], spec.dtypes[0].is_complex

    def call(u: Tensor) -> Tensor:
        given = spec.unpack(u)
        before = -1 if given.is_inference() else given._version
        out = apply(given)
        if not isinstance(out, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise FunctionTypeError(f"{name} returned {describe(out)}; it must return a tensor like b.")
        if out.shape != shape or out.is_complex() != kind or out.device != spec.device:
            raise FunctionError(
                f"{name} returned {describe(out)} on {out.device}; it must return a tensor like b, "
                f"{'complex' if kind else 'real'}, of shape {tuple(shape)}, on {spec.device}."
            )
        if before >= 0 and given._version != before:
            raise FunctionError(f"{name} changed its input in place; the solver still needs that tensor.")
        return spec.pack(out)

    return call


class _Scaled(LinearProblem):
    """A u = b, both sides divided by `size`, as (I - (I - A)) u = b; products with A itself lose no digits in that."""

    def __init__(self, apply: Apply, transposed: Apply | None, b: Tensor, size: Tensor, spec: StateSpec) -> None:
        eps = spec.eps * HALF_NOISE if spec.rounds else 0.0
        rproduct = None if transposed is None else lambda u: u - transposed(u / size)
        super().__init__(lambda u: u - apply(u) / size, rproduct, b / size, eps)
        self._apply = apply
        self._transposed = transposed
        self._size = size

    def matvec(self, u: Tensor) -> Tensor:
        self.nfe += 1
        return self._apply(u) / self._size

    def rmatvec(self, u: Tensor) -> Tensor:
        if self._transposed is None:
            return super().rmatvec(u)
        self.nfe += 1
        return self._transposed(u / self._size)
