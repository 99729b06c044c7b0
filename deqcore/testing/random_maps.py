"""Maps that a solver may meet, good and bad, for tests that draw them at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["COUPLED", "KINDS", "random_map"]

#: (z, x, w) -> f(z), shapes (B, F), (B, F), (F, F): on flat states of any dtype.
Map = Callable[[Tensor, Tensor, Tensor], Tensor]


def _real(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` on the real and imaginary parts of complex numbers."""

    def both(z: Tensor) -> Tensor:
        if not z.is_complex():
            return fn(z)
        return torch.complex(fn(z.real), fn(z.imag))

    return both


_floor, _sign, _relu = _real(torch.floor), _real(torch.sign), _real(torch.relu)
_cosine, _sine, _step = _real(torch.cos), _real(torch.sin), _real(lambda z: torch.where(z > 0.1, -0.7, 0.9).to(z.dtype))
_root, _log, _exp = _real(lambda z: torch.sqrt(1 - z)), _real(torch.log), _real(torch.exp)


def _spread(z: Tensor) -> Tensor:
    """A factor a sample from .05 to .99, by its first number: fast samples beside slow ones."""
    return (0.52 + 0.47 * torch.tanh(3 * z[:, :1].real)).to(z.dtype)


#: Rows are independent in these.
ALONE: dict[str, Map] = {
    "linear": lambda z, x, w: 0.8 * (z @ w) + x,
    "linear, slow": lambda z, x, w: 0.99 * (z @ w) + x,
    "linear, uneven": lambda z, x, w: _spread(x) * (z @ w) + x,
    "tanh": lambda z, x, w: torch.tanh(0.9 * (z @ w) + x),
    "tanh, steep": lambda z, x, w: torch.tanh(5.0 * (z @ w) + x),
    "cosine": lambda z, x, w: _cosine(z) + 0.1 * x,
    "expanding": lambda z, x, w: 3.0 * z + x,
    "expanding, turned": lambda z, x, w: -1.8 * (z @ w) + x,
    "exploding": lambda z, x, w: 100.0 * z * z + x,
    "exponential": lambda z, x, w: _exp(3.0 * z) + x,
    "flip": lambda z, x, w: x - z,
    "cycle": lambda z, x, w: x - z.roll(1, 1),
    "periodic": lambda z, x, w: _sine(4.0 * z) + x,
    "chaotic": lambda z, x, w: 3.9 * z * (1 - z),
    "constant": lambda z, x, w: x,
    "nearly constant": lambda z, x, w: x + 1e-6 * z,
    "zero": lambda z, x, w: 0.0 * x,
    "identity": lambda z, x, w: z,
    "shift": lambda z, x, w: z + 1,
    "sign": lambda z, x, w: _sign(z) + 0.5 * x,
    "floor": lambda z, x, w: _floor(1.5 * z + x),
    "jump": lambda z, x, w: _step(z) + 0.01 * x,
    "kinked": lambda z, x, w: _relu(1.2 * (z @ w) + x),
    "root": lambda z, x, w: _root(z) + 0.1 * x,
    "logarithm": lambda z, x, w: _log(z) + 1.5 + 0.1 * x,
    "reciprocal": lambda z, x, w: 1 / (z + x),
    "tiny": lambda z, x, w: 0.5 * z + 1e-6 * x,
    "huge": lambda z, x, w: 0.5 * z + 1e4 * x,
    "square root of rounding": lambda z, x, w: z - (z - x) ** 3,
}
#: And here they are not.
COUPLED: dict[str, Map] = {
    "mean": lambda z, x, w: 0.5 * torch.tanh(z @ w) + 0.5 * z.mean(0, keepdim=True) + 0.1 * x,
    "ring": lambda z, x, w: 0.9 * z.roll(1, 0) @ w + 0.1 * x,
    "chain": lambda z, x, w: torch.cat([x[:1], 0.9 * z[:-1]]),
    "normalised": lambda z, x, w: (z - z.mean(0)) / (1e-3 + z.abs().mean(0)) + x,
}
KINDS = (*ALONE, *COUPLED)


def random_map(kind: str, features: int, dtype: torch.dtype, generator: torch.Generator) -> Callable[..., Tensor]:
    """The map `kind` with an orthogonal matrix of its own, as a function of (z, x) on (B, features) tensors."""
    w, _ = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))
    w = w.to(dtype)
    made = ALONE[kind] if kind in ALONE else COUPLED[kind]
    return lambda z, x: made(z, x, w)
