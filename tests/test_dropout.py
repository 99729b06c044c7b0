"""Variational dropout: shapes beside torchdeq, one mask a solve, and the inputs that must not break it."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torchdeq.dropout
from torch import nn

import deqcore
from deqcore import get_deq, mem_gc, reset_dropout

SPATIAL = {"1d": (5,), "2d": (4, 3), "3d": (2, 4, 3)}
STRUCTURED = [f"{kind}{size}" for kind in ("VariationalDropout", "VariationalDropToken") for size in SPATIAL]
ALL = ["VariationalDropout", *STRUCTURED]


@pytest.fixture(autouse=True)
def _double():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


def make(name, dropout=0.5, token_first=True, module=deqcore):
    options = {} if name == "VariationalDropout" else {"token_first": token_first}
    return getattr(module, name)(dropout, **options)


def ones_for(name, token_first=True, batch=6, channels=7, **options):
    spatial = SPATIAL.get(name[-2:], (5,))
    shape = (batch, *spatial, channels) if token_first else (batch, channels, *spatial)
    return torch.ones(shape, **options)


# ---- the mask


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("token_first", [True, False])
def test_shapes_and_scale_are_torchdeqs(name, token_first):
    x = ones_for(name, token_first)
    ours, theirs = make(name, 0.4, token_first), make(name, 0.4, token_first, torchdeq.dropout)
    out, expected = ours(x), theirs(x)
    assert out.shape == expected.shape == x.shape
    assert ours.mask.shape == theirs.mask.shape
    assert set(out.unique().tolist()) == {0.0, 1 / 0.6} == set(expected.double().unique().tolist())
    torch.testing.assert_close(out, ours.mask.expand_as(x))


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("token_first", [True, False])
def test_what_is_dropped_is_dropped_whole(name, token_first):
    out = make(name, 0.5, token_first)(ones_for(name, token_first))
    channel = out.dim() - 1 if token_first else 1
    whole = [d for d in range(1, out.dim()) if (d == channel) == ("Token" in name)]
    lowest, highest = out.amin(whole), out.amax(whole)
    torch.testing.assert_close(lowest, highest, rtol=0, atol=0)
    assert lowest.std(dim=0).max() > 0  # samples differ
    assert lowest.flatten(1).std(dim=1).max() > 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_and_the_mean(p):
    out = deqcore.VariationalDropout(p)(torch.ones(400, 500))
    zeros = float((out == 0).double().mean())
    deviation = math.sqrt(p * (1 - p) / out.numel())
    assert abs(zeros - p) < 5 * deviation
    assert abs(float(out.mean()) - 1) < 5 * deviation / (1 - p)


@pytest.mark.parametrize("name", ALL)
def test_the_ends_of_the_range(name):
    x = torch.randn_like(ones_for(name)).requires_grad_()
    out = make(name, 1.0)(x)
    torch.testing.assert_close(out, torch.zeros_like(x), rtol=0, atol=0)  # torchdeq: NaN
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=0)
    assert make(name, 0.0)(x) is x
    assert make(name, 0)(x) is x


def test_torchdeq_gives_nan_there():
    assert torchdeq.dropout.VariationalDropout(1.0)(torch.ones(3)).isnan().all()


@pytest.mark.parametrize("name", ALL)
def test_eval_mode_is_the_identity(name):
    layer = make(name).eval()
    x = ones_for(name)
    assert layer(x) is x and layer.mask is None


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_the_mask_has_the_inputs_dtype(name, dtype):
    layer = make(name)
    out = layer(ones_for(name, dtype=dtype))
    assert out.dtype == dtype
    assert layer.mask.dtype == dtype.to_real()
    assert {round(value) for value in out.real.unique().tolist()} == {0, 2}


def test_the_mask_is_on_the_inputs_device():
    layer = deqcore.VariationalDropout2d()
    layer(torch.ones(2, 3, 3, 4))
    out = layer(torch.ones(2, 3, 3, 4, device="meta"))
    assert out.is_meta and layer.mask.is_meta


# ---- how long it holds


def test_outside_a_solve_a_mask_holds_until_reset():
    model = nn.Sequential(deqcore.VariationalDropout(0.5), nn.Sequential(deqcore.VariationalDropout1d(0.5)))
    x = torch.ones(4, 20, 30)
    first = model(x)
    torch.testing.assert_close(model(2 * x), 2 * first, rtol=0, atol=0)
    reset_dropout(model)
    assert model[0].mask is None and model[1][0].mask is None
    second = model(x)
    assert not torch.equal(first, second)
    deqcore.reset_deq(model)
    assert not torch.equal(model(x), second)


@pytest.mark.parametrize("name", ALL)
def test_another_batch_dtype_or_device_draws_anew(name):
    layer = make(name)
    for other in (ones_for(name), ones_for(name, batch=9), ones_for(name, batch=9).float()):
        out = layer(other)
        assert out.shape == other.shape and out.dtype == other.dtype
        mask = layer.mask
        layer(other)
        assert layer.mask is mask
    with pytest.raises(RuntimeError):  # torchdeq's is stale
        stale = make(name, module=torchdeq.dropout)
        stale(ones_for(name))
        stale(ones_for(name, batch=9))


def test_a_mask_from_inference_mode_is_not_kept_for_training():
    layer = deqcore.VariationalDropout()
    with torch.inference_mode():
        layer(torch.ones(3, 4))
    x = torch.ones(3, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.mask)


def solve(layer, x, deq=None, seen=None):
    deq = deq or get_deq(f_max_iter=30, f_tol=1e-10, on_failure="ignore")

    def f(z):
        out = layer(0.5 * torch.tanh(z) + x)
        if seen is not None:
            seen.append(layer.mask)
        return out

    return deq(f, torch.zeros_like(x))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("options", [{"ift": True}, {"grad": 3, "n_states": 2}, {"f_solver": "anderson", "grad": 2}])
def test_one_mask_a_solve_and_a_new_one_in_the_next(name, options):
    layer = make(name)
    x = ones_for(name)
    deq = get_deq(f_max_iter=30, f_tol=1e-10, regularizers=["jacobian"], on_failure="ignore", **options)
    masks = []
    for _ in range(3):
        seen = []
        z, info = solve(layer, x, deq, seen)
        assert info["nfe"] > 4
        assert len({id(mask) for mask in seen}) == 1
        masks.append(seen[0])
        # the state is the fixed point of the masked map, so one more application changes nothing
        torch.testing.assert_close(seen[0] * (0.5 * torch.tanh(z[-1]) + x), z[-1], rtol=0, atol=1e-3)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_the_gradient_is_that_of_the_masked_map():
    layer = deqcore.VariationalDropout(0.3)
    linear = nn.Linear(4, 4)
    x = torch.randn(5, 4)
    deq = get_deq(f_max_iter=200, f_tol=1e-13, ift=True, b_tol=1e-13)
    (z,), _ = deq(lambda z: 0.4 * layer(torch.tanh(linear(z))) + x, torch.zeros(5, 4))
    z.square().sum().backward()
    found = linear.weight.grad.clone()
    linear.weight.grad = None
    mask, z = layer.mask, torch.zeros(5, 4)
    for _ in range(200):
        z = 0.4 * mask * torch.tanh(linear(z)) + x
    z.square().sum().backward()
    torch.testing.assert_close(found, linear.weight.grad, rtol=1e-9, atol=1e-11)


def test_after_a_solve_its_mask_holds_outside():
    layer = deqcore.VariationalDropout(0.5)
    x = torch.ones(4, 30)
    seen = []
    solve(layer, x, seen=seen)
    torch.testing.assert_close(layer(x), seen[0] * x, rtol=0, atol=0)


def test_a_solve_does_not_take_over_an_outside_mask():
    layer = deqcore.VariationalDropout(0.5)
    x = torch.ones(4, 30)
    outside = layer(x)
    seen = []
    solve(layer, x, seen=seen)
    assert not torch.equal(seen[0] * x, outside)


def test_nested_solves_share_the_outer_mask():
    layer = deqcore.VariationalDropout(0.5)
    x = torch.ones(3, 40)
    inner = get_deq(f_max_iter=8, on_failure="ignore")
    outer = get_deq(f_max_iter=8, on_failure="ignore")
    seen = []

    def f(z):
        seen.append(layer(torch.ones_like(x)))
        (found,), _ = solve_inner(z)
        return 0.5 * found

    def solve_inner(z):
        def g(w):
            seen.append(layer(torch.ones_like(x)))
            return 0.3 * torch.tanh(layer(w)) + 0.1 * z + x

        return inner(g, torch.zeros_like(x))

    outer(f, torch.zeros_like(x))
    assert len(seen) > 20
    assert all(torch.equal(one, seen[0]) for one in seen)


def test_one_layer_at_two_places_of_f_keeps_a_mask_for_each_shape():
    layer = deqcore.VariationalDropout(0.5)
    small, large = [], []

    def f(z):
        small.append(layer(torch.ones(2, 10)))
        large.append(layer(torch.ones(2, 20)))
        return 0.5 * z

    get_deq(f_max_iter=5, on_failure="ignore")(f, torch.ones(2, 3))
    assert all(torch.equal(one, small[0]) for one in small) and all(torch.equal(one, large[0]) for one in large)


def test_recomputing_in_the_backward_uses_the_solves_mask():
    linear = nn.Linear(6, 6)
    layer = deqcore.VariationalDropout(0.5)
    block = nn.Sequential(linear, nn.Tanh(), layer)
    x = torch.randn(4, 6)
    deq = get_deq(f_max_iter=60, f_tol=1e-12, grad=3)
    gradients = []
    for step in (lambda z: 0.4 * block(z) + x, lambda z: 0.4 * mem_gc(block, (z,)) + x):
        torch.manual_seed(5)
        (z,), _ = deq(step, torch.zeros(4, 6))
        solve(layer, torch.ones(4, 6))  # another solve, another mask, before the backward
        linear.weight.grad = None
        z.square().sum().backward()
        gradients.append(linear.weight.grad.clone())
    torch.testing.assert_close(*gradients)


# ---- state, copies


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(name, how):
    layer = make(name, 0.3, token_first=False)
    x = ones_for(name, False)
    layer(x)
    assert not layer.state_dict() and not list(layer.buffers())
    twin = how(layer)
    assert twin.dropout == 0.3 and getattr(twin, "token_first", False) is False and twin.mask is None
    assert layer.mask is not None
    twin(x)
    layer.load_state_dict(twin.state_dict())
    assert repr(twin) == repr(layer) and "dropout=0.3" in repr(layer)


def test_names_are_torchdeqs():
    assert set(torchdeq.dropout.__all__) == set(deqcore.dropout.__all__)
    for name in ALL:
        assert getattr(deqcore.dropout, name) is getattr(deqcore, name)
        assert make(name).dropout == getattr(torchdeq.dropout, name)().dropout == 0.5
    assert all(getattr(deqcore, name)().token_first for name in STRUCTURED)


# ---- what is refused


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
def test_probabilities_out_of_range(name, p):
    with pytest.raises(deqcore.ConfigError, match="dropout must be a probability from 0 to 1"):
        getattr(deqcore, name)(p)
    with pytest.raises(ValueError):
        getattr(deqcore, name)(p)


@pytest.mark.parametrize("p", ["0.5", None, True, [0.5]])
def test_things_that_are_no_probability(p):
    with pytest.raises(deqcore.ConfigTypeError, match="dropout must be a number from 0 to 1"):
        deqcore.VariationalDropout2d(p)


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_number_of_dimensions(name, training):
    layer = make(name).train(training)
    for wrong in (ones_for(name)[0], ones_for(name)[None]):
        with pytest.raises(
            deqcore.FunctionError, match=rf"{name}\(token_first=True\) takes .*\(B, .*L|W, D\)"
        ) as caught:
            layer(wrong)
        assert str(tuple(wrong.shape)) in str(caught.value)
        assert isinstance(caught.value, ValueError)


def test_reset_takes_a_module():
    with pytest.raises(deqcore.ConfigTypeError, match="reset_dropout takes"):
        reset_dropout([deqcore.VariationalDropout()])
