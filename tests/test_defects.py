"""What TorchDEQ 0.1.0 gets wrong, each beside ours and against an independent truth (PARITY.md, section 2)."""

from __future__ import annotations

import argparse
import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deqcore
from deqcore import (
    ConvergenceError,
    ConvergenceWarning,
    PluginClashError,
    Status,
    UnknownKeyError,
    UnknownPluginError,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchdeq = pytest.importorskip("torchdeq")

DOUBLE = torch.float64


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weight(size: int, rho: float, seed: int = 1, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.linalg.qr(rand(size, size, seed=seed))[0].to(dtype) * rho


def residual(f: Any, z: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.linalg.vector_norm((f(z) - z).flatten(1), dim=1)


def spoilt(f: Any, call: int, row: int) -> Any:
    """f, whose given call gives NaN in one row."""
    count = 0

    def g(z: Tensor) -> Tensor:
        nonlocal count
        out, now = f(z), count
        count += 1
        if now == call:
            out = out.clone()
            out[row] = math.nan
        return out

    return g


# ---- wrong numbers, no error


def test_1_second_derivatives() -> None:
    """z = tanh(z / 2 + x) at x = 0.3, by differentiating the closed form of dz/dx."""
    point, z = 0.3, 0.0
    for _ in range(200):
        z = math.tanh(0.5 * z + point)
    slope = 1 - z * z
    first = slope / (1 - 0.5 * slope)
    exact = -2 * z * first / (1 - 0.5 * slope) ** 2
    assert exact == pytest.approx(-3.06756, abs=1e-5)

    def second(package: Any) -> float:
        x = torch.tensor([[point]], dtype=DOUBLE, requires_grad=True)
        deq = package.get_deq(ift=True, f_tol=1e-12, b_tol=1e-12, f_max_iter=200, b_max_iter=200)
        z_out, _ = deq(lambda z: torch.tanh(0.5 * z + x), torch.zeros(1, 1, dtype=DOUBLE))
        (dz,) = torch.autograd.grad(z_out[-1].sum(), x, create_graph=True)
        assert dz.item() == pytest.approx(first)
        return torch.autograd.grad(dz.sum(), x)[0].item()

    assert second(torchdeq) == pytest.approx(-1.19986, abs=1e-4)
    assert second(deqcore) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("memory", [2, 8, 30])
def test_2_broyden_with_a_bounded_memory(memory: int) -> None:
    w, x = rand(64, 64, seed=1).float(), 0.1 * rand(64, 64).float()
    w = 0.9 * w / torch.linalg.eigvals(w).abs().max()

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ w + x)

    theirs, _, _ = torchdeq.get_solver("broyden")(f, torch.zeros(64, 64), max_iter=200, tol=1e-6, LBFGS_thres=memory)
    ours, _, info = deqcore.get_solver("broyden")(f, torch.zeros(64, 64), max_iter=200, tol=1e-6, LBFGS_thres=memory)
    assert torch.isnan(theirs).any(1).sum() >= 1
    assert (residual(f, ours) <= 4e-6).all()
    assert not info.failed()


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
@pytest.mark.parametrize("batch", [3, 70])
@pytest.mark.parametrize("call", [3, 5])
def test_3_one_nan_in_one_step_of_one_sample(solver: str, batch: int, call: int) -> None:
    w, x = weight(6, 0.7), rand(batch, 6)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ w + x)

    zero = torch.zeros(batch, 6, dtype=DOUBLE)
    theirs, _ = torchdeq.get_deq(f_solver=solver, f_max_iter=80, f_tol=1e-8).eval()(spoilt(f, call, 1), zero)
    assert not torch.isfinite(theirs[-1][1]).all()
    ours, info = deqcore.get_deq(f_solver=solver, f_max_iter=80, f_tol=1e-8).eval()(spoilt(f, call, 1), zero)
    assert info.converged.all()
    assert (residual(f, ours[-1]) < 1e-8).all()


def test_3_float16_norms_overflow() -> None:
    """The norm of the state, 1.6e5, is above the largest float16."""

    def f(z: Tensor) -> Tensor:
        return 0.5 * z + 20000

    zero = torch.zeros(2, 16, dtype=torch.float16)
    theirs, _ = torchdeq.get_deq(f_stop_mode="rel").eval()(f, zero)
    assert torch.equal(theirs[-1], zero)
    ours, info = deqcore.get_deq(f_stop_mode="rel").eval()(f, zero)
    assert torch.allclose(ours[-1].double(), torch.full((2, 16), 40000.0, dtype=DOUBLE), rtol=2e-3)
    assert not info.failed()


def test_4_indexing_with_an_early_stop() -> None:
    """z = z / 2 + x is 2 x, and its gradient 2."""

    def run(package: Any, **options: Any) -> tuple[list[Tensor], Tensor]:
        x = torch.ones(1, 1, dtype=DOUBLE, requires_grad=True)
        deq = package.get_deq(core="indexing", ift=True, f_max_iter=60, **options)
        z_out, _ = deq(lambda z: 0.5 * z + x, torch.zeros(1, 1, dtype=DOUBLE))
        return z_out, torch.autograd.grad(z_out[-1].sum(), x)[0]

    theirs, gradient = run(torchdeq, indexing=[2])
    assert (len(theirs), theirs[-1].item(), gradient.item()) == (1, 1.75, 1.0)
    ours, gradient = run(deqcore, indexing=[2])
    assert len(ours) == 2
    assert ours[-1].item() == pytest.approx(2, abs=2e-3)
    assert gradient.item() == pytest.approx(2, abs=1e-5)
    assert len(run(torchdeq, n_states=3)[0]) == 1
    assert len(run(deqcore, n_states=3)[0]) == 3


def test_5_broydens_sampled_steps() -> None:
    w = weight(6, 0.8)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ w + 0.3)

    def state(package: Any, steps: int) -> Tensor:
        solver = package.get_solver("broyden")
        return solver(f, torch.zeros(2, 6, dtype=DOUBLE), max_iter=steps, tol=0.0, return_final=True)[0]

    def sampled(package: Any, step: int) -> Tensor:
        solver = package.get_solver("broyden")
        _, (found,), _ = solver(f, torch.zeros(2, 6, dtype=DOUBLE), max_iter=9, tol=0.0, indexing=[step])
        return found

    assert torch.allclose(sampled(torchdeq, 4), state(torchdeq, 3), atol=1e-12)  # a step early
    assert not torch.allclose(sampled(torchdeq, 4), state(torchdeq, 4), atol=1e-6)
    assert torch.allclose(sampled(deqcore, 4), state(deqcore, 4), atol=1e-12)


