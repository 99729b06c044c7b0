"""Products with a function's Jacobian that can be differentiated again, also inside of torch.func's transforms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .errors import GradientModeError

__all__ = [
    "alive",
    "forward_levels",
    "has_tangent",
    "in_forward_mode",
    "is_batched_cotangent",
    "is_wrapped",
    "plain",
    "pull",
    "push",
    "record",
    "refuse_tracing",
    "settled",
    "transforming",
    "varies",
    "without_gradient",
]

Function = Callable[..., Tensor]

_functorch: Any = torch._C._functorch  # pyright: ignore  # torch has no public way to ask what transforms are on


_vjp: Any = torch.func.vjp


def transforming() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap...) is on."""
    return _functorch.peek_interpreter_stack() is not None


def forward_levels() -> int:
    """How many forward-mode transforms of torch.func are on, one inside the other."""
    stack: Any = _functorch.get_interpreter_stack() or ()
    return sum(level.key() == _functorch.TransformType.Jvp for level in stack)


def is_batched_cotangent(tensor: Tensor) -> bool:
    """Whether the tensor comes from a backward over several cotangents at once (``is_grads_batched=True``)."""
    return bool(_functorch.is_legacy_batchedtensor(tensor))


def alive(tensor: Tensor) -> Tensor:
    """The tensor without transforms that are over: a backward may be asked for after its ``torch.func.vjp``."""
    return _functorch.unwrap_if_dead(tensor)


def without_gradient(tensor: Tensor) -> Tensor:
    """The tensor as a constant, for transforms, too; what is mapped over stays so."""
    while is_wrapped(tensor) and not _functorch.is_batchedtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.detach()


def settled(products: Sequence[Tensor | None], sources: Iterable[Tensor]) -> list[Tensor | None]:
    """The products, without a graph where none of what they were made of has one."""
    if transforming() or any(source.requires_grad for source in sources):
        return list(products)
    return [None if product is None else product.detach() for product in products]


def refuse_tracing() -> None:
    """Raise where operations are only recorded, of which none would say when to stop.

    Raises:
        GradientModeError: they are.
    """
    proxies: Any = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if proxies is not None and proxies.get_proxy_mode() is not None:
        raise GradientModeError(
            "a solve can't be recorded by torch.func.linearize or make_fx: how many steps it takes depends on values. "
            "Use torch.func.jvp, or vjp, at each call."
        )


def plain(tensor: Tensor) -> Tensor:
    """The tensor without any transform, without gradients: of those mapped over, the first one's."""
    while is_wrapped(tensor):
        dim = _functorch.maybe_get_bdim(tensor) if _functorch.is_batchedtensor(tensor) else None
        tensor = _functorch.get_unwrapped(tensor)
        tensor = tensor if dim is None else tensor.select(dim, 0)
    return tensor.detach()


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is on."""
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward mode follows the tensor."""
    return in_forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


def varies(tensor: Tensor) -> bool:
    """Whether autograd, forward mode or a transform of torch.func follows the tensor."""
    while True:
        if tensor.requires_grad or _functorch.is_batchedtensor(tensor) or has_tangent(tensor):
            return True
        if not is_wrapped(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a transform of torch.func."""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def pull(
    fn: Function, primals: Sequence[Tensor], cotangent: Tensor, wanted: Sequence[bool] | None = None
) -> list[Tensor | None]:
    """J^T @ cotangent for each of `primals`, or those `wanted`; None where `fn` does not depend on it.

    With grad enabled the result can be differentiated, in `primals`, the cotangent and, by autograd, whatever `fn`
    closes over.
    """
    where = [k for k, primal in enumerate(primals) if _is_continuous(primal) and (wanted is None or wanted[k])]
    found: list[Tensor | None] = [None] * len(primals)
    if transforming():
        _, back = _vjp(_in_some(fn, primals, where), *(primals[k] for k in where))
        products: Sequence[Tensor | None] = back(cotangent)
    else:
        aliases, out = _record(fn, primals, where)
        if not out.requires_grad:
            return found
        products = torch.autograd.grad(out, aliases, cotangent, create_graph=torch.is_grad_enabled(), allow_unused=True)
    for k, product in zip(where, products, strict=True):
        found[k] = product
    return found


def push(fn: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    """J @ tangents, a missing tangent being zero, as the vjp of the vjp: any autograd function in `fn` can do that."""
    where = [k for k, tangent in enumerate(tangents) if tangent is not None and _is_continuous(primals[k])]
    given = [tangents[k] for k in where]
    if transforming():
        out, back = _vjp(_in_some(fn, primals, where), *(primals[k] for k in where))
        _, forth = _vjp(back, torch.zeros_like(out))
        return forth(tuple(given))[0]
    aliases, out = _record(fn, primals, where)
    if not out.requires_grad or not where:
        return torch.zeros_like(out)
    with torch.enable_grad():
        dummy = torch.zeros_like(out, requires_grad=True)
        pulled = torch.autograd.grad(out, aliases, dummy, create_graph=True, allow_unused=True)
    pairs = [(p, t) for p, t in zip(pulled, given, strict=True) if p is not None and p.requires_grad]  # pyright: ignore
    if not pairs:
        return torch.zeros_like(out)
    (product,) = torch.autograd.grad(
        [p for p, _ in pairs],
        dummy,
        [t for _, t in pairs],  # type: ignore[misc]
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    return torch.zeros_like(out) if product is None else product  # pyright: ignore[reportUnnecessaryComparison]


def record(fn: Function, primals: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Tensors that stand for the primals, and `fn` of them with its graph."""
    where = [k for k, primal in enumerate(primals) if _is_continuous(primal)]
    aliases, out = _record(fn, primals, where)
    every = list(primals)
    for k, alias in zip(where, aliases, strict=True):
        every[k] = alias
    return every, out


def _in_some(fn: Function, primals: Sequence[Tensor], where: Sequence[int]) -> Function:
    """`fn` in the primals at `where` alone."""

    def call(*some: Tensor) -> Tensor:
        every = list(primals)
        for k, value in zip(where, some, strict=True):
            every[k] = value
        return fn(*every)

    return call


def _record(fn: Function, primals: Sequence[Tensor], where: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Tensors that stand for the primals at `where`, and `fn` of them with its graph.

    With grad enabled they hang on the primals: what is found can be differentiated further.
    """
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [
            primals[k].view_as(primals[k])
            if further and primals[k].requires_grad
            else primals[k].detach().requires_grad_()
            for k in where
        ]
        return aliases, _in_some(fn, primals, where)(*aliases)
