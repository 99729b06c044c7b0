"""A call of a DEQ under torch.compile: in the caller's graph where that can be, beside it where it can't.

Dynamo traces no loop that ends by its values, no context variable and no pydantic model being made. A run of a fixed
number of steps needs none of them: it is unrolled into the caller's graph here, by the solver's own steps and the
kernel's own books. Any other call breaks the graph once and runs as ever, except for f, which is compiled by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import scope as scopes
from .forward import Forward
from .interfaces import GradientBackend, Solver
from .problem import Problem
from .recorder import Recorder
from .scope import SolveScope, current_scope
from .settings import SolverSettings
from .solution import Solution
from .state import StateSpec, with_gradient_of
from .tree import LEAF

if TYPE_CHECKING:
    from .deq import DEQ

try:  # torch has no public means to have a function compiled that is called where nothing is
    from torch._C._dynamo.eval_frame import get_eval_frame_callback, set_eval_frame  # pyright: ignore
except ImportError:  # f then runs uncompiled

    def get_eval_frame_callback() -> Any:
        return None

    def set_eval_frame(callback: Any) -> Any:
        return callback


__all__ = ["Call", "beside", "call"]

F = TypeVar("F", bound=Callable[..., Any])

#: The scopes that are on in what is being traced, which can't look into a context variable.
TRACED = scopes.traced
#: Real dtypes of the parts of complex ones.
PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
#: Options of a call that set the number of steps.
STEPS = ("f_max_iter", "max_iter")
#: Shown where a graph breaks, and in the error of fullgraph=True.
REASON = (
    "deqcore: this call can't be part of a graph. One can if it runs a fixed number of steps (tol=0), returns one "
    "state, a tensor or a tuple of tensors, and gets no gradient or a traced one (phantom); see docs/compile.md"
)


#: Functions of ours, copied for one f each.
_copies: WeakKeyDictionary[Any, dict[FunctionType, FunctionType]] = WeakKeyDictionary()


def _breaks(function: F) -> F:
    """Have dynamo break the graph at this function; it is called with what dynamo had in force still there."""
    disable: Any = torch.compiler.disable
    try:
        return disable(function, recursive=False, reason=REASON)
    except TypeError:  # before torch 2.7 no reason can be given
        return disable(function, recursive=False)


def _uncompiled(function: F) -> F:
    """Keep dynamo out of this function and all that it calls."""
    disable: Any = torch.compiler.disable
    return disable(function)


class Call(NamedTuple):
    """The arguments of one call of a DEQ."""

    fn: Callable[..., Any]
    z0: Any
    args: Any = ()
    solver_kwargs: Mapping[str, Any] | None = None
    sradius_mode: bool = False
    backward_writer: Callable[[Solution], Any] | None = None
    warm_start: Solution | None = None
    callback: Callable[..., Any] | None = None
    progress: bool = False


def call(deq: DEQ, given: Call) -> tuple[list[Any], Solution]:
    """What ``DEQ.forward`` does while it is traced."""
    steps = _steps(deq, given)
    if steps is None:
        return beside(deq.forward, **given._asdict())
    if torch.is_grad_enabled() and type(deq.gradients[-1]).attach is GradientBackend.attach:
        return _attach_beside(deq, given, steps)
    TRACED.append(TRACED[-1] if TRACED else SolveScope())
    try:
        problem, solution = _solve(deq, given, steps, None)
        return _finish(deq, problem, solution, lambda: deq.gradients[-1].attach(problem, solution))
    finally:
        TRACED.pop()


# ---- which calls


def _steps(deq: DEQ, given: Call) -> int | None:
    """The number of steps of a call that can be traced; None where it can't."""
    config, settings = deq.config, cast(SolverSettings, deq.solver.settings)
    solver = type(deq.solver)
    asks = given.sradius_mode or given.progress or config.keep_state or config.on_failure == "raise"
    if asks or given.warm_start is not None or given.callback is not None:
        return None
    if solver.estimates or solver.solve is not Solver.solve or not solver.traceable:
        return None
    if solver.monitored and settings.thresholds() != (0.0, 0.0):
        return None
    if not isinstance(given.args, tuple | list) or not _packs(given.z0, config.batch_dims):
        return None
    if deq.training and deq.regularizers and torch.is_grad_enabled():
        return None
    limit = settings.max_iter
    if not deq.training:
        limit = config.eval_max_iter or int(limit * config.eval_factor)
    if given.solver_kwargs:
        limit = _only_steps(given.solver_kwargs)
    if deq.training and limit:
        plan = deq.core.plan(limit)
        limit = plan[0].stop if len(plan) == 1 else None
    return limit or None  # a call of no steps is nothing to compile


def _only_steps(options: Mapping[str, Any]) -> int | None:
    """The number of steps, where `options` says nothing else."""
    for key in STEPS:
        if key in options and len(options) == 1:
            steps = options[key]
            return steps if type(steps) is int and steps > 0 else None
    return None