def test_5_broydens_stagnation_test() -> None:
    """Theirs compares samples instead of steps: a single sample always stagnates, once it is within 3 tol."""
    slopes = torch.linspace(0.2, 0.999, 150, dtype=DOUBLE)
    x = rand(1, 150)

    def f(z: Tensor) -> Tensor:
        return slopes * z + x

    def run(package: Any, tol: float) -> Tensor:
        return package.get_solver("broyden")(f, torch.zeros(1, 150, dtype=DOUBLE), max_iter=150, tol=tol)[0]

    _, _, info = torchdeq.get_solver("broyden")(f, torch.zeros(1, 150, dtype=DOUBLE), max_iter=150, tol=1e-13)
    trace = info["abs_trace"][0, 1:]
    k = next(k for k in range(32, 149) if trace[k] < trace[:k].min() and trace[k:].min() < trace[k] / 2.5)
    tol = trace[k].item() / 2.5
    assert residual(f, run(torchdeq, tol)).item() > 1.5 * tol  # stopped though a later step gets there
    assert residual(f, run(deqcore, tol)).item() <= tol


@pytest.mark.parametrize("scale", [1e-4, 1e-7])
def test_6_gradients_and_the_losss_scale(scale: float) -> None:
    w, x = weight(8, 0.9), rand(4, 8).requires_grad_()
    cotangent = rand(4, 8, seed=5)

    def gradient(package: Any, scale: float) -> Tensor:
        deq = package.get_deq(ift=True, f_tol=1e-10, f_max_iter=300, b_max_iter=300)
        z_out, _ = deq(lambda z: torch.tanh(z @ w + x), torch.zeros(4, 8, dtype=DOUBLE))
        return torch.autograd.grad(scale * (cotangent * z_out[-1]).sum(), x)[0] / scale

    z, _ = deqcore.get_deq("broyden", f_tol=1e-12, f_max_iter=100).eval()(
        lambda z: torch.tanh(z @ w + x.detach()), torch.zeros(4, 8, dtype=DOUBLE)
    )
    slope = 1 - z[-1] ** 2
    exact = torch.stack(
        [s * torch.linalg.solve(torch.eye(8, dtype=DOUBLE) - w * s, c) for s, c in zip(slope, cotangent, strict=True)]
    )

    def error(package: Any) -> float:
        return float(torch.linalg.vector_norm(gradient(package, scale) - exact) / torch.linalg.vector_norm(exact))

    assert error(torchdeq) > (0.1 if scale == 1e-7 else 1e-4)
    assert error(deqcore) < 1e-5


