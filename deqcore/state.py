"""A pytree of tensors as one (batch, features) tensor, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import FunctionError, FunctionTypeError, StateError, StateTypeError
from .tree import LEAF, arrange, close_records, describe, flatten, flatten_with_paths

__all__ = ["StateSpec", "finite", "with_gradient_of"]

#: What f must do, for error texts.
MUST = "f must return the same structure, shapes, device and kind of dtype as its state"


def _like(tree: Any) -> Any:
    """Lists and tuples of states are one structure: TorchDEQ programs return either."""
    return tuple(tree) if type(tree) in (list, tuple) else tree


#: How many specs of single tensors are remembered.
SPECS_KEPT = 256
_specs: dict[Any, StateSpec] = {}


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
        self.kind = describe(z0)
        named, self.tree = ([("", z0)], LEAF) if isinstance(z0, Tensor) else flatten_with_paths(_like(z0))
        if not named:
            raise StateError(
                f"z0 holds no tensor: got {z0!r}. Give a tensor, or a tuple, list, dict or dataclass of tensors."
            )
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
        self.sizes = [leaf.numel() // self.batch * (2 if leaf.is_complex() else 1) for leaf in leaves]
        self.features = sum(self.sizes)
        #: True where some leaf is narrower than the packed tensor, so that unpacking rounds.
        self.rounds = any(dtype.to_real() != self.dtype for dtype in self.dtypes)
        #: Spacing of the coarsest leaf dtype at 1: no residual below a few of these means anything.
        self.eps = max(torch.finfo(dtype).eps for dtype in self.dtypes)
        self.single = self.tree.is_leaf()
        self._plain = self.single and not self.rounds and not self.dtypes[0].is_complex
        #: True where the state is a tuple or list of nothing but tensors, the usual kind of several states.
        self._listed = self.as_arguments and all(path == f"[{k}]" for k, path in enumerate(self.paths))

    @classmethod
    def of(cls, z0: Any, batch_dims: int = 1) -> StateSpec:
        """The spec of `z0`; that of the usual state, one dense tensor, is made once for all states like it."""
        if type(z0) is not Tensor or z0.layout is not torch.strided or z0.is_nested:
            return cls(z0, batch_dims)
        key = (z0.shape, z0.dtype, z0.device, batch_dims)
        spec = _specs.get(key)
        if spec is None:
            if len(_specs) >= SPECS_KEPT:  # shapes that change with every call
                _specs.clear()
            spec = _specs[key] = cls(z0, batch_dims)
        return spec

    @staticmethod
    def _check_leaf(path: str, leaf: Any) -> None:
        if not isinstance(leaf, Tensor):
            raise StateTypeError(
                f"z0{path} is {describe(leaf)}; a state holds floating point or complex tensors only. "
                "Make tensors of arrays and numbers (torch.as_tensor), and keep what f needs besides the state in its "
                "closure or in args=(...)."
            )
        if leaf.is_nested or leaf.layout != torch.strided:
            kind = "a nested tensor" if leaf.is_nested else f"a tensor of layout {leaf.layout}"
            raise StateTypeError(f"z0{path} is {kind}; a state must be dense. Pad it, or convert it with .to_dense().")
        if not (leaf.is_floating_point() or leaf.is_complex()) or leaf.dtype.itemsize < 2:
            raise StateTypeError(
                f"z0{path} is {describe(leaf)}; a state must be floating point, of 16 bits at least, or complex. "
                "Convert it with .float()."
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
                f"the parts of z0 have different batch sizes ({listing}); with batch_dims={k} the first {k} size(s) "
                "must agree. Set batch_dims=0 to solve for the whole state as one equilibrium."
            )
        return torch.Size(found.pop())

    def _check_whole(self, leaves: Sequence[Tensor]) -> None:
        if self.batch == 0 or any(leaf.numel() == 0 for leaf in leaves):
            listing = ", ".join(f"z0{p}: {tuple(s)}" for p, s in zip(self.paths, self.shapes, strict=True))
            raise StateError(
                f"z0 is empty ({listing}); there is nothing to solve for. Skip the call for an empty batch."
            )
        devices = {str(leaf.device) for leaf in leaves}
        if len(devices) > 1:
            raise StateError(
                f"the parts of z0 are on different devices: {', '.join(sorted(devices))}. Move them to one."
            )

    def select(self, batch: int) -> StateSpec:
        """The spec of `batch` of the samples; for states with one batch dimension."""
        chosen = copy(self)
        chosen.shapes = [torch.Size((batch, *shape[1:])) for shape in self.shapes]
        chosen.batch_shape, chosen.batch = torch.Size((batch,)), batch
        return chosen

    # ---- packing

    def pack(self, tree: Any) -> Tensor:
        """A state of this structure as a (batch, features) tensor; dtypes are cast, nothing is checked."""
        if self.single:
            return self._pack_leaf(tree)
        return self._pack_leaves(tree if self._listed else flatten(_like(tree))[0])

    def _pack_leaves(self, leaves: Sequence[Tensor]) -> Tensor:
        return torch.cat([self._pack_leaf(leaf) for leaf in leaves], dim=1)

    def _pack_leaf(self, leaf: Tensor) -> Tensor:
        if leaf.is_complex():
            leaf = torch.view_as_real(leaf.resolve_conj())
        return leaf.reshape(self.batch, -1).to(self.dtype)

    def unpack(self, z: Tensor) -> Any:
        """The state that packed tensor `z` stands for, with every leaf's own shape and dtype."""
        if self._plain:
            return z.view(self.shapes[0]) if z.is_contiguous() else z.reshape(self.shapes[0])
        return self._tree_of(self._leaves_of(z))

    def _leaves_of(self, z: Tensor) -> list[Tensor]:
        parts = zip(z.split(self.sizes, dim=1), self.shapes, self.dtypes, strict=True)
        return [self._unpack_leaf(part, shape, dtype) for part, shape, dtype in parts]

    def _tree_of(self, leaves: list[Tensor]) -> Any:
        if self._listed:
            return tuple(leaves)
        return leaves[0] if self.single else close_records(pytree.tree_unflatten(leaves, self.tree))

    @staticmethod
    def _unpack_leaf(part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if dtype.is_complex:
            pairs = part.to(dtype.to_real()).reshape(*shape, 2)
            if pairs.is_contiguous() and pairs.storage_offset() % 2 == 0:
                return torch.view_as_complex(pairs)
            return torch.complex(pairs[..., 0], pairs[..., 1])  # its place among other leaves doesn't suit a view
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

        def call(z: Tensor) -> Tensor:
            leaves = self._leaves_of(z)
            before = [-1 if leaf.is_inference() else leaf._version for leaf in leaves]
            state = self._tree_of(leaves)
            out = fn(*state, *args) if self.as_arguments else fn(state, *args)
            if any(leaf._version != count for leaf, count in zip(leaves, before, strict=True) if count >= 0):
                raise _changed_in_place()
            return self._pack_leaves(self._take_output(out))

        return call

    def _wrap_plain(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        """The same for the usual state, one real tensor, where each microsecond is counted."""
        shape, dtype, flat = self.shapes[0], self.dtype, (self.batch, self.features)
        reshape = tuple(shape) != flat
        checked = False

        def call(z: Tensor) -> Tensor:
            state = z.reshape(shape) if reshape else z
            if checked:
                out = fn(state, *args)
                if type(out) is not Tensor or out.shape != shape or out.dtype is not dtype:
                    out = self._take_output(out)[0].to(dtype)
            else:
                out = first(state)
            return out.reshape(flat) if reshape else out

        def first(state: Tensor) -> Tensor:
            nonlocal checked
            before = -1 if state.is_inference() else state._version
            out = fn(state, *args)
            if before >= 0 and state._version != before:
                raise _changed_in_place()
            (out,) = self._take_output(out)
            checked = True
            return out.to(dtype)

        return call

    def _take_output(self, out: Any) -> list[Tensor]:
        """The leaves of what f returned.

        Raises:
            FunctionError, FunctionTypeError: it has not z0's structure, shapes, device and kind of dtype.
        """
        if self.single and isinstance(out, Tensor):
            leaves: list[Any] = [out]
        elif self._listed and type(out) in (list, tuple) and all(isinstance(leaf, Tensor) for leaf in out):
            leaves = list(out)
            if len(leaves) != len(self.shapes):
                raise self._other_structure(out)
        else:
            leaves = self._match(out)
        for leaf, shape, dtype in zip(leaves, self.shapes, self.dtypes, strict=True):
            if (
                not isinstance(leaf, Tensor)
                or leaf.layout is not torch.strided
                or leaf.is_nested
                or leaf.shape != shape
                or leaf.dtype is not dtype
                or leaf.device != self.device
            ):
                self._check_output(leaves)
                break
        return leaves

    def _match(self, out: Any) -> list[Any]:
        """Leaves of `out` in the order of z0's."""
        if self.as_arguments and type(out) not in (list, tuple):
            raise FunctionTypeError(
                f"f returned {describe(out)} for a state of {len(self.shapes)} tensors; return a tuple or list of them."
            )
        leaves, tree = flatten(_like(out))
        if tree != self.tree:
            leaves, tree = arrange(_like(out), self.tree)
        if tree != self.tree:
            raise self._other_structure(out)
        return leaves

    def _other_structure(self, out: Any) -> FunctionTypeError:
        named, _ = flatten_with_paths(_like(out))
        parts = ", ".join(f"{path}: {describe(leaf)}" for path, leaf in named) or "nothing"
        found = f"{describe(out)} of {parts}" if len(named) != 1 or named[0][0] else describe(out)
        return FunctionTypeError(f"f returned {found}; z0 is {self._structure()}; {MUST}.")

    def _check_output(self, leaves: list[Any]) -> None:
        """Refuse leaves that have not z0's shapes, device and kind of dtype."""
        for leaf, path, shape, dtype in zip(leaves, self.paths, self.shapes, self.dtypes, strict=True):
            if not isinstance(leaf, Tensor):
                raise FunctionTypeError(f"f returned {describe(leaf)} where z0{path} has a tensor; {MUST}.")
            if leaf.is_nested or leaf.layout != torch.strided:
                kind = "nested tensor" if leaf.is_nested else f"tensor of layout {leaf.layout}"
                raise FunctionTypeError(f"f returned a {kind} where z0{path} is dense; {MUST}.")
            if leaf.shape != shape:
                raise FunctionError(
                    f"f returned shape {tuple(leaf.shape)} where z0{path} has shape {tuple(shape)}; {MUST}. "
                    "Give a z0 of the shape that f keeps."
                )
            if leaf.is_complex() != dtype.is_complex or not (leaf.is_floating_point() or leaf.is_complex()):
                raise FunctionTypeError(
                    f"f returned {describe(leaf)} where z0{path} is {str(dtype).removeprefix('torch.')}; {MUST}."
                )
            if leaf.device != self.device:
                raise FunctionError(
                    f"f returned a tensor on {leaf.device} where z0{path} is on {self.device}; {MUST}. Move f's "
                    "parameters and z0 to one device."
                )

    def _structure(self) -> str:
        shapes = ", ".join(f"{path}: {tuple(shape)}" for path, shape in zip(self.paths, self.shapes, strict=True))
        return f"one tensor of shape {tuple(self.shapes[0])}" if self.single else f"{self.kind} of {shapes}"

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


def with_gradient_of(attached: Tensor, z: Tensor) -> Tensor:
    """`z` to the last bit, with the gradient of `attached`; what is not finite there changes nothing."""
    return z + (attached - attached.detach()).nan_to_num()  # inf - inf is NaN


def finite(z: Tensor, what: str) -> Tensor:
    """`z`, where all of it is a number.

    Raises:
        StateError: it holds NaN or inf; `what` it is, for the text.
    """
    if bool(torch.isfinite(z).all()):
        return z
    rows = int((~torch.isfinite(z)).any(1).sum())
    raise StateError(f"{what} holds NaN or inf in {rows} of {z.shape[0]} samples; a solve can't start there.")
