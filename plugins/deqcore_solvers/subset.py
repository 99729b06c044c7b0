"""A problem as some samples of the batch see it while the others stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor

from deqcore import LinearProblem, Problem

__all__ = ["Evaluates", "subset", "without_evaluations"]


class Evaluates(Exception):  # noqa: N818  # no RuntimeError: those are taken for missing derivatives
    """A method asked for f where it was to do without."""


def subset(problem: Problem, z: Tensor, rows: Tensor) -> Problem:
    """`problem` for the samples `rows` (int64) of the state `z`: f is called for the whole batch, and counted there.

    Unlike :meth:`deqcore.Problem.narrow`, this asks nothing of f: samples may depend on each other.
    """

    def among(others: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda u: others.index_copy(0, rows, u)

    def on_rows(apply: Callable[[Tensor], Tensor], others: Tensor) -> Callable[[Tensor], Tensor]:
        whole = among(others)
        return lambda u: apply(whole(u))[rows]

    part: Any = copy(problem)  # counts for itself: see _advance() in auto.py
    part.spec = None
    part.call = on_rows(problem.call, z)
    part.eps = problem.eps
    part.round = on_rows(problem.round, z)
    if isinstance(problem, LinearProblem):
        products: Any = problem
        still = torch.zeros_like(z)
        part.b = problem.b[rows]
        part._product = on_rows(products._product, still)
        part._rproduct = products._rproduct and on_rows(products._rproduct, still)
    return part


def without_evaluations(problem: Problem) -> Problem:
    """`problem`, which raises :class:`Evaluates` instead of evaluating f."""

    def refuse(*given: Any) -> Any:
        raise Evaluates

    silent: Any = copy(problem)
    silent.call = silent._product = silent._rproduct = refuse
    return silent