def _packs(z0: Any, batch_dims: int) -> bool:
    """Whether `z0` is a state that :class:`_Spec` knows; any other is packed, or refused, outside of the graph."""
    leaves: Any = [z0] if isinstance(z0, Tensor) else z0
    if not isinstance(leaves, tuple | list) or not leaves:
        return False
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.is_nested or leaf.layout is not torch.strided:
            return False
        if not (leaf.is_floating_point() or leaf.is_complex()) or leaf.dtype.itemsize < 2:
            return False
        alike = leaf.device == leaves[0].device and leaf.shape[:batch_dims] == leaves[0].shape[:batch_dims]
        if not alike or leaf.dim() < batch_dims or leaf.numel() == 0:
            return False
    return True


# ---- the solve, traced


class _Spec(StateSpec):
    """A :class:`StateSpec` of a tensor, or of a tuple or list of tensors, made by what can be traced alone."""

    def __init__(self, z0: Any, batch_dims: int) -> None:
        self.single = isinstance(z0, Tensor)
        leaves: list[Tensor] = [z0] if self.single else list(z0)
        self.as_arguments = self._listed = not self.single
        self.kind = "tensor" if self.single else f"{len(leaves)} tensors"
        self.tree = LEAF
        self.paths = [""] if self.single else [f"[{k}]" for k in range(len(leaves))]
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.device = leaves[0].device
        self.batch_dims = batch_dims
        self.batch_shape = leaves[0].shape[:batch_dims]
        self.batch = math.prod(self.batch_shape)
        real = [PARTS.get(dtype, dtype) for dtype in self.dtypes]
        self.dtype = torch.float32
        for dtype in real:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self.sizes = [leaf.numel() // self.batch * (2 if leaf.is_complex() else 1) for leaf in leaves]
        self.features = sum(self.sizes)
        self.rounds = any(dtype != self.dtype for dtype in real)
        self.eps = max(torch.finfo(dtype).eps for dtype in real)
        self._plain = self.single and not self.rounds and not leaves[0].is_complex()

    @staticmethod
    def _unpack_leaf(part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if dtype not in PARTS:
            return part.to(dtype).reshape(shape)
        pairs = part.to(PARTS[dtype]).reshape(*shape, 2)
        return torch.complex(pairs[..., 0], pairs[..., 1])

    def wrap(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        def evaluate(z: Tensor) -> Tensor:
            # A copy, which a compiler leaves out: that f changes its input in place can't be seen here, only be borne.
            state = self.unpack(z.clone())
            out = fn(*state, *args) if self.as_arguments else fn(state, *args)
            return self._pack_leaves(self._take_output(out))

        return evaluate


class _Limited:
    """A solver's settings with another number of steps: what pydantic's own copy is, which can't be traced."""

    def __init__(self, settings: SolverSettings, max_iter: int) -> None:
        self.settings = settings
        self.max_iter = max_iter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settings, name)


def _solve(deq: DEQ, given: Call, steps: int, fz: Tensor | None) -> tuple[Problem, Solution]:
    """The problem, and its state after `steps` steps of the solver; `fz` is f at the packed start, if known."""
    spec = _Spec(given.z0, deq.config.batch_dims)
    problem = Problem.of(given.fn, spec, tuple(given.args))
    solver: Any = deq.solver
    if steps != solver.settings.max_iter:
        solver = type(solver)(_Limited(solver.settings, steps))
    with torch.no_grad():
        solution = _iterate(deq, solver, problem, spec.pack(given.z0).detach(), fz, steps)
    solution.spec = None  # ours is for tracing only
    return problem, solution


def _iterate(deq: DEQ, solver: Any, problem: Problem, z: Tensor, fz: Tensor | None, steps: int) -> Solution:
    """What the kernel's loop does where there is no tolerance to look at."""
    device, check_every = z.device.type, deq.config.check_every if solver.monitored else steps
    off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with off:
        recorder = Recorder(problem, z, solver.settings, None, deq.config.keep_trace)
        recorder.measure = _measure(solver.settings)
        if fz is None:
            fz = problem(z)
        if solver.monitored:
            recorder.judge(0, z, fz)
        state = solver.init(problem, z, fz)
        k, budget = 0, solver.settings.max_nfe
        while k < steps and (budget is None or problem.work < budget):
            z, state, fz = solver.step(problem, z, fz, state)
            k += 1
            if problem.rounds:
                z, fz = problem.round(z), None
            if fz is None:
                fz = problem(z)
            if k % check_every == 0 or k == steps:
                recorder.judge(k, z, fz)
        solution = recorder.finish(z, k, not solver.monitored)
    for key, value in solver.notes(state).items():
        solution[key] = value
    return solution


def _measure(settings: SolverSettings) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(z, f(z)) -> norms of f(z) - z and of f(z), each a new tensor."""
    order = math.inf if settings.residual_norm == "max" else 2

    def measure(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
        factor = z.shape[1] ** -0.5 if settings.residual_norm == "rms" else 1.0
        return tuple(torch.linalg.vector_norm(part, order, 1) * factor for part in (fz - z, fz))  # pyright: ignore

    return measure


def _finish(
    deq: DEQ, problem: Problem, solution: Solution, attach: Callable[[], Tensor | list[Tensor]]
) -> tuple[list[Any], Solution]:
    """The states with their gradients, and the last entries of `solution`."""
    spec = cast(StateSpec, problem.spec)
    states: list[Tensor] = [solution["z"]]
    if deq.training or torch.is_grad_enabled():
        found = attach()
        states = [found] if isinstance(found, Tensor) else list(found)
    if not deq.training:
        solution["sradius"] = torch.zeros(1, device=spec.device)
        attached, state = states[-1], cast(Tensor, solution["z"])
        if attached is not state and attached.requires_grad:
            state = with_gradient_of(attached, state)
        states = [state]
    if deq.regularizers:  # with a penalty to compute, no call comes here
        solution["regularizers"], solution["regularization"] = {}, states[-1].new_zeros(())
    solution.update(problem.counts())
    return [spec.output(state) for state in states], solution


# ---- beside the graph


class _Compiled:
    """f, which dynamo compiles although nothing is compiled where it is called.

    The first evaluation of a solve is a plain one: it makes what the SolveScope keeps (weights, masks), which the
    graph of the others then takes as inputs. So are those with grad: a compiled backward can't be differentiated
    again, and computes the gradients of all parameters with every product J^T u.

    Args:
        fn: the user's function.
        callback: what dynamo had in force for this thread: the user's backend and options.
    """

    def __init__(self, fn: Callable[..., Any], callback: Any) -> None:
        self._fn = fn
        self._callback = callback
        self._begun = False

    def __call__(self, *args: Any) -> Any:
        if not self._begun or torch.is_grad_enabled():
            self._begun = True
            return self._fn(*args)
        return _under(self._callback, _copy_for(self._fn, _evaluate), current_scope(), self._fn, *args)

    def __getattr__(self, name: str) -> Any:  # a solver may need more of f than its values
        return getattr(self._fn, name)


def _under(callback: Any, run: Callable[..., Any], *args: Any) -> Any:
    before = set_eval_frame(callback)
    try:
        return run(*args)
    finally:
        set_eval_frame(before)


def _evaluate(scope: SolveScope | None, fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)`` in the scope of a solve that is not traced itself."""
    if scope is None:
        return fn(*args)
    TRACED.append(scope)
    try:
        return fn(*args)
    finally:
        TRACED.pop()


def _copy_for(fn: Callable[..., Any], run: FunctionType) -> Callable[..., Any]:
    """`run` for this f alone: dynamo compiles the same code a few times only, whatever it is called with."""
    key: Any = getattr(fn, "__code__", None) or getattr(getattr(fn, "__func__", None), "__code__", None) or fn
    try:
        copies = _copies.setdefault(key, {})
    except TypeError:  # no weak reference to it can be had
        return run
    if run not in copies:
        copies[run] = FunctionType(run.__code__.replace(co_name=f"{run.__name__}_of_f"), run.__globals__)
    return copies[run]


@_uncompiled
def _plainly(callback: Any, run: Callable[..., Any], fn: Callable[..., Any], args: Any, options: Any) -> Any:
    return run(_Compiled(fn, callback), *args, **options)


@_breaks
def beside(run: Callable[..., Any], fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``run(fn, *args, **options)`` outside of any graph, with f compiled by itself."""
    return _plainly(get_eval_frame_callback(), run, fn, args, options)


def _solve_in(scope: SolveScope, deq: DEQ, given: Call, steps: int, fz: Tensor) -> tuple[Problem, Solution]:
    return _evaluate(scope, _solve, deq, given, steps, fz)


@_uncompiled
def _attached(callback: Any, deq: DEQ, given: Call, steps: int) -> tuple[list[Any], Solution]:
    with SolveScope():
        spec = StateSpec.of(given.z0, deq.config.batch_dims)
        problem = Problem.of(_Compiled(given.fn, callback), spec, tuple(given.args))
        with torch.no_grad():
            fz = problem(spec.pack(given.z0).detach())
        traced, solution = _under(callback, _copy_for(given.fn, _solve_in), current_scope(), deq, given, steps, fz)
        solution.spec, problem.nfe = spec, problem.nfe + traced.nfe
        this = Forward(deq, deq.solver, problem, given.backward_writer, None, None)
        return _finish(deq, problem, solution, lambda: this.attach(deq.gradients[-1], solution))


@_breaks
def _attach_beside(deq: DEQ, given: Call, steps: int) -> tuple[list[Any], Solution]:
    """The solve as one graph of its own, and then a gradient that can't be traced."""
    return _attached(get_eval_frame_callback(), deq, given, steps)
