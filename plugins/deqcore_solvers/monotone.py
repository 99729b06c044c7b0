"""What f must provide for the monotone operator solvers, and f as these see it, on packed states."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from deqcore import FunctionError, Problem

__all__ = ["ROUNDING", "MonotoneMap", "Operator", "ResolventMap"]

#: Differences of this many spacings of the dtype, relative to what they are differences of, are rounding error.
ROUNDING = 1e3


class MonotoneMap(Protocol):
    """An equilibrium z = prox(W z + U x + b) whose I - W is strongly monotone: the symmetric part is at least m > 0.

    Such a W is (1 - m) I - A^T A + B - B^T, whatever A and B are. f itself must be an object with these methods, such
    as a module: ``deq(layer, z0, args=(x,))``, whose call returns ``prox(linear(z) + inject(x), 1.0)``.

    It may also have numbers `monotonicity` (m) and `lipschitz` (L, the largest singular value of I - W), from which
    `peaceman_rachford` takes its step size.
    """

    def __call__(self, z: Tensor, *args: Any) -> Tensor:
        """f(z)."""
        ...

    def linear(self, z: Tensor) -> Tensor:
        """W z."""
        ...

    def inject(self, *args: Any) -> Tensor:
        """U x + b, from the args that f is called with; once a solve."""
        ...

    def prox(self, v: Tensor, alpha: float | Tensor) -> Tensor:
        """argmin over u of |u - v|^2 / 2 + alpha h(u), for the convex h whose prox at alpha = 1 is the nonlinearity.

        relu(v) whatever alpha is. `alpha` is a number, or a tensor of one number a sample that broadcasts with v.
        """
        ...


class ResolventMap(MonotoneMap, Protocol):
    """A monotone map that can also solve with I + alpha (I - W), as `peaceman_rachford` needs."""

    def inverse_step(self, v: Tensor, alpha: float) -> Tensor:
        """(I + alpha (I - W))^-1 v. `alpha` is the same in every step, so that a factor may be kept."""
        ...


class Operator:
    """f's parts on packed states of shape (B, F). Each product with W, and each solve with it, counts as an evaluation.

    Args:
        problem: its `fn` is the user's f.
        z: a packed state, where f is checked to be what its parts say.
        fz: f(z).
        needs: methods that the solver calls.
        solver: its name, for the errors.

    Raises:
        FunctionError: f lacks a method, or its parts make another map than f, or its state is not one tensor.
    """

    def __init__(self, problem: Problem, needs: tuple[str, ...], solver: str) -> None:
        fn: Any = problem.fn
        missing = [name for name in needs if not callable(getattr(fn, name, None))]
        if missing or problem.spec is None:
            signatures = {
                "linear": "linear(z) -> W z",
                "inject": "inject(*args) -> U x + b",
                "prox": "prox(v, alpha) -> the nonlinearity's proximal operator (relu(v) for relu)",
                "inverse_step": "inverse_step(v, alpha) -> (I + alpha (I - W))^-1 v",
            }
            raise FunctionError(
                f"solver {solver!r} solves z = prox(W z + U x + b, 1) and needs its parts from f, which must be an "
                f"object with the methods {'; '.join(signatures[name] for name in needs)}. f is "
                f"{type(fn).__name__!r} and lacks {', '.join(missing)}. Hand over the module itself with its input "
                "in args, deq(layer, z0, args=(x,)), not a lambda around it, or use solver='anderson', which needs "
                "values of f only."
            )
        if not problem.spec.single:
            raise FunctionError(
                f"solver {solver!r} takes a state of one tensor, and this one is {problem.spec}. Put its parts into "
                "one tensor, or use solver='anderson'."
            )
        self.problem = problem
        self.spec = problem.spec
        self.fn = fn

    def inject(self) -> Tensor:
        """U x + b for the present args, expanded to the batch."""
        bias = self.fn.inject(*self.problem.args)
        return self.spec.pack(bias.expand(self.spec.shapes[0])).detach()

    def check(self, z: Tensor, fz: Tensor, image: Tensor) -> None:
        """Refuse an f that is not prox(image, 1) at `z`, with `image` = W z + U x + b."""
        error = (self.prox(image, 1.0) - fz).abs()
        largest = fz.abs().amax(1, True) + image.abs().amax(1, True)
        allowed = ROUNDING * self.problem.eps(z) * (1 + largest)
        if bool((error > allowed).any()):
            raise FunctionError(
                f"f is not prox(linear(z) + inject(), 1): they differ by {float(error.nan_to_num().max()):.3g} at a "
                "state of this solve. The solver would find the equilibrium of the parts; make f and them agree."
            )

    def linear(self, z: Tensor) -> Tensor:
        """W z."""
        self.problem.nfe += 1
        return self.spec.pack(self.fn.linear(self.spec.unpack(z))).detach()

    def prox(self, v: Tensor, alpha: float | Tensor) -> Tensor:
        """prox(v, alpha); `alpha` a number or of shape (B, 1)."""
        if isinstance(alpha, Tensor):
            shape = self.spec.shapes[0]
            alpha = alpha.reshape(*self.spec.batch_shape, *[1] * (len(shape) - len(self.spec.batch_shape)))
        return self.spec.pack(self.fn.prox(self.spec.unpack(v), alpha)).detach()

    def inverse_step(self, v: Tensor, alpha: float) -> Tensor:
        """(I + alpha (I - W))^-1 v."""
        self.problem.nfe += 1
        return self.spec.pack(self.fn.inverse_step(self.spec.unpack(v), alpha)).detach()

    def number(self, name: str) -> float | None:
        """f's `monotonicity` or `lipschitz` as a number, or None where it has none.

        Raises:
            FunctionError: it is not positive and finite.
        """
        value = getattr(self.fn, name, None)
        if value is None:
            return None
        value = float(value)
        if not 0 < value < float("inf"):
            raise FunctionError(f"f.{name} is {value}; it must be positive and finite, or missing.")
        return value