def test_7_failures_are_not_silent() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    zero = torch.zeros(2, 3)
    cases = {
        "diverged": (lambda z: 3 * z + x, {"f_max_iter": 30}),
        "non_finite": (lambda z: (z - 1).sqrt() + x, {}),
        "max_steps": (lambda z: 0.99 * z + x, {"f_max_iter": 10}),
        "stalled": (lambda z: -z + x, {}),
    }
    for status, (f, options) in cases.items():
        torchdeq.get_deq(**options)(f, zero)  # warnings are errors here: this is silence
        with pytest.warns(ConvergenceWarning, match=f"2 of 2 samples {status}"):
            _, info = deqcore.get_deq(**options)(f, zero)
        assert (info["status"] == Status[status.upper()]).all()
        with pytest.raises(ConvergenceError, match=status):
            deqcore.get_deq(**options, on_failure="raise")(f, zero)
        deqcore.get_deq(**options, on_failure="ignore")(f, zero)


def test_7_a_backward_that_fails_is_not_silent() -> None:
    x = torch.ones(2, 3, requires_grad=True)

    def loss(package: Any) -> Tensor:
        deq = package.get_deq(ift=True, f_max_iter=3000, b_max_iter=5, b_solver="fixed_point_iter")
        return deq(lambda z: 0.99 * z + x, torch.zeros(2, 3))[0][-1].sum()

    loss(torchdeq).backward()
    assert x.grad is not None
    assert x.grad.max() < 10  # of 100
    with pytest.warns(ConvergenceWarning, match="backward solve: 2 of 2 samples max_steps"):
        loss(deqcore).backward()


def test_7_the_unmonitored_solver_tells_of_nan_too() -> None:
    with pytest.warns(ConvergenceWarning, match="2 of 2 samples non_finite"):
        z_out, info = deqcore.get_deq(f_solver="simple_fixed_point_iter", f_max_iter=400).eval()(
            lambda z: 2 * z + 1, torch.zeros(2, 3)
        )
    assert torch.isfinite(z_out[-1]).all()
    assert torch.equal(info["abs_lowest"], residual(lambda z: 2 * z + 1, z_out[-1]))


def test_8_hook_ift_twice() -> None:
    """A second backward through one graph, and two calls in one graph, which hang there and are not run."""
    w, x = weight(5, 0.8), rand(3, 5).requires_grad_()

    def options(package: Any) -> Any:
        return package.get_deq(hook_ift=True, f_tol=1e-10, b_tol=1e-10, f_max_iter=300, b_max_iter=300)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ w + x)

    zero = torch.zeros(3, 5, dtype=DOUBLE)

    def twice(package: Any) -> tuple[Tensor, Tensor]:
        loss = options(package)(f, zero)[0][-1].square().sum()
        return tuple(torch.autograd.grad(loss, x, retain_graph=keep)[0] for keep in (True, False))  # type: ignore[return-value]

    first, second = twice(torchdeq)
    assert not torch.allclose(first, second, rtol=1e-2)
    one, two = twice(deqcore)
    assert torch.equal(one, two)
    assert torch.allclose(one, first, atol=1e-8)

    deq = options(deqcore)
    a, b = deq(f, zero)[0][-1], deq(lambda z: 0.5 * f(z), zero)[0][-1]
    (both,) = torch.autograd.grad(a.sum() + b.sum(), x)
    alone = [torch.autograd.grad(deq(g, zero)[0][-1].sum(), x)[0] for g in (f, lambda z: 0.5 * f(z))]
    assert torch.allclose(both, alone[0] + alone[1], atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2])
def test_9_anderson_with_few_steps(steps: int) -> None:
    x0 = rand(3, 4)
    theirs, _, _ = torchdeq.get_solver("anderson")(lambda z: 0.5 * z + 1, x0, max_iter=steps)
    assert torch.equal(theirs, x0)
    ours, _, info = deqcore.get_solver("anderson")(lambda z: 0.5 * z + 1, x0, max_iter=steps)
    assert (residual(lambda z: 0.5 * z + 1, ours) < residual(lambda z: 0.5 * z + 1, x0)).all()
    assert (info["steps"] <= steps).all()


