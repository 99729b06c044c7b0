"""Fixed-point problems whose answer is known, by name: a problem is a map, where to start, and where it must end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError, ConvergenceError, suggest

__all__ = ["PROBLEMS", "ExactProblem", "exact_problem", "exact_problems", "newton_answer"]

DOUBLE = torch.float64


@dataclass(frozen=True)
class ExactProblem:
    """z = fn(z, *args) and its answer.

    Attributes:
        name: what it is called in tables.
        fn: the map, differentiable in z and in all of args.
        z0: the start, shape (B, features).
        answer: z*, of z0's shape, computed in double precision without any solver under test: in closed form, by one
            dense solve, or by Newton's method with a dense Jacobian.
        args: tensors that fn takes after z; where `batched`, those whose dimension 0 is the batch come first.
        batched: whether rows are independent of each other. If not, the whole state is one equilibrium (batch_dims=0).
        contracts: whether plain iteration from z0 gets there.
        facts: what is known of the answer from elsewhere, as (what, expected value, its uncertainty, measure).
    """

    name: str
    fn: Callable[..., Tensor]
    z0: Tensor
    answer: Tensor
    args: tuple[Tensor, ...] = ()
    batched: bool = True
    contracts: bool = True
    facts: tuple[tuple[str, float, float, Callable[[Tensor], Tensor]], ...] = field(default=(), repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the state, and of all of args."""
        return self.z0.dtype

    @property
    def batch_dims(self) -> int:
        """What a solve of it must be given."""
        return 1 if self.batched else 0

    def error(self, z: Tensor) -> float:
        """Largest difference from the answer, over its largest element where that exceeds 1."""
        return float((z - self.answer).abs().max()) / max(1.0, float(self.answer.abs().max()))


# ---- answers that need no solver


def newton_answer(fn: Callable[[Tensor], Tensor], z0: Tensor, steps: int = 50) -> Tensor:
    """The fixed point of a real map on one equilibrium, by Newton's method with a dense Jacobian, to rounding error.

    Args:
        fn: the map; `z0` may have any shape.
        z0: a float64 start from which Newton's method gets there.
        steps: most steps.

    Raises:
        ConvergenceError: it did not get there.
    """
    shape, z = z0.shape, z0.reshape(-1)

    def residual(flat: Tensor) -> Tensor:
        return fn(flat.reshape(shape)).reshape(-1) - flat

    for _ in range(steps):
        r = residual(z)
        if float(r.abs().max()) <= 8 * torch.finfo(z.dtype).eps * max(1.0, float(z.abs().max())):
            break
        jacobian = torch.autograd.functional.jacobian(residual, z)
        z = z - torch.linalg.solve_ex(jacobian, r).result  # of a singular one: not finite, which the check finds
    if not float(residual(z).abs().max()) <= 1e-13 * max(1.0, float(z.abs().max())):
        raise ConvergenceError(f"Newton's method did not get from {tuple(shape)} to a fixed point in {steps} steps.")
    return z.reshape(shape)


def _rows(fn: Callable[..., Tensor], z0: Tensor, *args: Tensor) -> Tensor:
    """:func:`newton_answer` row by row; `args` have the batch as dimension 0."""
    found = [newton_answer(lambda z, k=k: fn(z, *(a[k : k + 1] for a in args)), z0[k : k + 1]) for k in range(len(z0))]
    return torch.cat(found)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=dtype)


def _of_radius(matrix: Tensor, radius: float) -> Tensor:
    return matrix * (radius / torch.linalg.eigvals(matrix).abs().max())


# ---- the problems, in double precision


def _dottie() -> ExactProblem:
    """cos z = z."""
    fact = ("z", 0.7390851332151607, 1e-15, lambda z: z[0, 0])
    z0 = torch.zeros(1, 1, dtype=DOUBLE)
    return ExactProblem("dottie", torch.cos, z0, newton_answer(torch.cos, z0), facts=(fact,))


