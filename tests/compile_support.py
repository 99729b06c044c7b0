"""Models to compile, a backend that counts graphs, and the comparison of compiled and plain calls."""

import copy

import torch
from torch import nn

import deqcore
from deqcore import get_deq

F64 = torch.float64
SOLVERS = ("fixed_point_iter", "damped", "anderson")


class Graphs:
    """A backend that keeps the graphs it is given, and runs them by another backend."""

    def __init__(self, backend="eager"):
        self.backend = torch._dynamo.lookup_backend(backend)
        self.found = []

    def __call__(self, graph, inputs):
        self.found.append(graph)
        return self.backend(graph, inputs)

    def with_call(self, target):
        """The graphs that call the function `target` somewhere."""
        return [g for g in self.found if any(node.target is target for node in g.graph.nodes)]


def compiled(model, backend="eager", **options):
    graphs = Graphs(backend)
    return torch.compile(model, backend=graphs, **options), graphs


class Model(nn.Module):
    """An equilibrium of a function that is made anew in every call, as programs do."""

    def __init__(self, features=8, dtype=F64, norm=None, dropout=0.0, **config):
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.layer = nn.Linear(features, features), nn.Linear(features, features)
        self.drop = deqcore.VariationalDropout(dropout)
        self.to(dtype)
        if norm is not None:
            deqcore.apply_norm(self.layer, norm)
        self.deq = get_deq(on_failure="ignore", **config)

    def forward(self, x):
        bias = self.inject(x)

        def fn(z):
            return torch.tanh(0.4 * self.drop(self.layer(z)) + bias)

        z_out, info = self.deq(fn, torch.zeros_like(x))
        return z_out[-1], info


def inputs(batch=6, features=8, dtype=F64, seed=1):
    return torch.randn(batch, features, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def config(solver, gradient="phantom", tol=0.0, max_iter=3, **settings):
    return {"solver": {"name": solver, "tol": tol, "max_iter": max_iter, **settings}, "gradient": gradient}


def step(run, model, x):
    """State, info and gradients of one training step of `run`, which runs `model`."""
    model.zero_grad()
    torch.manual_seed(2)
    z, info = run(x)
    if z.requires_grad:
        (z**3).sum().backward()
    return z.detach(), info, [p.grad for p in model.parameters() if p.grad is not None]


def compare(model, x, atol=1e-12, backend="eager", calls=2, **options):
    """Compiled and plain calls give the same; returns the graphs and the compiled call's info."""
    plain = copy.deepcopy(model)
    run, graphs = compiled(model, backend, **options)
    for _ in range(calls):
        z, info, grads = step(run, model, x)
        right, right_info, right_grads = step(plain, plain, x)
    torch.testing.assert_close(z, right, atol=atol, rtol=0)
    assert len(grads) == len(right_grads)
    for mine, theirs in zip(grads, right_grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol * 100, rtol=atol)
    same_info(info, right_info, atol)
    return graphs, info


def same_info(mine, theirs, atol):
    assert type(mine) is deqcore.Solution
    assert set(mine) == set(theirs)
    for key in set(theirs) - {"backward"}:
        if isinstance(theirs[key], torch.Tensor):
            torch.testing.assert_close(mine[key], theirs[key], atol=10 * atol, rtol=1e-5 if atol > 1e-9 else 1e-9)
        else:
            assert mine[key] == theirs[key], key
    if "backward" in theirs:
        same_info(mine["backward"], theirs["backward"], max(atol, 1e-9))


def breaks():
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def half(z):
    return 0.5 * torch.cos(z) + 0.2
