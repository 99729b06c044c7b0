"""The equilibrium as a pure function of f's arguments: for torch.func, forward mode and every order."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from .adjoint import Equilibrium, Relation, refuse_nested_forward_mode
from .deq import DEQ, get_deq
from .errors import ConfigError, FunctionTypeError, GradientModeError
from .forward import hearing
from .interfaces import GradientBackend, Solver
from .iterate import iterate
from .problem import Problem
from .products import alive, in_forward_mode, plain, refuse_tracing, transforming, varies, without_gradient
from .registry import registry
from .scope import SolveScope, current_scope
from .settings import SolverSettings
from .solution import Solution
from .state import StateSpec, finite, with_gradient_of
from .tree import take_apart

__all__ = ["fixed_point"]


@overload
def fixed_point(
    fn: Callable[..., Any], z0: Any, args: Sequence[Any] = (), *, return_info: Literal[False] = False, **keywords: Any
) -> Any: ...
@overload
def fixed_point(
    fn: Callable[..., Any], z0: Any, args: Sequence[Any] = (), *, return_info: Literal[True], **keywords: Any
) -> tuple[Any, Solution]: ...
def fixed_point(
    fn: Callable[..., Any], z0: Any, args: Sequence[Any] = (), *, return_info: bool = False, **keywords: Any
) -> Any:
    """Find z = fn(z, *args) from `z0`, as a pure function of `args`.

    It can be differentiated in `args` by autograd and by torch.func, in reverse and in forward mode, and to any order,
    as far as the gradient backend can: with ``gradient="implicit"``, the default here, all of them.

    Args:
        fn: the map; called as ``fn(z, *args)`` for a tensor, ``fn(a, b, *args)`` for a tuple or list of states, and
            ``fn(state, *args)`` for any other pytree. Must return what it takes, and use no other tensor that has a
            gradient than those in `args`.
        z0: the start, shape (B, ...) with the default ``batch_dims=1``. It has no gradient: the equilibrium does not
            depend on it.
        args: fn's further arguments, any pytrees; their tensors are what can be differentiated in, and mapped over.
        return_info: whether to return the Solution, too. Under ``torch.func.vmap`` it has a row for each state of
            each of the samples mapped over.
        keywords: a configuration, as for :func:`deqcore.get_deq`. What is about training a module has no meaning here:
            cores of several states, regularizers, norms. ``compact`` has none under ``torch.func.vmap``.

    Returns:
        the equilibrium, of the structure of `z0`; or (equilibrium, info).

    Raises:
        GradientModeError: fn uses a tensor with a gradient that is not in `args`; or a derivative is asked for that
            the gradient backend, or torch, does not have.
        ConfigError, UnknownKeyError, UnknownPluginError: as get_deq; or a setting without a meaning here.
        StateError, StateTypeError, FunctionError, FunctionTypeError, ConvergenceError: as a DEQ's call.

    Example:
        >>> def solve(x):
        ...     f = lambda z, x: torch.tanh(0.5 * z + x)
        ...     return fixed_point(f, torch.zeros(()), (x,), solver={"tol": 1e-6})
        >>> slope = torch.func.grad(solve)
        >>> round(float(torch.func.grad(slope)(torch.tensor(0.3))), 2)
        -3.07
    """
    if not callable(fn):
        raise FunctionTypeError(f"f must be callable, got {type(fn).__name__}: fixed_point(fn, z0).")
    if torch.compiler.is_compiling():
        from . import compiled  # it imports dynamo

        return compiled.beside(fixed_point, fn, z0, args, return_info=return_info, **keywords)
    deq = _deq_for(keywords)
    if not isinstance(args, tuple | list):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FunctionTypeError(
            f"args must be a tuple of fn's further arguments, got {type(args).__name__}: args=(x,)."
        )
    refuse_tracing()
    with SolveScope():
        spec = StateSpec.of(z0, deq.config.batch_dims)
        problem, values = _pose(fn, spec, tuple(args), deq)
        z = problem.attached(without_gradient(alive(spec.pack(z0))), values)
        out = spec.output(z)
    return (out, problem.solution) if return_info else out


# ---- the configuration

_kept: dict[Any, DEQ] = {}
#: Configurations whose DEQs are kept.
KEPT = 64


def _deq_for(keywords: dict[str, Any]) -> DEQ:
    """The DEQ of this configuration; one of plain values is made once."""
    try:
        values = json.dumps(keywords, sort_keys=True)
    except (TypeError, ValueError):
        return _make(keywords)
    around = tuple(sorted(item for item in os.environ.items() if item[0].startswith("DEQCORE_")))
    key = values, around, registry.version
    if key not in _kept:
        if len(_kept) >= KEPT:
            _kept.clear()
        _kept[key] = _make(keywords)
    return _kept[key]


def _make(keywords: dict[str, Any]) -> DEQ:
    config = dict(keywords)
    if not any(key in ("ift", "hook_ift", "grad") or key.partition(".")[0] == "gradient" for key in config):
        config["gradient"] = "implicit"
    deq = get_deq(**config)
    if not isinstance(deq, DEQ):
        raise ConfigError(f"core={keywords.get('core')!r} makes {type(deq).__name__}; fixed_point needs a deqcore.DEQ.")
    if len(deq.core.plan(deq.config.solver.max_iter)) > 1:
        raise ConfigError("fixed_point returns one state: leave out n_states and indexing, or use get_deq.")
    for key in ("regularizers", "norm"):
        if getattr(deq.config, key):
            raise ConfigError(f"{key} is for training a module, which fixed_point is not for: use get_deq.")
    return deq


# ---- the relation between args and equilibrium


def _pose(fn: Callable[..., Any], spec: StateSpec, args: tuple[Any, ...], deq: DEQ) -> tuple[_Posed, list[Tensor]]:
    """The relation that f stands for, and the tensors in `args`."""
    tensors, rebuilt = take_apart(args)
    values = [alive(tensor) for tensor in tensors]
    return _Posed(fn, spec, rebuilt, rebuilt(values), deq), values


class _Posed(Relation):
    """z = fn(z, *args), with the tensors in args as values."""

    def __init__(
        self,
        fn: Callable[..., Any],
        spec: StateSpec,
        rebuilt: Callable[[Sequence[Tensor]], tuple[Any, ...]],
        args: tuple[Any, ...],
        deq: DEQ,
    ) -> None:
        gradient = deq.gradients[-1]
        scope = cast(SolveScope, current_scope())
        super().__init__(Problem.of(fn, spec, args), gradient.adjoint, gradient.exact, scope)
        self.spec = spec
        self.rebuilt = rebuilt
        self.deq = deq
        self.gradient = gradient
        #: f at the start, where it is known.
        self.first: Tensor | None = None
        self.solution: Solution = Solution({}, spec)  # pyright: ignore[reportIncompatibleVariableOverride]

    def attached(self, start: Tensor, values: list[Tensor]) -> Tensor:
        """The state with its gradient, shape (batch, features)."""
        refuse_nested_forward_mode()
        if torch.is_grad_enabled() or transforming() or in_forward_mode():
            self.check(start, values)
        if type(self.gradient).attach is GradientBackend.attach:
            return Equilibrium.apply(self, None, start, *values)
        if transforming() and not self.gradient.transforms:
            raise GradientModeError(
                f"torch.func can't transform gradient={self.deq.config.gradient.name!r}. Use gradient='implicit', "
                "which is exact, or 'phantom' or 'one_step'."
            )
        self.is_constant = True
        with torch.no_grad():
            z = Equilibrium.apply(self, None, start, *values)
        self.problem.start = start
        solution = Solution({**self.solution, "z": z}, self.spec)  # z may belong to a transform
        solution.solver, solution.solver_state = self.solution.solver, self.solution.solver_state
        solution.on_backward = self.solution.on_backward
        found = self.gradient.attach(self.problem, solution)
        attached = found if isinstance(found, Tensor) else found[-1]
        return with_gradient_of(attached, z)

    def evaluate(self, z: Tensor, *values: Tensor) -> Tensor:
        with self.scope.again():
            return self.problem.bind(self.spec, self.rebuilt(values))(z)

    def find(self, start: Tensor | None, values: Sequence[Tensor]) -> Tensor:
        problem = Problem.of(cast(Any, self.problem.fn), self.spec, self.rebuilt([value.detach() for value in values]))
        return self.run(problem, cast(Tensor, start), self.deq.config.compact, self.first)

    def run(self, problem: Problem, start: Tensor, compact: bool, fz: Tensor | None = None) -> Tensor:
        """Solve, all tensors being plain ones. Transforms come here once, with all that they map over."""
        config, solver = self.deq.config, self.deq.solver_for(None)
        settings = cast(SolverSettings, solver.settings)
        start = start.detach().clone()
        if not settings.is_fixed:
            finite(start, "z0")
        problem.nfe = self.problem.nfe
        with torch.no_grad():
            found = iterate(
                solver,
                problem,
                start,
                fz,
                check_every=config.check_every,
                compact=compact,
                keep_trace=config.keep_trace,
                keep_state=config.keep_state or self.gradient.needs_state,
            ).solution
        self._tell(found, problem, solver)
        return found["z"].clone()

    def check(self, start: Tensor, values: Sequence[Tensor]) -> None:
        """See that f captured nothing that has a gradient: with all that may have one held still, nothing moves.

        Raises:
            GradientModeError: something does.
        """
        inputs = [plain(value) for value in values]
        with torch.enable_grad():
            fz = self.evaluate(plain(start), *inputs)
        self.problem.nfe += 1
        if varies(fz):
            raise GradientModeError(
                "fn uses a tensor that has a gradient, or is mapped over, and is not in args: deqcore.fixed_point is a "
                "function of args only. Hand the tensor to fn, fixed_point(fn, z0, args=(x, weight)), or detach it; or "
                "use deqcore.get_deq(gradient='implicit'), whose call differentiates what fn closes over."
            )
        self.first = None if transforming() else fz.detach()

    def _tell(self, found: Solution, problem: Problem, solver: Solver[Any]) -> None:
        """Have what is known of the solve be this, and the failure policy hear of it."""
        found.update(problem.counts())
        found["sradius"] = torch.zeros(1, device=found["z"].device)
        told, on_failure = self.solution, self.deq.config.on_failure
        told.update(found.items())
        told.solver, told.solver_state = solver, found.solver_state
        told.waits, told.accepted = found.waits, found.accepted
        told.on_backward = hearing(None, on_failure)
        told.judged(on_failure, "forward solve")

    def over(self, size: int, dims: Sequence[int | None]) -> Relation:
        return _Mapped(self, self, size, dims)


class _Mapped(Relation):
    """Several relations side by side, their batches one after the other.

    Args:
        root: what solves for all of them.
        each: one of them.
        size: how many there are.
        dims: 0 for a value that is one for each, with that in front; None for one that all share.
    """

    def __init__(self, root: _Posed, each: Relation, size: int, dims: Sequence[int | None]) -> None:
        super().__init__(root.problem, root.solve_adjoint, root.exact, root.scope)
        self.root = root
        self.each = each
        self.size = size
        self.dims = tuple(dims)
        self.solution = root.solution
        self.is_constant = root.is_constant

    def evaluate(self, z: Tensor, *values: Tensor) -> Tensor:
        call = torch.vmap(self.each.evaluate, in_dims=(0, *self.dims))
        return call(z.unflatten(0, (self.size, -1)), *values).flatten(0, 1)

    def find(self, start: Tensor | None, values: Sequence[Tensor]) -> Tensor:
        values = [value.detach() for value in values]
        problem = Problem(lambda z: self.evaluate(z, *values), eps=self.problem.eps(cast(Tensor, start)))
        return self.root.run(problem, cast(Tensor, start), compact=False)

    def over(self, size: int, dims: Sequence[int | None]) -> Relation:
        return _Mapped(self.root, self, size, dims)
