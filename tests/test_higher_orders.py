"""Every order and mode of the implicit gradient, against unrolling, closed forms and finite differences."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd import grad as pull
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import deqcore
from deqcore import GradientModeError, get_deq

DOUBLE = torch.float64
#: Float64 derivatives of it are exact to 1e-8 and better.
EXACT: dict[str, Any] = {
    "solver": {"name": "broyden", "tol": 1e-13, "max_iter": 100},
    "gradient": {"name": "implicit", "solver": {"name": "gmres", "tol": 1e-13, "max_iter": 200}},
    "on_failure": "ignore",
}
STEPS = 120


@pytest.fixture(autouse=True)
def _quiet_torch():
    with warnings.catch_warnings():
        # torch's own rules for forward mode are compiled in a way that it calls deprecated.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        yield


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weight(size: int, rho: float = 0.6, seed: int = 1) -> Tensor:
    """A matrix whose singular values are all `rho`."""
    return torch.linalg.qr(rand(size, size, seed=seed))[0] * rho


def tanh_map(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(z @ w + x)


def solve(x: Tensor, w: Tensor) -> Tensor:
    return deqcore.fixed_point(tanh_map, torch.zeros(x.shape, dtype=x.dtype), (x, w), **EXACT)


def unroll(x: Tensor, w: Tensor) -> Tensor:
    z = torch.zeros(x.shape, dtype=x.dtype)
    for _ in range(STEPS):
        z = tanh_map(z, x, w)
    return z


def same(found: Any, expected: Any, tol: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


# ---- gradcheck and gradgradcheck of a call


def tensor_state(deq: Any, x: Tensor, w: Tensor) -> Tensor:
    return deq(lambda z: torch.tanh(z @ w + x), torch.zeros(2, 3, dtype=DOUBLE))[0][-1]


def tuple_state(deq: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.sin(torch.cat([a, b.flatten(1)], 1) @ w + x)
        return joint[:, :1], joint[:, 1:].unflatten(1, (2, 1)) * 0.9

    zero = torch.zeros(2, 3, dtype=DOUBLE)
    return tuple(deq(fn, (zero[:, :1], zero[:, 1:].unflatten(1, (2, 1))))[0][-1])


def dict_state(deq: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    def fn(z: dict[str, Any]) -> dict[str, Any]:
        joint = torch.tanh(torch.cat([z["h"], z["c"][0]], 1) @ w + x)
        return {"h": joint[:, :2], "c": [joint[:, 2:]]}

    zero = torch.zeros(2, 3, dtype=DOUBLE)
    found = deq(fn, {"h": zero[:, :2], "c": [zero[:, 2:]]})[0][-1]
    return found["h"], found["c"][0]


def through_args(deq: Any, x: Tensor, w: Tensor) -> Tensor:
    return deq(tanh_map, torch.zeros(2, 3, dtype=DOUBLE), args=(x, w))[0][-1]


def computed_captures(deq: Any, x: Tensor, w: Tensor) -> Tensor:
    """What f captures are no leaves, and one of them hangs on the other."""
    bias = (x @ w).tanh()
    scaled = w * bias.mean().exp() * 0.5
    return deq(lambda z: torch.tanh(z @ scaled + bias) + 0.1 * x, torch.zeros(2, 3, dtype=DOUBLE))[0][-1]


def nested(deq: Any, x: Tensor, w: Tensor) -> Tensor:
    inner = get_deq(**EXACT)
    zero = torch.zeros(2, 3, dtype=DOUBLE)

    def fn(z: Tensor) -> Tensor:
        (y,), _ = inner(lambda y: 0.5 * torch.tanh(y @ w + z), zero)
        return 0.5 * y + x

    return deq(fn, zero)[0][-1]


def chained(deq: Any, x: Tensor, w: Tensor) -> Tensor:
    return tensor_state(deq, tensor_state(deq, x, w).sin(), w)


def whole_state(deq: Any, x: Tensor, w: Tensor) -> Tensor:
    """Rows depend on each other."""
    links = torch.tensor([[0.2, 0.7], [0.6, 0.3]], dtype=DOUBLE)
    coupled = get_deq(**EXACT, batch_dims=0)
    return coupled(lambda z: torch.tanh(links @ z @ w + x), torch.zeros(2, 3, dtype=DOUBLE))[0][-1]


CALLS = [tensor_state, tuple_state, dict_state, through_args, computed_captures, nested, chained, whole_state]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_first_and_second_derivatives_of_a_call(call: Any, training: bool) -> None:
    deq = get_deq(**EXACT).train(training)
    inputs = rand(2, 3).mul(0.5).requires_grad_(), weight(3).requires_grad_()

    def run(x: Tensor, w: Tensor) -> Any:
        return call(deq, x, w)

    assert torch.autograd.gradcheck(run, inputs, atol=1e-7)
    if training or call in (tensor_state, nested):
        assert torch.autograd.gradgradcheck(run, inputs, atol=1e-6)


class Cell(nn.Module):
    """A map with parameters, a buffer, tied weights, and layers of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.register_buffer("shift", rand(3, seed=9) * 0.2)
        self.double()
        with torch.no_grad():
            self.first.weight.mul_(0.7)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        back = nn.functional.linear(torch.tanh(self.first(z)), self.first.weight.T)  # tied
        return torch.tanh(0.5 * self.norm(back + x) + 0.3 * self.second(torch.sin(self.first(z))) + self.shift)