def test_9_anderson_with_a_memory_of_one() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        torchdeq.get_solver("anderson")(lambda z: 0.5 * z + 1, torch.zeros(3, 4), m=1)
    z, _, info = deqcore.get_solver("anderson")(lambda z: 0.5 * z + 1, torch.zeros(3, 4), m=1)
    assert info.converged.all()
    assert torch.allclose(z, torch.full((3, 4), 2.0), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_9_anderson_in_half_precision(dtype: torch.dtype) -> None:
    zero = torch.zeros(3, 4, dtype=dtype)
    with pytest.raises(RuntimeError):
        torchdeq.get_deq(f_solver="anderson").eval()(lambda z: 0.5 * z + 1, zero)
    z_out, info = deqcore.get_deq(f_solver="anderson").eval()(lambda z: 0.5 * z + 1, zero)
    assert z_out[-1].dtype == dtype
    assert torch.allclose(z_out[-1].double(), torch.full((3, 4), 2.0, dtype=DOUBLE), atol=2e-2)
    assert not info.failed()


def test_10_spectral_radius_of_a_rotation() -> None:
    angle = torch.tensor(1.2, dtype=DOUBLE)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])

    def radius(package: Any) -> Tensor:
        torch.manual_seed(0)
        _, info = package.get_deq(f_max_iter=300).eval()(
            lambda z: 0.9 * z @ turn + 1, torch.zeros(2, 2, dtype=DOUBLE), sradius_mode=True
        )
        return info["sradius"]

    exact = torch.linalg.eigvals(0.9 * turn).abs().max().item()
    assert exact == pytest.approx(0.9)
    assert (radius(torchdeq) < 0.5).all()
    assert radius(deqcore).tolist() == pytest.approx([exact, exact])
    z = rand(2, 2).requires_grad_()
    assert deqcore.power_method(0.9 * z @ turn, z)[1].tolist() == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_11_norms_and_state_dicts(norm: str) -> None:
    def model(package: Any, seed: int) -> nn.Linear:
        torch.manual_seed(seed)
        layer = nn.Linear(4, 4)
        package.apply_norm(layer, norm)
        return layer

    x = rand(3, 4).float()
    for package in (torchdeq, deqcore):
        source, target = model(package, 1).eval(), model(package, 2).eval()
        target.load_state_dict(source.state_dict())
        stale = package is torchdeq and norm == "weight_norm"
        assert torch.allclose(source(x), target(x)) is not stale


def test_11_copies_of_what_has_a_norm() -> None:
    theirs, ours = nn.Linear(4, 4), nn.Linear(4, 4)
    torchdeq.apply_norm(theirs, "weight_norm")
    deqcore.apply_norm(ours, "weight_norm")
    with pytest.raises(RuntimeError):
        copy.deepcopy(theirs)
    x = rand(3, 4).float()
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))
    with pytest.raises(KeyError):
        torchdeq.apply_norm(theirs, "weight_norm")
    before = ours(x)
    deqcore.apply_norm(ours, "weight_norm")
    assert torch.allclose(ours(x), before)


@pytest.mark.parametrize("options", [{}, {"ift": True}, {"f_solver": "anderson", "core": "indexing", "n_states": 2}])
def test_11_pickle_of_a_deq(options: dict[str, Any]) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(torchdeq.get_deq(**options))
    deq = deqcore.get_deq(**options)
    for again in (pickle.loads(pickle.dumps(deq)), copy.deepcopy(deq)):
        assert again.config == deq.config
        assert torch.equal(again(torch.cos, torch.zeros(2, 3))[0][-1], deq(torch.cos, torch.zeros(2, 3))[0][-1])


def test_12_sampled_phantom_steps() -> None:
    def count(package: Any, **options: Any) -> list[float]:
        z_out, _ = package.get_deq(f_max_iter=1, f_tol=0.0, **options)(
            lambda z: z + 1, torch.zeros(1, 1), solver_kwargs={"return_final": True}
        )
        return [z.item() for z in z_out]

    assert count(torchdeq, grad=5, sup_gap=2) == [3, 5]  # the last of five steps, 6, is missing
    assert count(deqcore, grad=5, sup_gap=2) == [3, 5, 6]
    assert count(torchdeq, grad=3, sup_loc=[1, 3]) == [2, 4, 4]
    assert count(deqcore, grad=3, sup_loc=[1, 3]) == [2, 4]


