"""Several calls in one graph, graphs used twice, equilibria inside of equilibria, checkpoints and threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deqcore
from deqcore import get_deq

DOUBLE = torch.float64
EXACT: dict[str, Any] = {
    "solver": {"name": "broyden", "tol": 1e-12, "max_iter": 200},
    "gradient": {"name": "implicit", "solver": {"name": "gmres", "tol": 1e-12}},
}
STEPS = 150


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def leaves() -> tuple[Tensor, Tensor]:
    w = torch.linalg.qr(rand(4, 4, seed=1))[0] * 0.7
    return w.requires_grad_(), rand(3, 4).requires_grad_()


def implicit(deq: Any, fn: Any) -> Tensor:
    return deq(fn, torch.zeros(3, 4, dtype=DOUBLE))[0][-1]


def unrolled(deq: Any, fn: Any) -> Tensor:
    z = torch.zeros(3, 4, dtype=DOUBLE)
    for _ in range(STEPS):
        z = fn(z)
    return z


def same(found: Any, expected: Any, tol: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


# ---- many calls of one deq in one graph


def independent(solve: Any, deq: Any, w: Tensor, x: Tensor) -> Tensor:
    parts = [solve(deq, lambda z, k=k: torch.tanh(z @ w + k * x)) for k in range(1, 5)]
    return torch.stack(parts).square().sum()


def chain(solve: Any, deq: Any, w: Tensor, x: Tensor) -> Tensor:
    u = x
    for _ in range(4):
        u = solve(deq, lambda z, u=u: torch.tanh(z @ w + u))
    return u.sin().sum()


def diamond(solve: Any, deq: Any, w: Tensor, x: Tensor) -> Tensor:
    """Two equilibria of one, and one of the two."""
    first = solve(deq, lambda z: torch.tanh(z @ w + x))
    left = solve(deq, lambda z: torch.sin(0.5 * z + first @ w))
    right = solve(deq, lambda z: 0.3 * torch.cos(z * left.detach().mean()) + first)
    return solve(deq, lambda z: torch.tanh(z @ w.T + left * right)).sum() + first.sum()


def recurrent(solve: Any, deq: Any, w: Tensor, x: Tensor) -> Tensor:
    """An equilibrium a time step, each a function of the one before: backpropagation through time."""
    h, total = torch.zeros(3, 4, dtype=DOUBLE), 0.0
    for t in range(5):
        h = solve(deq, lambda z, h=h, t=t: torch.tanh(0.5 * z @ w + h.roll(t, 1) + x))
        total = total + (h * (t + 1)).sum()
    return total


def inner_and_outer(solve: Any, deq: Any, w: Tensor, x: Tensor) -> Tensor:
    """The same deq inside of its own f, and behind it."""

    def fn(z: Tensor) -> Tensor:
        return 0.5 * solve(deq, lambda y: 0.5 * torch.tanh(y @ w + z)) + x

    z = solve(deq, fn)
    return solve(deq, lambda y: torch.tanh(y @ w + z)).sum() + z.square().sum()


GRAPHS = [independent, chain, diamond, recurrent, inner_and_outer]


@pytest.mark.parametrize("graph", GRAPHS)
def test_many_calls_of_one_deq_in_one_graph(graph: Any) -> None:
    inputs, deq = leaves(), get_deq(**EXACT)
    same(
        torch.autograd.grad(graph(implicit, deq, *inputs), inputs),
        torch.autograd.grad(graph(unrolled, None, *inputs), inputs),
    )


@pytest.mark.parametrize("graph", [independent, chain, diamond])
def test_second_derivatives_of_many_calls(graph: Any) -> None:
    inputs, deq = leaves(), get_deq(**EXACT)

    def second(value: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(value, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    same(second(graph(implicit, deq, *inputs)), second(graph(unrolled, None, *inputs)), 1e-7)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("gradient", ["implicit", {"name": "phantom", "steps": 2}])
def test_a_graph_kept_gives_the_same_again_and_again(graph: Any, gradient: Any) -> None:
    inputs = leaves()
    value = graph(implicit, get_deq(**{**EXACT, "gradient": gradient}), *inputs)
    found = [torch.autograd.grad(value, inputs, retain_graph=k < 2) for k in range(3)]
    for again in found[1:]:
        same(again, found[0], 1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, inputs)


def test_parts_of_one_graph_one_after_the_other() -> None:
    """Two losses of one equilibrium add up to the gradient of their sum, also into .grad."""
    w, x = leaves()
    z = implicit(get_deq(**EXACT), lambda z: torch.tanh(z @ w + x))
    z.sum().backward(retain_graph=True)
    z.square().sum().backward()
    y = unrolled(None, lambda z: torch.tanh(z @ w + x))
    same([w.grad, x.grad], list(torch.autograd.grad(y.sum() + y.square().sum(), [w, x])))


def test_a_backward_inside_of_f() -> None:
    """f is a gradient step: it differentiates something itself."""
    w, x = leaves()

    def fn(z: Tensor) -> Tensor:
        with torch.enable_grad():
            at = z if z.requires_grad else z.detach().requires_grad_()
            energy = 0.5 * (at - x).square().sum() + 0.25 * torch.cos(at @ w).sum()
            (slope,) = torch.autograd.grad(energy, at, create_graph=True)
        return z - 0.5 * slope

    found = torch.autograd.grad(implicit(get_deq(**EXACT), fn).square().sum(), [w, x])
    same(found, torch.autograd.grad(unrolled(None, fn).square().sum(), [w, x]))


def test_an_equilibrium_in_an_equilibrium_by_another_backend() -> None:
    w, x = leaves()
    inner_z = {}

    def fn(deq: Any) -> Any:
        def outer(z: Tensor) -> Tensor:
            y = (
                implicit(deq, lambda y: 0.5 * torch.tanh(y @ w + z))
                if deq
                else unrolled(None, lambda y: 0.5 * torch.tanh(y @ w + z))
            )
            inner_z["y"] = y
            return 0.5 * y + x

        return outer

    expected = torch.autograd.grad(unrolled(None, fn(None)).square().sum(), [w, x])
    for first in ({"name": "broyden", "tol": 1e-12}, {"name": "fixed_point_iter", "tol": 1e-12, "max_iter": 300}):
        deq = get_deq(**EXACT)
        outer = get_deq(**{**EXACT, "solver": first}, on_failure="ignore")
        same(torch.autograd.grad(implicit(outer, fn(deq)).square().sum(), [w, x]), expected)


# ---- checkpoints around a call


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("gradient", ["implicit", {"name": "phantom", "steps": 3}])
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_a_call_under_a_checkpoint(reentrant: bool, gradient: Any, drop: float) -> None:
    """The backward runs the call once more; a dropout mask must be the one of the first run."""
    w, x = leaves()
    deq, dropout = get_deq(**{**EXACT, "gradient": gradient}), deqcore.VariationalDropout(drop)

    def block(u: Tensor) -> Tensor:
        return implicit(deq, lambda z: torch.tanh(dropout(z @ w) * 0.8 + u))

    def run(around: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        value = around(around(x)).square().sum()
        return torch.autograd.grad(value, [w, x]) if around is block or not reentrant else by_backward(value)

    def by_backward(value: Tensor) -> tuple[Tensor, ...]:
        w.grad = x.grad = None
        value.backward()
        assert w.grad is not None and x.grad is not None
        return w.grad.clone(), x.grad.clone()

    same(run(lambda u: checkpoint(block, u, use_reentrant=reentrant)), run(block), 1e-10)


def test_checkpoints_inside_of_f() -> None:
    w, x = leaves()

    def fn(z: Tensor) -> Tensor:
        return checkpoint(lambda z: torch.tanh(z @ w + x), z, use_reentrant=False)

    found = torch.autograd.grad(implicit(get_deq(**EXACT), fn).square().sum(), [w, x])
    same(found, torch.autograd.grad(unrolled(None, lambda z: torch.tanh(z @ w + x)).square().sum(), [w, x]))


def test_gradient_by_sequential_checkpoints_of_a_model() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4).double()
            self.deq = get_deq(**EXACT)

        def forward(self, u: Tensor) -> Tensor:
            return self.deq(lambda z: torch.tanh(0.3 * self.layer(z) + u), torch.zeros_like(u))[0][-1]

    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(4, 4).double(), Block())
    x = rand(3, 4)

    def gradients(z: Tensor) -> list[Tensor]:
        model.zero_grad()
        z.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(model(x))
    same(gradients(torch.utils.checkpoint.checkpoint_sequential(model, 3, x, use_reentrant=False)), plain, 1e-12)


# ---- threads


def in_threads(works: list[Any]) -> list[Any]:
    """What each returned, or raises what one raised; all start at one moment."""
    found: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(k: int) -> None:
        try:
            start.wait(20)
            found[k] = works[k]()
        except BaseException as error:
            found[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def second_order(deq: Any, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    z = implicit(deq, lambda z: torch.tanh(z @ w + x))
    first = torch.autograd.grad(z.square().sum(), (w, x), create_graph=True)
    return torch.autograd.grad(first[0].square().sum() + first[1].sum(), (w, x))


@pytest.mark.parametrize("shared", [True, False])
def test_two_threads_that_train(shared: bool) -> None:
    """One deq in both, or one in each; shared weights; forward, backward and second derivatives at once."""
    w, _ = leaves()
    deqs = [get_deq(**EXACT)] * 2 if shared else [get_deq(**EXACT) for _ in range(2)]
    inputs = [rand(3, 4, seed=20 + k).requires_grad_() for k in range(2)]
    alone = [second_order(deq, w, x) for deq, x in zip(deqs, inputs, strict=True)]

    def work(k: int) -> Any:
        return lambda: [second_order(deqs[k], w, inputs[k]) for _ in range(8)]

    for k, found in enumerate(in_threads([work(0), work(1)])):
        for again in found:
            same(again, alone[k], 1e-12)


def test_one_graph_differentiated_in_two_threads() -> None:
    """A graph that is kept may be walked by several threads; each gets the whole gradient."""
    w, x = leaves()
    z = implicit(get_deq(**EXACT), lambda z: torch.tanh(z @ w + x))
    value = z.square().sum()
    expected = torch.autograd.grad(value, (w, x), retain_graph=True)

    def work() -> Any:
        return [torch.autograd.grad(value, (w, x), retain_graph=True) for _ in range(8)]

    for found in in_threads([work, work]):
        for again in found:
            same(again, expected, 1e-12)


def test_a_graph_made_in_one_thread_and_differentiated_in_another() -> None:
    w, x = leaves()
    deq = get_deq(**EXACT)
    expected = second_order(deq, w, x)
    (z,) = in_threads([lambda: implicit(deq, lambda z: torch.tanh(z @ w + x))])

    def rest() -> Any:
        first = torch.autograd.grad(z.square().sum(), (w, x), create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].sum(), (w, x))

    same(in_threads([rest])[0], expected, 1e-12)


@pytest.mark.parametrize("dropout", [deqcore.VariationalDropout(0.3), nn.Dropout(0.3)], ids=["variational", "torch"])
def test_masks_of_one_layer_in_two_threads(dropout: nn.Module) -> None:
    """A solve in one thread must not lend its scope to the other."""
    w, _ = leaves()
    deq = get_deq(**EXACT)

    def work(k: int) -> Any:
        def run() -> Any:
            checks = []
            for n in range(6):
                x = rand(3, 4, seed=n).requires_grad_()
                seen: list[Tensor] = []

                def fn(z: Tensor, x: Tensor = x, seen: list[Tensor] = seen) -> Tensor:
                    seen.append(dropout(torch.ones_like(z)).detach())
                    return torch.tanh(seen[-1] * (z @ w) + x)

                implicit(deq, fn).square().sum().backward()
                checks.append(all(torch.equal(mask, seen[0]) for mask in seen) and len(seen) > 3)
            return checks

        return run

    for checks in in_threads([work(0), work(1)]):
        assert all(checks)
