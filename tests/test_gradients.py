"""Gradients against unrolling, dense solves of (I - J)^T, closed forms and finite differences."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deqcore import ConfigError, ConvergenceError, ConvergenceWarning, GradientModeError, Solution, Status, get_deq

DOUBLE = torch.float64
#: Tolerances at which float64 gradients are exact to 1e-8 and better.
TIGHT = {"f_solver": "broyden", "f_tol": 1e-12, "f_max_iter": 200, "ift": True, "b_tol": 1e-12, "b_max_iter": 200}


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weight(size: int, rho: float = 0.8, seed: int = 1, dtype: torch.dtype = DOUBLE) -> Tensor:
    """A matrix whose singular values are all `rho`."""
    return torch.linalg.qr(rand(size, size, seed=seed))[0].to(dtype) * rho


# ---- independent truths


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def dense_gradients(fn: Any, z: Any, cotangent: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients by a dense solve of (I - J)^T u = cotangent at `z`, over the whole state at once."""
    leaves, spec = pytree.tree_flatten(pytree.tree_map(lambda t: t.detach(), z))

    def on_flat(x: Tensor) -> Tensor:
        parts = x.split([leaf.numel() for leaf in leaves])
        tree = pytree.tree_unflatten([p.view_as(t) for p, t in zip(parts, leaves, strict=True)], spec)
        return flat(fn(*tree) if isinstance(tree, tuple | list) else fn(tree))

    point = flat(leaves)
    jacobian = torch.autograd.functional.jacobian(on_flat, point)
    u = torch.linalg.solve((torch.eye(len(point), dtype=point.dtype) - jacobian).T, cotangent)
    return list(torch.autograd.grad(on_flat(point), inputs, u))


def unrolled_gradients(fn: Any, z0: Any, cotangent: Tensor, inputs: list[Tensor], steps: int = 400) -> list[Tensor]:
    z = z0
    for _ in range(steps):
        z = fn(*z) if isinstance(z, tuple | list) else fn(z)
    return list(torch.autograd.grad(flat(z), inputs, cotangent))


def close(found: list[Tensor], expected: list[Tensor], tol: float = 1e-8) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(a - b) <= tol * max(torch.linalg.vector_norm(b).item(), 1e-300), (a, b)


# ---- implicit = unrolled = dense


class Case(NamedTuple):
    fn: Any
    z0: Any
    inputs: list[Tensor]
    options: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Pair:
    a: Tensor
    b: Tensor


def closure() -> Case:
    w, x = weight(6).requires_grad_(), rand(4, 6).requires_grad_()
    return Case(lambda z: torch.tanh(z @ w + x), torch.zeros(4, 6, dtype=DOUBLE), [w, x])


def module() -> Case:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.6)
    return Case(net, torch.zeros(3, 5, dtype=DOUBLE), list(net.parameters()))


def tuple_state() -> Case:
    w, x = weight(5).requires_grad_(), rand(3, 2).requires_grad_()

    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.tanh(torch.cat([a, b.flatten(1)], 1) @ w)
        return joint[:, :3], joint[:, 3:].reshape(3, 2, 1) + 0.1 * x[..., None]

    return Case(fn, (torch.zeros(3, 3, dtype=DOUBLE), torch.zeros(3, 2, 1, dtype=DOUBLE)), [w, x])


def list_state() -> Case:
    case = tuple_state()
    return Case(lambda *z: list(case.fn(*z)), list(case.z0), case.inputs)


def dict_state() -> Case:
    w, x = weight(4).requires_grad_(), rand(3, 4).requires_grad_()

    def fn(z: dict[str, Any]) -> dict[str, Any]:
        joint = torch.tanh(torch.cat([z["h"], z["c"][0]], 1) @ w + x)
        return {"h": joint[:, :1], "c": [joint[:, 1:]]}

    return Case(fn, {"h": torch.zeros(3, 1, dtype=DOUBLE), "c": [torch.zeros(3, 3, dtype=DOUBLE)]}, [w, x])


def vector_state() -> Case:
    x = rand(7).requires_grad_()
    return Case(lambda z: 0.5 * torch.cos(z) + x, torch.zeros(7, dtype=DOUBLE), [x])


def scalar_state() -> Case:
    x = rand(1)[0].requires_grad_()
    return Case(lambda z: torch.tanh(0.5 * z + x), torch.zeros((), dtype=DOUBLE), [x])


def graph_whole() -> Case:
    return graph()._replace(options={"batch_dims": 0})


def graph() -> Case:
    """Rows depend on each other, as the nodes of a graph do."""
    links = (torch.rand(9, 9, generator=torch.Generator().manual_seed(3)) < 0.4).double()
    links = links / links.sum(1, keepdim=True).clamp_min(1)
    w, x = weight(4, 0.9).requires_grad_(), rand(9, 4).requires_grad_()
    return Case(lambda z: torch.tanh(links @ z @ w + x), torch.zeros(9, 4, dtype=DOUBLE), [w, x])


def not_contractive() -> Case:
    """|df/dz| is 1.5 everywhere: unrolling diverges, the equilibrium is x / 2.5."""
    x = rand(3, 4).requires_grad_()
    return Case(lambda z: x - 1.5 * z, torch.zeros(3, 4, dtype=DOUBLE), [x])


