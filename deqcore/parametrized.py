"""Parametrizations on and off a module's tensors, shared ones included, and copies of modules that have them."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Spot", "parametrizations_on", "parametrized_tensors", "put_on", "take_off"]


class Spot(NamedTuple):
    """One tensor of one module."""

    path: str
    module: nn.Module
    tensor: str
    dim: int | None

    def __str__(self) -> str:
        return f"{self.path}.{self.tensor}" if self.path else self.tensor


def parametrized_tensors(module: nn.Module) -> list[str]:
    """Names of the tensors of a parametrized module that are made from others."""
    return list(cast("nn.ModuleDict", module.parametrizations))


def parametrizations_on(spot: Spot) -> parametrize.ParametrizationList:
    """The parametrizations of a tensor, with the tensors they make it from."""
    found: Any = spot.module.parametrizations
    return found[spot.tensor]


def put_on(groups: list[tuple[list[Spot], nn.Module]]) -> None:
    """Parametrize each group's tensor, which all of the group share, so that they go on sharing it.

    Raises:
        ValueError, RuntimeError: a parametrization does not fit its tensor; all tensors are then as they were.
    """
    # Registering may give a parameter other storage, so the tensor that holds its values is kept as well.
    before = [(spot, getattr(spot.module, spot.tensor)) for group, _ in groups for spot in group]
    values = [parameter.detach() for _, parameter in before]
    done: list[Spot] = []
    try:
        for group, parametrization in groups:
            _put_on_one(group, parametrization, done)
    except (ValueError, RuntimeError):
        take_off(done)
        for (spot, parameter), value in zip(before, values, strict=True):
            parameter.data = value
            setattr(spot.module, spot.tensor, parameter)
        raise


def _put_on_one(group: list[Spot], parametrization: nn.Module, done: list[Spot]) -> None:
    first, *others = group
    parametrize.register_parametrization(first.module, first.tensor, parametrization)
    done.append(first)
    _make_copyable(first.module)
    for spot in others:
        parametrize.register_parametrization(spot.module, spot.tensor, nn.Identity(), unsafe=True)
        cast("nn.ModuleDict", spot.module.parametrizations)[spot.tensor] = parametrizations_on(first)
        done.append(spot)
        _make_copyable(spot.module)


def take_off(spots: list[Spot]) -> None:
    """Make each spot's tensor, as it is, a plain parameter again; shared ones stay shared."""
    groups: dict[int, list[Spot]] = {}
    for spot in spots:
        groups.setdefault(id(parametrizations_on(spot)), []).append(spot)
    for first, *others in groups.values():
        normed = parametrizations_on(first).eval()  # no power iteration: the weight stays what it is
        single: bool = normed.is_tensor
        wants_grad = any(parameter.requires_grad for parameter in normed.parameters(recurse=False))
        parametrize.remove_parametrizations(first.module, first.tensor)
        weight: Tensor = getattr(first.module, first.tensor)
        if not isinstance(weight, nn.Parameter):  # torch makes a buffer of what needed no grad
            weight = nn.Parameter(weight.detach())
        setattr(first.module, first.tensor, weight.requires_grad_(wants_grad))
        for spot in others:
            parametrize.remove_parametrizations(spot.module, spot.tensor, leave_parametrized=not single)
            setattr(spot.module, spot.tensor, weight)


# ---- copies


def _make_copyable(module: nn.Module) -> None:
    """Let pickle and copy handle a parametrized module, whose class torch makes on the fly and refuses to pickle.

    torch's own deepcopy gives both copies one class, so that taking a norm off one would break the other.
    """
    made = type(module)
    made.__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]  # pyright: ignore[reportAttributeAccessIssue]
    if "__deepcopy__" in vars(made):
        del made.__deepcopy__  # pyright: ignore[reportAttributeAccessIssue]


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    base: Any = parametrize.type_before_parametrizations(module)
    return _restore, (base, tuple(parametrized_tensors(module))), base.__getstate__(module)


def _restore(base: type[nn.Module], tensors: tuple[str, ...]) -> nn.Module:
    """A bare module of class `base`, parametrized at these tensors, for pickle to fill. Pickles hold this name."""
    module: nn.Module = base.__new__(base)
    nn.Module.__init__(module)
    for tensor in tensors:
        module.register_parameter(tensor, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(module, tensor, nn.Identity(), unsafe=True)
    _make_copyable(module)
    return module
