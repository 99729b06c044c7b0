"""The tensors that f uses and did not make: finding them, and calling f with others in their place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .products import is_wrapped

__all__ = ["Captures", "Closure", "Made", "leaves_of", "mark_own", "next_node", "substituted", "tensors_in"]

#: Attribute of the leaves that the kernel itself makes to differentiate by: when that was. An f that holds a DEQ does
#: not capture those of the inner one; the f of the inner one does capture the outer one's.
MADE_AT = "_deqcore_made_at"


class _Active(threading.local):
    def __init__(self) -> None:
        self.tables: list[Mapping[int, Tensor]] = []


_active = _Active()


def mark_own(leaf: Tensor) -> Tensor:
    """`leaf`, known from now on as one that the kernel made just now."""
    setattr(leaf, MADE_AT, next_node())
    return leaf


def next_node() -> int:
    """The number of the next node of autograd's graph in this thread; a thread counts them in order."""
    with torch.enable_grad():
        return torch.ones((), requires_grad=True).view(()).grad_fn._sequence_nr()  # type: ignore[union-attr]


def tensors_in(items: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in a function's arguments, nested lists, tuples and dicts included."""
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, list | tuple):
            yield from tensors_in(item)
        elif isinstance(item, dict):
            yield from tensors_in(item.values())


class Captures(TorchFunctionMode):
    """While it is on, notes every tensor that requires grad and was there before: parameters, inputs, buffers.

    Only what goes through torch's functions is seen; not what is handed straight to ``autograd.Function.apply`` or
    TorchScript.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._since = next_node()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in(args):
            if tensor.requires_grad and id(tensor) not in self.found:
                self._note(tensor)
        if not kwargs:
            return func(*args)
        for tensor in tensors_in(kwargs.values()):
            if tensor.requires_grad and id(tensor) not in self.found:
                self._note(tensor)
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor) -> None:
        node: Any = tensor.grad_fn
        made_at: int = getattr(tensor, MADE_AT, 0) if node is None else node._sequence_nr()
        if made_at <= self._since and not is_wrapped(tensor):
            self.found[id(tensor)] = tensor

    @property
    def tensors(self) -> list[Tensor]:
        """What was found, in the order of first use."""
        return list(self.found.values())


class Made(TorchFunctionMode):
    """While it is on, keeps every tensor that a function of torch returns; ``tensor in made`` asks for one."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._kept.update((id(tensor), tensor) for tensor in tensors_in((out,)))
        return out

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._kept


def leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """The leaves that the tensor has a gradient to, as autograd's graph has them."""
    waiting: list[Any] = [] if tensor.grad_fn is None else [tensor.grad_fn]
    if tensor.grad_fn is None and tensor.requires_grad:
        yield tensor
    seen: set[Any] = set(waiting)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


class _Substitution(TorchFunctionMode):
    """Hands every function of torch the tensors of `table` in place of those whose ids they are listed under."""

    def __init__(self, table: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.table = table

    def __enter__(self) -> Any:
        _active.tables.append(self.table)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _active.tables.pop()
        leave: Any = super().__exit__  # which torch leaves unannotated
        leave(*exception)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._swap(args), **{key: self._swap_one(value) for key, value in (kwargs or {}).items()})

    def _swap(self, items: Sequence[Any]) -> list[Any]:
        return [self._swap_one(item) for item in items]

    def _swap_one(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.table.get(id(item), item)
        if type(item) is list:
            return self._swap(item)
        if type(item) is tuple:
            return tuple(self._swap(item))
        if type(item) is dict:
            return {key: self._swap_one(value) for key, value in item.items()}
        return item


def substituted(tensor: Tensor) -> Tensor:
    """What stands for `tensor` in the evaluations that are on; ``autograd.Function.apply`` does not ask by itself."""
    for table in reversed(_active.tables):
        tensor = table.get(id(tensor), tensor)
    return tensor


class Closure:
    """f as a function of the state and of the tensors it captured.

    Args:
        call: f on packed states.
        captured: the tensors.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], captured: Sequence[Tensor]) -> None:
        self.call = call
        self.captured = list(captured)  # kept: an id is one tensor's only as long as that lives

    def __call__(self, z: Tensor, *values: Tensor) -> Tensor:
        table = {id(tensor): value for tensor, value in zip(self.captured, values, strict=True)}
        with _Substitution(table):
            return self.call(z)
