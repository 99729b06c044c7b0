"""What f depends on besides its state, and f as a function of both."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deqcore import GradientModeError, Problem, SolveScope, current_scope
from deqcore.captures import Closure, next_node, tensors_in

__all__ = ["Evaluation", "Inputs", "Watched"]

_UNSEEN = (
    "gradient='reversible' evaluates f again in the backward, with other tensors in place of those that f uses, and f "
    "hands one that has a history (an encoder's output, say) straight to a custom autograd.Function or to TorchScript, "
    "where nothing can take its place. Give it to f in args: deq(fn, z0, args=(x,)); or use gradient='implicit'."
)


class Inputs:
    """Finds the tensors that require grad and that f uses but did not make: parameters, closures, args.

    Every evaluation of the forward is watched, as another parameter may come into play at any of them.

    Args:
        problem: f on packed states.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._seen: dict[int, weakref.ref[Tensor]] = {}  # weak: what an evaluation makes for itself is forgotten

    def watch(self, call: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """`call(z)`, with note taken of what it uses."""
        uses = _Uses()
        with uses:
            fz = call(z)
        for tensor in uses.found.values():
            known = self._seen.get(id(tensor))
            if known is None or known() is not tensor:
                self._seen[id(tensor)] = weakref.ref(tensor)
        return fz

    def found(self, z: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that can be replaced, and leaves that can't; by one more evaluation, at `z`.

        Raises:
            GradientModeError: some other tensor can't be replaced.
        """
        here = {id(tensor): tensor for tensor in tensors_in(self.problem.args) if tensor.requires_grad}
        for reference in self._seen.values():
            tensor = reference()
            if tensor is not None and tensor.requires_grad:
                here.setdefault(id(tensor), tensor)
        replaceable = list(here.values())
        scope = current_scope() or SolveScope()
        # With the others in their place: what is given to a custom function is seen inside of it, but not replaced.
        evaluation = Evaluation(self.problem, replaceable, replaceable, [True] * len(replaceable), scope)
        since = next_node()
        _, leaf, fz = evaluation.recorded(z)
        return replaceable, _other_leaves(fz, since, [leaf, *evaluation.aliases])


class _Uses(TorchFunctionMode):
    """While it is on, notes every tensor that requires grad and that no function of torch has made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            if tensor.requires_grad and id(tensor) not in self._made:
                self.found[id(tensor)] = tensor
        out = func(*args, **kwargs)
        for tensor in tensors_in((out,)):  # only where f switches grad on for itself
            if tensor.requires_grad and id(tensor) not in self.found:
                self._made[id(tensor)] = tensor
        return out


def _other_leaves(fz: Tensor, since: int, known: Sequence[Tensor]) -> list[Tensor]:
    """Leaves in the graph of `fz`, made since that node, besides the `known` ones.

    Raises:
        GradientModeError: something in it was there before and is no leaf.
    """
    leaves = {id(tensor) for tensor in known}
    waiting: list[Any] = [fz.grad_fn] if fz.grad_fn is not None else []
    visited: set[Any] = set(waiting)
    others: dict[int, Tensor] = {}
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if id(leaf) not in leaves:
                others[id(leaf)] = leaf
            continue
        if node._sequence_nr() < since:
            raise GradientModeError(_UNSEEN)
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                waiting.append(following)
    return list(others.values())


class Watched(Problem):
    """A problem whose evaluations are watched, and whose states are not rounded to what f sees.

    A step that rounds can't be undone; f casts what it is given by itself.
    """

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        super().__init__(problem.call, problem.spec)
        self.__dict__.update(problem.__dict__)
        self.problem = problem
        self.inputs = inputs

    rounds = False  # type: ignore[assignment]

    def round(self, z: Tensor) -> Tensor:
        return z

    def __call__(self, z: Tensor) -> Tensor:
        self.nfe += 1
        return self.inputs.watch(self.call, z)


class Evaluation:
    """f with its inputs replaced by leaves of this backward's own, and the sums of the gradients in them.

    Args:
        problem: f on packed states; evaluations and products are counted there.
        replaceable: tensors of f's own; see :meth:`Inputs.found`.
        values: what they were, and further leaves that f uses as they are.
        wanted: for each of the values, whether its gradient is asked for.
        scope: what was fixed in the solve.
    """

    def __init__(
        self,
        problem: Problem,
        replaceable: Sequence[Tensor],
        values: Sequence[Tensor],
        wanted: Sequence[bool],
        scope: SolveScope,
    ) -> None:
        self.problem = problem
        self.scope = scope
        self.nfe = self.nvjp = 0
        count = len(replaceable)
        self.aliases = [
            value.detach().requires_grad_(want) for value, want in zip(values[:count], wanted, strict=False)
        ]
        self.closure = Closure(_bound(problem, replaceable, self.aliases), replaceable)
        self.sums: list[Tensor | None] = [None] * len(wanted)
        every = [*self.aliases, *values[count:]]
        self._where = [k for k, want in enumerate(wanted) if want]
        self._sources = [every[k] for k in self._where]

    def plain(self, z: Tensor) -> Tensor:
        """f(z), without a graph."""
        self._count()
        with torch.no_grad(), self.scope.again():
            return self.closure(z, *self.aliases)

    def recorded(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(z); and z and f(z) as :meth:`pull` takes them."""
        self._count()
        with torch.enable_grad(), self.scope.again():
            z = z.detach().requires_grad_()
            fz = self.closure(z, *self.aliases)
        return fz.detach(), z, fz

    def pull(self, z: Tensor, fz: Tensor, cotangent: Tensor) -> Tensor:
        """J^T @ cotangent; the products with f's derivatives in its inputs are added to their sums."""
        self.nvjp += 1
        self.problem.nvjp += 1
        if not fz.requires_grad:
            return torch.zeros_like(z)
        product, *parts = torch.autograd.grad(fz, [z, *self._sources], cotangent, allow_unused=True)
        for k, part in zip(self._where, parts, strict=True):
            if part is not None:  # pyright: ignore[reportUnnecessaryComparison]
                total = self.sums[k]
                self.sums[k] = part.clone() if total is None else total.add_(part)
        return torch.zeros_like(z) if product is None else product  # pyright: ignore[reportUnnecessaryComparison]

    def _count(self) -> None:
        self.nfe += 1
        self.problem.nfe += 1


def _bound(problem: Problem, replaceable: Sequence[Tensor], aliases: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """f with the aliases in its args; what it closes over is replaced while it runs."""
    if problem.fn is None or problem.spec is None:
        return problem.call
    table = {id(tensor): alias for tensor, alias in zip(replaceable, aliases, strict=True)}
    return problem.bind(problem.spec, tuple(_replaced(item, table) for item in problem.args))


def _replaced(item: Any, table: dict[int, Tensor]) -> Any:
    """`item` with the tensors of `table` in it. (Torch's pytrees would leave a cycle behind at every call.)"""
    if isinstance(item, Tensor):
        return table.get(id(item), item)
    if type(item) in (list, tuple):
        return type(item)(_replaced(part, table) for part in item)
    if type(item) is dict:
        return {key: _replaced(part, table) for key, part in item.items()}
    return item