def test_12_dropout() -> None:
    theirs, ours = torchdeq.VariationalDropout(1.0), deqcore.VariationalDropout(1.0)
    assert torch.isnan(theirs(torch.ones(4, 4))).any()
    assert not ours(torch.ones(4, 4)).any()
    theirs, ours = torchdeq.VariationalDropout(0.5), deqcore.VariationalDropout(0.5)
    wide = torch.ones(4, 8, dtype=DOUBLE)
    theirs(wide)
    assert theirs.mask.dtype == torch.float32
    assert ours(wide.half()).dtype == torch.float16
    assert theirs(wide.half()).dtype == torch.float32  # widens a half precision state
    with pytest.raises(RuntimeError):
        theirs(wide[:3])
    assert ours(wide[:3]).shape == (3, 8)


def test_13_damping_and_the_stop_test() -> None:
    def f(z: Tensor) -> Tensor:
        return 0.5 * z + 1

    zero = torch.zeros(1, 1, dtype=DOUBLE)
    theirs, _, info = torchdeq.get_solver("fixed_point_iter")(f, zero, max_iter=500, tol=1e-3, tau=0.1)
    assert info["abs_lowest"].item() < 1e-3
    assert residual(f, theirs).item() > 9e-3
    for solver in ("fixed_point_iter", "anderson"):
        ours, _, info = deqcore.get_solver(solver)(f, zero, max_iter=500, tol=1e-3, tau=0.1)
        assert residual(f, ours).item() <= 1e-3
        assert info["abs_lowest"].item() == pytest.approx(residual(f, ours).item())


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_14_best_rows_of_different_steps(solver: str) -> None:
    """From (0, 0) the first row's residual is 0 at once, the second's two steps later, when the first has left."""

    def f(z: Tensor) -> Tensor:
        a, b = z[:1], z[1:]
        return torch.cat([a + b, b + 1 - a])

    zero = torch.zeros(2, 1, dtype=DOUBLE)
    if solver == "fixed_point_iter":
        theirs, info = torchdeq.get_deq(f_max_iter=4).eval()(f, zero)
        assert info["abs_lowest"].tolist() == [0, 0]
        assert residual(f, theirs[-1]).max() > 1.9
    ours, info = deqcore.get_deq(f_solver=solver, f_max_iter=4, on_failure="ignore").eval()(f, zero)
    assert torch.allclose(info["abs_lowest"], residual(f, ours[-1]))
    within = residual(f, ours[-1]) <= 1e-3
    assert torch.equal(info.converged, within)


def test_14_a_graph_whose_nodes_depend_on_each_other() -> None:
    """However the best rows are put together, what is reported is what f says of the state returned."""
    for seed in range(20):
        links = 1.1 * rand(7, 7, seed=seed) / 7**0.5
        x = rand(7, 3, seed=100 + seed)

        def f(z: Tensor, links: Tensor = links, x: Tensor = x) -> Tensor:
            return torch.tanh(links @ z * 1.5 + x)

        for steps in (5, 17):
            deq = deqcore.get_deq(f_max_iter=steps, f_tol=1e-6, on_failure="ignore").eval()
            z_out, info = deq(f, torch.zeros(7, 3, dtype=DOUBLE))
            assert torch.allclose(info["abs_lowest"], residual(f, z_out[-1]), atol=1e-12)


# ---- refused or crashing where a user expects it to work


def test_gradients_in_eval() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    theirs, _ = torchdeq.get_deq(ift=True).eval()(lambda z: 0.5 * z + x, torch.zeros(2, 3))
    assert not theirs[-1].requires_grad
    ours, _ = deqcore.get_deq(ift=True).eval()(lambda z: 0.5 * z + x, torch.zeros(2, 3))
    (gradient,) = torch.autograd.grad(ours[-1].sum(), x)
    assert torch.allclose(gradient, torch.full_like(x, 2.0), atol=1e-5)


