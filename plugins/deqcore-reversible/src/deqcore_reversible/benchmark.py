"""What the reversible gradient takes and how exact it is: ``python -m deqcore_reversible.benchmark``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

from deqcore import DEQ, get_deq
from deqcore.testing import peak_bytes

__all__ = ["Block", "error", "evaluations", "main", "peak", "reversible"]

DAMPINGS = (0.2, 0.5, 0.8)
FEW, MANY = 4, 64
#: Limits on the pairs kept, the default first.
KEEPS = (1, 0, 3, None)


class Block(nn.Module):
    """A residual block of a transformer's kind, without its attention: f(z) = norm(x + W2 gelu(W1 z)), contracting."""

    def __init__(self, batch: int = 64, size: int = 128, width: int = 8, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(size, width * size, dtype=dtype)
        self.second = nn.Linear(width * size, size, dtype=dtype)
        self.norm = nn.LayerNorm(size, dtype=dtype)
        self.x = nn.Parameter(torch.randn(batch, size, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        return self.norm(self.x + self.second(nn.functional.gelu(self.first(z))))


def reversible(steps: int, damping: float, keep: int | None = 1) -> DEQ:
    """A DEQ of exactly so many steps."""
    return get_deq(
        solver={"name": "reversible", "max_iter": steps, "tol": 0.0, "damping": damping, "return_final": True},
        gradient={"name": "reversible", "keep": keep},
        core="reversible",
        on_failure="ignore",
    )


def unrolled(f: Callable[[Tensor], Tensor], z0: Tensor, damping: float, steps: int) -> Tensor:
    """The same steps, differentiated by autograd."""
    y = z = z0
    for _ in range(steps):
        y = torch.lerp(y, f(z), damping)
        z = torch.lerp(z, f(y), damping)
    return z


def _reversible(f: Callable[[Tensor], Tensor], z0: Tensor, damping: float, steps: int, keep: int | None = 1) -> Tensor:
    return reversible(steps, damping, keep)(f, z0)[0][0]


def train(f: Block, solve: Callable[[Block, Tensor], Tensor]) -> None:
    """One training step."""
    f.zero_grad()
    solve(f, torch.zeros_like(f.x)).square().mean().backward()


def peak(f: Block, solve: Callable[[Block, Tensor], Tensor]) -> int:
    """Bytes that a training step takes at its peak, its gradients included."""
    train(f, solve)
    f.zero_grad()
    return peak_bytes(lambda: train(f, solve), f.x.device)


def gaussian(rho: float, dtype: torch.dtype, size: int = 64, batch: int = 32) -> tuple[Tensor, Tensor]:
    """W of this spectral radius, and x, for f(z) = tanh(W z + x)."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(size, size, generator=random, dtype=torch.float64)
    w *= rho / torch.linalg.eigvals(w).abs().max()
    x = torch.randn(batch, size, generator=random, dtype=torch.float64)
    return w.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()


def error(rho: float, damping: float, dtype: torch.dtype, steps: int = 64) -> tuple[float, float, int]:
    """Relative error of the gradient in W against unrolling, the largest of a state, and how many pairs were kept."""
    w, x = gaussian(rho, dtype)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ w.mT + x)

    (z,), info = reversible(steps, damping)(f, torch.zeros_like(x))
    (found,) = torch.autograd.grad(z.square().sum(), w)
    (plain,) = torch.autograd.grad(unrolled(f, torch.zeros_like(x), damping, steps).square().sum(), w)
    backward = info["backward"]
    return float((found - plain).norm() / plain.norm()), float(backward["rel_lowest"].max()), backward["kept"]


def evaluations(rho: float, damping: float, dtype: torch.dtype, steps: int = 64) -> tuple[int, int, int]:
    """Evaluations of f in the forward and in the backward, and products with J^T."""
    w, x = gaussian(rho, dtype)
    (z,), info = reversible(steps, damping)(lambda z: torch.tanh(z @ w.mT + x), torch.zeros_like(x))
    z.sum().backward()
    return info["nfe"], info["backward"]["nfe"], info["backward"]["nvjp"]


def _seconds(f: Block, solve: Callable[[Block, Tensor], Tensor], times: int = 5) -> float:
    found: list[float] = []
    for _ in range(times):
        begin = perf_counter()
        train(f, solve)
        found.append(perf_counter() - begin)
    return min(found)


def _row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def _memory(dampings: Sequence[float]) -> None:
    print("Peak memory of a training step of 64 steps over that of 4 (MLP block, batch 64 x 128), by `keep`\n")
    _row("damping", "dtype", *(f"keep={keep}" for keep in KEEPS), "unrolled")
    _row(*["---"] * (len(KEEPS) + 3))
    for dtype in (torch.float64, torch.float32):
        f = Block(dtype=dtype)
        for damping in dampings:
            few, *many = (
                peak(f, partial(_reversible, damping=damping, steps=steps, keep=keep))
                for steps, keep in ((FEW, 1), *((MANY, keep) for keep in KEEPS))
            )
            whole = peak(f, partial(unrolled, damping=damping, steps=MANY))
            _row(damping, str(dtype)[6:], *(f"{size / few:.2f}" for size in many), f"{whole / few:.1f}")


def _errors(dampings: Sequence[float]) -> None:
    print("\nGradient against unrolling, 64 steps, f(z) = tanh(W z + x), spectral radius .9, batch 32 x 64\n")
    _row("damping", "dtype", "gradient off by", "states off by, at most", "pairs kept", "nfe, backward nfe, nvjp")
    _row(*["---"] * 6)
    for dtype in (torch.float64, torch.float32):
        for damping in dampings:
            off, state, kept = error(0.9, damping, dtype)
            counts = ", ".join(map(str, evaluations(0.9, damping, dtype)))
            _row(damping, str(dtype)[6:], f"{off:.1e}", f"{state:.1e}", kept, counts)


def _times() -> None:
    print("\nSeconds of a training step, 64 steps, the same block, float32, one thread\n")
    f = Block()
    ours = _seconds(f, partial(_reversible, damping=0.5, steps=64))
    plain = _seconds(f, partial(unrolled, damping=0.5, steps=64))
    _row("reversible", "unrolled", "ratio")
    _row(*["---"] * 3)
    _row(f"{ours:.3f}", f"{plain:.3f}", f"{ours / plain:.2f}")


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    _memory(DAMPINGS)
    _errors(DAMPINGS)
    _times()


if __name__ == "__main__":
    main()
