"""Peak memory of a training step, by gradient backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import deqcore
from deqcore import DEQError
from deqcore.testing import installed, peak_bytes
from deqcore_zoo.digits import DigitCell

from .gradients_count import Counter
from .options import Options
from .report import Table

__all__ = ["tables"]

STEPS, FEW = 64, 4
LIMIT, REVERSIBLE_LIMIT = 1.3, 1.05
#: No history in the forward, no Krylov basis in the backward.
LEAN: dict[str, Any] = {
    "solver": "simple_fixed_point_iter",
    "gradient": {"name": "implicit", "solver": {"name": "neumann", "tol": 0.0}},
}
UNROLLED: tuple[dict[str, Any], ...] = (
    {"name": "unrolled"},
    {"name": "unrolled", "checkpoint": "every_k"},
    {"name": "unrolled", "checkpoint": "recursive"},
)


class Mlp(nn.Module):
    """f(z, u) = LayerNorm(u + W2 relu(W1 z)), four times as wide inside."""

    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.wide, self.back, self.norm = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.LayerNorm(d)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return self.norm(u + 0.5 * self.back(functional.relu(self.wide(z))))


class Transformer(nn.Module):
    """f(z, u): a layer of attention and an MLP, four times as wide inside, with layer norms."""

    def __init__(self, d: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out, self.norm, self.mlp = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.LayerNorm(d), Mlp(d)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(z).chunk(3, -1))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        h = self.norm(u + 0.5 * self.out((weights @ v).transpose(1, 2).flatten(2)))
        return self.mlp(h, h)


class Case:
    """f, and what one evaluation of it takes."""

    def __init__(self, title: str, f: nn.Module, shape: tuple[int, ...]) -> None:
        self.title = title
        self.f = f
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.z0 = torch.zeros(shape)
        self.state = self.z0.nbytes
        self._plain(True)  # the parameters' gradients are there from now on
        self.graph = peak_bytes(lambda: self._plain(False))
        self.whole = peak_bytes(lambda: self._plain(True))

    def _plain(self, backward: bool) -> Tensor:
        fz = self.f(self.z0.clone().requires_grad_(), self.x)
        if backward:
            fz.sum().backward()
        return fz

    def step(self, steps: int, **configuration: Any) -> tuple[int, int]:
        """Peak bytes of a training step of so many solver steps, and the evaluations of f that it makes."""
        solver = configuration.pop("solver")
        deq = deqcore.get_deq(
            solver={**_named(solver), "max_iter": steps, "tol": 0.0}, on_failure="ignore", **configuration
        )

        def train(f: Callable[..., Tensor]) -> None:
            deq(f, self.z0, args=(self.x,))[0][-1].sum().backward()

        train(self.f)  # what is loaded or made once is not counted
        counter = Counter(self.f)
        train(counter)
        return peak_bytes(lambda: train(self.f)), counter.calls


def _named(choice: str | dict[str, Any]) -> dict[str, Any]:
    return {"name": choice} if isinstance(choice, str) else choice


def _cases() -> list[Case]:
    torch.manual_seed(0)
    return [
        Case("digits cell", DigitCell(32, 8), (32, 32, 8, 8)),
        Case("MLP", Mlp(), (1024, 64)),
        Case("transformer layer", Transformer(), (64, 16, 64)),
    ]


def tables(options: Options) -> list[Table]:
    """The implicit step, and the backends whose memory depends on the number of steps."""
    cases = _cases()[:2] if options.quick else _cases()
    found = [_implicit(cases), _unrolled(cases)]
    return [*found, _reversible(cases)] if "reversible" in installed("gradients") else found


def _implicit(cases: list[Case]) -> Table:
    table = Table(
        f"Peak memory of an implicit training step, {STEPS} steps forward and {STEPS} back",
        ("f", "graph", "with its backward", "training step", "over the graph", "over f with its backward", "ok"),
        notes="In states (sizes of z). Graph: one evaluation of f, its input included, held for a backward; then "
        "with that backward, whose temporaries are f's own. The training step: forward by simple_fixed_point_iter, "
        "which keeps no history, adjoint by neumann, which keeps no basis: so neither is counted. The peak of all "
        "that torch's allocator gave out, the parameters and their gradients, which are there before, aside. ok: at "
        f"most {LIMIT} over the graph.",
    )
    for case in cases:
        gradient = {**LEAN["gradient"], "solver": {**LEAN["gradient"]["solver"], "max_iter": STEPS}}
        peak, _ = case.step(STEPS, solver=LEAN["solver"], gradient=gradient)
        ratio = peak / case.graph
        sizes = (f"{size / case.state:.1f}" for size in (case.graph, case.whole, peak))
        ok = "yes" if ratio <= LIMIT else "NO"
        table.add(case.title, *sizes, f"{ratio:.2f}", f"{peak / case.whole:.2f}", ok)
    return table


def _unrolled(cases: list[Case]) -> Table:
    titles = [gradient.get("checkpoint", "none") for gradient in UNROLLED]
    table = Table(
        f"Peak memory of an unrolled training step, {STEPS} steps, over f with its backward",
        ("f", *(f"checkpoint {title}" for title in titles), "evaluations of f"),
        notes="fixed_point_iter; evaluations: of the three, forward and backward.",
    )
    for case in cases:
        found = [case.step(STEPS, solver="fixed_point_iter", gradient=gradient) for gradient in UNROLLED]
        peaks = (f"{peak / case.whole:.1f}" for peak, _ in found)
        table.add(case.title, *peaks, ", ".join(str(calls) for _, calls in found))
    return table


def _reversible(cases: list[Case]) -> Table:
    table = Table(
        f"Peak memory of a reversible training step, {STEPS} steps over {FEW}",
        ("f", "damping", "pairs kept, at most", f"{FEW} steps, states", f"{STEPS} steps, states", "ratio", "ok"),
        notes="float32. Where the reconstruction would lose too much, pairs of states are kept, and are counted here; "
        "with a limit on them (1 is the default), steps are made once more in the backward instead. "
        f"ok: at most {REVERSIBLE_LIMIT}.",
    )
    for case in cases:
        for damping, keep in ((0.2, 1), (0.5, 1), (0.2, 0), (0.5, 0), (0.5, None)):
            title = case.title, damping, "as needed" if keep is None else keep
            solver = {"name": "reversible", "damping": damping, "return_final": True}
            gradient = {"name": "reversible", "keep": keep}
            try:
                few, many = (
                    case.step(steps, solver=solver, gradient=gradient, core="reversible")[0] for steps in (FEW, STEPS)
                )
            except (DEQError, RuntimeError) as error:
                table.add(*title, f"refused: {type(error).__name__}", "", "", "")
                continue
            ok = "yes" if many <= REVERSIBLE_LIMIT * few else "NO"
            sizes = (f"{size / case.state:.1f}" for size in (few, many))
            table.add(*title, *sizes, f"{many / few:.2f}", ok)
    return table
