"""A problem whose f is called for a part of the batch only, because the other samples are finished."""

from __future__ import annotations

from contextlib import nullcontext
from copy import copy
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import DEQError, FunctionError
from .scope import current_scope

if TYPE_CHECKING:
    from .problem import Problem

__all__ = ["Part"]

#: What a user can do about an f that doesn't suit compaction.
REMEDY = (
    "With compact=True, f is called for the unfinished samples only. Give f's batched tensors by "
    "deq(fn, z0, args=(x, ...)), whose tensors of the batch's size are taken to be batched; keep other tensors of that "
    "size in fn itself; make f treat samples alike and apart (no batch statistics); or set compact=False."
)


class Part:
    """Which samples are there, and what the whole was.

    Args:
        problem: the problem, with all samples.
        batch: how many these are.
    """

    def __init__(self, problem: Problem, batch: int) -> None:
        self.problem = problem
        self.batch = batch
        self.whole = problem.spec, problem.args, problem.call
        self.rows: Tensor | None = None  # of the whole batch, on the CPU
        self.counts = torch.zeros(batch, dtype=torch.int64)
        self.probed = False
        self.since = 0  # evaluations that are in the counts

    def select(self, keep: Tensor | None) -> None:
        """Go on with the samples `keep` of the present ones, or with all again."""
        self._count()
        spec, args, call = self.whole
        problem = self.problem
        if keep is None:
            self.rows, problem.spec, problem.args, problem.call = None, spec, args, call
            return
        self.rows = keep if self.rows is None else self.rows[keep]
        problem.spec, problem.args = spec.select(len(self.rows)), self._args(self.rows)  # type: ignore[union-attr]
        problem.call = self._calling(self.rows)

    def again(self, which: Tensor, z: Tensor, fz: Tensor) -> Tensor:
        """`fz` with f called anew for the samples `which` of the present ones alone."""
        self._count()
        rows = which if self.rows is None else self.rows[which]
        self._count_alone(rows)
        there = which.to(z.device)
        return fz.index_copy(0, there, self._calling(rows)(z[there]))

    def _count_alone(self, rows: Tensor) -> None:
        self.problem.nfe += 1
        self.counts[rows] += 1
        self.since += 1

    def probe(self, rows: Tensor, z: Tensor, fz: Tensor) -> None:
        """Call f for one of these samples alone, and see that it gives what it gave in the batch; once a solve."""
        if self.probed:
            return
        self.probed = True
        row = rows[len(rows) // 2][None]  # not the first, which an f that takes a table for its own may look up
        alone = self._calling(row)(z[row.to(z.device)])
        self._count_alone(row)
        before = fz[row.to(fz.device)]
        norm = torch.linalg.vector_norm
        allowed = self.problem.eps(z) ** 0.5 * (norm(before) + norm(z[row.to(z.device)]))
        if not bool(norm(alone - before) <= allowed):
            raise FunctionError(
                f"f gives sample {int(row)} another value without the rest of the batch: off by "
                f"{float(norm(alone - before)):.2g}, of a size of {float(norm(before)):.2g}. {REMEDY}"
            )

    def counted(self) -> Tensor:
        """(B,) int64, evaluations of f in which each sample took part."""
        self._count()
        return self.counts.clone()

    def _count(self) -> None:
        new, self.since = self.problem.nfe - self.since, self.problem.nfe
        if self.rows is None:
            self.counts += new
        else:
            self.counts[self.rows] += new

    def _args(self, rows: Tensor) -> tuple[Any, ...]:
        def pick(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf[rows.to(leaf.device)] if leaf.dim() and leaf.shape[0] == self.batch else leaf
            if not is_dataclass(leaf) or isinstance(leaf, type):
                return leaf
            chosen = copy(leaf)  # keeps what is no field
            for field in fields(leaf):
                object.__setattr__(chosen, field.name, pick_all(getattr(leaf, field.name)))
            return chosen

        def pick_all(tree: Any) -> Any:
            return pytree.tree_map(pick, tree, is_leaf=is_dataclass)

        return pick_all(self.whole[1])

    def _calling(self, rows: Tensor) -> Any:
        spec = self.whole[0]
        call = self.problem.bind(spec.select(len(rows)), self._args(rows))  # type: ignore[union-attr]
        scope = current_scope()

        def narrowed(z: Tensor) -> Tensor:
            try:
                with scope.narrowed(rows, self.batch) if scope is not None else nullcontext():
                    return call(z)
            except Exception as error:
                ours = isinstance(error, DEQError) and not isinstance(error, FunctionError)
                if ours or isinstance(error, (NotImplementedError, torch.OutOfMemoryError)):  # no derivative, no room
                    raise
                raise FunctionError(
                    f"f can't be called for {len(rows)} of {self.batch} samples: {str(error).rstrip('.')}. {REMEDY}"
                ) from error

        return narrowed
