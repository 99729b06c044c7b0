"""The gradient in what f uses: equal to that of the steps written out."""

from __future__ import annotations

import deqcore_reversible.gradient
import pytest
import torch
from deqcore_reversible.reversal import Reversal
from reversible_support import DOUBLE, close, noise, reversible, unrolled, weight
from torch import nn

import deqcore
from deqcore import Status

STEPS = 12


def check(f, sources, z0=None, args=(), steps=STEPS, damping=0.5, tolerance=1e-10, gradient=()):
    """The gradients in `sources`, against unrolling `f(z, *args)`."""
    z0 = torch.zeros(4, 6, dtype=DOUBLE) if z0 is None else z0
    cotangent = noise(*z0.shape, seed=7, dtype=z0.dtype)
    (z,), info = reversible(steps, damping, gradient)(f, z0, args=args)
    z_plain = unrolled(lambda z: f(z, *args), z0, damping, steps)[-1]
    close([z], [z_plain], max(tolerance, 1e-12))
    expected = torch.autograd.grad((cotangent * z_plain).sum(), sources, retain_graph=True)
    close(torch.autograd.grad((cotangent * z).sum(), sources), expected, tolerance)
    return info


# ---- how exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("damping", [0.2, 0.5, 0.8])
def test_many_steps_at_any_damping(damping, dtype):
    w, x = weight(64, dtype=dtype), noise(8, 64, dtype=dtype).requires_grad_()
    z0 = noise(8, 64, seed=2, dtype=dtype).requires_grad_()
    tolerance = torch.finfo(dtype).eps ** 0.5
    allowed = {"steps": 64, "damping": damping, "tolerance": tolerance / 10}
    info = check(lambda z: torch.tanh(z @ w.mT + x), (w, x), z0, **allowed, gradient={"keep": None})
    backward = info["backward"]
    assert backward.counts() == {Status.CONVERGED: 8}
    assert float(backward["rel_lowest"].max()) <= tolerance
    assert float(backward["rel_trace"][:, :-1].max()) <= tolerance / (1 - damping) ** 2
    assert 2 < backward["kept"] < 64 and backward["repeats"]
    assert (backward["nfe"], backward["nvjp"], info["nfe"]) == (128, 128, 130)


def test_the_gradient_in_the_start():
    w, z0 = weight(), noise(4, 6, seed=2).requires_grad_()
    check(lambda z: torch.tanh(z @ w.mT), (w, z0), z0, steps=5, damping=0.3)


@pytest.mark.parametrize("damping", [0.2, 0.5, 0.8])
def test_states_are_kept_where_the_check_says_so(damping, monkeypatch):
    """Without any estimate of the error, plain reversal goes astray; what is measured puts it right."""
    monkeypatch.setattr(deqcore_reversible.gradient, "spacing", lambda *given: 10**6)
    w, x = weight(64), noise(8, 64).requires_grad_()
    f = lambda z: torch.tanh(z @ w.mT + x)  # noqa: E731
    info = check(f, (w, x), torch.zeros(8, 64, dtype=DOUBLE), steps=64, damping=damping, tolerance=1e-9)
    backward = info["backward"]
    assert backward.counts() == {Status.CONVERGED: 8} and backward["repeats"]
    if damping > 0.2:  # where plain reversal happens to be enough
        assert backward["kept"] > 2 and backward["nfe"] > 128
    assert float(backward["rel_lowest"].max()) <= torch.finfo(DOUBLE).eps ** 0.5


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_fewer_states_are_kept_for_more_evaluations(keep):
    w, x = weight(64, dtype=torch.float32), noise(8, 64, dtype=torch.float32).requires_grad_()
    f = lambda z: torch.tanh(z @ w.mT + x)  # noqa: E731
    z0 = torch.zeros(8, 64)
    info = check(f, (w, x), z0, steps=60, damping=0.5, tolerance=1e-4, gradient={"keep": keep})
    backward = info["backward"]
    assert backward.converged.all() and backward["kept"] > keep + 1
    assert 130 < backward["nfe"] < 350 and info["nfe"] == 122


