"""Graph breaks of a compiled training step, and where they are."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from deqcore import get_deq

from .options import Options
from .report import Table

__all__ = ["tables"]

FIXED: dict[str, Any] = {"tol": 0.0, "max_iter": 8}
STOPS: dict[str, Any] = {"rtol": 1e-4, "max_iter": 60}
CASES: tuple[tuple[str, str, dict[str, Any], Any], ...] = (
    ("8 steps", "anderson", FIXED, "phantom"),
    ("8 steps", "anderson", FIXED, "implicit"),
    ("stop test", "anderson", STOPS, "phantom"),
    ("stop test", "anderson", STOPS, "implicit"),
    ("stop test", "broyden", STOPS, "implicit"),
)


class Model(nn.Module):
    """A DEQ as programs write it: f is a closure, made anew in every call."""

    def __init__(self, **configuration: Any) -> None:
        super().__init__()
        self.inject, self.layer = nn.Linear(16, 16), nn.Linear(16, 16)
        self.deq = get_deq(on_failure="ignore", **configuration)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.inject(x)

        def fn(z: Tensor) -> Tensor:
            return torch.tanh(0.4 * self.layer(z) + bias)

        z_out, _ = self.deq(fn, torch.zeros_like(x))
        return z_out[-1].square().mean()


class Graphs:
    """A backend that keeps the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.found: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.found.append(graph)
        return graph

    def of_f(self) -> list[int]:
        """For each graph in which f is evaluated: how often its last operation is there, less its first."""
        held: list[int] = []
        for graph in self.found:
            targets = [node.target for node in graph.graph.nodes]
            # The injection's own linear layer is the one more that the caller's graph may have.
            first, last = sum("linear" in str(t) for t in targets), targets.count(torch.tanh)
            if last:
                held.append(first - last)
        return held


def tables(options: Options) -> list[Table]:
    """Graphs and breaks by kind of solve."""
    table = Table(
        "Graph breaks of a compiled training step",
        ("solve", "solver", "gradient", "graph breaks", "graphs", "of these with f, whole", "breaks inside f", "error"),
        notes="torch.compile in its default mode, dynamo's own count for the forward of one step; then the backward. "
        "A break inside f is one whose stack ends in f's code, or a graph that holds a part of f only. Error: of the "
        "loss and of all gradients, largest difference from the same step without a compiler.",
    )
    disabled = logging.getLogger("torch.__trace").disabled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, solver, settings, gradient in CASES[1::2] if options.quick else CASES:
            table.add(kind, solver, f"`{gradient}`", *_count({"name": solver, **settings}, gradient))
    logging.getLogger("torch.__trace").disabled = disabled
    torch._dynamo.reset()
    return [table]


def _count(solver: dict[str, Any], gradient: Any) -> tuple[object, ...]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Model(solver=solver, gradient=gradient), torch.randn(32, 16)
    told = torch._dynamo.explain(model)(x)
    inside = sum(bool(reason.user_stack) and reason.user_stack[-1].name == "fn" for reason in told.break_reasons)
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs)
    mine, right = (_step(model, run, x) for run in (compiled, model))
    held = graphs.of_f()
    whole = sum(extra in (0, 1) for extra in held)
    error = max(float((a - b).abs().max()) for a, b in zip(mine, right, strict=True))
    breaks = told.graph_break_count
    return breaks, len(graphs.found), f"{whole} of {len(held)}", inside + len(held) - whole, f"{error:.0e}"


def _step(model: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss = run(x)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
