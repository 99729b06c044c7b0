"""Losses, estimates and small helpers: dense Jacobians, eigenvalues, torchdeq beside, plain evaluation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torchdeq.loss
import torchdeq.utils
from torch import nn

import deqcore
from deqcore import (
    apply_norm,
    fp_correction,
    get_deq,
    jac_reg,
    mem_gc,
    mixed_init,
    power_method,
    register_weight_func,
    registry,
)
from deqcore.spectrum import power_iterate


@pytest.fixture(autouse=True)
def _double():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def own_weights(monkeypatch):
    """Weight functions registered in a test, undone afterwards."""
    plugin = registry.get("regularizers", "fixed_point_correction")
    monkeypatch.setattr(plugin, "weights", dict(plugin.weights))


def linear_map(matrices, z=None):
    """(f0, z0) for f(z) = A z, a matrix a sample."""
    batch, features, _ = matrices.shape
    z0 = (torch.randn(batch, features, dtype=matrices.dtype) if z is None else z).requires_grad_()
    return torch.einsum("bij,bj->bi", matrices, z0), z0


# ---- jac_reg


def test_jac_reg_estimates_the_dense_frobenius_norm():
    weight = 0.4 * torch.randn(6, 6)
    z0 = torch.randn(3, 6, requires_grad=True)
    f0 = torch.tanh(z0 @ weight.T)
    dense = torch.autograd.functional.jacobian(lambda z: torch.tanh(z @ weight.T), z0.detach())
    exact = dense.square().sum() / z0.numel()
    vecs = 4000
    found = jac_reg(f0, z0, vecs=vecs, create_graph=False)
    # the variance of ||J^T v||^2 over normal v is 2 ||J J^T||_F^2
    matrix = dense.reshape(18, 18)
    deviation = (2 * (matrix @ matrix.T).square().sum() / vecs).sqrt() / z0.numel()
    assert abs(found - exact) < 5 * deviation
    assert not found.requires_grad


def test_jac_reg_is_exact_where_every_vector_gives_the_same():
    rotation = torch.linalg.qr(torch.randn(2, 5, 5))[0]
    f0, z0 = linear_map(0.7 * rotation)
    torch.manual_seed(3)
    found = jac_reg(f0, z0)
    torch.manual_seed(3)
    torch.testing.assert_close(found, 0.49 * torch.randn(2, 5).square().sum() / 10)


@pytest.mark.parametrize("vecs", [1, 3])
def test_jac_reg_and_its_gradient_equal_torchdeqs(vecs):
    weight = torch.randn(5, 5, requires_grad=True)
    values, gradients = [], []
    for function in (jac_reg, torchdeq.loss.jac_reg):
        z0 = torch.linspace(-1, 1, 20).view(4, 5).requires_grad_()
        torch.manual_seed(7)
        value = function(torch.tanh(z0 @ weight), z0, vecs=vecs)
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, weight)[0])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


def test_jac_reg_of_a_holomorphic_map():
    matrix = torch.randn(4, 4, dtype=torch.complex128)
    z0 = torch.randn(2, 4, dtype=torch.complex128, requires_grad=True)
    found = jac_reg(z0 @ matrix.T, z0, vecs=4000)
    exact = 2 * matrix.abs().square().sum() / 8
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0)
    assert found.dtype == torch.float64


def test_jac_reg_of_a_map_that_ignores_its_input():
    z0, other = torch.randn(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    assert jac_reg(2 * other, z0) == 0


# ---- spectral radius


def test_power_method_on_a_rotation():
    cos, sin = math.cos(1.0), math.sin(1.0)
    rotation = 0.9 * torch.tensor([[[cos, -sin], [sin, cos]]]).repeat(3, 1, 1)
    vectors, radii = power_method(*linear_map(rotation))
    torch.testing.assert_close(radii, torch.full((3,), 0.9))
    assert vectors.shape == (3, 2)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    _, theirs = torchdeq.loss.power_method(*linear_map(rotation))
    assert (theirs - 0.9).abs().max() > 0.05  # a Rayleigh quotient means nothing here


@pytest.mark.parametrize("features", [1, 2, 3, 6, 12])
def test_power_method_on_random_matrices(features):
    matrices = torch.randn(100, features, features)
    expected = torch.linalg.eigvals(matrices).abs().amax(1)
    _, found = power_method(*linear_map(matrices))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_power_method_on_larger_matrices():
    matrices = torch.randn(50, 30, 30) / 30**0.5
    expected = torch.linalg.eigvals(matrices).abs().amax(1)
    _, found = power_method(*linear_map(matrices), n_iters=200)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    _, single = power_method(*linear_map(matrices.float()), n_iters=200)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("matrix", "radius"),
    [
        ([[0.9, 1.0], [0.0, 0.9]], 0.9),  # defective
        ([[0.9, 0.0], [0.0, -0.9]], 0.9),  # two of one size
        ([[0.0, 0.8, 0.0], [0.0, 0.0, 0.8], [0.8, 0.0, 0.0]], 0.8),  # three
        ([[0.7, 0.0, 0.0], [0.0, 0.7, 0.0], [0.0, 0.0, 0.7]], 0.7),
        ([[0.0, 1.0], [0.0, 0.0]], 0.0),  # nilpotent
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),
        ([[1e-200, 0.0], [0.0, 0.0]], 1e-200),
    ],
)
def test_power_method_on_special_matrices(matrix, radius):
    _, found = power_method(*linear_map(torch.tensor([matrix])))
    torch.testing.assert_close(found, torch.tensor([radius]), rtol=1e-6, atol=1e-300)


def test_power_method_gives_the_dominant_direction_and_each_samples_own_radius():
    values = torch.tensor([[0.9, 0.3, 0.1], [0.2, -0.7, 0.1], [0.1, 0.2, 0.5]])
    vectors, radii = power_method(*linear_map(torch.diag_embed(values)))
    torch.testing.assert_close(radii, torch.tensor([0.9, 0.7, 0.5]))
    torch.testing.assert_close(vectors.abs(), torch.eye(3), atol=1e-6, rtol=0)


def test_power_method_keeps_the_shape_of_the_state():
    weight = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    nn.init.normal_(weight.weight, std=0.05)
    z0 = torch.randn(2, 3, 4, 4, requires_grad=True)
    f0 = torch.tanh(weight(z0))
    dense = torch.func.vmap(torch.func.jacrev(lambda z: torch.tanh(weight(z[None]))[0].flatten()))(z0.detach())
    expected = torch.linalg.eigvals(dense.reshape(2, 48, 48).detach()).abs().amax(1)
    vectors, radii = power_method(f0, z0, n_iters=300)
    assert vectors.shape == z0.shape
    torch.testing.assert_close(radii, expected, rtol=1e-6, atol=0)
    f0.sum().backward()  # the graph is still there


def test_power_method_on_a_complex_state():
    matrix = torch.diag(torch.tensor([0.8j, -0.5, 0.3 + 0.1j]))
    z0 = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    vectors, radii = power_method(z0 @ matrix.T, z0)
    assert vectors.is_complex() and not radii.is_complex()
    torch.testing.assert_close(radii, torch.full((2,), 0.8))


def test_power_method_of_a_map_that_ignores_its_input():
    z0, other = torch.randn(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    torch.testing.assert_close(power_method(2 * other, z0)[1], torch.zeros(2))


def test_power_iterate_takes_as_many_products_as_it_says():
    for features, expected in ((3, 10 + 3), (50, 10 + 12)):
        calls = []
        matrix = torch.randn(features, features)
        power_iterate(lambda v: (calls.append(1), v @ matrix)[1], torch.randn(2, features), 10)  # noqa: B023
        assert len(calls) == expected


def test_the_spectral_radius_of_an_evaluation():
    linear = nn.Linear(6, 6)
    with torch.no_grad():
        linear.weight.copy_(0.5 * torch.linalg.qr(torch.randn(6, 6))[0])
    deq = get_deq(f_max_iter=200, f_tol=1e-12).eval()
    (z,), info = deq(lambda z: torch.tanh(linear(z)), torch.zeros(4, 6), sradius_mode=True)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: torch.tanh(linear(z))))(z.detach())
    expected = torch.linalg.eigvals(jacobian.detach()).abs().amax(1)
    torch.testing.assert_close(info["sradius"], expected, rtol=1e-6, atol=0)


# ---- fixed-point correction


def states(count):
    return [torch.randn(4, 3, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "options"),
    [("exp", {}), ("exp", {"gamma": 0.5}), ("linear", {}), ("linear", {"gamma": 0.3, "bias": 0.1})],
)
def test_fp_correction_equals_torchdeqs(count, name, options):
    z, y, mask = states(count), torch.randn(4, 3), torch.rand(4, 3)

    def crit(x, y, mask):
        return ((x - y) * mask).abs().mean()

    results = []
    functions: tuple[Any, ...] = (fp_correction, torchdeq.loss.fp_correction)
    for function in functions:
        loss, values = function(crit, (z, y, mask), weight_func=name, return_loss_values=True, **options)
        results.append((loss.detach(), torch.tensor(values), *torch.autograd.grad(loss, z)))
        torch.testing.assert_close(function(crit, (z, y, mask), name, **options).detach(), loss.detach())
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_shorter_lists_repeat_as_in_torchdeq():
    z, y = states(4), states(2)
    crit = nn.functional.mse_loss
    torch.testing.assert_close(fp_correction(crit, (z, y)), torchdeq.loss.fp_correction(crit, (z, y)))
    torch.testing.assert_close(fp_correction(crit, (tuple(z), y)), fp_correction(crit, (z, y)))


def test_const_needs_no_gpu():
    z = states(3)
    loss = fp_correction(lambda x: x.mean(), (z,), "const", c=0.5)
    torch.testing.assert_close(loss, 0.5 * sum(x.mean() for x in z))
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            torchdeq.loss.fp_correction(lambda x: x.mean(), (z,), "const")


def test_a_registered_weight_function(own_weights):
    register_weight_func("square", lambda n, k, power=2: ((k + 1) / n) ** power)
    z = states(3)
    loss = fp_correction(lambda x: x.mean(), (z,), "square")
    torch.testing.assert_close(loss, sum(((k + 1) / 3) ** 2 * x.mean() for k, x in enumerate(z)))
    cubed = fp_correction(lambda x: x.mean(), (z,), weight_func="square", power=3)
    torch.testing.assert_close(cubed, sum(((k + 1) / 3) ** 3 * x.mean() for k, x in enumerate(z)))
    assert get_deq(regularizers=[{"name": "fixed_point_correction", "weight_func": "square"}])


def test_an_infinite_loss_stays_infinite():
    assert fp_correction(lambda x: x.sum() / 0, ([torch.ones(2)],)) == math.inf


# ---- as regularizers


def test_jacobian_regularization_and_its_gradient_through_a_solve():
    linear = nn.Linear(5, 5)
    x = torch.randn(3, 5)
    deq = get_deq(f_max_iter=200, f_tol=1e-12, ift=True, regularizers=[{"name": "jacobian", "weight": 0.5, "vecs": 2}])
    seeds = []

    def f(z):
        seeds.append(torch.get_rng_state())
        return 0.5 * torch.tanh(linear(z)) + x

    (z,), info = deq(f, torch.zeros(3, 5))
    info["regularization"].backward()
    torch.set_rng_state(seeds[-1])
    expected = 0
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: 0.5 * torch.tanh(linear(z))))(z.detach())
    for _ in range(2):
        v = torch.randn(3, 5)
        expected = expected + 0.5 * torch.einsum("bij,bi->bj", jacobian, v).square().sum() / 2 / z.numel()
    torch.testing.assert_close(info["regularization"], expected)
    torch.testing.assert_close(info["regularizers"]["jacobian"], 2 * expected)
    for found, parameter in zip(torch.autograd.grad(expected, linear.parameters()), linear.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, found, rtol=1e-8, atol=1e-10)


def test_fixed_point_correction_of_sampled_states_and_its_gradient():
    linear = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    choice = {"name": "fixed_point_correction", "weight": 0.5, "gamma": 0.6}
    deq = get_deq(f_max_iter=12, f_tol=0.0, n_states=3, grad=1, regularizers=[choice], on_failure="ignore")
    z, info = deq(lambda z: 0.5 * torch.tanh(linear(z)) + x, torch.zeros(2, 4))
    assert len(z) == 3
    expected = 0.5 * sum(0.6 ** (2 - k) * (z[k] - z[-1].detach()).square().mean() for k in range(2))
    torch.testing.assert_close(info["regularization"], expected)
    reference = torch.autograd.grad(expected, linear.weight, retain_graph=True)[0]
    info["regularization"].backward()
    torch.testing.assert_close(linear.weight.grad, reference)
    assert linear.weight.grad.abs().max() > 0


def test_one_state_needs_no_correction():
    deq = get_deq(regularizers=["fixed_point_correction"], f_max_iter=60)
    _, info = deq(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
    assert info["regularization"] == 0


def test_several_regularizers_add_up_and_are_zero_in_eval():
    linear = nn.Linear(4, 4)
    choices = [{"name": "jacobian", "weight": 2.0}, {"name": "fixed_point_correction", "weight": 3.0}]
    deq = get_deq(f_max_iter=60, n_states=2, grad=1, regularizers=choices, on_failure="ignore")
    _, info = deq(lambda z: 0.4 * torch.tanh(linear(z)) + 1, torch.zeros(2, 4))
    parts = info["regularizers"]
    assert set(parts) == {"jacobian", "fixed_point_correction"}
    torch.testing.assert_close(info["regularization"], 2 * parts["jacobian"] + 3 * parts["fixed_point_correction"])
    _, info = deq.eval()(lambda z: 0.4 * torch.tanh(linear(z)) + 1, torch.zeros(2, 4))
    assert info["regularization"] == 0 and not info["regularizers"]


def test_a_regularizer_makes_training_more_contractive():
    linear = nn.Linear(8, 8)
    deq = get_deq(f_max_iter=60, f_tol=1e-6, regularizers=["jacobian"], ift=True, on_failure="ignore")
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    penalties = []
    for _ in range(20):
        _, info = deq(lambda z: torch.tanh(linear(z)) + 0.1, torch.zeros(16, 8))
        optimizer.zero_grad()
        info["regularization"].backward()
        optimizer.step()
        penalties.append(float(info["regularization"].detach()))
    assert penalties[-1] < 0.5 * penalties[0]


def test_a_map_that_ignores_its_state_has_no_jacobian_to_penalise():
    deq = get_deq(regularizers=["jacobian"], on_failure="ignore")
    x = torch.ones(2, 3)
    _, info = deq(lambda z: x + 0.0, torch.zeros(2, 3))
    assert info["regularization"] == 0
    parameter = torch.ones(2, 3, requires_grad=True)
    _, info = deq(lambda z: 2 * parameter, torch.zeros(2, 3))
    assert info["regularization"] == 0


# ---- mem_gc


def block():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def test_mem_gc_gives_the_gradients_of_plain_evaluation():
    plain = block()
    saved, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    x = torch.randn(3, 4)
    results = []
    for module, evaluate in (
        (plain, lambda m, z: m(z)),
        (saved, lambda m, z: mem_gc(m, (z,))),
        (theirs, lambda m, z: torchdeq.utils.mem_gc(m, (z,))),
    ):
        z = x.clone().requires_grad_()
        out = evaluate(module, evaluate(module, z))
        out.square().sum().backward()
        results.append((out.detach(), z.grad, *(p.grad for p in module.parameters())))
    for ours, expected, torchdeqs in zip(results[1], results[0], results[2], strict=True):
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(ours, torchdeqs)


def test_mem_gc_keeps_its_argument_alone_and_evaluates_twice():
    module, calls, kept = block(), [], []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        module(torch.ones(3, 4)).sum()
        plain = len(kept)
        kept.clear()
        out = mem_gc(module, (torch.ones(3, 4),))
    assert plain > 2 and kept == [(3, 4)]  # the argument alone
    assert len(calls) == 2
    out.sum().backward()
    assert len(calls) == 3


def test_mem_gc_of_several_states_closures_and_constants():
    weight = torch.randn(4, 4, requires_grad=True)

    def f(a, b, factor, flag=None):
        return torch.tanh(a @ weight) * factor, b + a.sum()

    a, b = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    results = []
    for first, second in (f(a, b, 3.0, "x"), mem_gc(f, (a, b, 3.0, "x")), mem_gc(f, [a, b, 3.0])):
        loss = (first * second).sum()
        results.append((loss.detach(), *torch.autograd.grad(loss, (a, b, weight))))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected)
    assert mem_gc(lambda: weight.sum()) == weight.sum()


def test_mem_gc_draws_random_numbers_alike_both_times():
    module = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5))
    x = torch.randn(3, 4, requires_grad=True)
    out = mem_gc(module, (x,))
    out.sum().backward()
    mask = out.detach() != 0
    torch.testing.assert_close(module[0].bias.grad, 2 * mask.double().sum(0))


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("options", [{"grad": 3}, {"ift": True, "b_tol": 1e-12}])
@pytest.mark.parametrize("max_iter", [0, 60])
def test_mem_gc_in_a_solve_uses_its_weights_and_masks(norm, options, max_iter):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), deqcore.VariationalDropout(0.3), nn.Linear(5, 5))
        # many power iterations, so that one more changes nothing
        apply_norm(module, norm, **({"n_power_iterations": 500} if norm == "spectral_norm" else {}))
        x = torch.randn(3, 5, requires_grad=True)

        def f(z, module=module, x=x, recompute=recompute):
            return 0.5 * (mem_gc(module, (z,)) if recompute else module(z)) + x

        torch.manual_seed(2)
        deq = get_deq(f_max_iter=max_iter, f_tol=1e-12, on_failure="ignore", **options)
        z, _ = deq(f, torch.ones(3, 5))
        z[-1].square().sum().backward()
        gradients.append([z[-1].detach(), x.grad, *(p.grad for p in module.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert gradients[0][0].abs().max() > 0


# ---- mixed_init


def test_mixed_init_is_half_normal_half_zero():
    z = mixed_init((300, 400))
    assert z.shape == (300, 400) and z.dtype == torch.float64
    count = z.numel()
    zero = (z == 0).double()
    assert abs(zero.mean() - 0.5) < 5 * 0.5 / count**0.5
    rest = z[z != 0]
    assert abs(rest.mean()) < 5 / rest.numel() ** 0.5
    assert abs(rest.square().mean() - 1) < 5 * (2 / rest.numel()) ** 0.5
    assert abs((rest.pow(4)).mean() - 3) < 5 * (96 / rest.numel()) ** 0.5  # normal, not just of variance 1
    rows = zero.mean(1)
    assert rows.std() < 2 * 0.5 / 400**0.5  # entries, not whole rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex128])
def test_mixed_init_of_other_dtypes_and_devices(dtype):
    z = mixed_init(torch.Size([4, 500]), dtype=dtype)
    assert z.dtype == dtype and 0.3 < float((z == 0).double().mean()) < 0.7
    assert mixed_init((2, 3), "meta").is_meta and mixed_init([2, 3], torch.device("cpu")).shape == (2, 3)


def test_mixed_init_takes_torchdeqs_arguments():
    torch.manual_seed(4)
    ours = mixed_init((5, 6), None)
    torch.manual_seed(4)
    theirs = torchdeq.utils.mixed_init((5, 6), None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# ---- what is refused

Z = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda z: jac_reg(2 * z.detach(), z), deqcore.FunctionError, r"no graph to z0.*requires_grad_"),
        (lambda z: jac_reg(2 * z, z.detach()), deqcore.FunctionError, "no graph to z0"),
        (lambda z: jac_reg(z.sum(1), z), deqcore.FunctionError, r"\(2,\).*\(2, 3\)"),
        (lambda z: jac_reg(2 * z, z, vecs=0), deqcore.ConfigError, "vecs must be at least 1, got 0"),
        (lambda z: power_method(2 * z.detach(), z), deqcore.FunctionError, "no graph to z0"),
        (lambda z: power_method(z.sum(), z), deqcore.FunctionError, "keeps the shape"),
        (lambda z: fp_correction(torch.sum, (z,), "expo"), deqcore.ConfigError, r"'expo'.*Did you mean 'exp'"),
        (lambda z: fp_correction(torch.sum, (z,), gama=1), deqcore.UnknownKeyError, r"'exp'.*gama.*gamma"),
        (lambda z: fp_correction(torch.sum, (z,), "const", gamma=1), deqcore.UnknownKeyError, r"options: c\."),
        (lambda z: fp_correction(3, (z,)), deqcore.ConfigTypeError, "criterion.*int"),
        (lambda z: fp_correction(torch.sum, z), deqcore.ConfigTypeError, "args must be a tuple"),
        (lambda z: fp_correction(torch.sum, ()), deqcore.ConfigError, "at least one argument"),
        (lambda z: fp_correction(torch.sum, ([],)), deqcore.ConfigError, "no empty list"),
        (lambda z: register_weight_func("a", 3), deqcore.ConfigTypeError, r"func\(n, k"),
        (lambda z: mem_gc(torch.sum, z), deqcore.FunctionTypeError, r"in_args must be a tuple.*Tensor"),
        (
            lambda z: registry.create("regularizers", {"name": "fixed_point_correction", "weight_func": "no"}),
            deqcore.ConfigError,
            "no weight function named 'no'",
        ),
        (
            lambda z: get_deq(regularizers=[{"name": "fixed_point_correction", "weight_func": "const", "gamma": 0.5}]),
            deqcore.ConfigError,
            "gamma",
        ),
        (lambda z: get_deq(regularizers=[{"name": "jacobian", "vecs": 0}]), deqcore.ConfigError, "vecs"),
        (lambda z: get_deq(regularizers=[{"name": "jacobian", "weight": -1}]), deqcore.ConfigError, "weight"),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(Z.clone().requires_grad_())