def test_plain_reversal_is_not_enough(monkeypatch):
    """What the test above is about: with the checks' word not heeded, the steps end far from where they began."""
    monkeypatch.setattr(deqcore_reversible.gradient, "spacing", lambda *given: 10**6)
    begin = Reversal.__init__

    def heedless(self, *given):
        begin(self, *given)
        self.repeats = False

    monkeypatch.setattr(Reversal, "__init__", heedless)
    w, x = weight(64), noise(8, 64)
    (z,), info = reversible(64, 0.5)(lambda z: torch.tanh(z @ w.mT + x), torch.zeros_like(x))
    with pytest.warns(deqcore.ConvergenceWarning, match=r"backward solve: 8 of 8 samples stalled"):
        z.sum().backward()
    assert float(info["backward"]["rel_trace"].max()) > 1


@pytest.mark.parametrize("tolerance", [1e-12, 1e-20])
def test_a_tolerance_below_what_can_be_reconstructed_keeps_every_state(tolerance):
    w = weight()
    info = check(
        lambda z: torch.tanh(z @ w.mT + 1), (w,), steps=20, damping=0.9, gradient={"tolerance": tolerance, "keep": None}
    )
    assert info["backward"].converged.all()
    if tolerance < 1e-15:
        assert info["backward"]["kept"] == 21 and float(info["backward"]["rel_lowest"].max()) == 0


# ---- what f uses


def test_leaves_in_a_closure():
    w, x, b = weight(), noise(4, 6).requires_grad_(), noise(6, seed=3).requires_grad_()
    check(lambda z: torch.tanh(nn.functional.linear(z, w, b) + x), (w, x, b))


def test_what_an_encoder_made():
    w, v, x = weight(), weight(seed=5), noise(4, 6).requires_grad_()
    hidden = torch.sin(x @ v)
    check(lambda z: torch.tanh(z @ w.mT + hidden), (w, v, x))


def test_a_weight_that_f_and_the_encoder_share():
    w, x = weight(), noise(4, 6).requires_grad_()
    hidden = torch.sin(x @ w)
    deeper = hidden @ w
    check(lambda z: torch.tanh(z @ w.mT + hidden * deeper), (w, x))


def test_modules():
    torch.manual_seed(0)
    f = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6), nn.LayerNorm(6)).double()
    check(f, tuple(f.parameters()), noise(4, 6))


@pytest.mark.parametrize("kind", ["leaf", "made", "in a dict", "also closed over"])
def test_args(kind):
    w, x = weight(), noise(4, 6).requires_grad_()
    given = x if kind == "leaf" else torch.sin(x)
    if kind == "in a dict":
        check(lambda z, more: torch.tanh(z @ w.mT + more["x"][0]), (w, x), args=({"x": [given]},))
    elif kind == "also closed over":
        check(lambda z, x: torch.tanh(z @ w.mT + x * given), (w, x), args=(given,))
    else:
        check(lambda z, x: torch.tanh(z @ w.mT + x), (w, x), args=(given,))


def test_a_frozen_parameter_and_only_the_input():
    w, x = weight().detach(), noise(4, 6).requires_grad_()
    check(lambda z: torch.tanh(z @ w.mT + x), (x,))
    w.requires_grad_()
    check(lambda z: torch.tanh(z @ w.mT + x), (x,))
    check(lambda z: torch.tanh(z @ w.mT + x), (w,))
    assert w.grad is None and x.grad is None


def test_a_weight_that_only_some_steps_use():
    """Which of two experts a sample is sent to depends on its state."""
    first, second = weight(), weight(seed=4)
    x = noise(4, 6).abs()

    def f(z):
        return torch.tanh((z @ (first if float(z.detach().abs().max()) < 0.3 else second).mT) + x)

    check(f, (first, second), steps=6, damping=0.3)


class Product(torch.autograd.Function):
    """z @ w, as nobody outside can see."""

    @staticmethod
    def forward(ctx, z, w):
        ctx.save_for_backward(z, w)
        return z @ w

    @staticmethod
    def backward(ctx, cotangent):
        z, w = ctx.saved_tensors
        return cotangent @ w.mT, z.mT @ cotangent