def half_of_it() -> Case:
    """f neither depends on all of z nor on all of its inputs."""
    x = rand(3, 4).requires_grad_()
    return Case(lambda z: torch.cat([0.5 * z[:, 2:], x[:, :2]], 1), torch.zeros(3, 4, dtype=DOUBLE), [x])


CASES = [closure, module, tuple_state, list_state, dict_state, vector_state, scalar_state, graph, graph_whole]
CASES += [not_contractive, half_of_it]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_implicit_is_the_dense_solve(case: Any, training: bool) -> None:
    fn, z0, inputs, options = case()
    options = {**TIGHT, **options}
    if case is graph:  # row by row, a quasi-Newton forward solve is for independent rows
        options |= {"f_solver": "fixed_point_iter", "f_max_iter": 1000}
    z_out, info = get_deq(**options).train(training)(fn, z0)
    assert info.converged.all()
    cotangent = rand(*flat(z_out[-1]).shape, seed=7)
    found = torch.autograd.grad(flat(z_out[-1]), inputs, cotangent)
    assert info["backward"].converged.all()
    close(list(found), dense_gradients(fn, pytree.tree_map(lambda t: t.detach(), z_out[-1]), cotangent, inputs))
    if case is not not_contractive:
        close(list(found), unrolled_gradients(fn, z0, cotangent, inputs))


@pytest.mark.parametrize("b_solver", ["fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"])
def test_every_solver_solves_the_adjoint(b_solver: str) -> None:
    fn, z0, inputs, _ = closure()
    z_out, info = get_deq(**{**TIGHT, "b_solver": b_solver, "b_max_iter": 400})(fn, z0)
    cotangent = rand(24, seed=7)
    found = torch.autograd.grad(flat(z_out[-1]), inputs, cotangent)
    close(list(found), dense_gradients(fn, z_out[-1], cotangent, inputs))
    assert info["backward"].converged.all()


def test_dataclass_state() -> None:
    w = weight(4).requires_grad_()

    def fn(z: Pair) -> Pair:
        joint = torch.tanh(torch.cat([z.a, z.b], 1) @ w + 0.3)
        return Pair(joint[:, :1], joint[:, 1:])

    zero = torch.zeros(3, 4, dtype=DOUBLE)
    z_out, _ = get_deq(**TIGHT)(fn, Pair(zero[:, :1], zero[:, 1:]))
    cotangent = rand(3, 4, seed=7)
    found = torch.autograd.grad(torch.cat([z_out[-1].a, z_out[-1].b], 1), [w], cotangent)
    z = torch.cat([z_out[-1].a, z_out[-1].b], 1)
    close(list(found), dense_gradients(lambda z: torch.tanh(z @ w + 0.3), z, cotangent.reshape(-1), [w]))


def test_complex_state_against_unrolling() -> None:
    a = torch.complex(rand(3, 4), rand(3, 4, seed=1)).requires_grad_()

    def fn(z: Tensor) -> Tensor:
        return 0.5j * z + 0.1 * z * z.conj() / (1 + z.abs() ** 2) + a

    z0 = torch.zeros(3, 4, dtype=torch.complex128)
    z_out, _ = get_deq(**TIGHT)(fn, z0)
    (found,) = torch.autograd.grad((z_out[-1].abs() ** 2).sum() + z_out[-1].real.sum(), a)
    z = z0
    for _ in range(200):
        z = fn(z)
    (expected,) = torch.autograd.grad((z.abs() ** 2).sum() + z.real.sum(), a)
    assert torch.allclose(found, expected, atol=1e-9)


def test_args_take_gradients() -> None:
    w, x = weight(6).requires_grad_(), rand(4, 6).requires_grad_()
    z_out, _ = get_deq(**TIGHT)(lambda z, w, x: torch.tanh(z @ w + x), torch.zeros(4, 6, dtype=DOUBLE), args=(w, x))
    cotangent = rand(24, seed=7)
    found = torch.autograd.grad(flat(z_out[-1]), [w, x], cotangent)
    close(list(found), dense_gradients(lambda z: torch.tanh(z @ w + x), z_out[-1], cotangent, [w, x]))


def test_finite_differences() -> None:
    w = weight(3)
    deq = get_deq(**TIGHT)

    def solve(x: Tensor, w: Tensor) -> Tensor:
        return deq(lambda z: torch.tanh(z @ w + x), torch.zeros(2, 3, dtype=DOUBLE))[0][-1]

    assert torch.autograd.gradcheck(solve, (rand(2, 3).requires_grad_(), w.requires_grad_()), atol=1e-6)


def test_any_autograd_function_inside_f() -> None:
    class Cubed(torch.autograd.Function):
        """Differentiable once, by hand."""

        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return z**3

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
            (z,) = ctx.saved_tensors
            return 3 * z**2 * cotangents[0]

    x = (0.1 * rand(3, 2)).requires_grad_()
    z_out, _ = get_deq(**TIGHT)(lambda z: Cubed.apply(z) + x, torch.zeros(3, 2, dtype=DOUBLE))
    (found,) = torch.autograd.grad(z_out[-1].sum(), x)
    close([found], [1 / (1 - 3 * z_out[-1].detach() ** 2)])


