"""Pytrees as the state needs them: dataclasses opened, dicts equal whatever the order of their keys."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["LEAF", "arrange", "close_records", "describe", "flatten", "flatten_with_paths", "map_leaves", "take_apart"]

#: Structure of a single tensor.
LEAF = pytree.tree_flatten(0)[1]
DICTS = (dict, OrderedDict, defaultdict)


class _Record:
    """Stands in for a dataclass instance while torch's pytree walks over it."""

    def __init__(self, cls: type, fields: dict[str, Any]) -> None:
        self.cls = cls
        self.fields = fields


def _record_flatten(record: _Record) -> tuple[list[Any], Any]:
    return list(record.fields.values()), (record.cls, tuple(record.fields))


def _record_unflatten(children: Any, context: Any) -> _Record:
    cls, names = context
    return _Record(cls, dict(zip(names, children, strict=True)))


def _record_keys(record: _Record) -> tuple[list[tuple[Any, Any]], Any]:
    keys = [(pytree.GetAttrKey(name), value) for name, value in record.fields.items()]
    return keys, (record.cls, tuple(record.fields))


pytree.register_pytree_node(
    _Record,
    _record_flatten,
    _record_unflatten,
    flatten_with_keys_fn=_record_keys,
    serialized_type_name="deqcore.Record",
)


def _is_dataclass(node: object) -> bool:
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def _open(tree: Any) -> Any:
    """`tree` with every dataclass instance replaced by a record of its fields."""

    def enter(node: Any) -> Any:
        if not _is_dataclass(node):
            return node
        return _Record(type(node), {f.name: _open(getattr(node, f.name, None)) for f in dataclasses.fields(node)})

    return pytree.tree_map(enter, tree, is_leaf=_is_dataclass)


def close_records(tree: Any) -> Any:
    """`tree` with every record turned back into an instance of its dataclass, without running its ``__init__``."""

    def leave(node: Any) -> Any:
        if not isinstance(node, _Record):
            return node
        instance = object.__new__(node.cls)  # __init__ would run the user's checks again, on every evaluation
        for name, value in node.fields.items():
            object.__setattr__(instance, name, close_records(value))
        return instance

    return pytree.tree_map(leave, tree, is_leaf=lambda node: isinstance(node, _Record))


def map_leaves(tree: Any, kind: type, fn: Callable[[Any], Any]) -> Any:
    """`tree`, a pytree or a dataclass of pytrees, with fn(leaf) in place of every leaf of this kind.

    The usual containers are walked here: torch's walk leaves a cycle of its own behind, which holds tensors until
    garbage is collected.
    """
    if isinstance(tree, kind):
        return fn(tree)
    if type(tree) in (list, tuple):
        return type(tree)([map_leaves(part, kind, fn) for part in tree])
    if type(tree) is dict:
        return {key: map_leaves(part, kind, fn) for key, part in tree.items()}
    if _is_dataclass(tree):
        made = object.__new__(type(tree))  # __init__ may take something else
        for field in dataclasses.fields(tree):
            object.__setattr__(made, field.name, map_leaves(getattr(tree, field.name), kind, fn))
        return made
    if type(tree) not in pytree.SUPPORTED_NODES and not isinstance(tree, tuple):
        return tree
    leaves, structure = pytree.tree_flatten(tree, is_leaf=lambda part: isinstance(part, kind))
    if structure.is_leaf():
        return tree
    return pytree.tree_unflatten([map_leaves(leaf, kind, fn) for leaf in leaves], structure)


class _Slot(NamedTuple):
    """Where a tensor belongs."""

    place: int


def take_apart(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors in `tree`, each once, and what puts others in their places; that holds none of them."""
    places: dict[int, _Slot] = {}
    tensors: list[Tensor] = []

    def slot(tensor: Tensor) -> _Slot:
        if id(tensor) not in places:
            places[id(tensor)] = _Slot(len(tensors))
            tensors.append(tensor)
        return places[id(tensor)]

    frame = map_leaves(tree, Tensor, slot)
    return tensors, lambda given: map_leaves(frame, _Slot, lambda slot: given[slot.place])


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves and structure."""
    return pytree.tree_flatten(_open(tree))


def flatten_with_paths(tree: Any) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Leaves with the path of each as text (``['h'][0]``), and the structure."""
    with_path, spec = pytree.tree_flatten_with_path(_open(tree))
    return [(pytree.keystr(path), leaf) for path, leaf in with_path], spec


def arrange(tree: Any, spec: pytree.TreeSpec) -> tuple[list[Any], pytree.TreeSpec]:
    """As :func:`flatten`; what differs from `spec` only in a dict's order, or a list for a tuple, is made equal."""
    template = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    return pytree.tree_flatten(_arrange(template, _open(tree)))


def _arrange(like: Any, tree: Any) -> Any:
    if isinstance(like, _Record):
        if not isinstance(tree, _Record) or like.cls is not tree.cls:
            return tree
        return _Record(like.cls, {name: _arrange(like.fields[name], tree.fields[name]) for name in like.fields})
    if type(like) in DICTS:
        if type(tree) not in DICTS or like.keys() != tree.keys():
            return tree
        made = {key: _arrange(like[key], tree[key]) for key in like}
        return defaultdict(like.default_factory, made) if type(like) is defaultdict else type(like)(made)
    same = type(like) is type(tree) or {type(like), type(tree)} == {list, tuple}
    if not isinstance(like, list | tuple) or not same or len(like) != len(tree):  # pyright: ignore[reportUnknownArgumentType]
        return tree
    pairs: Any = zip(like, tree, strict=True)  # pyright: ignore[reportUnknownArgumentType]
    make: Callable[..., Any] = getattr(like, "_make", type(like))  # a named tuple takes its parts one by one
    return make([_arrange(a, b) for a, b in pairs])


def describe(value: object) -> str:
    """`value` in a few words, for error texts."""
    if isinstance(value, Tensor):
        return f"{_a(str(value.dtype).removeprefix('torch.'))} tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, int | float):
        return f"{value!r} ({type(value).__name__})"
    return _a(type(value).__name__)


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