def test_a_parameter_given_straight_to_a_custom_function():
    w, v, x = weight(), weight(seed=5), noise(4, 6).requires_grad_()
    hidden = x @ v
    check(lambda z: torch.tanh(Product.apply(z, w) + hidden), (w, v, x))


def test_a_made_tensor_given_straight_to_a_custom_function_is_refused_but_in_args():
    w = weight()
    twice = w * 0.5 + 0
    with pytest.raises(deqcore.GradientModeError, match=r"Give it to f in args.*gradient='implicit'"):
        reversible()(lambda z: torch.tanh(Product.apply(z, twice) + 1), torch.zeros(4, 6, dtype=DOUBLE))
    check(lambda z, twice: torch.tanh(Product.apply(z, twice) + 1), (w,), args=(twice,))


def test_f_that_differentiates_something_itself():
    w, x = weight(rho=0.5), noise(4, 6).requires_grad_()

    def f(z):
        with torch.enable_grad():
            inner = z if z.requires_grad else z.detach().requires_grad_()
            energy = torch.log(torch.cosh(inner @ w.mT + x)).sum()
            (slope,) = torch.autograd.grad(energy, inner, create_graph=True)
        return slope

    check(f, (w, x), noise(4, 6, seed=2))


def test_f_that_does_not_depend_on_z_or_on_anything():
    x = noise(4, 6).requires_grad_()
    check(lambda z: x * 2, (x,))
    (z,), _ = reversible()(lambda z: z * 0.5, torch.zeros(4, 6, dtype=DOUBLE))
    assert not z.requires_grad


# ---- what a state is


def test_a_dict_of_states_of_several_dtypes():
    w, x = weight(), noise(4, 6).requires_grad_()

    def f(state):
        a, b = state["a"], state["b"]
        return {"a": torch.tanh(a @ w.mT + b.real), "b": torch.complex(0.3 * a, 0.2 * b.imag + x)}

    start = {"a": noise(4, 6, seed=2), "b": torch.complex(noise(4, 6, seed=3), noise(4, 6, seed=4))}
    (found,), _ = reversible(8, 0.4)(f, start)
    y = z = start
    for _ in range(8):
        made = f(z)
        y = {key: 0.6 * y[key] + 0.4 * made[key] for key in y}
        made = f(y)
        z = {key: 0.6 * z[key] + 0.4 * made[key] for key in z}
    loss, expected = ((s["a"].sum() + s["b"].abs().square().sum()) for s in (found, z))
    close(torch.autograd.grad(loss, (w, x)), torch.autograd.grad(expected, (w, x)))


def test_one_equilibrium_for_all_rows():
    w, a, x = weight(), 0.2 * noise(4, 4, seed=9), noise(4, 6).requires_grad_()
    z0 = torch.zeros(4, 6, dtype=DOUBLE)

    def f(z):
        return torch.tanh(a @ z @ w.mT + x)

    (z,), _ = reversible(8, 0.4, batch_dims=0)(f, z0)
    expected = torch.autograd.grad(unrolled(f, z0, 0.4, 8)[-1].square().sum(), (w, x))
    close(torch.autograd.grad(z.square().sum(), (w, x)), expected)


def test_a_state_in_half_precision_is_carried_in_full():
    """Steps that round can't be undone. f sees what is rounded, as ever."""
    w, x = weight(dtype=torch.float32), noise(4, 6, dtype=torch.float32).requires_grad_()
    z0 = torch.zeros(4, 6, dtype=torch.bfloat16)

    def f(z):
        assert z.dtype == torch.bfloat16
        return torch.tanh(z.float() @ w.mT + x).to(torch.bfloat16)

    (z,), info = reversible(10, 0.3)(f, z0)
    assert z.dtype == torch.bfloat16
    found = torch.autograd.grad(z.float().sum(), (w, x))
    plain = unrolled(lambda z: f(z.to(torch.bfloat16)).float(), z0.float(), 0.3, 10)[-1]
    close(found, torch.autograd.grad(plain.sum(), (w, x)), 2e-2)
    assert float(info["backward"]["rel_lowest"].max()) <= torch.finfo(torch.float32).eps ** 0.5