def test_second_derivatives_in_a_modules_parameters_and_buffers() -> None:
    cell, deq = Cell(), get_deq(**EXACT)
    names = [name for name, _ in cell.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in cell.parameters()]
    x, shift = rand(2, 3).requires_grad_(), cell.shift.clone().requires_grad_()
    given = (x, shift, *values)

    def in_place_of_the_modules(x: Tensor, shift: Tensor, *values: Tensor) -> Tensor:
        table = {**dict(zip(names, values, strict=True)), "shift": shift}
        return deq(lambda z: functional_call(cell, table, (z, x)), torch.zeros(2, 3, dtype=DOUBLE))[0][-1]

    def unrolled(x: Tensor, shift: Tensor, *values: Tensor) -> Tensor:
        table = {**dict(zip(names, values, strict=True)), "shift": shift}
        z = torch.zeros(2, 3, dtype=DOUBLE)
        for _ in range(300):
            z = functional_call(cell, table, (z, x))
        return z

    cotangent, directions = rand(2, 3, seed=5), [rand(*t.shape, seed=20 + k) for k, t in enumerate(given)]

    def both(run: Any) -> list[Tensor]:
        first = pull(run(*given), given, cotangent, create_graph=True)
        second = pull(first, given, directions)
        return [*(g.detach() for g in first), *second]

    same(both(in_place_of_the_modules), both(unrolled))


def test_second_derivatives_in_a_modules_own_parameters() -> None:
    """The module is a closure of f, as programs write it; nothing is handed over."""
    cell, deq = Cell(), get_deq(**EXACT)
    x = rand(2, 3).requires_grad_()
    inputs = [x, *cell.parameters()]

    def penalty(z: Tensor) -> list[Tensor]:
        """A gradient penalty, as in WGAN-GP: the slope in x is part of the loss."""
        (slope,) = pull(z.square().sum(), x, create_graph=True)
        return list(pull(slope.square().sum() + z.sum(), inputs))

    z = torch.zeros(2, 3, dtype=DOUBLE)
    for _ in range(300):
        z = cell(z, x)
    expected = penalty(z)
    for given in ((lambda z: cell(z, x), ()), (cell, (x,))):
        same(penalty(deq(given[0], torch.zeros(2, 3, dtype=DOUBLE), args=given[1])[0][-1]), expected)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_second_derivatives_through_a_norm(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    deqcore.apply_norm(layer, name)
    layer.eval()  # the spectral norm's vectors stay
    x, deq = rand(2, 3).requires_grad_(), get_deq(**EXACT)
    inputs = [x, *layer.parameters()]

    def penalty(z: Tensor) -> list[Tensor]:
        (slope,) = pull(z.square().sum(), x, create_graph=True)
        return list(pull(slope.square().sum(), inputs))

    z = torch.zeros(2, 3, dtype=DOUBLE)
    w = layer.weight
    for _ in range(600):
        z = torch.tanh(0.7 * nn.functional.linear(z, w, layer.bias) + x)
    found = penalty(deq(lambda z: torch.tanh(0.7 * layer(z) + x), torch.zeros(2, 3, dtype=DOUBLE))[0][-1])
    same(found, penalty(z))


# ---- scalars: closed forms, three orders and more


def derivatives_of_tanh(x: float, count: int) -> list[float]:
    """Of z = tanh(.5 z + x) in x: dz/dx is 2 (1 - z^2) / (1 + z^2), and d/dx is d/dz times that."""
    z = 0.0
    for _ in range(400):
        z = math.tanh(0.5 * z + x)
    at = torch.tensor(z, dtype=DOUBLE, requires_grad=True)
    slope = 2 * (1 - at**2) / (1 + at**2)
    found, term = [z], slope
    for _ in range(count):
        found.append(term.item())
        (term,) = pull(term, at, create_graph=True)
        term = term * slope
    return found


def scalar(x: Tensor, **options: Any) -> Tensor:
    settings = {**EXACT, **options}
    return deqcore.fixed_point(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros((), dtype=DOUBLE), (x,), **settings)


def scalar_call(x: Tensor) -> Tensor:
    return get_deq(**EXACT)(lambda z: torch.tanh(0.5 * z + x), torch.zeros((), dtype=DOUBLE))[0][-1]


def test_the_second_derivative_that_torchdeq_gets_wrong() -> None:
    assert derivatives_of_tanh(0.3, 2)[2] == pytest.approx(-3.06756, abs=1e-5)
    x = torch.tensor(0.3, dtype=DOUBLE)
    assert float(grad(grad(scalar))(x)) == pytest.approx(-3.06756, abs=1e-5)


@pytest.mark.parametrize("run", [scalar, scalar_call])
def test_five_orders_by_backward_of_backward(run: Any) -> None:
    x = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    value, found = run(x), []
    for order in range(6):
        found.append(value.item())
        if order < 5:
            (value,) = pull(value, x, create_graph=True)
    assert found == pytest.approx(derivatives_of_tanh(0.3, 5), rel=1e-8)


def along(f: Any) -> Any:
    return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]