# ---- phantom


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson"])
@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (3, 1.0), (4, 0.6)])
def test_phantom_is_its_steps_differentiated(steps: int, damping: float, solver: str) -> None:
    fn, z0, inputs, _ = closure()
    deq = get_deq(f_solver=solver, grad=steps, tau=damping, f_max_iter=15, f_tol=0)
    z_out, info = deq(fn, z0)
    z = info["z"]
    for _ in range(steps):
        z = damping * fn(z) + (1 - damping) * z
    cotangent = rand(*z.shape, seed=7)
    assert torch.allclose(z_out[-1], z, rtol=0, atol=1e-14)
    close(
        list(torch.autograd.grad(z_out[-1], inputs, cotangent)),
        list(torch.autograd.grad(z, inputs, cotangent)),
        tol=1e-12,
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sup_gap": 2}, [2, 4, 5]),
        ({"sup_gap": 5}, [5]),
        ({"sup_gap": 9}, [5]),
        ({"sup_loc": [1, 3]}, [1, 3, 5]),
        ({"sup_loc": [3, 5]}, [3, 5]),
        ({"sup_loc": [7]}, [5]),
    ],
)
def test_phantom_returns_the_states_asked_for_and_the_last(options: dict[str, Any], expected: list[int]) -> None:
    fn, z0, inputs, _ = closure()
    z_out, info = get_deq(grad=5, tau=0.7, f_max_iter=4, f_tol=0, **options)(fn, z0)
    states = [info["z"]]
    for _ in range(5):
        states.append(0.7 * fn(states[-1]) + 0.3 * states[-1])
    assert len(z_out) == len(expected)
    for found, k in zip(z_out, expected, strict=True):
        assert torch.allclose(found, states[k], rtol=0, atol=1e-14)
        close(
            list(torch.autograd.grad(found.sum(), inputs, retain_graph=True)),
            list(torch.autograd.grad(states[k].sum(), inputs, retain_graph=True)),
            tol=1e-12,
        )


def test_phantom_can_be_differentiated_again() -> None:
    fn, z0, (_, x), _ = closure()
    z_out, info = get_deq(grad=3, f_tol=1e-8, f_max_iter=200)(fn, z0)

    def second(z: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    z = info["z"]
    for _ in range(3):
        z = fn(z)
    close([second(z_out[-1])], [second(z)], tol=1e-10)


# ---- what is returned


@pytest.mark.parametrize("ift", [True, False])
@pytest.mark.parametrize("max_iter", [1, 3, 200])
def test_eval_returns_the_state_itself_with_a_gradient(ift: bool, max_iter: int) -> None:
    fn, z0, inputs, _ = closure()
    deq = get_deq(f_max_iter=max_iter, f_tol=1e-10, ift=ift, on_failure="ignore").eval()
    z_out, info = deq(fn, z0)
    assert len(z_out) == 1
    assert torch.equal(z_out[0].detach(), info["z"])
    reference = info["z"]
    cotangent = rand(*reference.shape, seed=7)
    found = list(torch.autograd.grad(z_out[0], inputs, cotangent))
    if ift:
        close(found, dense_gradients(fn, reference, cotangent.reshape(-1), inputs), tol=1e-5)
    else:
        close(found, list(torch.autograd.grad(fn(reference), inputs, cotangent)), tol=1e-12)


def test_eval_value_survives_a_backend_that_overflows() -> None:
    """The value is the state found, whatever f gives in the step that is differentiated."""
    x = torch.full((2, 3), 0.5, dtype=DOUBLE, requires_grad=True)
    deq = get_deq(f_max_iter=2, f_tol=0, on_failure="ignore").eval()
    z_out, info = deq(lambda z: 1e20 * (z + x), torch.zeros(2, 3, dtype=DOUBLE))
    assert torch.equal(z_out[0].detach(), info["z"])


def test_implicit_in_training_returns_the_state_unmoved() -> None:
    fn, z0, _, _ = closure()
    z_out, info = get_deq(ift=True, f_max_iter=3, on_failure="ignore")(fn, z0)
    assert torch.equal(z_out[-1].detach(), info["z"])


def test_changing_the_result_in_place_leaves_the_gradient_right() -> None:
    fn, z0, inputs, _ = closure()
    z_out, _ = get_deq(**TIGHT)(fn, z0)
    z, cotangent = z_out[-1].detach().clone(), rand(24, seed=7)
    changed = z_out[-1].mul_(3)
    found = torch.autograd.grad(changed, inputs, cotangent.view(4, 6))
    close(list(found), dense_gradients(fn, z, 3 * cotangent, inputs))


def test_float16_and_bfloat16_states_keep_their_dtype_and_get_a_gradient() -> None:
    for dtype, tol in ((torch.float16, 2e-2), (torch.bfloat16, 8e-2)):
        w, x = weight(6, 0.5, dtype=dtype), rand(4, 6).to(dtype).requires_grad_()
        z_out, info = get_deq(ift=True, f_tol=1e-3)(
            lambda z, w=w, x=x: torch.tanh(z @ w + x), torch.zeros(4, 6, dtype=dtype)
        )
        assert z_out[-1].dtype == dtype
        assert not info.failed()
        (found,) = torch.autograd.grad(z_out[-1].float().sum(), x)
        assert found.dtype == dtype
        wide = x.detach().double().requires_grad_()
        (expected,) = dense_gradients(
            lambda z, w=w, x=wide: torch.tanh(z @ w.double() + x),
            z_out[-1].double(),
            torch.ones(24, dtype=DOUBLE),
            [wide],
        )
        close([found.double()], [expected], tol=tol)


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_autocast_changes_f_and_not_the_solvers(solver: str) -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(32, 32))
    layer.weight  # noqa: B018
    x = torch.randn(8, 32)

    def run(enabled: bool) -> Tensor:
        layer.zero_grad()
        deq = get_deq(ift=True, f_solver=solver, b_solver=solver, f_tol=1e-2, b_max_iter=100)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            w = layer.weight * 0.9
            z_out, info = deq(lambda z: torch.tanh(nn.functional.linear(z, w) + x), torch.zeros(8, 32))
            assert not info.failed()
        z_out[-1].square().sum().backward()
        assert not info["backward"].failed()
        assert z_out[-1].dtype == torch.float32
        return layer.bias.grad if layer.bias.grad is not None else layer.parametrizations.weight.original.grad.clone()

    expected, found = run(False), run(True)
    assert torch.linalg.vector_norm(found - expected) < 0.05 * torch.linalg.vector_norm(expected)