def test_implicit_under_autocast() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    with torch.no_grad():
        layer.weight.mul_(0.5)

    def gradient(package: Any, enabled: bool) -> Tensor:
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            deq = package.get_deq(hook_ift=True, f_tol=2e-2)
            z_out, _ = deq(lambda z: layer(z + x).tanh(), torch.zeros(4, 8))
            loss = z_out[-1].float().square().sum()
        loss.backward()
        assert layer.weight.grad is not None
        return layer.weight.grad.clone()

    with pytest.raises(RuntimeError):
        gradient(torchdeq, True)
    exact, found = gradient(deqcore, False), gradient(deqcore, True)
    assert torch.linalg.vector_norm(found - exact) < 0.05 * torch.linalg.vector_norm(exact)


def test_simple_fixed_point_iter_as_the_backward_solver() -> None:
    x = torch.ones(2, 3, requires_grad=True)

    def gradient(package: Any) -> Tensor:
        deq = package.get_deq(ift=True, b_solver="simple_fixed_point_iter")
        return torch.autograd.grad(deq(lambda z: 0.5 * z + x, torch.zeros(2, 3))[0][-1].sum(), x)[0]

    with pytest.raises(TypeError):
        gradient(torchdeq)
    assert torch.allclose(gradient(deqcore), torch.full_like(x, 2.0), atol=1e-5)


@pytest.mark.parametrize("options", [{"tol": 1e-6}, {"max_iter": 3}, {"f_max_iter": 3.0}])
@pytest.mark.filterwarnings("ignore::deqcore.ConvergenceWarning")
def test_solver_options_by_call(options: dict[str, Any]) -> None:
    zero = torch.zeros(2, 3, dtype=DOUBLE)
    with pytest.raises(TypeError):
        torchdeq.get_deq().eval()(lambda z: 0.5 * z + 1, zero, solver_kwargs=options)
    deq = deqcore.get_deq().eval()
    _, info = deq(lambda z: 0.5 * z + 1, zero, solver_kwargs=options)
    if "tol" in options:
        assert (info["abs_lowest"] <= 1e-6).all()
    else:
        assert (info["nstep"] == 3).all()
        assert info["abs_trace"].shape == (2, 4)
    _, info = deq(lambda z: 0.5 * z + 1, zero)  # for that call only
    assert (info["abs_lowest"] > 1e-6).all()
    assert (info["nstep"] > 3).all()


