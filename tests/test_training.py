"""What training does to an equilibrium: its backward's honesty, mixed precision, frozen parts, statistics, memory."""

from __future__ import annotations

import copy
import gc
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from compile_support import breaks, compiled
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import deqcore
from deqcore import ConvergenceError, ConvergenceWarning, Status, get_deq

DOUBLE = torch.float64
EXACT: dict[str, Any] = {
    "solver": {"name": "broyden", "tol": 1e-12, "max_iter": 200},
    "gradient": {"name": "implicit", "solver": {"name": "gmres", "tol": 1e-12}},
}


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def weight(size: int, rho: float = 0.8, dtype: torch.dtype = DOUBLE) -> Tensor:
    return (torch.linalg.qr(rand(size, size, seed=1))[0] * rho).to(dtype)


def same(found: Any, expected: Any, tol: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def unroll(fn: Any, z: Tensor, steps: int = 300) -> Tensor:
    for _ in range(steps):
        z = fn(z)
    return z


# ---- the backward is a solve of its own, and says how it went


@pytest.mark.parametrize("adjoint", ["gmres", "anderson", "broyden", "fixed_point_iter"])
@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_the_residual_that_the_backward_reports_is_the_true_one(adjoint: str, size: float) -> None:
    """|J^T u + b - u| and over |J^T u + b|, recomputed outside; b is the cotangent, however small."""
    w, x = weight(6, 0.95), rand(4, 6).requires_grad_()
    heard: list[Any] = []
    gradient = {"name": "implicit", "solver": {"name": adjoint, "tol": 1e-3, "max_iter": 400}}
    deq = get_deq(**{**EXACT, "gradient": gradient})
    z_out, info = deq(lambda z: torch.tanh(z @ w + x), torch.zeros(4, 6, dtype=DOUBLE), backward_writer=heard.append)
    z, cotangent = z_out[-1], size * rand(4, 6, seed=3)
    assert "backward" not in info
    torch.autograd.grad(z, x, cotangent)
    told = info["backward"]
    assert heard == [told]
    b, u = cotangent, told["z"]
    slopes = 1 - z.detach() ** 2
    au = (u * slopes) @ w.T + b
    lengths = torch.linalg.vector_norm(au - u, dim=1)
    same(told["abs_lowest"] / size, lengths / size, 1e-6)
    same(told["abs_trace"].amin(1) / size, lengths / size, 1e-6)
    same(told["rel_lowest"], lengths / torch.linalg.vector_norm(au, dim=1), 1e-6)
    assert bool(told.converged.all()) and bool((told["abs_lowest"] > 0).all())
    assert told["status"].shape == (4,) and told["steps"].shape == (4,)


def test_the_backward_counts_its_products() -> None:
    w, x = weight(6, 0.95), rand(4, 6).requires_grad_()
    count = [0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
            count[0] += 1
            return cotangents[0]

    for adjoint in ("gmres", "anderson", "fixed_point_iter"):
        gradient = {"name": "implicit", "solver": {"name": adjoint, "tol": 1e-6, "max_iter": 300}}
        fn = lambda z: torch.tanh(Counted.apply(z) @ w + x)  # noqa: E731
        z_out, info = get_deq(
            **{**EXACT, "solver": {"name": "anderson", "tol": 1e-9, "max_iter": 99}, "gradient": gradient}
        )(fn, torch.zeros(4, 6, dtype=DOUBLE))
        count[0] = 0
        torch.autograd.grad(z_out[-1].sum(), x)
        # one pass more goes on to f's own inputs
        assert info["backward"]["nfe"] <= count[0] <= info["backward"]["nfe"] + 1
        assert int(info["backward"]["steps"].max()) <= info["backward"]["nfe"]


def failing(policy: str, training: bool = True, **options: Any) -> tuple[Tensor, Any, Tensor]:
    w, x = weight(16, 0.97), rand(4, 16).requires_grad_()
    gradient = {"name": "implicit", "solver": {"name": "fixed_point_iter", "tol": 1e-9, "max_iter": 3}}
    deq = get_deq(**{**EXACT, "gradient": gradient}, on_failure=policy).train(training)
    z_out, info = deq(lambda z: torch.tanh(z @ w + x), torch.zeros(4, 16, dtype=DOUBLE), **options)
    return z_out[-1], info, x


@pytest.mark.parametrize("training", [True, False])
def test_the_failure_policy_in_the_backward(training: bool) -> None:
    z, info, x = failing("raise", training)
    with pytest.raises(ConvergenceError, match="backward solve") as caught:
        torch.autograd.grad(z.sum(), x)
    assert caught.value.solution.counts() == {Status.MAX_STEPS: 4}
    assert info["backward"] is caught.value.solution  # known all the same
    z, info, x = failing("warn", training)
    with pytest.warns(ConvergenceWarning, match="backward solve"):
        torch.autograd.grad(z.sum(), x)
    heard: list[Any] = []
    z, info, x = failing("ignore", training, backward_writer=heard.append)
    (found,) = torch.autograd.grad(z.sum(), x)
    assert bool(found.isfinite().all()) and heard == [info["backward"]]
    assert heard[0].counts() == {Status.MAX_STEPS: 4}


def test_the_failure_policy_in_every_solve_of_a_second_derivative() -> None:
    """A second derivative solves three adjoints or more; each is judged, and heard of."""
    heard: list[Any] = []
    z, _, x = failing("ignore", backward_writer=heard.append)
    (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    assert len(heard) == 1
    torch.autograd.grad(first.square().sum(), x)
    assert len(heard) >= 3 and all(solve.failed() for solve in heard)
    z, _, x = failing("raise")
    with pytest.raises(ConvergenceError, match="backward solve"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


def test_the_failure_policy_in_fixed_point() -> None:
    w, x = weight(16, 0.97), rand(4, 16).requires_grad_()
    gradient = {"name": "implicit", "solver": {"name": "fixed_point_iter", "tol": 1e-9, "max_iter": 3}}

    def run(x: Tensor, policy: str) -> Tensor:
        fn = lambda z, x: torch.tanh(z @ w + x)  # noqa: E731
        options = {**EXACT, "gradient": gradient, "on_failure": policy}
        return deqcore.fixed_point(fn, torch.zeros(4, 16, dtype=DOUBLE), (x,), **options).sum()

    for derive in (lambda f: torch.autograd.grad(f(x), x), lambda f: torch.func.grad(f)(x.detach())):
        with pytest.raises(ConvergenceError, match="backward solve"):
            derive(lambda x: run(x, "raise"))
        with pytest.warns(ConvergenceWarning, match="backward solve"):
            derive(lambda x: run(x, "warn"))
        derive(lambda x: run(x, "ignore"))


def test_a_backward_where_f_has_no_finite_slope() -> None:
    """sqrt at 0: the products are NaN; the status says so, no solver hangs, and the gradient is not made up."""
    x = torch.zeros(2, 3, dtype=DOUBLE, requires_grad=True)
    deq = get_deq(**EXACT, on_failure="ignore")
    z_out, info = deq(
        lambda z: 0.5 * (z.abs() + x.detach()).sqrt() * z.sign() + 0 * z + x, torch.zeros(2, 3, dtype=DOUBLE)
    )
    (found,) = torch.autograd.grad(z_out[-1].sum(), x)
    if not bool(found.isfinite().all()):
        return
    assert info["backward"].failed()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("way", ["call", "fixed_point", "second"])
@pytest.mark.parametrize("mean", [False, True])
def test_the_losss_scale_changes_nothing(way: str, dtype: torch.dtype, mean: bool) -> None:
    """1, 1e-4, 1e-7: the same relative error, at a loose tolerance, where an absolute one would stop early."""
    w, x = weight(8, 0.9, dtype), rand(5, 8, dtype=dtype).requires_grad_()
    tolerance = 1e-4
    options = {
        "solver": {"name": "anderson", "tol": 1e-6, "max_iter": 300},
        "gradient": {"name": "implicit", "solver": {"name": "gmres", "tol": tolerance}},
        "on_failure": "ignore",
    }

    def gradient(scale: float, options: Any = options) -> Tensor:
        fn = lambda z, x: torch.tanh(z @ w + x)  # noqa: E731
        if way == "fixed_point":
            z = deqcore.fixed_point(fn, torch.zeros(5, 8, dtype=dtype), (x,), **options)
        else:
            z = get_deq(**options)(fn, torch.zeros(5, 8, dtype=dtype), args=(x,))[0][-1]
        loss = scale * (z.square().mean() if mean else z.square().sum())
        if way == "second":
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            return torch.autograd.grad(first.sum(), x)[0].double() / scale
        return torch.autograd.grad(loss, x)[0].double() / scale

    wide = x.detach().double().requires_grad_()
    z = unroll(lambda z: torch.tanh(z @ w.double() + wide), torch.zeros(5, 8, dtype=DOUBLE), 500)
    loss = z.square().mean() if mean else z.square().sum()
    (exact,) = torch.autograd.grad(loss, wide, create_graph=way == "second")
    if way == "second":
        (exact,) = torch.autograd.grad(exact.sum(), wide)
    errors = [
        float(torch.linalg.vector_norm(gradient(s) - exact) / torch.linalg.vector_norm(exact))
        for s in (1.0, 1e-4, 1e-7)
    ]
    assert max(errors) < 30 * tolerance
    assert max(errors) <= 1.2 * min(errors) + 1e-6, errors


# ---- eval, autocast, scaler


class Model(nn.Module):
    """A classifier with an equilibrium of a small network inside."""

    def __init__(self, size: int = 16, **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.layer, self.head = nn.Linear(8, size), nn.Linear(size, size), nn.Linear(size, 4)
        self.size = size
        settings = {"solver": {"name": "anderson", "tol": 1e-2, "max_iter": 60}, "gradient": "implicit", **config}
        self.deq = get_deq(**settings, on_failure="ignore")

    def forward(self, x: Tensor) -> Tensor:
        u = self.inject(x)
        z_out, self.info = self.deq(lambda z: torch.tanh(self.layer(z) + u), torch.zeros(len(x), self.size))
        return self.head(z_out[-1])


BATCH = rand(12, 8, seed=5, dtype=torch.float32)
LABELS = torch.arange(12) % 4


def gradients(model: nn.Module, around: Any = None, backward_inside: bool = False) -> Tensor:
    model.zero_grad()
    with around or nullcontext():
        loss = nn.functional.cross_entropy(model(BATCH).float(), LABELS)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return torch.cat([p.grad.reshape(-1).double() for p in model.parameters()])


@pytest.mark.parametrize("gradient", ["implicit", "phantom", "one_step", "neumann", "unrolled"])
def test_gradients_in_eval_are_those_in_train(gradient: str) -> None:
    model = Model(gradient=gradient, solver={"name": "fixed_point_iter", "tol": 1e-6, "max_iter": 200})
    training = gradients(model.train())
    evaluated = gradients(model.eval())
    assert float(evaluated.norm()) > 0
    same(evaluated, training, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", ["implicit", "phantom", "unrolled", "neumann"])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_forward_and_backward(gradient: str, dtype: torch.dtype, inside: bool) -> None:
    model = Model(gradient=gradient)
    for training in (True, False):
        model.train(training)
        expected = gradients(model)
        found = gradients(model, torch.autocast("cpu", dtype=dtype), inside)
        assert float(cosine_similarity(found, expected, 0)) > 0.999
        assert 0.95 < float(found.norm() / expected.norm()) < 1.05
        if gradient == "implicit":
            assert not model.info["backward"].failed()
            assert model.info["backward"]["z"].dtype == torch.float32


def test_autocast_second_derivatives() -> None:
    """A gradient penalty under autocast, beside the one in float32."""
    model = Model()
    x = BATCH.clone().requires_grad_()

    def penalty(around: Any) -> Tensor:
        model.zero_grad()
        with around:
            out = model(x).float().sum()
            (slope,) = torch.autograd.grad(out, x, create_graph=True)
            slope.square().sum().backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])

    found, expected = penalty(torch.autocast("cpu", dtype=torch.bfloat16)), penalty(nullcontext())
    assert float(cosine_similarity(found, expected, 0)) > 0.99


def test_fixed_point_under_autocast() -> None:
    w, x = weight(16, 0.8, torch.float32), rand(4, 16, dtype=torch.float32)

    def run(w: Tensor, x: Tensor) -> Tensor:
        fn = lambda z, w, x: torch.tanh(nn.functional.linear(z, w) + x).float()  # noqa: E731
        settings = {"solver": {"name": "anderson", "tol": 1e-2}, "on_failure": "ignore"}
        return deqcore.fixed_point(fn, torch.zeros(4, 16), (w, x), **settings).square().sum()

    expected = torch.func.grad(run)(w, x)
    w.requires_grad_()
    for around in (torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", dtype=torch.float16)):
        with around:
            value = run(w, x)
            assert value.dtype == torch.float32
            (inside,) = torch.autograd.grad(value, w, retain_graph=True)
            by_transform = torch.func.grad(run)(w.detach(), x)
        (outside,) = torch.autograd.grad(value, w)
        for found in (inside, outside, by_transform):
            assert float(cosine_similarity(found.flatten(), expected.flatten(), 0)) > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_scaler_and_a_step_that_overflows(dtype: torch.dtype) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = nn.functional.cross_entropy(model(BATCH).float(), LABELS)
        overflows = step == 5
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(loss * (float("inf") if overflows else 1.0)).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert unchanged == overflows
        assert (scaler.get_scale() < scale) == overflows
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_scale_of_a_scaler_changes_no_gradient() -> None:
    model = Model(solver={"name": "anderson", "tol": 1e-6, "max_iter": 100})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    expected = gradients(model)
    for size in (2.0**-20, 1.0, 2.0**16, 2.0**60):
        scaler = torch.amp.GradScaler("cpu", init_scale=size)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(BATCH), LABELS)).backward()
        scaler.unscale_(optimizer)
        same(torch.cat([p.grad.reshape(-1).double() for p in model.parameters()]), expected, 1e-6)


def test_an_overflow_in_a_part_of_the_cotangent_is_seen_by_the_scaler() -> None:
    """One infinite entry must end up as a gradient that is not finite, not be swallowed by the solve."""
    w, x = weight(6, dtype=torch.float32).requires_grad_(), rand(4, 6, dtype=torch.float32)
    for bad in (float("inf"), float("nan")):
        for settings in (EXACT["gradient"], {"name": "neumann", "terms": 5}, "phantom"):
            deq = get_deq(solver={"name": "anderson", "tol": 1e-5}, gradient=settings, on_failure="ignore")
            z_out, _ = deq(lambda z: torch.tanh(z @ w + x), torch.zeros(4, 6))
            cotangent = torch.ones(4, 6)
            cotangent[2, 1] = bad
            (found,) = torch.autograd.grad(z_out[-1], w, cotangent)
            assert not bool(found.isfinite().all())


# ---- which tensors take part


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.double()
        with torch.no_grad():
            self.a.weight.mul_(0.7)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.a(z) + self.b(x))


@pytest.mark.parametrize("frozen", [["a.weight"], ["a.weight", "a.bias"], ["b.weight", "b.bias"], "all"])
@pytest.mark.parametrize("gradient", ["implicit", "phantom", "neumann", "one_step"])
def test_frozen_parameters_of_a_module(frozen: Any, gradient: str) -> None:
    model, x = Mixed(), rand(3, 6)
    options = {"solver": EXACT["solver"], "on_failure": "ignore"}
    settings = EXACT["gradient"] if gradient == "implicit" else gradient

    def run() -> Tensor:
        return get_deq(**options, gradient=settings)(lambda z: model(z, x), torch.zeros(3, 6, dtype=DOUBLE))[0][-1]

    run().square().sum().backward()
    everything = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    names = list(everything) if frozen == "all" else frozen
    for name, p in model.named_parameters():
        p.requires_grad_(name not in names)
    z = run()
    if frozen == "all":
        assert not z.requires_grad
        return
    z.square().sum().backward()
    for name, p in model.named_parameters():
        if name in names:
            assert p.grad is None
        else:
            same(p.grad, everything[name], 1e-10)


@pytest.mark.parametrize("gradient", ["implicit", "phantom", "neumann", "one_step", "unrolled"])
def test_only_the_gradients_asked_for(gradient: str) -> None:
    """autograd.grad(loss, x) and backward(inputs=[x]) leave every .grad of others alone."""
    model, x = Mixed(), rand(3, 6).requires_grad_()
    solver = {"name": "fixed_point_iter", "tol": 1e-12, "max_iter": 500}
    z_out, _ = get_deq(solver=solver, gradient=gradient)(lambda z: model(z, x), torch.zeros(3, 6, dtype=DOUBLE))
    loss = z_out[-1].square().sum()
    (alone,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert all(p.grad is None for p in model.parameters()) and x.grad is None
    loss.backward(inputs=[x], retain_graph=True)
    assert all(p.grad is None for p in model.parameters())
    same(x.grad, alone, 1e-12)
    loss.backward(inputs=[model.b.bias], retain_graph=True)
    assert model.a.weight.grad is None and model.b.bias.grad is not None
    x.grad = None
    model.zero_grad()
    loss.backward()
    same(x.grad, alone, 1e-12)


def test_a_start_that_requires_grad() -> None:
    """The equilibrium does not depend on it; where f does, that is a gradient."""
    w, x = weight(6).requires_grad_(), rand(3, 6).requires_grad_()
    z0 = rand(3, 6, seed=4).requires_grad_()
    deq = get_deq(**EXACT)
    z_out, _ = deq(lambda z: torch.tanh(z @ w + x), z0)
    assert torch.autograd.grad(z_out[-1].sum(), z0, allow_unused=True, retain_graph=True) == (None,)
    found = torch.autograd.grad(z_out[-1].sum(), [w, x])
    z = unroll(lambda z: torch.tanh(z @ w + x), torch.zeros(3, 6, dtype=DOUBLE))
    same(found, torch.autograd.grad(z.sum(), [w, x]))
    z_out, _ = deq(lambda z: torch.tanh(z @ w + x + 0.1 * z0), z0)
    z = unroll(lambda z: torch.tanh(z @ w + x + 0.1 * z0), torch.zeros(3, 6, dtype=DOUBLE))
    same(torch.autograd.grad(z_out[-1].sum(), z0), torch.autograd.grad(z.sum(), z0))
    made = z0.tanh() @ w  # a start that is computed, from what f uses
    z_out, _ = deq(lambda z: torch.tanh(z @ w + x), made)
    same(torch.autograd.grad(z_out[-1].sum(), [w, x]), found)
    first = torch.autograd.grad(deq(lambda z: torch.tanh(z @ w + x), made)[0][-1].sum(), [w, x], create_graph=True)
    z = unroll(lambda z: torch.tanh(z @ w + x), torch.zeros(3, 6, dtype=DOUBLE))
    right = torch.autograd.grad(z.sum(), [w, x], create_graph=True)
    same(torch.autograd.grad(first[0].sum(), [w, x]), torch.autograd.grad(right[0].sum(), [w, x]), 1e-7)


@pytest.mark.parametrize("gradient", ["implicit", "phantom", "neumann", "one_step", "unrolled", "shine"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_a_gradient(mode: Any, gradient: str, training: bool) -> None:
    model, x = Mixed(), rand(3, 6)
    solver = {"name": "broyden" if gradient == "shine" else "fixed_point_iter", "tol": 1e-10, "max_iter": 300}
    deq = get_deq(solver=solver, gradient=gradient).train(training)
    with mode():
        (z,), info = deq(lambda z: model(z, x), torch.zeros(3, 6, dtype=DOUBLE))
        assert not z.requires_grad and z.is_inference() == (mode is torch.inference_mode)
        assert bool(info.converged.all())
    same(z.clone(), unroll(lambda z: model(z, x), torch.zeros(3, 6, dtype=DOUBLE)).detach(), 1e-8)
    (z,), _ = deq(lambda z: model(z, x), torch.zeros(3, 6, dtype=DOUBLE))  # and nothing of it is left behind
    z.sum().backward()
    assert model.a.weight.grad is not None


def test_inference_mode_of_fixed_point_and_of_norms() -> None:
    layer = deqcore.apply_norm(nn.Linear(6, 6).double(), "spectral_norm")
    drop, deq, x = deqcore.VariationalDropout(0.3), get_deq(**EXACT), rand(3, 6)
    with torch.inference_mode():
        deq(lambda z: torch.tanh(0.5 * drop(layer(z)) + x), torch.zeros(3, 6, dtype=DOUBLE))
        z = deqcore.fixed_point(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros(3, 6, dtype=DOUBLE), (x,), **EXACT)
        assert z.is_inference()
    (z,), _ = deq(lambda z: torch.tanh(0.5 * drop(layer(z)) + x), torch.zeros(3, 6, dtype=DOUBLE))
    z.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_state_whose_leaves_have_different_precision() -> None:
    w, x = weight(6, 0.6, torch.float32).requires_grad_(), rand(3, 6, dtype=torch.float32).requires_grad_()

    def fn(h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.tanh(torch.cat([h.float(), c.float()], 1) @ w + x)
        return joint[:, :3].to(h.dtype), joint[:, 3:]

    def run(dtype: torch.dtype, tol: float) -> list[Tensor]:
        deq = get_deq(solver={"name": "anderson", "tol": tol}, gradient="implicit", on_failure="ignore")
        ((h, c),), info = deq(fn, (torch.zeros(3, 3, dtype=dtype), torch.zeros(3, 3)))
        assert h.dtype == dtype and c.dtype == torch.float32
        found = torch.autograd.grad(h.float().sum() + c.sum(), [w, x])
        assert not info["backward"].failed()
        return list(found)

    exact = run(torch.float32, 1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        for a, b in zip(run(dtype, 1e-3), exact, strict=True):
            assert a.dtype == torch.float32
            assert float(cosine_similarity(a.flatten(), b.flatten(), 0)) > 0.999


# ---- what modules inside of f keep


@pytest.fixture(params=["implicit", "phantom", "unrolled", "one_step", "neumann"])
def backend(request: Any) -> Any:
    return {"solver": {"name": "fixed_point_iter", "tol": 1e-8, "max_iter": 200}, "gradient": request.param}


class Normalised(nn.Module):
    def __init__(self, kind: Any = nn.BatchNorm1d, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(5, 5), kind(5, **options)
        self.double()
        self.seen: list[Tensor] = []

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y = 0.4 * self.layer(z) + x
        self.seen.append(y.detach().clone())
        return torch.tanh(0.7 * self.norm(y))


def statistics(norm: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in norm.named_buffers()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_statistics_are_updated_once_a_solve(backend: Any, momentum: Any, training: bool) -> None:
    """As after one call of the layer on the last input that it saw in the forward; the backward changes nothing."""
    f, x = Normalised(momentum=momentum), 2 + 3 * rand(7, 5)
    deq = get_deq(**backend, on_failure="ignore").train(training)
    alone = copy.deepcopy(f.norm)
    for solve in range(3):
        f.seen.clear()
        z_out, _ = deq(lambda z: f(z, x), torch.zeros(7, 5, dtype=DOUBLE))
        assert len(f.seen) > 3
        alone(f.seen[-1])
        after = statistics(f.norm)
        assert int(after["num_batches_tracked"]) == solve + 1
        same(after, statistics(alone), 1e-6)
        z_out[-1].square().sum().backward()
        same(statistics(f.norm), after, 0.0)


def test_batch_statistics_in_other_ways_of_solving() -> None:
    x = 2 + 3 * rand(8, 5)
    krylov = {"solver": {"name": "newton_krylov", "tol": 1e-6}, "gradient": "implicit", "batch_dims": 0}
    ways = {
        "anderson": ({"solver": {"name": "anderson", "tol": 1e-6}, "gradient": "implicit"}, {}),
        "broyden": ({"solver": {"name": "broyden", "tol": 1e-6}, "gradient": "implicit", "batch_dims": 0}, {}),
        "newton_krylov": (krylov, {}),
        "simple": ({"solver": {"name": "simple_fixed_point_iter", "max_iter": 9}, "gradient": "phantom"}, {}),
        "two states": ({"solver": {"name": "anderson", "max_iter": 12}, "core": {"name": "sliced", "n_states": 2}}, {}),
        "no step": ({"gradient": "phantom"}, {"solver_kwargs": {"f_max_iter": 0}}),
        "jacobian": ({"regularizers": [{"name": "jacobian", "weight": 0.1}], "gradient": "implicit"}, {}),
    }
    for name, (config, call) in ways.items():
        f = Normalised()
        deq = get_deq(**config, on_failure="ignore")
        z_out, _ = deq(lambda z, f=f: f(z, x), torch.zeros(8, 5, dtype=DOUBLE), **call)
        z_out[-1].sum().backward()
        assert int(f.norm.num_batches_tracked) == 1, name
        assert bool((f.norm.running_mean != 0).all()), name


def test_batch_statistics_without_a_gradient_in_eval_and_twice_in_f() -> None:
    f, x, deq = Normalised(), 1 + rand(8, 5), get_deq(**EXACT, on_failure="ignore")
    with torch.no_grad():
        deq(lambda z: f(z, x), torch.zeros(8, 5, dtype=DOUBLE))
    assert int(f.norm.num_batches_tracked) == 1
    before = statistics(f.norm)
    f.eval()
    z_out, _ = deq(lambda z: f(z, x), torch.zeros(8, 5, dtype=DOUBLE))
    z_out[-1].sum().backward()
    same(statistics(f.norm), before, 0.0)
    f.train()
    f(torch.zeros(8, 5, dtype=DOUBLE), x)  # outside of a solve the layer is its own self
    assert int(f.norm.num_batches_tracked) == 2
    deq(lambda z: 0.5 * f(f(z, x), x), torch.zeros(8, 5, dtype=DOUBLE))
    assert int(f.norm.num_batches_tracked) == 4  # two calls in one evaluation are two


def test_batch_norm_gives_the_gradient_of_the_batchs_statistics() -> None:
    f, x = Normalised(), 1 + rand(8, 5)
    inputs = [x.requires_grad_(), *f.parameters()]
    options = {**EXACT, "solver": {"name": "anderson", "tol": 1e-12, "max_iter": 300}, "batch_dims": 0}
    z_out, _ = get_deq(**options, on_failure="ignore")(lambda z: f(z, x), torch.zeros(8, 5, dtype=DOUBLE))
    found = torch.autograd.grad(z_out[-1].pow(3).sum(), inputs)
    z = unroll(lambda z: f(z, x), torch.zeros(8, 5, dtype=DOUBLE))
    same(found, torch.autograd.grad(z.pow(3).sum(), inputs), 1e-7)


def test_second_derivatives_leave_the_statistics_alone() -> None:
    f, x = Normalised(), (1 + rand(8, 5)).requires_grad_()
    options = {**EXACT, "batch_dims": 0}
    z_out, _ = get_deq(**options, on_failure="ignore")(lambda z: f(z, x), torch.zeros(8, 5, dtype=DOUBLE))
    before = statistics(f.norm)
    (first,) = torch.autograd.grad(z_out[-1].pow(3).sum(), x, create_graph=True)
    first.square().sum().backward()
    same(statistics(f.norm), before, 0.0)


class Dropped(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.drop = nn.Linear(6, 6).double(), drop
        self.masks: list[Tensor] = []

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y = self.layer(z)
        dropped = self.drop(y)
        self.masks.append((dropped.detach() == 0) & (y.detach() != 0))
        return torch.tanh(0.4 * dropped + x)


@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Dropout(0.5, inplace=False), deqcore.VariationalDropout(0.5)])
def test_dropout_masks_are_fixed_in_a_solve_and_new_in_the_next(backend: Any, drop: nn.Module) -> None:
    f, x = Dropped(drop), (3 + rand(7, 6)).requires_grad_()
    deq = get_deq(**backend, on_failure="ignore")
    masks = []
    for _ in range(3):
        f.masks.clear()
        z_out, info = deq(lambda z: f(z, x), torch.zeros(7, 6, dtype=DOUBLE))
        z_out[-1].square().sum().backward()
        assert len(f.masks) > 3 and all(torch.equal(mask, f.masks[0]) for mask in f.masks)
        assert bool(info.converged.all())
        masks.append(f.masks[0])
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    assert 0.2 < float(torch.stack(masks).double().mean()) < 0.8
    outside = [f.drop(torch.ones(40, dtype=DOUBLE)) for _ in range(2)]
    if isinstance(drop, nn.Dropout):  # outside of a solve the layer is its own self
        assert not torch.equal(*outside)
    assert not f._forward_hooks and not f.drop._forward_hooks and not f.drop._forward_pre_hooks


def test_dropout_gives_the_gradient_of_the_masked_map() -> None:
    f, x = Dropped(nn.Dropout(0.5)), (3 + rand(7, 6)).requires_grad_()
    z_out, _ = get_deq(**EXACT)(lambda z: f(z, x), torch.zeros(7, 6, dtype=DOUBLE))
    inputs = [x, *f.parameters()]
    mask = 2 * (~f.masks[0]).double()
    z = unroll(lambda z: torch.tanh(0.4 * f.layer(z) * mask + x), torch.zeros(7, 6, dtype=DOUBLE))

    def both(z: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(z.pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [*(g.detach() for g in first), *second]

    same(both(z_out[-1]), both(z), 1e-7)


def test_dropout_in_eval_does_nothing() -> None:
    f, x = Dropped(nn.Dropout(0.5)).eval(), 3 + rand(7, 6)
    z_out, _ = get_deq(**EXACT)(lambda z: f(z, x), torch.zeros(7, 6, dtype=DOUBLE))
    same(z_out[-1], unroll(lambda z: f(z, x), torch.zeros(7, 6, dtype=DOUBLE)))
    assert not any(bool(mask.any()) for mask in f.masks)


@pytest.mark.parametrize("kind", [nn.Dropout, deqcore.VariationalDropout])
def test_dropout_where_finished_samples_leave_the_batch(kind: Any) -> None:
    f, x = Dropped(kind(0.5)), rand(7, 6).mul(torch.linspace(0.01, 3, 7, dtype=DOUBLE)[:, None])
    x.requires_grad_()
    options = {**EXACT, "solver": {"name": "fixed_point_iter", "tol": 1e-10, "max_iter": 300}, "compact": True}
    z_out, info = get_deq(**options)(f, torch.zeros(7, 6, dtype=DOUBLE), args=(x,))
    assert bool(info.converged.all())
    whole = [mask for mask in f.masks if len(mask) == 7]
    assert all(torch.equal(mask, whole[0]) for mask in whole)
    keep = 2 * (~whole[0]).double()
    z = unroll(lambda z: torch.tanh(0.4 * f.layer(z) * keep + x), torch.zeros(7, 6, dtype=DOUBLE))
    same(z_out[-1].detach(), z.detach(), 1e-7)
    same(torch.autograd.grad(z_out[-1].sum(), x), torch.autograd.grad(z.sum(), x), 1e-6)


def test_an_error_in_f_leaves_no_hook_and_no_statistics_behind() -> None:
    f, drop, x = Normalised(), nn.Dropout(0.5), rand(8, 5)
    count = [0]

    def fn(z: Tensor) -> Tensor:
        count[0] += 1
        if count[0] == 4:
            raise ZeroDivisionError
        return drop(f(z, x))

    with pytest.raises(ZeroDivisionError):
        get_deq(**EXACT)(fn, torch.zeros(8, 5, dtype=DOUBLE))
    assert not drop._forward_hooks and not drop._forward_pre_hooks and not f.norm._forward_hooks
    ones = [drop(torch.ones(50)) for _ in range(2)]
    assert not torch.equal(*ones)
    before = int(f.norm.num_batches_tracked)
    f(torch.zeros(8, 5, dtype=DOUBLE), x)
    assert int(f.norm.num_batches_tracked) == before + 1


# ---- a compiled training step


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_a_compiled_training_step(compiler: str, gradient: str) -> None:
    """The whole of forward, loss and backward in default mode: as without a compiler, no break inside of f."""
    solver = {"name": "anderson", "tol": 1e-5, "max_iter": 60}
    plain = Model(gradient=gradient, solver=solver)
    model = copy.deepcopy(plain)
    run, graphs = compiled(model, compiler)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model)]
    counts = []
    for _ in range(4):
        losses = []
        for m, optimizer in zip((plain, run), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(m(BATCH), LABELS)
            loss.backward()
            losses.append(loss.item())
        for a, b in zip(plain.parameters(), model.parameters(), strict=True):
            same(a.grad, b.grad, 1e-5)
        for optimizer in optimizers:
            optimizer.step()
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        counts.append((len(graphs.found), breaks()))
    assert counts[1:] == [counts[1]] * 3  # nothing is compiled again from step to step
    tanh = [sum(node.target is torch.tanh for node in graph.graph.nodes) for graph in graphs.with_call(torch.tanh)]
    assert tanh == [1]  # f is one graph
    torch._dynamo.reset()


# ---- memory


@contextmanager
def without_collector() -> Generator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def living() -> int:
    """Tensors that are alive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(isinstance(item, Tensor) for item in gc.get_objects())


def trainer(kind: str, max_iter: int = 8) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.mul_(0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    x = torch.randn(3, 4)
    solver = {"name": "anderson", "tol": 1e-2, "max_iter": max_iter}
    gradient = kind if kind in ("phantom", "one_step", "neumann", "unrolled") else "implicit"
    deq = get_deq(solver=solver, gradient=gradient, on_failure="ignore")
    dropout, norm = nn.Dropout(0.2), nn.BatchNorm1d(4)

    def fn(z: Tensor, x: Tensor) -> Tensor:
        y = layer(z)
        return torch.tanh((norm(dropout(y)) if kind == "modules" else y) + x)

    def pure(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(z @ w + b + x)

    def step() -> None:
        optimizer.zero_grad()
        z0 = torch.zeros(3, 4)
        if kind == "fixed_point":
            options = {"solver": solver, "on_failure": "ignore"}
            deqcore.fixed_point(pure, z0, (layer.weight.tanh(), layer.bias), **options).square().sum().backward()
        elif kind == "torch.func":
            w, b = layer.weight.detach(), layer.bias.detach()
            options = {"solver": solver, "on_failure": "ignore"}
            torch.func.grad(lambda w: deqcore.fixed_point(pure, z0, (w, b), **options).square().sum())(w)
        elif kind == "second":
            u = x.clone().requires_grad_()
            z = deq(lambda z: fn(z, u), z0)[0][-1]
            (slope,) = torch.autograd.grad(z.sum(), u, create_graph=True)
            slope.square().sum().backward()
        elif kind == "graph not used":
            torch.autograd.grad(deq(lambda z: fn(z, x), z0)[0][-1].sum(), layer.weight, create_graph=True)
        elif kind == "no backward":
            deq(lambda z: fn(z, x), z0)
        else:
            deq(lambda z: fn(z, x), z0)[0][-1].square().sum().backward()
        optimizer.step()

    return step


KINDS = ["implicit", "second", "phantom", "one_step", "neumann", "unrolled", "fixed_point", "torch.func", "modules"]
KINDS += ["graph not used", "no backward"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind_without_the_collector(kind: str) -> None:
    step = trainer(kind)
    for _ in range(5):
        step()
    with without_collector():
        before, objects = living(), len(gc.get_objects())
        for _ in range(60):
            step()
        assert living() <= before
        if kind != "torch.func":  # which leaves a hundred small ones a call behind, by itself
            assert len(gc.get_objects()) <= objects + 30  # of no kind whatever: less than one a step


def memory_in_use() -> int:
    """Bytes that the system has given to the process; 0 where it doesn't say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("kind", "steps"), [("implicit", 1000), ("phantom", 300), ("fixed_point", 1000), ("second", 300), ("modules", 300)]
)
def test_memory_is_flat_over_many_steps(kind: str, steps: int) -> None:
    step = trainer(kind, max_iter=3)
    with without_collector():
        for _ in range(steps // 5):  # the allocators take that long to settle
            step()
        objects, memory = len(gc.get_objects()), memory_in_use()
        for _ in range(steps):
            step()
        assert len(gc.get_objects()) - objects < steps / 2
        assert memory_in_use() - memory < 2 * 2**20