# ---- the loss's scale


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("b_solver", ["broyden", "fixed_point_iter"])
def test_gradients_do_not_depend_on_the_losss_scale(dtype: torch.dtype, b_solver: str) -> None:
    w, x = weight(6, 0.9, dtype=dtype), rand(4, 6).to(dtype).requires_grad_()
    deq = get_deq(ift=True, f_tol=1e-6, f_max_iter=300, b_solver=b_solver, b_max_iter=300)

    def gradient(scale: float) -> Tensor:
        z_out, _ = deq(lambda z: torch.tanh(z @ w + x), torch.zeros(4, 6, dtype=dtype))
        return torch.autograd.grad(scale * z_out[-1].sum(), x)[0].double() / scale

    reference = gradient(1.0)
    for scale in (1e-4, 1e-7, 1e-30, 1e30):
        close([gradient(scale)], [reference], tol=1e-6)


@pytest.mark.parametrize("b_solver", ["broyden", "fixed_point_iter", "anderson"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_samples_of_very_different_cotangents_are_all_exact(dtype: torch.dtype, b_solver: str) -> None:
    """The sample that converges slowest has the smallest cotangent, or none."""
    rho = torch.tensor([0.1, 0.1, 0.5, 0.95], dtype=dtype)[:, None]
    w, x = weight(6, 1.0, dtype=dtype), rand(4, 6).to(dtype).requires_grad_()
    deq = get_deq(ift=True, f_solver="broyden", f_tol=1e-6, f_max_iter=100, b_solver=b_solver, b_max_iter=400)
    exact = torch.stack(
        [
            torch.linalg.solve(torch.eye(6, dtype=DOUBLE) - r * w.double(), torch.ones(6, dtype=DOUBLE))
            for r in rho[:, 0]
        ]
    )
    for last in (1e-12, 1e-16, 0.0):
        size = torch.tensor([1.0, 1e-3, 1e-8, last], dtype=dtype)[:, None]
        z_out, info = deq(lambda z: rho * (z @ w) + x, torch.zeros(4, 6, dtype=dtype))
        (found,) = torch.autograd.grad((size * z_out[-1]).sum(), x)
        assert not info["backward"].failed()
        error = torch.linalg.vector_norm(found.double() - size.double() * exact, dim=1)
        assert (error <= 3e-5 * torch.linalg.vector_norm(size.double() * exact, dim=1)).all(), error


def test_a_zero_cotangent_gives_zero_gradients() -> None:
    fn, z0, inputs, _ = closure()
    z_out, _ = get_deq(**TIGHT)(fn, z0)
    for gradient in torch.autograd.grad(0.0 * z_out[-1].sum(), inputs):
        assert not gradient.any()


def test_a_cotangent_that_is_not_finite_is_handed_on() -> None:
    """A gradient scaler looks for inf in the gradients, and skips the step."""
    fn, z0, inputs, _ = closure()
    z_out, _ = get_deq(**TIGHT)(fn, z0)
    found = torch.autograd.grad(z_out[-1].sum() * float("inf"), inputs)
    assert not torch.isfinite(found[0]).all()


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("b_solver", [None, "fixed_point_iter", "anderson", "broyden"])
@pytest.mark.parametrize("every", [True, False])
def test_rows_that_depend_on_each_other(batch_dims: int, b_solver: str | None, every: bool) -> None:
    """Also where most rows have no cotangent of their own; nobody has to say that f couples rows."""
    size = 12
    links = torch.diag(torch.full((size - 1,), 0.5, dtype=DOUBLE), 1)
    links = links + links.T
    w, x = weight(4, 0.9), rand(size, 4).requires_grad_()

    def fn(z: Tensor) -> Tensor:
        return torch.tanh(links @ z @ w + x)

    given = {} if b_solver is None else {"b_solver": b_solver}
    deq = get_deq(ift=True, f_tol=1e-9, f_max_iter=2000, b_max_iter=300, batch_dims=batch_dims, **given)
    for _ in range(2):  # what the first backward learns must not spoil the second
        z_out, info = deq(fn, torch.zeros(size, 4, dtype=DOUBLE))
        cotangent = torch.zeros(size, 4, dtype=DOUBLE)
        cotangent[slice(None) if every else 3] = 1
        (found,) = torch.autograd.grad(z_out[-1], x, cotangent)
        assert not info["backward"].failed()
        assert info["backward"]["status"].shape == info["status"].shape
        close([found], dense_gradients(fn, z_out[-1], cotangent.reshape(-1), [x]), tol=2e-5)


# ---- graphs


def test_backward_twice_with_retain_graph() -> None:
    fn, z0, inputs, _ = closure()
    z_out, info = get_deq(**TIGHT)(fn, z0)
    loss = z_out[-1].square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    one = info["backward"]
    second = torch.autograd.grad(loss, inputs)
    assert info["backward"] is not one
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_two_calls_of_one_deq_side_by_side() -> None:
    fn, z0, inputs, _ = closure()
    deq = get_deq(**TIGHT)
    (one, *_), info_one = deq(fn, z0)
    (two, *_), info_two = deq(lambda z: 0.5 * fn(z), z0)
    found = list(torch.autograd.grad(one.sum() + two.square().sum(), inputs))
    ones = torch.ones(24, dtype=DOUBLE)
    left = dense_gradients(fn, one, ones, inputs)
    right = dense_gradients(lambda z: 0.5 * fn(z), two, 2 * two.detach().reshape(-1), inputs)
    close(found, [a + b for a, b in zip(left, right, strict=True)])
    assert info_one["backward"] is not info_two["backward"]


@pytest.mark.parametrize("hook_ift", [True, False])
def test_two_calls_of_one_deq_in_a_chain(hook_ift: bool) -> None:
    w, x = weight(6).requires_grad_(), rand(4, 6).requires_grad_()
    deq = get_deq(**{**TIGHT, "ift": not hook_ift, "hook_ift": hook_ift})
    z0 = torch.zeros(4, 6, dtype=DOUBLE)

    def layer(u: Tensor) -> Tensor:
        return deq(lambda z: torch.tanh(z @ w + u), z0)[0][-1]

    def unrolled(u: Tensor) -> Tensor:
        z = z0
        for _ in range(300):
            z = torch.tanh(z @ w + u)
        return z

    found = torch.autograd.grad(layer(layer(x)).square().sum(), [w, x])
    close(list(found), list(torch.autograd.grad(unrolled(unrolled(x)).square().sum(), [w, x])))


def test_a_deq_inside_a_deqs_f() -> None:
    w, x = weight(3, 0.5).requires_grad_(), rand(2, 3).requires_grad_()
    outer, inner = get_deq(**TIGHT), get_deq(**TIGHT)
    z0 = torch.zeros(2, 3, dtype=DOUBLE)

    def fn(z: Tensor) -> Tensor:
        (y,), _ = inner(lambda y: 0.5 * torch.tanh(y @ w + z), z0)
        return 0.5 * y + x

    def unrolled(z: Tensor) -> Tensor:
        y = z0
        for _ in range(80):
            y = 0.5 * torch.tanh(y @ w + z)
        return 0.5 * y + x

    z_out, info = outer(fn, z0)
    found = torch.autograd.grad(z_out[-1].square().sum(), [w, x])
    assert not info["backward"].failed()
    close(list(found), dense_gradients(unrolled, z_out[-1], 2 * z_out[-1].detach().reshape(-1), [w, x]))


def test_a_derivative_that_nobody_can_follow_is_refused_not_wrong() -> None:
    class Double(torch.autograd.Function):  # called straight with a tensor from outside of f
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
            return 2 * cotangents[0]

    x = torch.tensor([0.3], dtype=DOUBLE, requires_grad=True)
    z_out, _ = get_deq(**TIGHT)(lambda z: torch.tanh(0.5 * z + 0.5 * Double.apply(x)), torch.zeros(1, dtype=DOUBLE))
    (first,) = torch.autograd.grad(z_out[-1].sum(), x, create_graph=True)
    slope = 1 - z_out[-1].detach() ** 2
    close([first.detach()], [slope / (1 - 0.5 * slope)])
    with pytest.raises(GradientModeError, match=r"custom autograd\.Function"):
        torch.autograd.grad(first.sum(), x)


def test_second_derivatives_of_an_f_that_differentiates_by_itself() -> None:
    """A gradient step on an energy makes a leaf of its own, where nothing else asks for one."""
    w, x = weight(4).requires_grad_(), rand(3, 4).requires_grad_()

    def step(z: Tensor) -> Tensor:
        with torch.enable_grad():
            point = z if z.requires_grad else z.detach().requires_grad_()
            energy = 0.5 * point.square().sum() + 0.2 * torch.cos(point @ w).sum() - (point * x).sum()
            (slope,) = torch.autograd.grad(energy, point, create_graph=True)
        return z - 0.5 * slope

    deq = get_deq(**TIGHT)

    def solve(w: Tensor, x: Tensor) -> Tensor:
        return deq(step, torch.zeros(3, 4, dtype=DOUBLE))[0][-1]

    assert torch.autograd.gradcheck(solve, (w, x)) and torch.autograd.gradgradcheck(solve, (w, x))


def test_a_graph_that_nobody_differentiates_again_may_be_created() -> None:
    fn, z0, inputs, _ = closure()
    z_out, _ = get_deq(**TIGHT)(fn, z0)
    cotangent = rand(24, seed=7)
    found = torch.autograd.grad(flat(z_out[-1]), inputs, cotangent, create_graph=True)
    close([g.detach() for g in found], dense_gradients(fn, z_out[-1], cotangent, inputs))


def test_hooks_on_a_parameter_run_once() -> None:
    fn, z0, inputs, _ = closure()
    calls: list[Tensor] = []
    inputs[0].register_hook(calls.append)
    z_out, _ = get_deq(**TIGHT)(fn, z0)
    z_out[-1].sum().backward()
    assert len(calls) == 1
    assert torch.equal(calls[0], inputs[0].grad)


# ---- which tensors take part


def test_frozen_parameters_get_nothing() -> None:
    fn, z0, (w, x), _ = closure()
    w.requires_grad_(False)
    z_out, _ = get_deq(**TIGHT)(fn, z0)
    z_out[-1].sum().backward()
    assert w.grad is None
    close([x.grad], dense_gradients(fn, z_out[-1], torch.ones(24, dtype=DOUBLE), [x]))


@pytest.mark.parametrize("ift", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_to_differentiate(ift: bool, training: bool) -> None:
    w = weight(6)
    deq = get_deq(ift=ift, f_max_iter=100).train(training)
    z_out, info = deq(lambda z: torch.tanh(z @ w + 1), torch.zeros(4, 6, dtype=DOUBLE))
    assert not z_out[-1].requires_grad
    assert info.converged.all()


@pytest.mark.parametrize("ift", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("solver", ["fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"])
def test_without_autograd(ift: bool, mode: Any, training: bool, solver: str) -> None:
    fn, z0, _, _ = closure()
    deq = get_deq(f_solver=solver, ift=ift, f_max_iter=100).train(training)
    with mode():
        z_out, info = deq(fn, z0)
        residual = torch.linalg.vector_norm(fn(z_out[-1]) - z_out[-1], dim=1)
    assert not z_out[-1].requires_grad
    assert (residual < 1e-3).all()
    assert info.converged.all()


@pytest.mark.parametrize("options", [{"ift": True}, {"grad": 2}, {"f_max_iter": 0}])
def test_z0_gets_no_gradient_and_is_not_touched(options: dict[str, Any]) -> None:
    fn, _, (_, x), _ = closure()
    z0 = rand(4, 6, seed=5).requires_grad_()
    before = z0.detach().clone()
    z_out, _ = get_deq(**{"f_max_iter": 100, **options})(fn, z0)
    z_out[-1].sum().backward()
    assert z0.grad is None
    assert x.grad is not None
    assert torch.equal(z0.detach(), before)


def test_zero_steps_hand_z0_to_the_gradient_backend() -> None:
    fn, _, inputs, _ = closure()
    z0 = rand(4, 6, seed=5)
    z_out, info = get_deq(grad=2)(fn, z0, solver_kwargs={"f_max_iter": 0})
    assert torch.equal(z_out[-1].detach(), fn(fn(z0)).detach())
    close(
        list(torch.autograd.grad(z_out[-1].sum(), inputs)),
        list(torch.autograd.grad(fn(fn(z0)).sum(), inputs)),
        tol=1e-12,
    )
    assert info["nfe"] == 2
    assert (info["status"] == Status.SKIPPED).all()


def test_the_backward_does_not_evaluate_f() -> None:
    fn, z0, inputs, _ = closure()
    calls = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return fn(z)

    z_out, info = get_deq(**TIGHT)(counted, z0)
    assert info["nfe"] == calls
    torch.autograd.grad(z_out[-1].sum(), inputs)
    assert info["nfe"] == calls
    assert info["backward"]["nfe"] >= 2


# ---- what is told of the backward


def test_writer_and_info_hear_of_every_backward() -> None:
    fn, z0, inputs, _ = closure()
    heard: list[Solution] = []
    z_out, info = get_deq(**TIGHT)(fn, z0, backward_writer=heard.append)
    assert "backward" not in info
    loss = z_out[-1].sum()
    torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.autograd.grad(loss, inputs)
    assert len(heard) == 2
    assert info["backward"] is heard[-1]
    for key in ("abs_lowest", "rel_lowest", "nstep", "status", "steps"):
        assert heard[0][key].shape == (4,)
    assert heard[0]["abs_trace"].shape == heard[0]["rel_trace"].shape
    assert not heard[0]["abs_lowest"].requires_grad


@pytest.mark.parametrize("policy", ["ignore", "warn", "raise"])
def test_a_backward_that_fails_is_not_silent(policy: str) -> None:
    fn, z0, inputs, _ = closure()
    options = {**TIGHT, "b_max_iter": 2, "b_solver": "fixed_point_iter"}
    z_out, info = get_deq(**options, on_failure=policy)(fn, z0)
    if policy == "raise":
        with pytest.raises(ConvergenceError, match="backward solve: 4 of 4 samples max_steps"):
            torch.autograd.grad(z_out[-1].sum(), inputs)
    elif policy == "warn":
        with pytest.warns(ConvergenceWarning, match="backward solve: 4 of 4 samples"):
            torch.autograd.grad(z_out[-1].sum(), inputs)
    else:
        torch.autograd.grad(z_out[-1].sum(), inputs)
    assert (info["backward"]["status"] == Status.MAX_STEPS).all()


# ---- several states


@pytest.mark.parametrize("ift", [True, False])
@pytest.mark.parametrize(
    ("options", "stops"),
    [({"n_states": 3}, [4, 8, 12]), ({"indexing": [2, 5]}, [2, 5, 12]), ({"n_states": 1}, [12])],
)
def test_sliced_goes_on_from_what_the_gradient_returned(options: dict[str, Any], stops: list[int], ift: bool) -> None:
    fn, z0, inputs, _ = closure()
    deq = get_deq(core="sliced", f_max_iter=12, f_tol=0, grad=2, tau=0.8, ift=ift, **options)
    z_out, _ = deq(fn, z0)
    assert len(z_out) == len(stops)
    z, start = z0, 0
    for k, stop in enumerate(stops):
        for _ in range(stop - start):
            z = fn(z).detach()
        start, state = stop, z
        last_is_exact = ift and k == len(stops) - 1
        if not last_is_exact:
            for _ in range(2):
                state = 0.8 * fn(state) + 0.2 * state
        assert torch.allclose(z_out[k], state, rtol=0, atol=1e-13)
        found = list(torch.autograd.grad(z_out[k].sum(), inputs))
        if last_is_exact:
            close(found, dense_gradients(fn, state, torch.ones(24, dtype=DOUBLE), inputs), tol=1e-5)
        else:
            close(found, list(torch.autograd.grad(state.sum(), inputs)), tol=1e-12)
        z = state.detach()


@pytest.mark.parametrize("ift", [True, False])
@pytest.mark.parametrize(
    ("options", "stops"),
    [({"n_states": 3}, [4, 8, 12]), ({"indexing": [2, 5]}, [2, 5, 12]), ({"n_states": 5}, [4, 6, 8, 10, 12])],
)
def test_indexing_attaches_beside_the_trajectory(options: dict[str, Any], stops: list[int], ift: bool) -> None:
    fn, z0, inputs, _ = closure()
    z_out, _ = get_deq(core="indexing", f_max_iter=12, f_tol=0, grad=2, ift=ift, **options)(fn, z0)
    assert len(z_out) == len(stops)
    states = [z0]
    for _ in range(12):
        states.append(fn(states[-1]).detach())
    for k, stop in enumerate(stops):
        state = states[stop]
        found = list(torch.autograd.grad(z_out[k].sum(), inputs))
        if ift and k == len(stops) - 1:
            assert torch.allclose(z_out[k], state, rtol=0, atol=1e-13)
            close(found, dense_gradients(fn, state, torch.ones(24, dtype=DOUBLE), inputs), tol=1e-5)
        else:
            state = fn(fn(state))
            assert torch.allclose(z_out[k], state, rtol=0, atol=1e-13)
            close(found, list(torch.autograd.grad(state.sum(), inputs)), tol=1e-12)


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden", "simple_fixed_point_iter"])
def test_an_early_stop_drops_no_state(core: str, solver: str) -> None:
    """z = z / 2 + x is solved long before the later steps asked for."""
    x = torch.ones(2, 1, dtype=DOUBLE, requires_grad=True)
    deq = get_deq(core=core, f_solver=solver, f_max_iter=90, f_tol=1e-12, n_states=3, ift=True)
    z_out, _ = deq(lambda z: 0.5 * z + x, torch.zeros(2, 1, dtype=DOUBLE))
    assert len(z_out) == 3
    for z in z_out:
        assert torch.allclose(z, torch.full_like(z, 2.0), atol=1e-6)
    (found,) = torch.autograd.grad(z_out[-1].sum(), x)
    assert torch.allclose(found, torch.full_like(found, 2.0), atol=1e-6)


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_a_list_of_gradient_steps_is_one_for_each_state(core: str) -> None:
    fn, z0, inputs, _ = closure()
    z_out, _ = get_deq(core=core, f_max_iter=9, f_tol=0, indexing=[3], grad=[1, 3])(fn, z0)
    state = z0
    for _ in range(3):
        state = fn(state).detach()
    first = fn(state)
    z = first.detach() if core == "sliced" else state
    for _ in range(6):
        z = fn(z).detach()
    second = fn(fn(fn(z)))
    for found, expected in zip(z_out, (first, second), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-13)
        close(
            list(torch.autograd.grad(found.sum(), inputs)), list(torch.autograd.grad(expected.sum(), inputs)), tol=1e-12
        )


def test_intermediate_gradients_can_be_exact_too() -> None:
    fn, z0, inputs, _ = closure()
    deq = get_deq(
        solver={"name": "broyden", "tol": 1e-12, "max_iter": 120},
        gradient="implicit",
        core={"name": "sliced", "n_states": 2, "intermediate": ["implicit"]},
    )
    z_out, _ = deq(fn, z0)
    for z in z_out:
        found = list(torch.autograd.grad(z.sum(), inputs))
        close(found, dense_gradients(fn, z, torch.ones(24, dtype=DOUBLE), inputs), tol=1e-5)


def test_states_of_one_call_share_one_backward() -> None:
    fn, z0, inputs, _ = closure()
    z_out, _ = get_deq(f_max_iter=12, f_tol=0, n_states=3, ift=True)(fn, z0)
    separate = [torch.autograd.grad(z.sum(), inputs, retain_graph=True) for z in z_out]
    joint = torch.autograd.grad(torch.stack([z.sum() for z in z_out]).sum(), inputs)
    close(list(joint), [torch.stack(parts).sum(0) for parts in zip(*separate, strict=True)], tol=1e-10)


# ---- memory


@pytest.mark.parametrize("options", [{"ift": True}, {"grad": 2}, {"ift": True, "n_states": 2, "core": "indexing"}])
@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_nothing_is_left_behind_by_200_steps(options: dict[str, Any], solver: str) -> None:
    """Without the cycle collector: no step leaves a reference cycle that holds tensors."""
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.mul_(0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    deq = get_deq(f_solver=solver, f_tol=1e-3, on_failure="ignore", **options)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    def steps(count: int) -> None:
        for _ in range(count):
            z_out, info = deq(lambda z: torch.tanh(layer(z) + x), torch.zeros(3, 4))
            optimizer.zero_grad()
            z_out[-1].square().sum().backward()
            optimizer.step()
            assert info["abs_trace"].dim() == 2

    def tensors() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(isinstance(item, Tensor) for item in gc.get_objects())

    steps(5)
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        steps(200)
        assert tensors() <= before
    finally:
        gc.enable()


# ---- settings of implicit


def slow(size: int = 12) -> tuple[Any, Tensor, list[Tensor]]:
    w, x = weight(size, 0.97).requires_grad_(), rand(5, size).requires_grad_()
    return lambda z: torch.tanh(z @ w + x), torch.zeros(5, size, dtype=DOUBLE), [w, x]


@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 1e-9])
def test_rtol_is_relative_to_the_cotangent(rtol: float) -> None:
    fn, z0, inputs = slow()
    deq = get_deq(f_solver="broyden", f_tol=1e-12, f_max_iter=200, gradient={"name": "implicit", "rtol": rtol})
    products = []
    for scale in (1.0, 1e-9, 1e9):
        z_out, info = deq(fn, z0)
        cotangent = scale * rand(60, seed=5)
        found = torch.autograd.grad(flat(z_out[-1]), inputs, cotangent)
        close(list(found), dense_gradients(fn, z_out[-1], cotangent, inputs), 100 * rtol)
        lengths = torch.linalg.vector_norm(cotangent.view(5, 12), dim=1)
        assert bool((info["backward"]["abs_lowest"] <= rtol * lengths).all())
        products.append(info["backward"]["nfe"])
    assert len(set(products)) == 1


def test_a_tolerance_given_twice_is_refused() -> None:
    for solver in ({"tol": 1e-3}, {"rtol": 1e-3}, {"name": "anderson", "atol": 1e-3}):
        with pytest.raises(ConfigError, match="not both"):
            get_deq(gradient={"name": "implicit", "rtol": 1e-4, "solver": solver})
    config = get_deq(gradient={"name": "implicit", "rtol": 1e-4, "solver": "anderson"}).config
    assert type(config).from_dict(config.to_dict()) == config


def test_a_warm_start_saves_products_where_the_same_batch_comes_again() -> None:
    fn, z0, inputs = slow(48)
    cold, warm = (
        get_deq(f_solver="broyden", f_tol=1e-12, f_max_iter=200, gradient={"name": "implicit", "warm_start": on})
        for on in (False, True)
    )
    counts: dict[bool, list[int]] = {False: [], True: []}
    for step in range(3):
        cotangent = 10.0 ** (4 * step) * (rand(240, seed=5) + 1e-3 * step * rand(240, seed=6))  # any scale of the loss
        for on, deq in ((False, cold), (True, warm)):
            z_out, info = deq(fn, z0)
            found = torch.autograd.grad(flat(z_out[-1]), inputs, cotangent)
            close(list(found), dense_gradients(fn, z_out[-1], cotangent, inputs), 1e-4)
            counts[on].append(info["backward"]["nfe"])
    assert counts[True][0] == counts[False][0]
    assert all(mine < other for mine, other in zip(counts[True][1:], counts[False][1:], strict=True))
    other, x = rand(3, 48).requires_grad_(), torch.zeros(3, 48, dtype=DOUBLE)  # another batch size: from zero

    def shorter(z: Tensor) -> Tensor:
        return torch.tanh(0.5 * z + other)

    z_out, _ = warm(shorter, x)
    (found,) = torch.autograd.grad(z_out[-1].sum(), other)
    close([found], dense_gradients(shorter, z_out[-1], torch.ones(144, dtype=DOUBLE), [other]), 1e-5)
