"""A pytree of tensors as one (batch, features) tensor, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import FunctionError, FunctionTypeError, StateError, StateTypeError

__all__ = ["StateSpec"]


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
    _Record, _record_flatten, _record_unflatten, flatten_with_keys_fn=_record_keys, serialized_type_name="deqcore.Record"
)


def _is_dataclass(node: object) -> bool:
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def _open(tree: Any) -> Any:
    """`tree` with every dataclass instance that torch doesn't know replaced by a record of its fields."""

    def enter(node: Any) -> Any:
        if not _is_dataclass(node):
            return node
        return _Record(type(node), {f.name: _open(getattr(node, f.name)) for f in dataclasses.fields(node)})

    return pytree.tree_map(enter, tree, is_leaf=_is_dataclass)


def _close(tree: Any) -> Any:
    def leave(node: Any) -> Any:
        if not isinstance(node, _Record):
            return node
        instance = object.__new__(node.cls)  # __init__ would run the user's checks on packed leaves again
        for name, value in node.fields.items():
            object.__setattr__(instance, name, _close(value))
        return instance

    return pytree.tree_map(leave, tree, is_leaf=lambda node: isinstance(node, _Record))


def _flatten(tree: Any) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Leaves with the path of each as text (``['h'][0]``), and the structure."""
    opened = _open(tree)
    with_path, spec = pytree.tree_flatten_with_path(opened)
    return [(pytree.keystr(path), leaf) for path, leaf in with_path], spec


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})" if value is None or isinstance(value, int | float) else type(value).__name__


def _like(tree: Any) -> Any:
    """Lists and tuples of states are one structure: TorchDEQ programs return either."""
    return tuple(tree) if type(tree) in (list, tuple) else tree


class StateSpec:
    """What a state looks like, and how it becomes one real tensor of shape (batch, features).

    The packed tensor has the widest dtype of the leaves, float32 at least, so that no solver ever accumulates in half
    precision; every leaf gets its own dtype back when unpacked. Complex leaves are packed as pairs of real numbers.

    Args:
        z0: a tensor, a tuple or list of tensors, or any pytree (dict, nested, dataclass) of floating point or complex
            tensors that share device and their first `batch_dims` sizes.
        batch_dims: leading dimensions that count separate equilibria. 1, the default, is one equilibrium a row; 0 takes
            the whole state as one equilibrium, as in a graph network, whose nodes depend on each other.

    Raises:
        StateTypeError: a leaf is not a tensor, or is an integer or boolean one.
        StateError: no leaves, an empty batch, different batch sizes or devices.
    """

    def __init__(self, z0: Any, batch_dims: int = 1) -> None:
        self.as_arguments = type(z0) in (list, tuple)
        named, self.tree = ([("", z0)], pytree.treespec_leaf()) if isinstance(z0, Tensor) else _flatten(_like(z0))
        if not named:
            raise StateError(f"z0 holds no tensor: got {z0!r}. Give a tensor, or a tuple, list, dict or dataclass of tensors.")
        for path, leaf in named:
            self._check_leaf(path, leaf)
        leaves: list[Tensor] = [leaf for _, leaf in named]
        self.paths = [path for path, _ in named]
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.device = leaves[0].device
        self.batch_dims = batch_dims
        self.batch_shape = self._batch_shape()
        self.batch = math.prod(self.batch_shape)
        self._check_whole(leaves)
        self.dtype = torch.float32
        for leaf in leaves:
            self.dtype = torch.promote_types(self.dtype, leaf.dtype.to_real())
        self.sizes = [
            leaf.numel() // self.batch * (2 if leaf.is_complex() else 1) for leaf in leaves
        ]
        self.features = sum(self.sizes)
        #: True where some leaf is narrower than the packed tensor, so that unpacking rounds.
        self.rounds = any(dtype.to_real() != self.dtype for dtype in self.dtypes)
        #: Spacing of the coarsest leaf dtype at 1: no residual below a few of these means anything.
        self.eps = max(torch.finfo(dtype).eps for dtype in self.dtypes)
        self.single = self.tree.is_leaf()
        self._plain = self.single and not self.rounds and not self.dtypes[0].is_complex

    @staticmethod
    def _check_leaf(path: str, leaf: Any) -> None:
        if not isinstance(leaf, Tensor):
            raise StateTypeError(
                f"z0{path} is {_describe(leaf)}; a state holds floating point or complex tensors only. "
                "Keep what f needs besides the state in its closure or in args=(...)."
            )
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise StateTypeError(
                f"z0{path} is {_describe(leaf)}; a state must be floating point or complex. Convert it with .float()."
            )

    def _batch_shape(self) -> torch.Size:
        k = self.batch_dims
        if k == 1 and all(len(shape) == 0 for shape in self.shapes):
            return torch.Size()  # a scalar equation is a batch of one
        for path, shape in zip(self.paths, self.shapes, strict=True):
            if len(shape) < k:
                raise StateError(
                    f"z0{path} has shape {tuple(shape)}, which has no room for batch_dims={k} batch dimension(s). "
                    "Set batch_dims=0 to solve for the whole state as one equilibrium."
                )
        found = {tuple(shape[:k]) for shape in self.shapes}
        if len(found) > 1:
            listing = ", ".join(f"z0{p}: {tuple(s)}" for p, s in zip(self.paths, self.shapes, strict=True))
            raise StateError(
                f"the parts of z0 have different batch sizes ({listing}); with batch_dims={k} the first {k} size(s) must "
                "agree. Set batch_dims=0 to solve for the whole state as one equilibrium."
            )
        return torch.Size(found.pop())

    def _check_whole(self, leaves: Sequence[Tensor]) -> None:
        if self.batch == 0 or any(leaf.numel() == 0 for leaf in leaves):
            listing = ", ".join(f"z0{p}: {tuple(s)}" for p, s in zip(self.paths, self.shapes, strict=True))
            raise StateError(f"z0 is empty ({listing}); there is nothing to solve for. Skip the call for an empty batch.")
        devices = {str(leaf.device) for leaf in leaves}
        if len(devices) > 1:
            raise StateError(f"the parts of z0 are on different devices: {', '.join(sorted(devices))}. Move them to one.")

    # ---- packing

    def pack(self, tree: Any) -> Tensor:
        """A state of this structure as a (batch, features) tensor; dtypes are cast, nothing is checked."""
        if self.single:
            return self._pack_leaf(tree)
        leaves = pytree.tree_leaves(_open(_like(tree)))
        return torch.cat([self._pack_leaf(leaf) for leaf in leaves], dim=1)

    def _pack_leaf(self, leaf: Tensor) -> Tensor:
        if leaf.is_complex():
            leaf = torch.view_as_real(leaf.resolve_conj())
        return leaf.reshape(self.batch, -1).to(self.dtype)

    def unpack(self, z: Tensor) -> Any:
        """The state that packed tensor `z` stands for, with every leaf's own shape and dtype."""
        if self._plain:
            return z.view(self.shapes[0]) if z.is_contiguous() else z.reshape(self.shapes[0])
        parts = z.split(self.sizes, dim=1)
        leaves = [
            self._unpack_leaf(part, shape, dtype) for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
        return leaves[0] if self.single else _close(pytree.tree_unflatten(leaves, self.tree))

    @staticmethod
    def _unpack_leaf(part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if dtype.is_complex:
            return torch.view_as_complex(part.to(dtype.to_real()).reshape(*shape, 2))
        return part.to(dtype).reshape(shape)

    def output(self, z: Tensor) -> Any:
        """As :meth:`unpack`, with TorchDEQ's shape for several states: always a list."""
        tree = self.unpack(z)
        return list(tree) if self.as_arguments else tree

    def round(self, z: Tensor) -> Tensor:
        """`z` as f sees it: rounded to the leaves' own dtypes. `z` itself where that changes nothing."""
        return self.pack(self.unpack(z)) if self.rounds else z

    # ---- f

    def wrap(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        """`fn(*states, *args)` as a map of packed tensors that refuses what no fixed-point map may do."""
        if self._plain:
            return self._wrap_plain(fn, args)
        checked = False

        def call(z: Tensor) -> Tensor:
            nonlocal checked
            before = z._version if not z.is_inference() else 0
            state = self.unpack(z)
            out = fn(*state, *args) if self.as_arguments else fn(state, *args)
            if not z.is_inference() and z._version != before:
                raise _changed_in_place()
            if not checked:
                self._check_output(out)
                checked = True
            return self.pack(out)

        return call

    def _wrap_plain(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        """The same for the usual state, one real tensor, where each microsecond is counted."""
        shape, dtype, flat = self.shapes[0], self.dtype, (self.batch, self.features)
        reshape = tuple(shape) != flat

        def call(z: Tensor) -> Tensor:
            before = -1 if z.is_inference() else z._version
            out = fn(z.reshape(shape) if reshape else z, *args)
            if before >= 0 and z._version != before:
                raise _changed_in_place()
            if not isinstance(out, Tensor) or out.shape != shape:
                self._check_output(out)
            if out.dtype is not dtype:
                self._check_output(out)
                out = out.to(dtype)
            return out.reshape(flat) if reshape else out

        return call

    def _check_output(self, out: Any) -> None:
        """Refuse what f returned unless it has z0's structure, shapes and kind of dtype."""
        wants = "f must return the same structure, shapes and kind of dtype as its state"
        named, tree = _flatten(_like(out))
        if self.as_arguments and type(out) not in (list, tuple):
            raise FunctionTypeError(
                f"f returned {_describe(out)} for a state of {len(self.shapes)} tensors; return a tuple or list of them."
            )
        if tree != self.tree:
            raise FunctionTypeError(f"f returned {self._structure(named, out)}, z0 is {self._structure()}; {wants}.")
        for (path, leaf), shape, dtype in zip(named, self.shapes, self.dtypes, strict=True):
            if not isinstance(leaf, Tensor):
                raise FunctionTypeError(f"f returned {_describe(leaf)} where z0{path} has a tensor; {wants}.")
            if leaf.shape != shape:
                raise FunctionError(
                    f"f returned shape {tuple(leaf.shape)} where z0{path} has shape {tuple(shape)}; {wants}. "
                    "Give a z0 of the shape that f keeps."
                )
            if leaf.is_complex() != dtype.is_complex or not (leaf.is_floating_point() or leaf.is_complex()):
                raise FunctionTypeError(
                    f"f returned {_describe(leaf)} where z0{path} is {str(dtype).removeprefix('torch.')}; {wants}."
                )

    def _structure(self, named: list[tuple[str, Any]] | None = None, value: Any = None) -> str:
        if named is None:
            return ", ".join(f"z0{p} {tuple(s)}" for p, s in zip(self.paths, self.shapes, strict=True))
        if len(named) == 1 and not named[0][0]:
            return _describe(value)
        return f"a {type(value).__name__} of " + (", ".join(f"{p}: {_describe(v)}" for p, v in named) or "nothing")

    def same_as(self, other: StateSpec) -> bool:
        """Whether states of `other` fit here: same structure, shapes and dtypes."""
        mine = (self.tree, self.shapes, self.dtypes, self.batch_shape)
        return mine == (other.tree, other.shapes, other.dtypes, other.batch_shape)

    def __repr__(self) -> str:
        return f"StateSpec({self._structure()}, batch={self.batch}, features={self.features}, dtype={self.dtype})"


def _changed_in_place() -> FunctionError:
    return FunctionError(
        "f changed its input in place; the solver still needs that tensor. Write z = z + ... instead of z += ..., and "
        "relu(z) instead of relu_(z)."
    )