def _chandrasekhar(c: float, known: tuple[tuple[int, float], ...] = ()) -> ExactProblem:
    """h_i = 1 / (1 - (c / 2n) sum_j mu_i h_j / (mu_i + mu_j)), whose mean is (2 / c)(1 - sqrt(1 - c)) for any nodes.

    Source: Chandrasekhar, Radiative Transfer (1960); Kelley, Iterative Methods (1995), section 5.6.
    """
    n = 10
    mu = torch.arange(1, n + 1, dtype=DOUBLE) / n
    kernel = c / (2 * n) * mu[:, None] / (mu[:, None] + mu)
    z0 = torch.ones(1, n, dtype=DOUBLE)

    def fn(h: Tensor, kernel: Tensor) -> Tensor:
        return 1 / (1 - h @ kernel.mT)

    facts = [("mean", (2 / c) * (1 - math.sqrt(1 - c)), 1e-14, torch.mean)]
    facts += [(f"h_{k}", value, 1e-11, lambda h, k=k: h[0, k - 1]) for k, value in known]
    answer = newton_answer(lambda h: fn(h, kernel), z0)
    return ExactProblem(f"chandrasekhar {c:g}", fn, z0, answer, (kernel,), facts=tuple(facts))


def _bratu(strength: float, middle: float) -> ExactProblem:
    """u'' + strength e^u = 0 on (0, 1), u = 0 at both ends, as u = G(strength e^u), G the inverse of -u'' on a grid.

    What is known is the differential equation's u(1/2); the grid's answer differs from it by O(h^2).

    Source: Bratu, Bull. Soc. Math. France 42 (1914); closed form in Mohsen, Comput. Math. Appl. 67 (2014).
    """
    n = 31
    h = 1 / (n + 1)
    second = 2 * torch.eye(n, dtype=DOUBLE) - torch.diag(torch.ones(n - 1, dtype=DOUBLE), 1)
    second = second - torch.diag(torch.ones(n - 1, dtype=DOUBLE), -1)
    green = strength * h * h * torch.linalg.inv(second)
    z0 = torch.zeros(1, n, dtype=DOUBLE)

    def fn(u: Tensor, green: Tensor) -> Tensor:
        return u.exp() @ green.mT

    fact = ("u(1/2)", middle, 0.2 * h * h, lambda u: u[0, n // 2])
    return ExactProblem(
        f"bratu {strength:g}", fn, z0, newton_answer(lambda u: fn(u, green), z0), (green,), facts=(fact,)
    )


def _affine_map(z: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return z @ w.mT + b


def _affine(name: str, w: Tensor, batch: int, contracts: bool, dtype: torch.dtype = DOUBLE) -> ExactProblem:
    """z = W z + b, whose answer is one dense solve."""
    d = w.shape[0]
    b = _randn(batch, d, seed=11, dtype=dtype)
    answer = torch.linalg.solve(torch.eye(d, dtype=dtype) - w, b.mT).mT.contiguous()
    return ExactProblem(name, _affine_map, torch.zeros_like(b), answer, (b, w), contracts=contracts)


def _contracting() -> ExactProblem:
    return _affine("affine", _of_radius(_randn(32, 32, seed=1), 0.9), 8, contracts=True)


def _expanding() -> ExactProblem:
    """Symmetric, eigenvalues from -3 to .5: plain iteration diverges, damped by .4 it converges."""
    q, _ = torch.linalg.qr(_randn(16, 16, seed=2))
    return _affine("affine, expanding", q * torch.linspace(-3.0, 0.5, 16, dtype=DOUBLE) @ q.mT, 4, contracts=False)


def _turning() -> ExactProblem:
    """Twice a rotation, by another angle in each of four planes: its expanding eigenvalues lie all around 0."""
    w = torch.zeros(8, 8, dtype=DOUBLE)
    for k, angle in enumerate((0.9, 1.6, 2.2, 2.9)):
        c, s = 2 * math.cos(angle), 2 * math.sin(angle)
        w[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = torch.tensor([[c, -s], [s, c]], dtype=DOUBLE)
    return _affine("affine, rotation", w, 4, contracts=False)


def _complex() -> ExactProblem:
    w = _of_radius(_randn(8, 8, seed=3, dtype=torch.complex128), 0.8)
    return _affine("affine, complex", w, 4, contracts=True, dtype=torch.complex128)


def _tanh_map(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(z @ w.mT + x)


def _tanh(name: str, w: Tensor, scale: float, contracts: bool) -> ExactProblem:
    """z = tanh(W z + x), a sample an x."""
    x = scale * _randn(8, w.shape[0], seed=12)
    z0 = torch.zeros_like(x)
    answer = _rows(lambda z, x: _tanh_map(z, x, w), z0, x)
    return ExactProblem(name, _tanh_map, z0, answer, (x, w), contracts=contracts)


def _tanh_contracting() -> ExactProblem:
    return _tanh("tanh", _of_radius(_randn(16, 16, seed=4), 0.95), 0.5, contracts=True)


def _tanh_negative() -> ExactProblem:
    """W = -A A^T of radius 3: no contraction, and the equilibrium is unique all the same."""
    a = _randn(16, 16, seed=5)
    return _tanh("tanh, negative", -_of_radius(a @ a.mT, 3.0), 0.3, contracts=False)


def _graph() -> ExactProblem:
    """Z = A Z W + B: rows are the nodes of a ring and depend on each other; the answer is one Kronecker solve."""
    nodes, d = 6, 4
    ring = torch.eye(nodes, dtype=DOUBLE)
    a = (ring.roll(1, 0) + ring.roll(-1, 0)) / 2
    w = _of_radius(_randn(d, d, seed=6), 0.9)
    b = _randn(nodes, d, seed=13)

    def fn(z: Tensor, b: Tensor, a: Tensor, w: Tensor) -> Tensor:
        return a @ z @ w + b

    whole = torch.eye(nodes * d, dtype=DOUBLE) - torch.kron(a, w.mT.contiguous())
    answer = torch.linalg.solve(whole, b.reshape(-1)).reshape(nodes, d)
    return ExactProblem("graph", fn, torch.zeros_like(b), answer, (b, a, w), batched=False)


#: name -> how the problem is made, in double precision.
PROBLEMS: dict[str, Callable[[], ExactProblem]] = {
    "dottie": _dottie,
    "chandrasekhar 0.5": lambda: _chandrasekhar(0.5),
    "chandrasekhar 0.9": lambda: _chandrasekhar(0.9, ((1, 1.14598995098), (10, 1.80262431917))),
    "bratu 1": lambda: _bratu(1.0, 0.14053921440),
    "bratu 2": lambda: _bratu(2.0, 0.32895242135),
    "affine": _contracting,
    "affine, expanding": _expanding,
    "affine, rotation": _turning,
    "affine, complex": _complex,
    "tanh": _tanh_contracting,
    "tanh, negative": _tanh_negative,
    "graph": _graph,
}


def exact_problem(name: str, dtype: torch.dtype = DOUBLE) -> ExactProblem:
    """The problem `name`, one of :data:`PROBLEMS`, in the given precision.

    Args:
        name: its key.
        dtype: real; a complex problem gets the complex dtype of that precision. The answer is rounded, so in single
            precision it is right to about 1e-7 of its size.

    Raises:
        ConfigError: no problem has that name; the text lists them.
    """
    if name not in PROBLEMS:
        raise ConfigError(f"no problem named {name!r};{suggest(name, PROBLEMS)} there are: {', '.join(PROBLEMS)}.")
    made = PROBLEMS[name]()

    def cast(value: Tensor) -> Tensor:
        return value.to(dtype.to_complex() if value.is_complex() else dtype)

    return ExactProblem(
        made.name,
        made.fn,
        cast(made.z0),
        cast(made.answer),
        tuple(map(cast, made.args)),
        made.batched,
        made.contracts,
        made.facts,
    )


def exact_problems(dtype: torch.dtype = DOUBLE) -> list[ExactProblem]:
    """All of them; see :func:`exact_problem`."""
    return [exact_problem(name, dtype) for name in PROBLEMS]
