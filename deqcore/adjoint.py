"""Implicit differentiation: an equilibrium as an autograd function whose derivatives are equilibria, too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .captures import Captures, Closure, Made, leaves_of, substituted
from .errors import GradientModeError
from .problem import Linearization, LinearProblem, Problem
from .products import alive, forward_levels, is_batched_cotangent, pull, push, record, settled, transforming
from .scope import SolveScope, current_scope
from .solution import Solution

__all__ = ["TRANSFORMS", "Equilibrium", "Relation", "attach_adjoint", "refuse_nested_forward_mode"]

SolveAdjoint = Callable[[LinearProblem], Solution]
#: Largest entry of a cotangent, or its inverse, whose squares no dtype from float32 on minds.
SAFE = 1e4


class Relation:
    """z = f(z, *values) between packed states and the tensors that f uses, and what it takes to differentiate it.

    Args:
        problem: f on packed states; the products are counted there.
        solve: solves u = J^T u + b for the problem it is given.
        exact: whether `solve` does so to a tolerance, also with I - J in place of its transpose.
        scope: what is fixed in f's evaluations.
    """

    #: What is known of the solve; told of further ones.
    solution: Solution | None = None
    #: True for a state that has no derivative by itself.
    is_constant = False

    def __init__(self, problem: Problem, solve: SolveAdjoint, exact: bool, scope: SolveScope) -> None:
        self.problem = problem
        self.solve_adjoint = solve
        self.exact = exact
        self.scope = scope

    def find(self, start: Tensor | None, values: Sequence[Tensor]) -> Tensor:
        """The state, shape (batch, features), from plain tensors."""
        raise NotImplementedError

    def evaluate(self, z: Tensor, *values: Tensor) -> Tensor:
        """f(z, *values), recorded where autograd or a transform is on."""
        raise NotImplementedError

    def over(self, size: int, dims: Sequence[int | None]) -> Relation:
        """`size` of these relations side by side; those values that have a dimension in `dims` are one for each."""
        raise NotImplementedError

    def linearize(self, z: Tensor, values: Sequence[Tensor]) -> tuple[Linearization, list[Tensor]]:
        """f at these plain tensors with its graph, and the tensors that stand for the values in it."""
        with torch.no_grad():
            (point, *inputs), fz = record(self.evaluate, (z, *values))
        self.problem.nfe += 1
        return Linearization(self.problem, point, fz), inputs

    def solve(self, linearized: Linearization, b: Tensor, transposed: bool) -> Tensor:
        """u = J^T u + b, or u = J u + b, scaled so that neither tolerance nor range depend on the loss's scale."""
        _refuse_batched(b)
        peak = b.abs().amax().item()  # not a norm, whose squares overflow and underflow long before the cotangent does
        if not math.isfinite(peak) or peak == 0:
            return b.clone()  # nothing to solve for; an overflow is handed on, as a gradient scaler expects
        scale = 1.0 if 1 / SAFE <= peak <= SAFE else peak  # where nothing is to be feared, a copy is saved
        forth, back = (linearized.vjp, linearized.jvp) if transposed else (linearized.jvp, linearized.vjp)
        b = b if scale == 1.0 else b / scale
        found = self.solve_adjoint(LinearProblem(forth, back, b, self.problem.eps(linearized.z)))
        if scale != 1.0:
            for key in ("z", "abs_lowest", "abs_trace"):
                found[key] = found[key] * scale
        if self.solution is not None:
            self.solution.report(found)
        return found["z"].clone()  # what is reported must neither hold a graph nor be a gradient that is added to


