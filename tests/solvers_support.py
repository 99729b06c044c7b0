"""Problems whose answer is known, and how the solver tests run one solver on one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deqcore import Problem, StateSpec, iterate

F64 = torch.float64


@dataclass
class Exact:
    """A map, a start, and the distance of a state from the answer."""

    fn: Any
    z0: torch.Tensor
    error: Any


def dottie():
    z0 = torch.tensor([[0.0, 0.5], [1.0, 0.2], [0.9, 0.7]], dtype=F64)
    return Exact(torch.cos, z0, lambda z: float((z - 0.7390851332151607).abs().max()))


def chandrasekhar(c):
    """H at mu = i / n: its mean is known for every c, and h_1 and h_10 for c = .9."""
    n = 10
    mu = torch.arange(1, n + 1, dtype=F64) / n
    kernel = c / (2 * n) * mu[:, None] / (mu[:, None] + mu)
    mean = 2 / c * (1 - math.sqrt(1 - c))

    def error(h):
        worst = (h.mean(1) - mean).abs().max()
        if c == 0.9:
            known = torch.tensor([1.14598995098, 1.80262431917], dtype=F64)
            worst = max(worst, (h[:, [0, -1]] - known).abs().max() - 1e-11)  # known to eleven digits
        return float(worst)

    return Exact(lambda h: 1 / (1 - h @ kernel.T), torch.ones(2, n, dtype=F64), error)


def bratu(strength, n=31):
    """u'' + strength e^u = 0 on a grid, as u = strength A^-1 e^u; the answer by Newton's method in numpy."""
    h = 1 / (n + 1)
    a = (2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)) / h**2
    u = np.zeros(n)
    for _ in range(20):
        u = u - np.linalg.solve(a - strength * np.diag(np.exp(u)), a @ u - strength * np.exp(u))
    middle = {1: 0.14053921440, 2: 0.32895242135}[strength]
    assert abs(u[n // 2] - middle) < strength * h**2  # the grid's own error
    answer = torch.from_numpy(u)
    green = torch.linalg.inv(torch.from_numpy(a))
    return Exact(
        lambda u: strength * u.exp() @ green.T, torch.zeros(2, n, dtype=F64), lambda z: float((z - answer).abs().max())
    )


def gaussian(d, radius, generator, kind="gaussian"):
    w = torch.randn(d, d, generator=generator, dtype=F64)
    if kind == "negative":
        w = -(w @ w.T)
    return w * (radius / torch.linalg.eigvals(w).abs().max())


def affine(radius, kind="gaussian", d=16, batch=4):
    g = torch.Generator().manual_seed(3)
    w = gaussian(d, radius, g, kind)
    b = torch.randn(batch, d, generator=g, dtype=F64)
    answer = torch.linalg.solve(torch.eye(d, dtype=F64) - w, b.T).T
    return Exact(lambda z: z @ w.T + b, torch.zeros_like(b), lambda z: float((z - answer).abs().max()))


def tanh_fixed_point(w, x, z):
    """The fixed point of tanh(W z + x) near z, by Newton's method with a dense solve for each sample."""
    eye = torch.eye(w.shape[0], dtype=F64)
    for _ in range(60):
        fz = torch.tanh(z @ w.T + x)
        jacobians = (1 - fz**2)[:, :, None] * w
        z = z + 0.7 * torch.linalg.solve(eye - jacobians, fz - z)
    return z


def tanh(radius, kind="gaussian", d=16, batch=4, size=0.5):
    g = torch.Generator().manual_seed(5)
    w = gaussian(d, radius, g, kind)
    x = size * torch.randn(batch, d, generator=g, dtype=F64)
    answer = tanh_fixed_point(w, x, torch.zeros_like(x))
    return Exact(lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x), lambda z: float((z - answer).abs().max()))


PROBLEMS = {
    "dottie": dottie,
    "chandrasekhar .5": lambda: chandrasekhar(0.5),
    "chandrasekhar .9": lambda: chandrasekhar(0.9),
    "bratu 1": lambda: bratu(1),
    "bratu 2": lambda: bratu(2),
    "affine .9": lambda: affine(0.9),
    "affine -20": lambda: affine(20.0, "negative"),
    "tanh .9": lambda: tanh(0.9),
    "tanh -5": lambda: tanh(5.0, "negative"),
}


class Calls:
    """A function that counts its calls."""

    def __init__(self, fn):
        self.fn = fn
        self.count = 0

    def __call__(self, *args):
        self.count += 1
        return self.fn(*args)


def solve(solver, fn, z0, args=(), **options):
    """The solution of one run of the loop."""
    with torch.no_grad():
        spec = StateSpec(z0)
        return iterate(solver, Problem.of(fn, spec, args), spec.pack(z0), **options).solution


def states_of(solver, fn, z0, args=()):
    """Every state that the loop judged, z0 aside."""
    seen = []
    solve(solver, fn, z0, args, callback=lambda step, z, residual: seen.append(z.clone()))
    return seen


def rows_tanh(batch=5, d=6, radius=0.9, dtype=F64, seed=7):
    """tanh(W z + x) with x as an argument, and x."""
    g = torch.Generator().manual_seed(seed)
    w = gaussian(d, radius, g).to(dtype)
    x = (0.5 * torch.randn(batch, d, generator=g, dtype=F64)).to(dtype)
    return (lambda z, x: torch.tanh(z @ w.T + x)), x


def complex_affine():
    """z -> A z + b on complex states of shape (3, 4), and its fixed point."""
    g = torch.Generator().manual_seed(11)
    a = torch.randn(4, 4, generator=g, dtype=torch.complex128)
    a = a * (0.8 / torch.linalg.eigvals(a).abs().max())
    b = torch.randn(3, 4, generator=g, dtype=torch.complex128)
    answer = torch.linalg.solve(torch.eye(4, dtype=a.dtype) - a, b.T).T
    return (lambda z: z @ a.T + b), torch.zeros_like(b), answer