def test_step_limits_that_are_floats() -> None:
    with pytest.raises(TypeError):
        torchdeq.get_deq(f_max_iter=12.0)(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
    deq = deqcore.get_deq(f_max_iter=12.0, b_max_iter=9.0, f_tol=0.0)
    _, info = deq(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
    assert (info["nstep"] == 12).all()
    with pytest.raises(deqcore.ConfigError, match=r"12\.5"):
        deqcore.get_deq(f_max_iter=12.5)


def test_constant_weights_without_cuda() -> None:
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torchdeq.fp_correction(torch.mean, ([torch.ones(2), 3 * torch.ones(2)],), weight_func="const")
    loss = deqcore.fp_correction(torch.mean, ([torch.ones(2), 3 * torch.ones(2)],), weight_func="const")
    assert loss.item() == pytest.approx(4.0)
    assert deqcore.fp_correction(torch.mean, ([torch.ones(2)],), weight_func="const", c=2.5).item() == pytest.approx(
        2.5
    )


def test_states_that_are_dicts_nested_or_of_mixed_dtypes() -> None:
    wide, narrow = torch.zeros(2, 3, dtype=DOUBLE), torch.zeros(2, 4)

    def f(z: dict[str, Any]) -> dict[str, Any]:
        return {"a": 0.5 * z["a"] + 1, "b": [0.25 * z["b"][0] + z["a"].mean().float()]}

    z0 = {"a": wide, "b": [narrow]}
    with pytest.raises(AssertionError):
        torchdeq.get_deq()(f, z0)
    z_out, info = deqcore.get_deq(f_tol=1e-5)(f, z0)
    state = z_out[-1]
    assert (state["a"].dtype, state["b"][0].dtype) == (DOUBLE, torch.float32)
    assert torch.allclose(state["a"], torch.full_like(wide, 2.0), atol=1e-4)
    assert torch.allclose(state["b"][0], torch.full_like(narrow, 8 / 3), atol=1e-4)
    assert info.converged.all()

    def pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * a + 1, 0.5 * b + 1

    theirs, _ = torchdeq.get_deq().eval()(pair, (wide, narrow))
    assert theirs[-1][1].dtype == DOUBLE  # widened
    ours, _ = deqcore.get_deq().eval()(pair, (wide, narrow))
    assert [part.dtype for part in ours[-1]] == [DOUBLE, torch.float32]


# ---- silent


def test_a_misspelt_option() -> None:
    _, info = torchdeq.get_deq(f_maxiter=7, f_tol=0.0)(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
    assert info["abs_trace"].shape[1] == 41  # all forty
    for given in ({"f_maxiter": 7}, {"solver": {"name": "anderson", "memmory": 3}}):
        with pytest.raises(UnknownKeyError, match=r"Did you mean '(f_max_iter|memory)'"):
            deqcore.get_deq(**given)
        with pytest.raises(UnknownKeyError):
            deqcore.get_deq(given)
    with pytest.warns(deqcore.DEQWarning, match="f_max_iter"):  # a Namespace is a whole program's
        deqcore.get_deq(argparse.Namespace(f_maxiter=7, lr=0.1))
    with pytest.raises(UnknownKeyError, match="memory"):
        deqcore.get_deq(f_solver="anderson")(torch.cos, torch.zeros(2, 3), solver_kwargs={"memmory": 3})


def test_an_unknown_solver() -> None:
    with pytest.raises(AssertionError) as found:
        torchdeq.get_deq(f_solver="andersen")
    assert not str(found.value)
    for given in ({"f_solver": "andersen"}, {"b_solver": "andersen"}, {"solver": "andersen"}):
        with pytest.raises(UnknownPluginError, match="Did you mean 'anderson'"):
            deqcore.get_deq(**given)
    with pytest.raises(ValueError, match="broyden"):
        deqcore.get_solver("newtonian")


def test_andersons_memory() -> None:
    """On a linear map of d dimensions, a memory of d is exact after d + 1 steps, one of 1 is not."""
    w = weight(5, 0.95)

    def steps(package: Any, memory: int) -> int:
        given = {} if package is torchdeq else {"on_failure": "ignore"}
        deq = package.get_deq(f_solver="anderson", f_max_iter=200, f_tol=1e-9, m=memory, **given).eval()
        _, info = deq(lambda z: z @ w + 1, torch.zeros(1, 5, dtype=DOUBLE))
        return int(info["nstep"].item())

    assert steps(torchdeq, 5) == steps(torchdeq, 2)
    assert steps(deqcore, 5) <= 7 < steps(deqcore, 1)
    for options in ({"solver": {"name": "anderson", "memory": 1}}, {"solver.memory": 1, "f_solver": "anderson"}):
        deq = deqcore.get_deq(**options, f_max_iter=200, f_tol=1e-9, on_failure="ignore").eval()
        _, info = deq(lambda z: z @ w + 1, torch.zeros(1, 5, dtype=DOUBLE))
        assert int(info["nstep"].item()) == steps(deqcore, 1)


def test_the_callers_configuration_is_left_alone() -> None:
    theirs, ours = argparse.Namespace(f_max_iter=9), argparse.Namespace(f_max_iter=9)
    torchdeq.get_deq(theirs, f_solver="anderson", ift=True)
    assert vars(theirs) != {"f_max_iter": 9}
    deqcore.get_deq(ours, f_solver="anderson", ift=True)
    assert vars(ours) == {"f_max_iter": 9}
    given = {"f_max_iter": 9, "grad": [2]}
    before = copy.deepcopy(given)
    deqcore.get_deq(given, f_solver="anderson")
    deqcore.apply_norm(nn.Linear(2, 2), "weight_norm", args=ours)
    assert given == before
    assert vars(ours) == {"f_max_iter": 9}


def test_built_ins_are_not_replaced_by_accident() -> None:
    def mine(func: Any, x0: Tensor, **options: Any) -> Any:
        return x0, [], {}

    original = torchdeq.get_solver("anderson")
    torchdeq.register_solver("anderson", mine)
    try:
        assert torchdeq.get_solver("anderson") is mine
    finally:
        torchdeq.register_solver("anderson", original)
    with deqcore.registry.scope():
        with pytest.raises(PluginClashError, match="replace=True"):
            deqcore.register_solver("anderson", mine)
        z, _, _ = deqcore.get_solver("anderson")(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
        assert torch.allclose(z, torch.full((2, 3), 2.0), atol=2e-3)
        deqcore.register_solver("anderson", mine, replace=True)
        assert deqcore.get_solver("anderson") is mine
    assert deqcore.get_solver("anderson") is not mine
