"""What the tests compare with: the coupled iteration written out and differentiated by autograd."""

from __future__ import annotations

import torch

import deqcore

DOUBLE = torch.float64


def unrolled(f, z0, damping, steps):
    """Every state of the coupled iteration, with its graph."""
    y = z = z0
    states = [z]
    for _ in range(steps):
        y = (1 - damping) * y + damping * f(z)
        z = (1 - damping) * z + damping * f(y)
        states.append(z)
    return states


def reversible(steps=12, damping=0.5, gradient=(), tol=0.0, **keywords):
    """A DEQ whose forward is the reversible iteration itself, of `steps` steps unless a tolerance is given."""
    solver = {"name": "reversible", "damping": damping, "max_iter": steps, "tol": tol, "return_final": tol == 0.0}
    chosen = {"name": "reversible", **dict(gradient)}
    return deqcore.get_deq(solver=solver, gradient=chosen, core="reversible", **keywords)


def weight(size=6, rho=0.9, seed=0, dtype=DOUBLE):
    """A Gaussian matrix with this spectral radius."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return (rho / torch.linalg.eigvals(drawn).abs().max() * drawn).to(dtype).requires_grad_()


def noise(*shape, seed=1, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def close(found, expected, tolerance=1e-10):
    """Each of the gradients found is there, and the one expected, relative to its size."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one is not None and one.shape == other.shape and one.dtype == other.dtype
        off, size = float((one - other).detach().norm()), float(other.detach().norm())
        assert off <= tolerance * size, f"off by {off:.3g} of {size:.3g}"


def contraction(size=6, batch=4):
    """f(z) = tanh(W z + x), W and x."""
    w, x = weight(size, rho=0.6), noise(batch, size).requires_grad_()
    return (lambda z: torch.tanh(z @ w.mT + x)), w, x
