"""What a solver is given: f on packed states, its products with the Jacobian, and the counts of each."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .captures import mark_own
from .errors import FunctionError, GradientModeError
from .modules import is_compiled, watched
from .part import Part
from .state import StateSpec

__all__ = ["LinearProblem", "Linearization", "Problem"]

#: Rounding error in half precision over that in float32 or float64, both in spacings. Sums are kept wider than half
#: precision: residuals get down to 0.1 to 0.5 of its spacings, and to 0.3 to 3 of those of float32 or float64.
HALF_NOISE = 0.25


class Problem:
    """The fixed-point problem z = f(z) on packed states of shape (batch, features).

    Nothing else crosses to a plugin. Calling the problem evaluates f and counts it.

    Args:
        call: f on packed tensors; see :meth:`deqcore.state.StateSpec.wrap`.
        spec: how packed tensors relate to the user's states; None for problems that have no user state of their own.
        eps: relative spacing of the numbers that `call` computes with, where that is coarser than the tensors' dtype.

    Attributes:
        nfe: evaluations of f so far.
        nvjp: products with the transposed Jacobian so far.
        njvp: products with the Jacobian so far.
        fn: the user's function, for a method that needs more of it than values; None where there is none.
        args: its further arguments.
        start: the packed state that the call started from, with the caller's own graph behind it.
        call: f on packed states, not counted.
    """

    fn: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    start: Tensor | None = None
    #: The autocast dtype that f is called under, if any.
    autocast: torch.dtype | None = None

    def __init__(self, call: Callable[[Tensor], Tensor], spec: StateSpec | None = None, eps: float = 0.0) -> None:
        self.call = call
        self._eps = eps
        self._part: Part | None = None
        self.spec = spec
        self.nfe = 0
        self.nvjp = 0
        self.njvp = 0

    @classmethod
    def of(cls, fn: Callable[..., Any], spec: StateSpec, args: tuple[Any, ...] = ()) -> Problem:
        """The problem of the user's `fn`, called with the state as the user wrote it, under the present autocast."""
        device = spec.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        problem = cls(_never, spec, eps=0.0 if autocast is None else _noise(torch.finfo(autocast).eps))
        problem.fn, problem.args, problem.autocast = fn, args, autocast
        problem.call = problem.bind(spec, args)
        if not torch.compiler.is_compiling() and not is_compiled(fn):
            problem.call = watched(problem.call, weakref.ref(problem))
        return problem

    def bind(self, spec: StateSpec, args: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
        """The user's function with these further arguments, on packed states of `spec`."""
        call = spec.wrap(self.fn or _never, args)
        return call if self.autocast is None else _under_autocast(call, spec.device.type, self.autocast)

    def __call__(self, z: Tensor) -> Tensor:
        """f(z), shape (batch, features)."""
        self.nfe += 1
        return self.call(z)

    # ---- a part of the batch

    def narrow(self, keep: Tensor, z: Tensor, fz: Tensor) -> None:
        """From now on, have f called for the samples `keep` of the present ones only, until :meth:`widen`.

        The first time, f is called for one sample alone, and must give what it gave in the batch.

        Args:
            keep: int64, on the CPU.
            z, fz: a state of the present samples, and f there.

        Raises:
            FunctionError: f gives a sample another value without the others, or doesn't take a part of the batch.
        """
        part = self._parts()
        part.probe(keep, z, fz)
        part.select(keep)

    def again(self, rows: Tensor, z: Tensor, fz: Tensor) -> Tensor:
        """`fz` with f called anew for the samples `rows` (int64, on the CPU) alone; see :meth:`narrow`."""
        part = self._parts()
        others = torch.ones(z.shape[0], dtype=torch.bool).index_fill(0, rows, False).nonzero()[:, 0]
        if len(others):
            part.probe(others, z, fz)
        return part.again(rows, z, fz)

    def _parts(self) -> Part:
        if self.spec is None or self.fn is None:
            raise FunctionError("this problem can't be narrowed: it was not made of a function and its batched args.")
        if self._part is None:
            self._part = Part(self, self.spec.batch)
        return self._part

    def widen(self) -> None:
        """Have f called for all samples again."""
        if self._part is not None:
            self._part.select(None)

    def sample_nfe(self) -> Tensor:
        """(B,) int64, evaluations of f in which each sample took part; on the CPU where samples have left."""
        if self._part is not None:
            return self._part.counted()
        device = None if self.spec is None else self.spec.device
        return torch.full((1 if self.spec is None else self.spec.batch,), self.nfe, device=device)

    def counts(self) -> dict[str, Any]:
        """What was counted so far, as entries of ``info``."""
        sample_nfe = self.sample_nfe()
        if self.spec is not None:
            sample_nfe = sample_nfe.to(self.spec.device)
        return {"nfe": self.nfe, "sample_nfe": sample_nfe, "nvjp": self.nvjp, "njvp": self.njvp}

    @property
    def work(self) -> int:
        """Evaluations of f and products with its Jacobian so far."""
        return self.nfe + self.nvjp + self.njvp

    @property
    def rounds(self) -> bool:
        """Whether f sees a narrower dtype than the packed one somewhere, so that states must be rounded for it."""
        return self.spec is not None and self.spec.rounds

    def eps(self, z: Tensor) -> float:
        """Relative rounding error of the coarsest numbers that f computes with, autocast included."""
        return max(self._eps, torch.finfo(z.dtype).eps, _noise(self.spec.eps) if self.spec is not None else 0.0)

    def round(self, z: Tensor) -> Tensor:
        """`z` as f sees it, rounded where a leaf of the state is narrower than the packed dtype."""
        return self.spec.round(z) if self.spec is not None else z

    def jvp(self, z: Tensor, tangent: Tensor) -> Tensor:
        """J @ tangent at `z`, shape (batch, features), in forward mode: one evaluation of f on dual numbers.

        Raises:
            NotImplementedError, RuntimeError: something in f has no forward derivative; see :meth:`linearize`.
            GradientModeError: under ``torch.inference_mode()``, where torch gives no derivative.
        """
        _derivatives_are_on()
        _prepare_forward_mode()
        self.njvp += 1
        with forward_ad.dual_level():
            dual = self.call(forward_ad.make_dual(z.detach(), tangent))
            product = forward_ad.unpack_dual(dual).tangent
        return torch.zeros_like(tangent) if product is None else product.detach()

    def linearize(self, z: Tensor) -> Linearization:
        """Evaluate f at `z` once, with its graph, for products with J = df/dz.

        Raises:
            GradientModeError: under ``torch.inference_mode()``, where torch gives no derivative.
        """
        _derivatives_are_on()
        with torch.enable_grad():
            z = mark_own(z.detach().requires_grad_())
            return Linearization(self, z, self(z))


def _derivatives_are_on() -> None:
    if torch.is_inference_mode_enabled():
        raise GradientModeError(
            "derivatives of f are needed, and torch.inference_mode() switches them off. Use torch.no_grad() instead, "
            "or a solver without derivatives: solver='anderson' or 'broyden'."
        )


@cache
def _prepare_forward_mode() -> None:
    """Have torch load its rules for forward mode, some of which it compiles in a way that it calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def _never(*args: Any) -> Any:
    raise FunctionError("this problem has no function.")


def _noise(eps: float) -> float:
    return eps * HALF_NOISE if eps > torch.finfo(torch.float32).eps else eps


def _under_autocast(call: Callable[[Tensor], Tensor], device: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """`call` under this autocast: the loop switches it off, so that solvers never compute in half precision."""
    cache = torch.is_autocast_cache_enabled()

    def cast(z: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype, cache_enabled=cache):
            return call(z)

    return cast


class Linearization:
    """One evaluation of f with its graph, and products with its Jacobian J at that point.

    Attributes:
        z: the point, a leaf that requires grad.
        fz: f(z), with its graph (to z and to whatever f closes over).
    """

    def __init__(self, problem: Problem, z: Tensor, fz: Tensor) -> None:
        self.problem = problem
        self.z = z
        self.fz = fz
        self._pulled: tuple[Tensor, Tensor | None] | None = None

    def vjp(self, cotangent: Tensor, create_graph: bool = False) -> Tensor:
        """J^T @ cotangent, shape (batch, features); zeros where f doesn't depend on z."""
        self.problem.nvjp += 1
        if not self.fz.requires_grad:
            return torch.zeros_like(cotangent)
        (product,) = torch.autograd.grad(
            self.fz, self.z, cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return torch.zeros_like(cotangent) if product is None else product  # pyright: ignore

    def jvp(self, tangent: Tensor) -> Tensor:
        """J @ tangent, shape (batch, features), as the vjp of the vjp: works for any autograd function in f.

        The first product costs a second backward more than the others.
        """
        self.problem.njvp += 1
        if not self.fz.requires_grad:
            return torch.zeros_like(tangent)
        if self._pulled is None:
            with torch.enable_grad():
                dummy = mark_own(torch.zeros_like(self.fz, requires_grad=True))
                (pulled,) = torch.autograd.grad(self.fz, self.z, dummy, create_graph=True, allow_unused=True)
            self._pulled = dummy, pulled
        dummy, pulled = self._pulled
        if pulled is None or not pulled.requires_grad:
            return torch.zeros_like(tangent)
        (product,) = torch.autograd.grad(pulled, dummy, tangent, retain_graph=True, allow_unused=True)
        return torch.zeros_like(tangent) if product is None else product  # pyright: ignore


class LinearProblem(Problem):
    """The linear equation (I - A) u = b, which is also the fixed point u = A u + b.

    Any fixed-point solver can solve it as it stands; a linear solver uses `matvec` and `rmatvec`.

    Args:
        product: u -> A u on (batch, features) tensors.
        rproduct: u -> A^T u, or None where it is not available.
        b: right-hand side, shape (batch, features).
        eps: relative spacing of the numbers that the products are computed with.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        rproduct: Callable[[Tensor], Tensor] | None,
        b: Tensor,
        eps: float = 0.0,
    ) -> None:
        super().__init__(lambda u: product(u) + b, eps=eps)
        self._product = product
        self._rproduct = rproduct
        self.b = b

    def matvec(self, u: Tensor) -> Tensor:
        """(I - A) u, counted as an evaluation."""
        self.nfe += 1
        return u - self._product(u)

    def rmatvec(self, u: Tensor) -> Tensor:
        """(I - A)^T u, counted as an evaluation.

        Raises:
            NotImplementedError: the transposed product is not available.
        """
        if self._rproduct is None:
            raise NotImplementedError(
                "this linear problem has no transposed product; use a solver that doesn't need one"
            )
        self.nfe += 1
        return u - self._rproduct(u)

    def couples_rows(self) -> bool:
        """Whether A makes any row depend on another one, by up to 2 log2(batch) products of some of the rows alone."""
        index = torch.arange(self.b.shape[0], device=self.b.device)
        for bit in range((len(index) - 1).bit_length()):
            for alone in (0, 1):  # any two rows differ in some bit of their index
                chosen = (index >> bit & 1) == alone
                self.nfe += 1
                spread = self._product(chosen.to(self.b.dtype)[:, None].expand_as(self.b))[~chosen]
                if bool((spread.nan_to_num(0.0) != 0).any()):
                    return True
        return False

    def as_one(self) -> LinearProblem:
        """The same equation with all rows as one sample, shape (1, batch * features); it counts for itself."""
        product, rproduct, shape = self._product, self._rproduct, self.b.shape

        def flat(apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda u: apply(u.reshape(shape)).reshape(1, -1)

        return LinearProblem(flat(product), flat(rproduct) if rproduct else None, self.b.reshape(1, -1), self._eps)
