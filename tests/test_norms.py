"""Weight normalisation: values and gradients beside torchdeq and torch, one computation a solve."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torchdeq
from norms_support import LAYERS, NORMS, all_layers, block, count_computations, originals, parametrized, scaling
from torch import nn
from torch.nn.utils import parametrizations

import deqcore
from deqcore import NormError, apply_norm, get_deq


@pytest.fixture(autouse=True)
def _double():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


# ---- values


@pytest.mark.parametrize("learn_scale", [True, False])
@pytest.mark.parametrize(("clip", "clip_value"), [(False, 1.0), (True, 1.0), (True, 0.4)])
@pytest.mark.parametrize("target_norm", [1.0, 0.7])
def test_weight_norm_equals_torchdeqs(learn_scale, clip, clip_value, target_norm):
    theirs = all_layers()
    ours = copy.deepcopy(theirs)
    options = {"learn_scale": learn_scale, "clip": clip, "clip_value": clip_value, "target_norm": target_norm}
    torchdeq.norm.apply_norm(theirs, "weight_norm", **options)
    if learn_scale and target_norm != 1.0:
        with pytest.warns(deqcore.DEQWarning, match=r"target_norm=0\.7 has no effect: it needs learn_scale=False"):
            apply_norm(ours, "weight_norm", **options)
    else:
        apply_norm(ours, "weight_norm", **options)
    torchdeq.norm.reset_norm(theirs)
    for name in LAYERS:
        torch.testing.assert_close(ours[name].weight, theirs[name].weight, rtol=1e-14, atol=1e-15)
    for name in LAYERS:  # the same after the parameters have moved
        mine = originals(ours[name])
        with torch.no_grad():
            theirs[name].weight_v.add_(torch.randn_like(theirs[name].weight_v))
            mine[-1].copy_(theirs[name].weight_v)
            if learn_scale:
                theirs[name].weight_g.mul_(torch.rand_like(theirs[name].weight_g) + 0.5)
                mine[0].copy_(theirs[name].weight_g)
    torchdeq.norm.reset_norm(theirs)
    for name in LAYERS:
        torch.testing.assert_close(ours[name].weight, theirs[name].weight, rtol=1e-14, atol=1e-15)
        x = torch.randn_like(ours[name].weight)
        (ours[name].weight * x).sum().backward()
        (theirs[name].weight * x).sum().backward()
        torch.testing.assert_close(originals(ours[name])[-1].grad, theirs[name].weight_v.grad)
        if learn_scale:
            torch.testing.assert_close(originals(ours[name])[0].grad, theirs[name].weight_g.grad)


@pytest.mark.parametrize("options", [{}, {"learn_scale": False, "target_norm": 0.9}, {"clip": True, "clip_value": 0.3}])
def test_spectral_norm_equals_torchdeqs_once_both_have_converged(options):
    theirs = all_layers()
    ours = copy.deepcopy(theirs)
    torchdeq.norm.apply_norm(theirs, "spectral_norm", **options)
    apply_norm(ours, "spectral_norm", **options)
    for _ in range(500):
        torchdeq.norm.reset_norm(theirs)
    with torch.no_grad():
        for _, name in itertools.product(range(500), LAYERS):
            ours[name].weight  # noqa: B018
    for name in LAYERS:
        torch.testing.assert_close(ours[name].weight, theirs[name].weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("cls", "dim"), [(nn.Linear, 0), (nn.Conv2d, 0), (nn.ConvTranspose2d, 1)])
def test_spectral_norm_divides_by_the_largest_singular_value(cls, dim):
    layer = cls(3, 4) if cls is nn.Linear else cls(3, 4, 3)
    matrix = layer.weight.detach().movedim(dim, 0).flatten(1)
    expected = layer.weight.detach() / torch.linalg.matrix_norm(matrix, 2) * 0.8
    apply_norm(layer, "spectral_norm", target_norm=0.8)
    torch.testing.assert_close(layer.weight, expected, rtol=2e-2, atol=1e-2)  # right from the start, to a few digits
    for _ in range(2000):
        layer.weight  # noqa: B018
    torch.testing.assert_close(layer.weight, expected)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv1d(3, 4, 3)])
def test_weight_norm_without_scale_bounds_every_channel(layer):
    apply_norm(layer, learn_scale=False, target_norm=0.5)
    norms = layer.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.5))
    bound = 0.5 * layer.weight.shape[0] ** 0.5
    assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) <= bound


@pytest.mark.parametrize(("cls", "inputs", "outputs"), [(nn.Conv2d, 2, 3), (nn.ConvTranspose2d, 3, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_bound_that_spectral_norm_states_for_convolutions(cls, inputs, outputs, groups):
    layer = cls(inputs * groups, outputs * groups, 3, padding=1, groups=groups, bias=False)
    apply_norm(layer, "spectral_norm", learn_scale=False, n_power_iterations=500)
    dense = layer(torch.eye(layer.in_channels * 25).view(-1, layer.in_channels, 5, 5)).flatten(1)
    measured = torch.linalg.matrix_norm(dense.detach(), 2)
    assert 1.0 < measured <= 3.0  # sqrt(9 kernel elements); 1 would be wrong


def test_clip_is_a_bound_on_the_factor():
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    apply_norm(layer, learn_scale=False, target_norm=50.0, clip=True, clip_value=1.5)
    torch.testing.assert_close(layer.weight, 1.5 * before)


def test_a_channel_of_zeros_stays_zero_and_can_leave():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    before = layer.weight.detach().clone()
    apply_norm(layer)
    torch.testing.assert_close(layer.weight, before)
    (layer.weight * torch.arange(1.0, 5.0)).sum().backward()
    g, v = originals(layer)
    assert g.grad.isfinite().all() and v.grad.isfinite().all()
    assert g.grad[1].abs() > 0.1
    with torch.no_grad():
        v[2] = 0  # as training may leave it
    assert (layer.weight[2] == 0).all()


def test_zeros_that_no_factor_can_scale_are_refused_and_the_model_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight[1] = 0
    with pytest.raises(NormError, match=r"^1\.weight: 1 output channel\(s\) are zeros.*learn_scale=True"):
        apply_norm(model, learn_scale=False)
    nn.init.zeros_(model[1].weight)
    with pytest.raises(NormError, match=r"^1\.weight.*all zeros.*filter the layer out"):
        apply_norm(model, "spectral_norm")
    assert not parametrized(model[0]) and isinstance(model[0].weight, nn.Parameter)


@pytest.mark.parametrize("name", NORMS)
def test_complex_weights(name):
    layer = nn.Linear(3, 3, dtype=torch.complex128)
    before = layer.weight.detach().clone()
    apply_norm(layer, name)
    if name == "weight_norm":
        expected = before
    else:
        for _ in range(1000):
            layer.weight  # noqa: B018
        expected = before / torch.linalg.matrix_norm(before, 2)
    torch.testing.assert_close(layer.weight, expected)
    layer.weight.abs().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parametrizations.parameters())


# ---- gradients


def solved_gradients(model, x, training, **options):
    """Gradients of a loss on the equilibrium of 0.5 tanh(model(z)) + x, and the equilibrium."""
    model.train(training)
    deq = get_deq(f_max_iter=300, f_tol=1e-13, b_max_iter=300, b_tol=1e-13, **options).train(training)
    (z,), _ = deq(lambda z: 0.5 * torch.tanh(model(z)) + x, torch.zeros_like(x))
    z.square().sum().backward()
    return z.detach()


def unrolled(model, x, steps=200):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = 0.5 * torch.tanh(model(z)) + x
    z.square().sum().backward()
    return z.detach()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("solver", ["fixed_point_iter", "broyden"])
def test_weight_norm_gradient_through_a_solve_equals_unrolling_torchs(training, solver):
    ours = nn.Linear(5, 5)
    reference = parametrizations.weight_norm(copy.deepcopy(ours))
    apply_norm(ours)
    x = torch.randn(4, 5, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.testing.assert_close(solved_gradients(ours, x, training, f_solver=solver, ift=True), unrolled(reference, y))
    torch.testing.assert_close(x.grad, y.grad)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        assert mine.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm_gradient_through_a_solve_equals_unrolling_torchs(training):
    ours = nn.Linear(5, 5)
    reference = parametrizations.spectral_norm(copy.deepcopy(ours)).eval()
    apply_norm(ours, "spectral_norm", learn_scale=False)
    x = torch.randn(4, 5, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found = solved_gradients(ours, x, training, ift=True)
    with torch.no_grad():  # singular vectors as they were in the solve: their last iteration is the solve's only one
        scaling(reference)._u.copy_(scaling(ours).u)
        scaling(reference)._v.copy_(scaling(ours).v)
    torch.testing.assert_close(found, unrolled(reference, y))
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(originals(ours)[0].grad, originals(reference)[0].grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.bias.grad, reference.bias.grad)


def test_gradient_of_the_learned_spectral_scale_by_finite_differences():
    ours = apply_norm(nn.Linear(4, 4), "spectral_norm").eval()
    x = torch.randn(3, 4)
    solved_gradients(ours, x, False, ift=True)
    g = scaling(ours).g
    found = g.grad.clone()
    for k in range(4):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                g[k] += step
                values.append(solved_gradients_value(ours, x))
                g[k] -= step
        torch.testing.assert_close(found[k, 0], (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def solved_gradients_value(model, x):
    z = torch.zeros_like(x)
    for _ in range(200):
        z = 0.5 * torch.tanh(model(z)) + x
    return z.square().sum()


def test_phantom_gradient_equals_its_own_unrolling():
    ours = apply_norm(nn.Linear(5, 5))
    reference = copy.deepcopy(ours)
    x = torch.randn(4, 5)
    solved_gradients(ours, x, True, grad=3)
    z = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(200):
            z = 0.5 * torch.tanh(reference(z)) + x
    for _ in range(3):
        z = 0.5 * torch.tanh(reference(z)) + x
    z.square().sum().backward()
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


# ---- once a solve


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"ift": True},
        {"f_solver": "anderson", "grad": 2},
        {"f_solver": "broyden", "n_states": 3, "grad": 1, "regularizers": ["jacobian"]},
        {"f_solver": "simple_fixed_point_iter"},
    ],
)
def test_a_weight_is_computed_once_a_solve(monkeypatch, name, training, options):
    calls = count_computations(monkeypatch, name)
    model = apply_norm(block(), name).train(training)
    deq = get_deq(f_max_iter=30, on_failure="ignore", **options).train(training)
    calls.clear()
    for solve in (1, 2):
        z, info = deq(lambda z: 0.3 * model(z), torch.ones(2, 5))
        assert info["nfe"] > 3
        assert len(calls) == 2 * solve  # two layers
        (z[-1].sum() + info.get("regularization", 0)).backward()
        assert len(calls) == 2 * solve
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters())) and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", NORMS)
def test_the_first_use_without_grad_still_gives_a_weight_with_a_gradient(name):
    layer = apply_norm(nn.Linear(3, 3), name)
    with deqcore.SolveScope():
        with torch.no_grad():
            first = layer.weight
        assert first.requires_grad and layer.weight is first
    with torch.no_grad(), deqcore.SolveScope():
        assert not layer.weight.requires_grad
    assert layer.weight is not first


def test_a_nested_solve_uses_the_outer_ones_weight(monkeypatch):
    calls = count_computations(monkeypatch, "weight_norm")
    layer = apply_norm(nn.Linear(3, 3))
    inner, outer = get_deq(f_max_iter=5, on_failure="ignore"), get_deq(f_max_iter=5, on_failure="ignore")
    calls.clear()

    def f(z):
        (found,), _ = inner(lambda w: 0.3 * torch.tanh(layer(w)) + z, torch.zeros_like(z))
        return 0.5 * found

    (z,), _ = outer(f, torch.ones(2, 3))
    assert len(calls) == 1
    z.sum().backward()
    assert originals(layer)[1].grad.abs().max() > 0


def test_power_iteration_runs_once_a_solve_in_training_and_never_in_eval():
    layer = apply_norm(nn.Linear(6, 6), "spectral_norm", n_power_iterations=2)
    matrix = originals(layer)[0].detach()
    deq = get_deq(f_max_iter=20, on_failure="ignore")
    for training in (False, True, True):
        layer.train(training)
        deq.train(training)
        u, v = scaling(layer).u.clone(), scaling(layer).v.clone()
        deq(lambda z: 0.5 * torch.tanh(layer(z)), torch.ones(2, 6))
        if training:
            for _ in range(2):
                v = nn.functional.normalize(matrix.T @ u, dim=0)
                u = nn.functional.normalize(matrix @ v, dim=0)
        torch.testing.assert_close(scaling(layer).u, u, rtol=0, atol=1e-15)
        torch.testing.assert_close(scaling(layer).v, v, rtol=0, atol=1e-15)


def test_two_forwards_before_one_backward():
    layer = apply_norm(nn.Linear(4, 4), "spectral_norm")
    deq = get_deq(f_max_iter=30, on_failure="ignore", ift=True)
    total = sum(deq(lambda z, k: 0.5 * torch.tanh(layer(z)) + k, torch.zeros(2, 4), (k,))[0][0].sum() for k in (1, 2))
    total.backward()  # would raise if the second forward had changed what the first one saved
    assert scaling(layer).g.grad.abs().max() > 0


def test_replaced_parameters_inside_one_solve_give_their_own_weight():
    layer = apply_norm(nn.Linear(3, 3))
    double = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(2, 3)
    with deqcore.SolveScope():
        once = layer(x)
        twice = torch.func.functional_call(layer, double, (x,))
        torch.testing.assert_close(layer(x), once)
    torch.testing.assert_close(twice, 2 * once)


def test_autocast_does_not_coarsen_the_norm():
    layer = nn.Linear(64, 64, dtype=torch.float32)
    expected = apply_norm(copy.deepcopy(layer), "spectral_norm", learn_scale=False, n_power_iterations=300)
    layer = apply_norm(layer, "spectral_norm", learn_scale=False, n_power_iterations=300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = layer.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, expected.weight, rtol=1e-4, atol=1e-5)
