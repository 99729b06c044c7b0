"""What autograd, norms, dropout and autocast do around the reversible gradient."""

from __future__ import annotations

import gc

import pytest
import torch
from reversible_support import DOUBLE, close, contraction, noise, reversible, unrolled, weight
from torch import nn

import deqcore

# ---- autograd's ways


def test_second_derivatives_are_refused_and_first_ones_with_a_graph_are_not():
    f, w, x = contraction()
    (z,), _ = reversible()(f, torch.zeros_like(x))
    plain = torch.autograd.grad(z.sum(), (w, x), retain_graph=True)
    found = torch.autograd.grad(z.sum(), (w, x), create_graph=True)
    close([part.detach() for part in found], plain)
    with pytest.raises(deqcore.GradientModeError, match=r"first derivatives only.*'implicit'.*'unrolled'"):
        torch.autograd.grad(found[0].square().sum(), x)


def test_several_cotangents_at_once_and_torch_func_are_refused():
    f, _, x = contraction()
    (z,), _ = reversible()(f, torch.zeros_like(x))
    with pytest.raises(deqcore.GradientModeError, match="one cotangent at a time"):
        torch.autograd.grad(z, x, torch.ones(2, *z.shape, dtype=DOUBLE), is_grads_batched=True)
    with pytest.raises(deqcore.GradientModeError, match="implicit"):
        torch.func.grad(lambda x: deqcore.fixed_point(torch.mul, x, (x,), gradient="reversible").sum())(x.detach())


def test_backward_twice_and_two_calls_in_one_graph():
    f, w, x = contraction()
    deq = reversible()
    (z,), _ = deq(f, torch.zeros_like(x))
    once = torch.autograd.grad(z.sum(), (w, x), retain_graph=True)
    close(torch.autograd.grad(z.sum(), (w, x)), once, 0)
    (first,), _ = deq(f, torch.zeros_like(x))
    (second,), _ = deq(lambda z: torch.tanh(z @ w.mT + first), first)
    plain = unrolled(f, torch.zeros_like(x), 0.5, 12)[-1]
    other = unrolled(lambda z: torch.tanh(z @ w.mT + plain), plain, 0.5, 12)[-1]
    close(torch.autograd.grad(second.sum(), (w, x)), torch.autograd.grad(other.sum(), (w, x)))


@pytest.mark.parametrize("inner", ["reversible", "implicit"])
def test_a_deq_in_a_deqs_f(inner):
    w, v, x = weight(rho=0.5), weight(rho=0.5, seed=4), noise(4, 6).requires_grad_()
    within = reversible(60, 0.8)
    if inner == "implicit":
        solver = {"name": "anderson", "tol": 1e-13, "max_iter": 99}
        within = deqcore.get_deq(solver=solver, gradient="implicit", b_tol=1e-12)

    def f(z):
        (y,), _ = within(lambda y: torch.tanh(y @ v.mT + z), torch.zeros_like(z))
        return torch.tanh(y @ w.mT + x)

    def plain(z):
        return torch.tanh(unrolled(lambda y: torch.tanh(y @ v.mT + z), torch.zeros_like(z), 0.8, 60)[-1] @ w.mT + x)

    (z,), _ = reversible(6)(f, torch.zeros_like(x))
    other = unrolled(plain, torch.zeros_like(x), 0.5, 6)[-1]
    found, expected = (torch.autograd.grad(state.sum(), (w, v, x)) for state in (z, other))
    close(found, expected, 1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant):
    f, w, x = contraction()

    def block(x):
        return reversible()(lambda z: torch.tanh(z @ w.mT + x), torch.zeros_like(x))[0][0]

    z = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
    z.sum().backward()
    plain = torch.autograd.grad(unrolled(f, torch.zeros_like(x), 0.5, 12)[-1].sum(), (w, x))
    close((w.grad, x.grad), plain)


def test_a_tensor_changed_in_between_is_noticed():
    f, _, x = contraction()
    (z,), _ = reversible()(f, torch.zeros_like(x))
    with torch.no_grad():
        x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_the_result_may_be_changed_in_place():
    f, w, x = contraction()
    (z,), _ = reversible()(f, torch.zeros_like(x))
    expected = torch.autograd.grad(z.sum(), w, retain_graph=True)
    z.mul_(1.0).add_(3.0)
    close(torch.autograd.grad(z.sum(), w), expected)


def test_nothing_is_left_behind():
    """With the garbage collector off: what a step made is gone when the step is."""
    w, x = weight(rho=0.6), noise(4, 6).requires_grad_()
    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(12):
            hidden = x * 2
            (z,), info = reversible(4)(lambda z, hidden: torch.tanh(z @ w.mT + hidden), torch.zeros_like(x), (hidden,))
            z.sum().backward()
            w.grad = x.grad = None
            del z, info, hidden
            counts.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[-1] == counts[4]


# ---- what is fixed in a solve


def test_dropout_masks_and_normed_weights_hold_in_the_backward():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6).double()
    deqcore.apply_norm(layer, "weight_norm")
    drop = deqcore.VariationalDropout(0.4)
    x = noise(4, 6).requires_grad_()
    masks = []

    def f(z):
        seen = drop(torch.ones_like(z))
        masks.append(seen.detach())
        return torch.tanh(layer(z) * seen + x)

    z0 = torch.zeros_like(x)
    (z,), info = reversible(10)(f, z0)
    sources = (*layer.parameters(), x)
    found = torch.autograd.grad(z.square().sum(), sources)
    assert all(torch.equal(mask, masks[0]) for mask in masks) and info["backward"].converged.all()
    plain = unrolled(lambda z: torch.tanh(layer(z) * masks[0] + x), z0, 0.5, 10)[-1]
    close(found, torch.autograd.grad(plain.square().sum(), sources))


def test_autocast_of_the_forward_holds_in_the_backward():
    w, x = weight(32, dtype=torch.float32), noise(8, 32, dtype=torch.float32).requires_grad_()
    dtypes = []

    def f(z):
        product = z @ w.mT
        dtypes.append(product.dtype)
        return torch.tanh(product + x)

    z0 = torch.zeros_like(x)
    with torch.autocast("cpu", torch.bfloat16):
        (z,), info = reversible(16, 0.4)(f, z0)
    before = len(dtypes)
    found = torch.autograd.grad(z.sum(), (w, x))
    assert len(dtypes) > before and set(dtypes) == {torch.bfloat16} and info["backward"].converged.all()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        plain = unrolled(f, z0, 0.4, 16)[-1]
    close(found, torch.autograd.grad(plain.sum(), (w, x)), 0.05)
