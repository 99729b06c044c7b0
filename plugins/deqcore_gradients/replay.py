"""A solve's steps once more, recorded by autograd, whole or in checkpointed segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from deqcore import Problem, Solver, SolveScope
from deqcore.report import FLOOR_SPACINGS
from deqcore.tree import map_leaves, take_apart

__all__ = ["Point", "Replay", "changed_since", "checkpointed"]

_hooks: Any = torch._C._autograd  # pyright: ignore  # torch has no public way to ask what saves tensors


class Point(NamedTuple):
    """Where a replay is.

    Attributes:
        z, fz: the state, and f there.
        state: the solver's own.
        reached: the states of samples that are where their solve ended, if not all of them get there together.
        settled: (B, 1) bool, samples whose residual was rounding error once.
    """

    z: Tensor
    fz: Tensor
    state: Any
    reached: Tensor | None
    settled: Tensor


class Replay:
    """The steps of a solve once more, recorded.

    Args:
        problem: f on packed states.
        solver: what made the steps.
        steps: (B,) int64, how many led to each sample's state.
        scope: what was fixed in the solve.
    """

    def __init__(self, problem: Problem, solver: Solver[Any], steps: Tensor, scope: SolveScope) -> None:
        self.problem = problem
        self.solver = solver
        self.steps = steps
        self.scope = scope
        self.last = int(steps.max())
        self.is_common = bool((steps == self.last).all())
        device = steps.device.type
        self._off: Callable[[], Any] = nullcontext
        if torch.is_autocast_enabled(device):  # f is called under it all the same; solvers compute in full precision
            self._off = partial(torch.autocast, device, enabled=False)

    def begin(self, start: Tensor) -> Point | None:
        """The point before the first step; None where nothing has a gradient."""
        with self._off():
            z = self.problem.round(start)
            fz = self.problem(z)
            if not (z.requires_grad or fz.requires_grad):
                return None
            state = self.solver.init(self.problem, z, fz)
            settled = torch.zeros_like(z[:, :1], dtype=torch.bool)
            return Point(z, fz, state, None if self.is_common else z, settled)

    def run(self, at: Point, first: int, last: int) -> Point:
        """The point after the steps from `first` (not made yet) to `last`."""
        problem = self.problem
        with self.scope.again(), self._off():
            for step in range(first + 1, last + 1):
                z, fz, state, reached, settled = at
                settled = settled if state is None else settled | self._is_rounding(z, fz)
                with _Differentiable():
                    z, state, image = self._step(z, fz, state, settled)
                if problem.rounds:
                    z, image = problem.round(z), None
                if reached is not None:
                    reached = torch.where((self.steps == step)[:, None], z, reached)
                if step < self.last:
                    fz = problem(z) if image is None else image
                at = Point(z, fz, state, reached, settled)
        return at

    def _is_rounding(self, z: Tensor, fz: Tensor) -> Tensor:
        norm, eps = torch.linalg.vector_norm, self.problem.eps(z)
        z, fz = z.detach(), fz.detach()
        return norm(fz - z, 2, 1, True) <= FLOOR_SPACINGS * eps * norm(fz, 2, 1, True)

    def _step(self, z: Tensor, fz: Tensor, state: Any, settled: Tensor) -> tuple[Tensor, Any, Tensor | None]:
        """A step of the solver. For samples that are settled, with the derivative of plain iteration: what a solver
        makes of differences that are rounding error, or zero, has none."""
        problem, solver = self.problem, self.solver
        if not bool(settled.any()):
            return solver.step(problem, z, fz, _copy(state, {id(z): z, id(fz): fz}))

        def still(part: Tensor) -> Tensor:
            if part.dim() == 0 or part.shape[0] != len(settled) or not part.requires_grad:
                return part.clone()
            return torch.where(settled.view(-1, *[1] * (part.dim() - 1)), part.detach(), part)

        held = still(z), still(fz)
        found, state, _ = solver.step(problem, *held, _copy(state, {id(z): held[0], id(fz): held[1]}, still))
        plain = found.detach() + (fz - fz.detach())
        return torch.where(settled, plain, found), state, None

    def halves(self, at: Point, first: int, last: int, leaf: int) -> tuple[Point, int]:
        """Checkpoint the first half of what is left, made of halves itself, until no more than `leaf` steps are."""
        while last - first > leaf:
            middle = first + (last - first) // 2
            at = checkpointed(partial(self._whole, leaf=leaf), at, first, middle)
            first = middle
        return at, first

    def _whole(self, at: Point, first: int, last: int, leaf: int) -> Point:
        at, first = self.halves(at, first, last, leaf)
        return self.run(at, first, last)


def checkpointed(run: Callable[[Point, int, int], Point], at: Point, first: int, last: int) -> Point:
    """``run(at, first, last)``, whose graph is made again in the backward.

    Tensors are handed to torch as arguments of their own: those inside of another one are never let go of, also in
    segments inside of segments.
    """
    tensors, rebuilt = take_apart(at)
    call = partial(_run_again, run, rebuilt, first, last)
    return checkpoint(call, *tensors, use_reentrant=False)  # pyright: ignore


def _run_again(
    run: Callable[[Point, int, int], Point],
    rebuilt: Callable[[Sequence[Tensor]], Any],
    first: int,
    last: int,
    *tensors: Tensor,
) -> Point:
    return run(rebuilt(tensors), first, last)


def _copy(state: Any, given: dict[int, Tensor], copy: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    """A solver's state with its tensors copied, as the step may write to them and autograd needs them as they were.

    Args:
        state: any pytree, or a dataclass of pytrees.
        given: what to put in the place of the tensors of these ids; some solvers look whether theirs is the present
            state.
        copy: what makes a copy.
    """
    return map_leaves(state, Tensor, lambda t: given[id(t)] if id(t) in given else given.setdefault(id(t), copy(t)))


class _Differentiable(TorchFunctionMode):
    """Lets steps that save memory be differentiated: ``op(..., out=buffer)``, which autograd refuses, becomes a copy of
    the result to the buffer, and what an operation has saved of its own result, to differentiate it, stays unchanged
    when the step goes on to change that result in place."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        out = given.pop("out", None)
        if isinstance(out, Tensor):
            return out.copy_(func(*args, **given))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, tuple):
            parts = [_apart(part) for part in result]
            changed = any(a is not b for a, b in zip(parts, result, strict=True))
            return type(result)(parts) if changed else result
        return _apart(result)


def _apart(result: Any) -> Any:
    """`result`, or a copy where the operation that it comes from needs it for its derivative."""
    saved = isinstance(result, Tensor) and hasattr(result.grad_fn, "_raw_saved_result")
    return result.clone() if saved else result


# ---- what a step did to what autograd had saved


def changed_since(born: int, z: Tensor) -> bool:
    """Whether a node in the graph of `z`, made since `born`, has saved a tensor that was changed afterwards.

    False where a hook looks after saved tensors (an outer checkpoint): to unpack them may be to compute them.
    """
    if _hooks._top_saved_tensors_default_hooks(False) is not None:
        return False
    waiting: list[Any] = [z.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node._sequence_nr() < born or hasattr(node, "variable"):
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_saved_"):
                try:
                    getattr(node, name)
                except RuntimeError:
                    return True
        waiting += [following for following, _ in node.next_functions]
    return False