class Equilibrium(torch.autograd.Function):
    """(relation, fz, start, *values) -> the state that `relation` finds.

    Backward: u = (I - J^T)^-1 cotangent, and u's product with f's Jacobian in the values. With `fz`, an evaluation of
    f there with its graph, that product is left to autograd, unless it is to be differentiated again.
    """

    @staticmethod
    def forward(relation: Relation, fz: Tensor | None, start: Tensor | None, *values: Tensor) -> Tensor:
        return relation.find(start, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.relation, fz, _, *values = inputs
        ctx.is_native = fz is not None
        ctx.save_for_backward(output, *values)
        ctx.save_for_forward(output, *values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        relation: Relation = ctx.relation
        (cotangent,) = cotangents
        further = torch.is_grad_enabled() or transforming()
        if ctx.is_native and not further:
            return None, _native(relation, cotangent), *[None] * (len(ctx.needs_input_grad) - 2)
        z, *values = map(alive, ctx.saved_tensors)
        if ctx.is_native and not relation.is_whole(z, values):  # type: ignore[attr-defined]
            with torch.no_grad():
                adjoint = _native(relation, cotangent.detach())
            adjoint = _FirstOrderOnly.apply(relation.exact, adjoint, relation.native.fz, cotangent)  # type: ignore[attr-defined]
            return None, adjoint, *[None] * (len(ctx.needs_input_grad) - 2)
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *_parts(relation, z, values, cotangent, wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        relation: Relation = ctx.relation
        z, *values = map(alive, ctx.saved_tensors)
        if relation.is_constant:
            return torch.zeros_like(z)
        moved = push(lambda *given: relation.evaluate(z, *given), values, tangents[3:])
        return _adjoint(relation, False, moved, z, *values)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        relation, _, start, *values = inputs
        size = info.batch_size
        values, dims = _to_front(values, in_dims[3:])
        start = _each(start, in_dims[2], size)
        z = Equilibrium.apply(relation.over(size, dims), None, start.flatten(0, 1), *values)
        return z.unflatten(0, (size, -1)), 0


def _parts(
    relation: Relation, z: Tensor, values: list[Tensor], cotangent: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The cotangent's product with dz/dvalue for each of `values`."""
    if torch.is_grad_enabled() or transforming():
        u = _adjoint(relation, True, cotangent, z, *values)
        parts = pull(lambda *given: relation.evaluate(z, *given), values, u, wanted)
        return settled(parts, (cotangent, z, *values))
    linearized, inputs = relation.linearize(z, values)
    u = relation.solve(linearized, cotangent, True)
    where = [k for k, value in enumerate(inputs) if wanted[k] and value.requires_grad]
    found: list[Tensor | None] = [None] * len(values)
    if where and linearized.fz.requires_grad:
        products = torch.autograd.grad(linearized.fz, [inputs[k] for k in where], u, allow_unused=True)
        for k, product in zip(where, products, strict=True):
            found[k] = product
    return found


class Adjoint(torch.autograd.Function):
    """(relation, transposed, b, z, *values) -> u with u = J^T u + b, or u = J u + b; J = df/dz there.

    Its derivatives are such solves with the other one of J and J^T, and second derivatives of f.
    """

    @staticmethod
    def forward(relation: Relation, transposed: bool, b: Tensor, z: Tensor, *values: Tensor) -> Tensor:
        linearized, _ = relation.linearize(z, values)
        return relation.solve(linearized, b, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.relation, ctx.transposed, _, *point = inputs
        ctx.save_for_backward(output, *point)
        ctx.save_for_forward(output, *point)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        relation: Relation = ctx.relation
        u, z, *values = map(alive, ctx.saved_tensors)
        v = _adjoint(relation, not ctx.transposed, cotangents[0], z, *values)
        inner, outer = (u, v) if ctx.transposed else (v, u)
        wanted = ctx.needs_input_grad[3:]
        parts = pull(lambda *point: _times(relation, True, inner, *point), (z, *values), outer, wanted)
        return None, None, *settled((v, *parts), (cotangents[0], u, z, *values))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        relation: Relation = ctx.relation
        u, *point = map(alive, ctx.saved_tensors)
        moved = push(lambda *given: _times(relation, ctx.transposed, u, *given), point, tangents[3:])
        b = tangents[2]
        return _adjoint(relation, ctx.transposed, moved if b is None else moved + b, *point)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        relation, transposed, b, z, *values = inputs
        size = info.batch_size
        values, dims = _to_front(values, in_dims[4:])
        b, z = _each(b, in_dims[2], size), _each(z, in_dims[3], size)
        u = Adjoint.apply(relation.over(size, dims), transposed, b.flatten(0, 1), z.flatten(0, 1), *values)
        return u.unflatten(0, (size, -1)), 0


def _adjoint(relation: Relation, transposed: bool, b: Tensor, *point: Tensor) -> Tensor:
    if not relation.exact:
        raise GradientModeError(_FIRST_ONLY)
    refuse_nested_forward_mode()
    return Adjoint.apply(relation, transposed, b, *point)


def _times(relation: Relation, transposed: bool, u: Tensor, z: Tensor, *values: Tensor) -> Tensor:
    """J^T u, or J u, as a function of where J is taken."""

    def at(point: Tensor) -> Tensor:
        return relation.evaluate(point, *values)

    if not transposed:
        return push(at, (z,), (u,))
    (product,) = pull(at, (z,), u)
    return torch.zeros_like(u) if product is None else product


def _to_front(values: Sequence[Any], dims: Sequence[int | None]) -> tuple[list[Any], list[int | None]]:
    """The values with the dimension that is mapped over in front, and where there is one now."""
    moved = [value if dim is None else value.movedim(dim, 0) for value, dim in zip(values, dims, strict=True)]
    return moved, [None if dim is None else 0 for dim in dims]


def _each(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


# ---- a state that was found already


def attach_adjoint(problem: Problem, solution: Solution, solve: SolveAdjoint, exact: bool = False) -> Tensor:
    """The state in `solution` as an implicit function of whatever f depends on.

    One evaluation of f with its graph, at the state: its derivative in f's inputs is used as it is, and the one in z
    for the products J^T u of the adjoint solve. The value is the state itself, unmoved.

    Args:
        problem: f on packed states.
        solution: holds the packed state under ``"z"``; told about the backward solve by :meth:`Solution.report`.
        solve: solves u = J^T u + b for the problem it is given.
        exact: whether `solve` solves it, and what I - J puts in J^T's place, to a tolerance. Further derivatives are
            made of further such solves; what takes something else for the solution gives first derivatives only.

    Returns:
        the state, shape (batch, features).
    """
    z: Tensor = solution["z"]
    if not torch.is_grad_enabled():
        return z
    linearized, captured = _linearize(problem, z, exact)
    if not _depends_on_more(linearized):
        return z
    relation = _Found(linearized, captured, solution, solve, exact)
    return Equilibrium.apply(relation, linearized.fz, None, *map(substituted, captured))


def _linearize(problem: Problem, z: Tensor, exact: bool) -> tuple[Linearization, list[Tensor]]:
    """f at `z` with its graph, and the tensors that it captured, where they will be asked for."""
    if not exact:
        return problem.linearize(z), []
    captures = Captures()
    try:
        with captures:
            return problem.linearize(z), captures.tensors
    except Exception:  # something in f can't be watched; an error of f's own comes again
        return problem.linearize(z), []


def _depends_on_more(linearized: Linearization) -> bool:
    """Whether f(z) has a gradient to anything but z itself."""
    return any(leaf is not linearized.z for leaf in leaves_of(linearized.fz))


class _Found(Relation):
    """The relation behind a state that was found already, f being a closure."""

    def __init__(
        self, native: Linearization, captured: list[Tensor], solution: Solution, solve: SolveAdjoint, exact: bool
    ) -> None:
        super().__init__(native.problem, solve, exact, current_scope() or SolveScope())
        self.native = native
        self.closure = Closure(native.problem.call, captured)
        self.solution = solution
        self._whole: bool | None = None

    def find(self, start: Tensor | None, values: Sequence[Tensor]) -> Tensor:
        return self.native.z.detach().clone()  # a caller may change it in place; f's graph needs z as it is

    def evaluate(self, z: Tensor, *values: Tensor) -> Tensor:
        with self.scope.again():
            return self.closure(z, *values)

    def over(self, size: int, dims: Sequence[int | None]) -> Relation:
        raise GradientModeError(TRANSFORMS)

    def is_whole(self, z: Tensor, values: Sequence[Tensor]) -> bool:
        """Whether f depends on nothing that requires grad besides its captured tensors."""
        if not self.exact:
            return False
        if self._whole is None:
            made = Made()
            with torch.enable_grad(), made:
                found = self.evaluate(z.detach(), *(value.detach() for value in values))
            self._whole = all(leaf in made for leaf in leaves_of(found))  # f may differentiate by leaves of its own
        return self._whole


def _native(relation: Any, cotangent: Tensor) -> Tensor:
    """The cotangent to hand to f's own graph."""
    with relation.scope.again():
        return relation.solve(relation.native, cotangent, True)


# ---- refusals

#: Where a transform of torch.func meets a state whose f is a closure.
TRANSFORMS = (
    "torch.func's transforms and forward mode need an f that is a function of its arguments: use "
    "deqcore.fixed_point(fn, z0, args=(x, ...)), which takes the same configuration."
)
_FIRST_ONLY = (
    "this gradient backend gives first derivatives only, in reverse mode, and more was asked for (create_graph=True "
    "and another backward, or torch.func). Use gradient='implicit', which is exact at every order, or "
    "gradient='phantom' or 'one_step', whose graphs can be differentiated again."
)
_UNSEEN = (
    "a second derivative was asked for, and f uses a tensor in a way that can't be followed (a custom "
    "autograd.Function or TorchScript is given a tensor from outside of f). Hand that tensor to f in args=(...) and "
    "use deqcore.fixed_point, or use gradient='unrolled' or 'phantom', whose graphs can be differentiated again."
)


def refuse_nested_forward_mode() -> None:
    """Raise where a result would be silently wrong."""
    if forward_levels() > 1:
        raise GradientModeError(
            "forward mode inside of forward mode (jvp of jvp, jacfwd of jacfwd) is silently wrong in torch for custom "
            "functions. Use forward over reverse: torch.func.hessian, jacfwd(jacrev(...)), or jvp of grad."
        )


def _refuse_batched(cotangent: Tensor) -> None:
    if is_batched_cotangent(cotangent):
        raise GradientModeError(
            "several cotangents at once (is_grads_batched=True, vectorize=True) have no solve of their own here. Use "
            "torch.func.jacrev, hessian or vmap with deqcore.fixed_point(fn, z0, args=...), or go through the "
            "cotangents one by one."
        )


class _FirstOrderOnly(torch.autograd.Function):
    """Lets a value through and refuses to be differentiated, in whatever the anchors depend on.

    ``autograd.grad`` runs only what lies between its inputs and outputs: unless all that the value depends on can be
    reached from here, a second derivative would silently lack its part.
    """

    @staticmethod
    def forward(ctx: Any, exact: bool, value: Tensor, *anchors: Tensor) -> Tensor:
        ctx.exact = exact
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise GradientModeError(_UNSEEN if ctx.exact else _FIRST_ONLY)
