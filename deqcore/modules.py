"""What torch's own modules do in a solve: batch statistics are taken once, dropout masks are drawn once."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]  # what all of them derive from
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from .dropout import mask_of
from .scope import SolveScope, current_scope

__all__ = ["Modules", "is_compiled", "watched"]

Evaluate = Callable[[Tensor], Tensor]
#: Buffers that a call in train mode changes.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
#: Dropout that multiplies by a mask.
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Modules:
    """The modules of torch that f calls in one scope, and what they were when it began.

    The kernel can't see into f: it looks which modules are called while f is evaluated for the first time.
    """

    def __init__(self) -> None:
        self.before: dict[nn.Module, dict[str, Tensor]] = {}
        self.dropouts: dict[nn.Module, None] = {}
        self._handles: list[RemovableHandle] = []
        self._inputs: dict[nn.Module, Tensor] = {}
        self._depth = 0

    @contextmanager
    def meeting(self) -> Generator[set[nn.Module]]:
        """Notes the modules that are called meanwhile; the set is of those that keep statistics."""
        met: set[nn.Module] = set()

        def meet(module: nn.Module, args: Any) -> Any:
            if self._scope() is None or not module.training:
                return None
            if isinstance(module, _NormBase) and module.running_mean is not None:
                met.add(module)
                self.before.setdefault(module, _statistics(module))
            elif isinstance(module, DROPOUT) and module not in self.dropouts and module.p > 0:
                self.dropouts[module] = None
                self._mask(module)
                return self._keep_input(module, args)
            return None

        handle = register_module_forward_pre_hook(meet)
        try:
            yield met
        finally:
            handle.remove()

    def restore(self, modules: set[nn.Module]) -> None:
        """Give the modules back the statistics from before the solve: of all evaluations, only the last one counts."""
        for module in modules:
            _put_back(module, self.before[module])

    @contextmanager
    def frozen(self) -> Generator[None]:
        """For evaluations after the solve: masks are those of the solve, and statistics stay as they are."""
        self._depth += 1
        if self._depth > 1 or not (self.before or self.dropouts):
            try:
                yield
            finally:
                self._depth -= 1
            return
        now = {module: _statistics(module) for module in self.before}
        try:
            for module in self.dropouts:
                self._mask(module)
            yield
        finally:
            self._depth -= 1
            self.release()
            for module, values in now.items():
                _put_back(module, values)

    def release(self) -> None:
        """Let go of the modules' hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    def _scope(self) -> SolveScope | None:
        """The scope that these are the modules of, where it is on in this thread; it holds them, not they it."""
        scope = current_scope()
        return scope if scope is not None and scope.modules is self else None

    # ---- dropout

    def _mask(self, module: nn.Module) -> None:
        """Have the module multiply by the solve's mask."""
        if module.inplace:
            self._handles.append(module.register_forward_pre_hook(self._keep_input))
        self._handles.append(module.register_forward_hook(self._masked))

    def _keep_input(self, module: nn.Module, args: Any) -> Any:
        """What the module is to change in place instead of its input."""
        if self._scope() is None or not module.inplace:
            return None
        self._inputs[module] = args[0]
        return (args[0].clone(), *args[1:])

    def _masked(self, module: nn.Module, args: Any, output: Any) -> Any:
        scope = self._scope()
        if scope is None or not module.training:
            return None
        x: Tensor = self._inputs.pop(module, args[0])
        return x * mask_of(scope, module, x, lambda like: type(module).forward(module, torch.ones_like(like)))


def is_compiled(fn: Any) -> bool:
    """Whether `fn` comes from torch.compile: a hook that is soon gone would have it compiled once more."""
    return hasattr(fn, "_torchdynamo_orig_callable") or hasattr(fn, "_orig_mod")


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    found = {name: getattr(module, name) for name in STATISTICS}
    return {name: value.clone() for name, value in found.items() if value is not None}


def _put_back(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        # .data: a graph that holds the buffer doesn't look at it again, and shall not take it for changed.
        getattr(module, name).data.copy_(value)


class _Evaluates(Protocol):
    call: Evaluate


def watched(evaluate: Evaluate, problem: ReferenceType[_Evaluates]) -> Evaluate:
    """`evaluate` for the first call in a solve, which finds out what modules it has to take care of.

    Args:
        evaluate: f on packed states.
        problem: whose `call` this is; it gets what to evaluate from then on.
    """

    def put(call: Evaluate) -> None:
        owner = problem()
        if owner is not None:
            owner.call = call

    def first(z: Tensor) -> Tensor:
        put(evaluate)
        scope = current_scope()
        if scope is None:
            return evaluate(z)
        modules = scope.modules = scope.modules or Modules()
        with modules.meeting() as met:
            fz = evaluate(z)
        if met:

            def again(z: Tensor) -> Tensor:
                modules.restore(met)
                return evaluate(z)

            put(again)
        return fz

    return first