def back(f: Any) -> Any:
    return lambda x: vjp(f, x)[1](torch.ones_like(x))[0]


COMPOSITIONS = {
    "grad": (grad, 1),
    "jvp": (along, 1),
    "vjp": (back, 1),
    "jacfwd": (jacfwd, 1),
    "jacrev": (jacrev, 1),
    "hessian": (hessian, 2),
    "grad of grad": (lambda f: grad(grad(f)), 2),
    "jvp of grad": (lambda f: along(grad(f)), 2),
    "grad of jvp": (lambda f: grad(along(f)), 2),
    "jacrev of jacfwd": (lambda f: jacrev(jacfwd(f)), 2),
    "jacrev of vjp": (lambda f: jacrev(back(f)), 2),
    "grad of hessian": (lambda f: grad(hessian(f)), 3),
    "jvp of grad of grad": (lambda f: along(grad(grad(f))), 3),
    "grad of jvp of grad": (lambda f: grad(along(grad(f))), 3),
    "jacrev of jacrev of jacfwd": (lambda f: jacrev(jacrev(jacfwd(f))), 3),
    "four grads": (lambda f: grad(grad(grad(grad(f)))), 4),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_of_transforms_on_a_scalar(name: str) -> None:
    transform, order = COMPOSITIONS[name]
    found = transform(scalar)(torch.tensor(0.3, dtype=DOUBLE))
    assert found.item() == pytest.approx(derivatives_of_tanh(0.3, order)[order], rel=1e-8)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_below_and_above_a_vmap(name: str) -> None:
    transform, order = COMPOSITIONS[name]
    xs = torch.tensor([0.3, -0.7, 1.1], dtype=DOUBLE)
    expected = torch.tensor([derivatives_of_tanh(x, order)[order] for x in xs.tolist()], dtype=DOUBLE)
    same(vmap(transform(scalar))(xs), expected)
    if order == 1 and name in ("grad", "jvp", "vjp"):
        same(transform(lambda xs: vmap(scalar)(xs).sum() if name == "grad" else vmap(scalar)(xs))(xs), expected)
    if name in ("grad of grad", "hessian"):
        second = hessian(lambda xs: vmap(scalar)(xs).sum())(xs)
        same(second, torch.diag(expected))


# ---- transforms on matrices, against the same transforms of the unrolled loop


def loss(z: Tensor) -> Tensor:
    return (z.sin() * torch.arange(1.0, z.numel() + 1, dtype=DOUBLE).view(z.shape)).sum()


TRANSFORMS = {
    "grad in both": lambda f: lambda x, w: grad(lambda x, w: loss(f(x, w)), (0, 1))(x, w),
    "jvp in both": lambda f: lambda x, w: jvp(f, (x, w), (x.cos(), w.sin())),
    "jvp in one": lambda f: lambda x, w: jvp(lambda w: f(x, w), (w,), (w.sin(),)),
    "vjp": lambda f: lambda x, w: vjp(f, x, w)[1](x.cos()),
    "jacrev": lambda f: lambda x, w: jacrev(f, (0, 1))(x, w),
    "jacrev in chunks": lambda f: lambda x, w: jacrev(f, (0, 1), chunk_size=2)(x, w),
    "jacfwd": lambda f: lambda x, w: jacfwd(f, (0, 1))(x, w),
    "hessian": lambda f: lambda x, w: hessian(lambda x, w: loss(f(x, w)), (0, 1))(x, w),
    "jacrev of jacrev": lambda f: lambda x, w: jacrev(jacrev(lambda w: loss(f(x, w))))(w),
    "jacrev of jacfwd": lambda f: lambda x, w: jacrev(jacfwd(lambda x: f(x, w)))(x),
    "hessian times a vector": lambda f: lambda x, w: jvp(grad(lambda w: loss(f(x, w))), (w,), (w.sin(),)),
    "vmap over one": lambda f: lambda x, w: vmap(f, in_dims=(0, None))(torch.stack([x, -x, 2 * x]), w),
    "vmap over the other": lambda f: lambda x, w: vmap(f, in_dims=(None, 2))(x, torch.stack([w, -w], 2)),
    "vmap of vmap": lambda f: (
        lambda x, w: vmap(lambda w: vmap(lambda x: f(x, w))(torch.stack([x, -x])))(torch.stack([w, w.T, -w]))
    ),
    "vmap with an axis out": lambda f: lambda x, w: vmap(f, in_dims=(None, 0), out_dims=1)(x, torch.stack([w, -w])),
    "gradients by sample": lambda f: lambda x, w: vmap(grad(lambda w, x: loss(f(x[None], w))), in_dims=(None, 0))(w, x),
    "hessians by sample": lambda f: lambda x, w: vmap(hessian(lambda x: loss(f(x[None], w))))(x),
    "grad of vmap": lambda f: (
        lambda x, w: grad(lambda w: loss(vmap(f, in_dims=(0, None))(torch.stack([x, x.sin()]), w)))(w)
    ),
    "jvp of vmap": lambda f: (
        lambda x, w: jvp(lambda w: vmap(f, in_dims=(0, None))(torch.stack([x, x.sin()]), w), (w,), (w.cos(),))
    ),
    "jacobian of autograd.functional": lambda f: lambda x, w: torch.autograd.functional.jacobian(f, (x, w)),
    "hessian of autograd.functional": lambda f: (
        lambda x, w: torch.autograd.functional.hessian(lambda x, w: loss(f(x, w)), (x, w))
    ),
    "vhp": lambda f: lambda x, w: torch.autograd.functional.vhp(lambda w: loss(f(x, w)), w, w.sin()),
    "hvp": lambda f: lambda x, w: torch.autograd.functional.hvp(lambda w: loss(f(x, w)), w, w.sin()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_those_of_the_unrolled_loop(name: str) -> None:
    x, w = 0.5 * rand(2, 3), weight(3)
    same(TRANSFORMS[name](solve)(x, w), TRANSFORMS[name](unroll)(x, w))


def test_transforms_of_structured_states_and_arguments() -> None:
    params = {"w": weight(3), "more": [0.3 * rand(3, seed=4), 0.2 * rand(2, 3, seed=5)], "flag": 2.0}

    def fn(z: dict[str, Tensor], params: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        joint = torch.tanh(torch.cat([z["h"], z["c"]], -1) @ params["w"] + x + params["more"][0] * params["flag"])
        return {"h": joint[..., :2] + 0.2 * params["more"][1][..., :2], "c": joint[..., 2:]}

    def implicit(tensors: Any, x: Tensor) -> Any:
        z0 = {"h": torch.zeros(2, 2, dtype=DOUBLE), "c": torch.zeros(2, 1, dtype=DOUBLE)}
        return deqcore.fixed_point(fn, z0, ({**tensors, "flag": 2.0}, x), **EXACT)

    def unrolled(tensors: Any, x: Tensor) -> Any:
        z = {"h": torch.zeros(2, 2, dtype=DOUBLE), "c": torch.zeros(2, 1, dtype=DOUBLE)}
        for _ in range(STEPS):
            z = fn(z, {**tensors, "flag": 2.0}, x)
        return z

    tensors, x = {key: params[key] for key in ("w", "more")}, rand(2, 3)
    for transform in (jacrev, jacfwd):
        same(transform(implicit)(tensors, x), transform(unrolled)(tensors, x))
    xs = torch.stack([x, -x])
    same(vmap(implicit, in_dims=(None, 0))(tensors, xs), vmap(unrolled, in_dims=(None, 0))(tensors, xs))
    total = [
        grad(lambda t, f=f: f(t, x)["h"].square().sum() + f(t, x)["c"].sum())(tensors) for f in (implicit, unrolled)
    ]
    same(total[0], total[1])


def test_a_module_as_the_map_of_fixed_point() -> None:
    cell = Cell()
    params = {**dict(cell.named_parameters()), **dict(cell.named_buffers())}
    params = {name: value.detach() for name, value in params.items()}
    xs = rand(3, 2, 3)

    def fn(z: Tensor, params: Any, x: Tensor) -> Tensor:
        return functional_call(cell, params, (z, x))

    def implicit(params: Any, x: Tensor) -> Tensor:
        return deqcore.fixed_point(fn, torch.zeros(2, 3, dtype=DOUBLE), (params, x), **EXACT).square().sum()

    def unrolled(params: Any, x: Tensor) -> Tensor:
        z = torch.zeros(2, 3, dtype=DOUBLE)
        for _ in range(200):
            z = fn(z, params, x)
        return z.square().sum()

    same(vmap(grad(implicit), in_dims=(None, 0))(params, xs), vmap(grad(unrolled), in_dims=(None, 0))(params, xs))


def test_states_that_no_transform_follows_in_each_gradient_solver() -> None:
    """The adjoint of a transform is solved by whatever solver is named."""
    x, w = 0.5 * rand(2, 3), weight(3)
    expected = hessian(lambda x: loss(unroll(x, w)))(x)
    for name in ("gmres", "bicgstab", "anderson", "broyden", "fixed_point_iter"):
        gradient = {"name": "implicit", "solver": {"name": name, "tol": 1e-12, "max_iter": 300}}

        def run(x: Tensor, gradient: Any = gradient) -> Tensor:
            options = {**EXACT, "gradient": gradient}
            return loss(deqcore.fixed_point(tanh_map, torch.zeros(2, 3, dtype=DOUBLE), (x, w), **options))

        same(hessian(run)(x), expected)


def test_a_nested_fixed_point() -> None:
    w = weight(3)

    def outer(solver: Any) -> Any:
        def fn(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
            return 0.5 * solver(lambda y, z, w: 0.5 * torch.tanh(y @ w + z), (z, w)) + 0.3 * x

        return lambda x, w: solver(fn, (x, w))

    def implicit(fn: Any, args: Any) -> Tensor:
        return deqcore.fixed_point(fn, torch.zeros(2, 3, dtype=DOUBLE), args, **EXACT)

    def unrolled(fn: Any, args: Any) -> Tensor:
        z = torch.zeros(2, 3, dtype=DOUBLE)
        for _ in range(45):
            z = fn(z, *args)
        return z

    x, found, expected = rand(2, 3), outer(implicit), outer(unrolled)
    for transform in (jacrev, jacfwd):
        same(transform(found, (0, 1))(x, w), transform(expected, (0, 1))(x, w))
    same(grad(lambda w: loss(found(x, w)))(w), grad(lambda w: loss(expected(x, w)))(w))
    same(hessian(lambda x: loss(found(x, w)))(x), hessian(lambda x: loss(expected(x, w)))(x))
    same(vmap(found, in_dims=(0, None))(torch.stack([x, -x]), w), torch.stack([expected(x, w), expected(-x, w)]))


def test_what_is_computed_before_and_behind_the_equilibrium() -> None:
    x, w = 0.5 * rand(2, 3), weight(3)

    def around(f: Any) -> Any:
        return lambda x: loss(f(f((x @ w).tanh() + x, w).exp() - 1, 0.5 * w + x.mean() * 0.1))

    same(hessian(around(solve))(x), hessian(around(unroll))(x))
    same(grad(around(solve))(x), grad(around(unroll))(x))


def test_the_derivative_in_an_argument_that_f_ignores() -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        return deqcore.fixed_point(lambda z, x, y: 0.5 * z + x, torch.zeros(2, dtype=DOUBLE), (x, y), **EXACT)

    x, y = rand(2), rand(2, seed=1)
    assert not jacrev(run, 1)(x, y).any() and not jacfwd(run, 1)(x, y).any()
    same(jacfwd(run)(x, y), 2 * torch.eye(2, dtype=DOUBLE))
    same(vmap(run, in_dims=(None, 0))(x, torch.stack([y, y])), (2 * x).expand(2, 2))


def test_integer_and_boolean_arguments() -> None:
    index, mask = torch.tensor([2, 0, 1]), torch.tensor([True, False, True])

    def fn(z: Tensor, x: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, 0.5 * z[..., index].cos(), 0.2 * z) + x

    def run(x: Tensor) -> Tensor:
        return deqcore.fixed_point(fn, torch.zeros(2, 3, dtype=DOUBLE), (x, index, mask), **EXACT)

    def unrolled(x: Tensor) -> Tensor:
        z = torch.zeros(2, 3, dtype=DOUBLE)
        for _ in range(100):
            z = fn(z, x, index, mask)
        return z

    x = rand(2, 3)
    for transform in (jacrev, jacfwd, lambda f: hessian(lambda x: loss(f(x)))):
        same(transform(run)(x), transform(unrolled)(x))
    masks = torch.stack([mask, ~mask])
    found = vmap(lambda m: deqcore.fixed_point(fn, torch.zeros(2, 3, dtype=DOUBLE), (x, index, m), **EXACT))(masks)
    assert found.shape == (2, 2, 3)
    same(found[0], unrolled(x))


def test_info_under_vmap_has_a_row_for_every_state() -> None:
    infos: list[Any] = []
    w = weight(3)

    def run(x: Tensor) -> Tensor:
        z, info = deqcore.fixed_point(tanh_map, torch.zeros(2, 3, dtype=DOUBLE), (x, w), return_info=True, **EXACT)
        infos.append(info)
        return z

    vmap(run)(rand(4, 2, 3))
    assert infos[0]["abs_lowest"].shape == (8,) and bool(infos[0].converged.all())


# ---- forward mode by autograd


def dual(f: Any, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        made = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        value, tangent = forward_ad.unpack_dual(f(*made))
        assert tangent is not None
        return value.clone(), tangent.clone()


def test_dual_numbers() -> None:
    x, w = 0.5 * rand(2, 3), weight(3)
    given = (x, w), (x.cos(), w.sin())
    same(dual(solve, *given), dual(unroll, *given))
    same(dual(lambda x: solve(x, w), (x,), (x.cos(),)), dual(lambda x: unroll(x, w), (x,), (x.cos(),)))
    with torch.no_grad():
        same(dual(solve, *given), dual(unroll, *given))


def test_dual_numbers_and_reverse_mode() -> None:
    x, w = (0.5 * rand(2, 3)).requires_grad_(), weight(3).requires_grad_()

    def product(f: Any) -> tuple[Tensor, ...]:
        with forward_ad.dual_level():
            value = loss(f(forward_ad.make_dual(x, x.detach().cos()), w))
            tangent = forward_ad.unpack_dual(value).tangent
            return pull(tangent, (x, w))

    same(product(solve), product(unroll))
    assert torch.autograd.gradcheck(solve, (x, w), check_forward_ad=True, atol=1e-7)
    assert torch.autograd.gradgradcheck(solve, (x, w), check_fwd_over_rev=True, atol=1e-6)


def test_batched_gradients_by_gradcheck() -> None:
    """vmap over a vjp, which is not the older batching of is_grads_batched."""
    x, w = 0.5 * rand(2, 3), weight(3)
    back, expected = (vjp(fn, x, w)[1] for fn in (solve, unroll))
    cotangents = rand(5, 2, 3, seed=3)
    same(vmap(back)(cotangents), vmap(expected)(cotangents))


# ---- what can't be done is refused, by an error that says what can


def refused(text: str) -> Any:
    return pytest.raises(GradientModeError, match=text)


def call_of_a_deq(x: Tensor) -> Tensor:
    return get_deq(**EXACT)(lambda z: torch.tanh(0.5 * z + x), torch.zeros(x.shape, dtype=DOUBLE))[0][-1]


POINT = torch.tensor([0.3, -0.2], dtype=DOUBLE)


def vector(x: Tensor, **options: Any) -> Tensor:
    settings = {**EXACT, **options}
    return deqcore.fixed_point(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros(2, dtype=DOUBLE), (x,), **settings)


@pytest.mark.parametrize(
    "twice",
    [
        lambda f: jacfwd(jacfwd(f)),
        lambda f: lambda x: along(along(f))(x),
        lambda f: jacfwd(lambda x: jacrev(jacfwd(f))(x)),
        lambda f: lambda x: along(lambda y: grad(lambda s: along(f)(s).sum())(y))(x),
    ],
)
def test_forward_mode_of_forward_mode(twice: Any) -> None:
    """Silently wrong in torch, for any custom function."""
    with refused("Use forward over reverse"):
        twice(vector)(POINT)


def test_linearize_is_refused() -> None:
    """It traces with made-up values, which no stop test can look at."""
    with refused("jvp"):
        torch.func.linearize(vector, POINT)


def test_dual_numbers_in_a_forward_transform() -> None:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(POINT, torch.ones_like(POINT))
        with pytest.raises((GradientModeError, RuntimeError)):
            jvp(vector, (x,), (torch.ones_like(POINT),))


@pytest.mark.parametrize("run", [vector, call_of_a_deq])
def test_several_cotangents_at_once(run: Any) -> None:
    x = POINT.clone().requires_grad_()
    with refused(r"torch\.func\.jacrev"):
        pull(run(x), x, torch.eye(2, dtype=DOUBLE), is_grads_batched=True)
    with refused(r"torch\.func\.jacrev"):
        torch.autograd.functional.jacobian(run, x.detach(), vectorize=True)
    with refused(r"torch\.func\.jacrev|hessian"):
        torch.autograd.functional.hessian(lambda x: run(x).square().sum(), x.detach(), vectorize=True)


def test_the_same_in_forward_mode() -> None:
    """strategy="forward-mode" is a vmap of dual numbers; it must be right or refused."""
    for run in (vector, call_of_a_deq):
        try:
            found = torch.autograd.functional.jacobian(run, POINT, vectorize=True, strategy="forward-mode")
        except GradientModeError as error:
            assert "fixed_point" in str(error) or "torch.func" in str(error)
        else:
            same(found, jacrev(vector)(POINT))


@pytest.mark.parametrize("backend", ["implicit", "phantom"])
def test_captured_tensors_that_require_grad(backend: str) -> None:
    w = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    layer = nn.Linear(2, 2).double()
    captured = {
        "tensor": lambda z, x: torch.tanh(w * z + x),
        "module": lambda z, x: torch.tanh(0.3 * layer(z[None])[0] + x),
        "computed": lambda z, x, y=w * 2: torch.tanh(0.1 * y * z + x),
        "only beside z": lambda z, x: 0.5 * z + x * w,
    }
    for fn in captured.values():
        with refused("not in args"):
            deqcore.fixed_point(fn, torch.zeros(2, dtype=DOUBLE), (POINT,), **{**EXACT, "gradient": backend})
        with torch.no_grad():  # where nothing is differentiated, nothing is missed
            deqcore.fixed_point(fn, torch.zeros(2, dtype=DOUBLE), (POINT,), **{**EXACT, "gradient": backend})


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(lambda x: f(x).sum()),
        lambda f: lambda x: along(f)(x),
        lambda f: lambda x: vmap(f)(torch.stack([x, x])),
        jacrev,
        jacfwd,
        lambda f: hessian(lambda x: f(x).sum()),
    ],
)
def test_tensors_captured_from_a_transform(transform: Any) -> None:
    """x is not in args: fixed_point would take it for a constant, and the derivative would silently be zero."""

    def run(x: Tensor) -> Tensor:
        return deqcore.fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros(2, dtype=DOUBLE), **EXACT)

    with refused("not in args"):
        transform(run)(POINT)
    with refused("deqcore.fixed_point"):
        transform(call_of_a_deq)(POINT)


def test_a_capture_from_an_outer_transform_only() -> None:
    """The inner transform knows of x alone; y belongs to the outer one."""

    def run(y: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            z0 = torch.zeros(2, dtype=DOUBLE)
            return deqcore.fixed_point(lambda z, x: torch.tanh(0.5 * z + x * y), z0, (x,), **EXACT).sum()

        return grad(inner)(POINT).sum()

    for transform in (grad, jacrev, lambda f: lambda y: vmap(f)(torch.stack([y, y]))):
        with refused("not in args"):
            transform(run)(torch.tensor(0.7, dtype=DOUBLE))


def test_dual_numbers_in_a_deqs_call() -> None:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(POINT, torch.ones_like(POINT))
        for training in (True, False):
            for gradient in ("implicit", "phantom"):
                deq = get_deq(**{**EXACT, "gradient": gradient}).train(training)
                with refused("deqcore.fixed_point"):
                    deq(lambda z: torch.tanh(0.5 * z + x), torch.zeros(2, dtype=DOUBLE))
                with refused("deqcore.fixed_point"):
                    deq(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros(2, dtype=DOUBLE), args=(x,))


@pytest.mark.parametrize("gradient", ["phantom", {"name": "phantom", "steps": 3, "damping": 0.6}, "one_step"])
def test_backends_of_plain_steps_under_transforms(gradient: Any) -> None:
    """Right as what they are: steps of f at the equilibrium, a constant."""
    settings = {**EXACT, "gradient": gradient}
    x, w = 0.5 * rand(2, 3), weight(3)
    steps, damping = (3, 0.6) if isinstance(gradient, dict) else (1, 1.0)

    def implicit(x: Tensor, w: Tensor) -> Tensor:
        return deqcore.fixed_point(tanh_map, torch.zeros(2, 3, dtype=DOUBLE), (x, w), **settings)

    z_star = unroll(x, w)

    def by_hand(x: Tensor, w: Tensor) -> Tensor:
        z = z_star
        for _ in range(steps):
            z = torch.lerp(z, tanh_map(z, x, w), damping)
        return z

    same(implicit(x, w), z_star)
    for transform in (lambda f: jacrev(f, (0, 1)), lambda f: jacfwd(f, (0, 1)), lambda f: hessian(f, (0, 1))):
        same(transform(implicit)(x, w), transform(by_hand)(x, w))
    xs = torch.stack([x, -x])
    same(vmap(implicit, in_dims=(0, None))(xs, w), vmap(unroll, in_dims=(0, None))(xs, w))
    per_sample = vmap(grad(lambda w, x: loss(implicit(x, w))), in_dims=(None, 0))(w, torch.stack([x, x]))
    same(per_sample, grad(lambda w: loss(by_hand(x, w)))(w).expand(2, 3, 3))


@pytest.mark.parametrize("gradient", ["unrolled", "neumann", "shine"])
def test_other_backends_under_transforms_are_right_or_refused(gradient: str) -> None:
    solver = {"name": "broyden" if gradient == "shine" else "fixed_point_iter", "tol": 1e-12, "max_iter": 200}
    settings = {"solver": solver, "gradient": gradient}
    names = "implicit"
    for transform in (lambda f: grad(lambda x: f(x).sum()), jacfwd, lambda f: hessian(lambda x: f(x).sum())):
        with refused(names):
            transform(lambda x: vector(x, **settings))(POINT)


@pytest.mark.parametrize("gradient", ["neumann", "shine"])
def test_backends_of_the_first_order_refuse_the_second(gradient: str) -> None:
    solver = {"name": "broyden", "tol": 1e-12, "max_iter": 200}
    x = POINT.clone().requires_grad_()
    deq = get_deq(solver=solver, gradient=gradient, on_failure="ignore")
    z_out, _ = deq(lambda z: torch.tanh(0.5 * z + x), torch.zeros(2, dtype=DOUBLE))
    for value in (z_out[-1], vector(x, solver=solver, gradient=gradient)):
        with refused("implicit"):
            (first,) = pull(value.sum(), x, create_graph=True)
            pull(first.sum(), x)


@pytest.mark.parametrize("kind", ["function", "script"])
def test_a_capture_that_can_t_be_followed_is_refused_at_second_order(kind: str) -> None:
    """At first order it is right."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * z + 2 * x

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
            return 0.5 * cotangents[0], 2 * cotangents[0]

    x = POINT.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = Double.apply if kind == "function" else torch.jit.trace(lambda z, x: 0.5 * z + 2 * x, (POINT, POINT))
    z_out, _ = get_deq(**EXACT)(lambda z: torch.tanh(inner(z, x)), torch.zeros(2, dtype=DOUBLE))
    slope = 1 - z_out[-1].detach() ** 2
    (first,) = pull(z_out[-1].sum(), x, create_graph=True)
    same(first.detach(), 2 * slope / (1 - 0.5 * slope))
    try:
        (second,) = pull(first.sum(), x)
    except GradientModeError as error:
        assert "args" in str(error)
    else:
        z = torch.zeros(2, dtype=DOUBLE)
        for _ in range(200):
            z = torch.tanh(0.5 * z + 2 * x)
        (expected,) = pull(z.sum(), x, create_graph=True)
        same(second, pull(expected.sum(), x)[0])


# ---- closures that are easy to follow wrongly, at second order


def penalised(run: Any, inputs: list[Tensor]) -> list[Tensor]:
    first = pull(run().square().sum(), inputs, create_graph=True)
    return list(pull(sum(g.square().sum() for g in first), inputs, allow_unused=True))


class Holder:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def closures() -> dict[str, Any]:
    x, w = (0.5 * rand(2, 3)).requires_grad_(), weight(3).requires_grad_()
    holder = Holder(w)
    views = x.view(-1).view(2, 3), w.T.T
    rows = list(x.unbind())
    buffer = torch.zeros(2, 3, dtype=DOUBLE)

    def writes_into_a_buffer(z: Tensor) -> Tensor:
        out = torch.empty_like(buffer)
        out[0] = torch.tanh(z[0] @ w + x[0])
        out[1:] = torch.tanh(z[1:] @ w + x[1:])
        return out

    def in_place(z: Tensor) -> Tensor:
        y = z @ w
        y += x
        return y.tanh_()

    def keywords(z: Tensor) -> Tensor:
        return torch.tanh(torch.addmm(input=x, mat1=z, mat2=w))

    def checkpointed(z: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda z: torch.tanh(z @ w + x), z, use_reentrant=False)

    def with_no_grad_inside(z: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 / (1 + 0 * x.norm())
        return torch.tanh(z @ w + x) * scale

    def detached_inside(z: Tensor) -> Tensor:
        return torch.tanh(z @ w + x) + 0.1 * (x - x.detach())

    return {
        "attribute": (lambda z: torch.tanh(z @ holder.value + x), [x, w]),
        "views": (lambda z: torch.tanh(z @ views[1] + views[0]), [x, w]),
        "parts": (lambda z: torch.tanh(z @ w + torch.stack(rows)), [x, w]),
        "operators of the tensor": (lambda z: ((z @ w).__add__(x)).tanh(), [x, w]),
        "writes into a buffer": (writes_into_a_buffer, [x, w]),
        "in place": (in_place, [x, w]),
        "keywords": (keywords, [x, w]),
        "indexing": (lambda z: torch.tanh(z @ w[:, torch.tensor([0, 1, 2])] + x[torch.tensor([0, 1])]), [x, w]),
        "a mean of a capture": (lambda z: torch.tanh(z @ w * w.norm().sigmoid() + x - x.mean(0)), [x, w]),
        "checkpointed": (checkpointed, [x, w]),
        "no_grad inside": (with_no_grad_inside, [x, w]),
        "detached inside": (detached_inside, [x, w]),
        "einsum": (lambda z: torch.tanh(torch.einsum("bi,ij->bj", z, w) + x), [x, w]),
        "cat of captures": (lambda z: torch.tanh(torch.cat([z, x], 1) @ torch.cat([w, torch.eye(3).double()])), [x, w]),
        "where": (lambda z: torch.where(x > 0, torch.tanh(z @ w + x), 0.3 * torch.sin(z @ w) + x), [x, w]),
    }


@pytest.mark.parametrize("name", list(closures()))
def test_second_derivatives_of_closures(name: str) -> None:
    fn, inputs = closures()[name]

    def unrolled() -> Tensor:
        z = torch.zeros(2, 3, dtype=DOUBLE)
        for _ in range(STEPS):
            z = fn(z)
        return z

    same(
        penalised(lambda: get_deq(**EXACT)(fn, torch.zeros(2, 3, dtype=DOUBLE))[0][-1], inputs),
        penalised(unrolled, inputs),
    )


def test_a_closure_changed_between_forward_and_backward() -> None:
    """As an optimizer's step does: autograd says so, and so must this, or be right."""
    w, x = weight(3).requires_grad_(), rand(2, 3).requires_grad_()
    z_out, _ = get_deq(**EXACT)(lambda z: torch.tanh(z @ w + x), torch.zeros(2, 3, dtype=DOUBLE))
    with torch.no_grad():
        w.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pull(z_out[-1].sum(), [w, x])


def test_a_name_rebound_between_forward_and_a_second_derivative() -> None:
    """f is a closure: what it names may be another tensor by the time of the backward."""
    x = (0.5 * rand(2, 3)).requires_grad_()
    box = Holder(weight(3).requires_grad_())
    first_w = box.value
    z_out, _ = get_deq(**EXACT)(lambda z: torch.tanh(z @ box.value + x), torch.zeros(2, 3, dtype=DOUBLE))
    box.value = (0.1 * first_w).detach().requires_grad_()
    expected = penalised(lambda: unroll(x, first_w), [x, first_w])
    try:
        found = penalised(lambda: z_out[-1], [x, first_w])
    except GradientModeError:
        return
    same(found, expected)
