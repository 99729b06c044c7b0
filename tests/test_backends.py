"""The approximate gradient backends: one_step, neumann and shine."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from backends_support import DOUBLE, EXACT, Layer, close, cosine, layer, of_radius, orthogonal, rand
from backends_support import backends as backends
from torch import Tensor, nn

from deqcore import (
    ConfigError,
    ConvergenceError,
    ConvergenceWarning,
    DEQConfig,
    GradientModeError,
    Solver,
    SolverSettings,
    Status,
    Step,
    VariationalDropout,
    apply_norm,
    fixed_point,
    get_deq,
    registry,
)
from deqcore_gradients.shine import Shine

BROYDEN = {"name": "broyden", "tol": 1e-10, "max_iter": 100}
ALL: list[Any] = [
    "one_step",
    "neumann",
    {"name": "neumann", "terms": 3, "damping": 0.6},
    "shine",
    {"name": "shine", "refine": 0, "fallback": "none"},
    {"name": "shine", "refine": 0, "fallback": "one_step"},
    "unrolled",
    {"name": "unrolled", "checkpoint": "every_k"},
    {"name": "unrolled", "checkpoint": "recursive"},
]


def solver_for(gradient: Any, tol: float = 1e-8) -> dict[str, Any]:
    name = gradient if isinstance(gradient, str) else gradient["name"]
    return {"name": "anderson" if name == "unrolled" else "broyden", "tol": tol, "max_iter": 100}


def make(gradient: Any, tol: float = 1e-8, **more: Any) -> Any:
    return get_deq(gradient=gradient, solver=solver_for(gradient, tol), **{"on_failure": "ignore", **more})


# ---- one_step


@pytest.mark.parametrize("training", [True, False])
def test_one_step_is_the_derivative_of_f_at_an_unmoved_state(training: bool) -> None:
    f = layer()
    z_out, info = get_deq(gradient="one_step", solver={"tol": 1e-3}).train(training)(f, f.z0)
    assert torch.equal(z_out[-1].detach(), info["z"])
    cotangent = rand(4, 6, seed=5)
    close(torch.autograd.grad(z_out[-1], f.inputs, cotangent), f.pulled(info["z"], cotangent), 1e-14)
    assert "backward" not in info


def test_one_step_has_phantoms_gradient_and_not_its_value() -> None:
    f = layer()
    (a,), info = get_deq(gradient="one_step", solver={"tol": 1e-2})(f, f.z0)
    (b,), _ = get_deq(gradient="phantom", solver={"tol": 1e-2})(f, f.z0)
    assert torch.equal(a.detach(), info["z"])
    assert not torch.equal(b, a)
    close(torch.autograd.grad(a.sum(), f.inputs), torch.autograd.grad(b.sum(), f.inputs), 1e-14)


def test_one_step_costs_one_evaluation() -> None:
    f = layer()
    with torch.no_grad():
        get_deq(solver={"tol": 0, "max_iter": 7}, gradient="one_step").eval()(f, f.z0)
    without, f.calls = f.calls, 0
    z_out, info = get_deq(solver={"tol": 0, "max_iter": 7}, gradient="one_step").eval()(f, f.z0)
    assert f.calls == without + 1 == info["nfe"]
    z_out[-1].sum().backward()
    assert f.calls == without + 1


def test_one_step_can_be_differentiated_again_as_what_it_is() -> None:
    f = layer()
    (z,), info = get_deq(gradient="one_step", solver={"tol": 1e-6, "max_iter": 200})(f, f.z0)
    point = info["z"]

    def higher(state: Tensor) -> Tensor:
        (first,) = torch.autograd.grad((state**3).sum(), f.x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), f.x, create_graph=True)
        return torch.autograd.grad(second.sum(), f.x)[0]

    fz = torch.tanh(point @ f.w + f.x)
    close([higher(z)], [higher(point + fz - fz.detach())], 1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, at the first jvp
def test_one_step_under_torch_func_is_what_it_is() -> None:
    w, x, t = orthogonal(6), rand(4, 6), rand(4, 6, seed=9)
    options = {"gradient": "one_step", "solver": {"name": "anderson", "tol": 1e-12, "max_iter": 100}}

    def solve(x: Tensor) -> Tensor:
        return fixed_point(lambda z, x: torch.tanh(z @ w + x), torch.zeros(4, 6, dtype=DOUBLE), (x,), **options)

    slope = 1 - solve(x) ** 2
    close([torch.func.jvp(solve, (x,), (t,))[1]], [slope * t], 1e-10)
    close([torch.func.grad(lambda x: (solve(x) * t).sum())(x)], [slope * t], 1e-10)
    several = torch.stack([x, 2 * x])
    close([torch.vmap(solve)(several)], [torch.stack([solve(x), solve(2 * x)])], 1e-10)


def test_a_state_where_f_overflows_keeps_its_value() -> None:
    x = torch.full((2, 3), 0.5, dtype=DOUBLE, requires_grad=True)
    deq = get_deq(gradient="one_step", solver={"tol": 0, "max_iter": 2}, on_failure="ignore")
    z_out, info = deq(lambda z: torch.exp(300 * z) + x, torch.ones(2, 3, dtype=DOUBLE))
    assert torch.equal(z_out[-1].detach(), info["z"])


# ---- neumann


@pytest.mark.parametrize(("terms", "damping"), [(1, 1.0), (1, 0.5), (2, 1.0), (5, 1.0), (4, 0.6)])
def test_neumann_is_the_papers_sum(terms: int, damping: float) -> None:
    f = layer()
    gradient = {"name": "neumann", "terms": terms, "damping": damping}
    (z,), info = get_deq(gradient=gradient, solver=BROYDEN, on_failure="ignore")(f, f.z0)
    assert torch.equal(z.detach(), info["z"])
    g = rand(4, 6, seed=5)
    transposed = damping * f.jacobians(info["z"]).mT + (1 - damping) * torch.eye(6, dtype=DOUBLE)
    power, u = torch.eye(6, dtype=DOUBLE).expand(4, 6, 6), torch.zeros(4, 6, dtype=DOUBLE)
    for _ in range(terms):
        u = u + damping * (power @ g[:, :, None])[:, :, 0]
        power = transposed @ power
    close(torch.autograd.grad(z, f.inputs, g), f.pulled(info["z"], u), 1e-13)


def test_neumann_with_one_term_is_one_step() -> None:
    f = layer()
    found = []
    for gradient in ("one_step", {"name": "neumann", "terms": 1}):
        (z,), _ = get_deq(gradient=gradient, solver=BROYDEN)(f, f.z0)
        found.append(torch.autograd.grad(z.square().sum(), f.inputs))
    close(*found, 1e-14)


def test_neumann_approaches_the_exact_gradient_at_the_rate_of_f() -> None:
    f = layer(rho=0.5)
    errors = []
    for terms in (2, 8, 50):
        (z,), info = get_deq(gradient={"name": "neumann", "terms": terms}, solver=BROYDEN)(f, f.z0)
        found = torch.autograd.grad(z.sum(), f.inputs)
        exact = f.pulled(info["z"], f.adjoint(info["z"], torch.ones(4, 6, dtype=DOUBLE)))
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)))
    assert errors[1] < 0.5**6 * errors[0]
    assert errors[2] < 1e-13


@pytest.mark.parametrize("terms", [1, 4])
def test_neumann_reports_what_it_did(terms: int) -> None:
    f = layer()
    seen: list[Any] = []
    (z,), info = get_deq(gradient={"name": "neumann", "terms": terms}, solver=BROYDEN)(
        f, f.z0, backward_writer=seen.append
    )
    g = rand(4, 6, seed=5)
    torch.autograd.grad(z, f.inputs, g)
    backward = info["backward"]
    assert seen == [backward]
    assert backward["nfe"] == terms  # terms - 1 for the sum, and one for its residual
    assert backward.counts() == {Status.MAX_STEPS: 4}
    assert not backward.failed()
    transposed = f.jacobians(info["z"]).mT
    left = torch.linalg.matrix_power(transposed, terms) @ g[:, :, None]  # J^T u + g - u
    expected = left[:, :, 0].norm(dim=1)
    close([backward["abs_lowest"]], [expected], 1e-12)


def test_a_neumann_series_that_diverges_says_so() -> None:
    x = rand(3, 4).requires_grad_()

    def f(z: Tensor) -> Tensor:
        return x - 3 * z

    def deq(**more: Any) -> Any:
        return get_deq(gradient={"name": "neumann", "terms": 8, **more}, solver=BROYDEN)

    (z,), info = deq()(f, torch.zeros(3, 4, dtype=DOUBLE))
    with pytest.warns(ConvergenceWarning, match=r"backward solve.*diverged"):
        z.sum().backward()
    assert info["backward"].counts() == {Status.DIVERGED: 3}
    x.grad = None
    (z,), info = deq(damping=0.2)(f, torch.zeros(3, 4, dtype=DOUBLE))  # 0.8 - 0.2 * 3: contracts by .2
    z.sum().backward()
    close([x.grad], [torch.full_like(x, 0.25)], 1e-4)
    raising = get_deq(gradient={"name": "neumann", "terms": 8}, solver=BROYDEN, on_failure="raise")
    (z,), _ = raising(f, torch.zeros(3, 4, dtype=DOUBLE))
    with pytest.raises(ConvergenceError, match="backward solve"):
        z.sum().backward()


def test_neumann_where_rows_depend_on_each_other() -> None:
    links = torch.diag(torch.full((5,), 0.3, dtype=DOUBLE), 1)
    links = links + links.T
    x = rand(6, 2).requires_grad_()
    gradient = {"name": "neumann", "terms": 60}
    (z,), _ = get_deq(gradient=gradient, solver={"name": "fixed_point_iter", "tol": 1e-10, "max_iter": 200})(
        lambda z: links @ z + x, torch.zeros(6, 2, dtype=DOUBLE)
    )
    g = rand(6, 2, seed=5)
    (found,) = torch.autograd.grad(z, x, g)
    close([found], [torch.linalg.solve(torch.eye(6, dtype=DOUBLE) - links, g)], 1e-10)


@pytest.mark.parametrize("options", [{"terms": 0}, {"damping": 0.0}, {"damping": 1.1}, {"steps": 3}])
def test_neumann_refuses_wrong_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        get_deq(gradient={"name": "neumann", **options})


# ---- shine


def hard(rho: float = 0.95, size: int = 24) -> Layer:
    return Layer(of_radius(size, rho).T.contiguous(), 0.3 * rand(5, size, seed=3))


@pytest.mark.parametrize("name", ["broyden", "newton", "chord", "auto"])
def test_shine_is_the_transposed_estimate(name: str) -> None:
    """Written out as a matrix, column by column, and transposed."""
    f = hard()
    solver = {"name": name, "tol": 1e-8, "max_iter": 60}
    gradient = {"name": "shine", "refine": 0, "fallback": "none"}
    (z,), info = get_deq(gradient=gradient, solver=solver, keep_state=True, on_failure="ignore")(f, f.z0)
    inverse = info.inverse()
    assert inverse is not None
    columns = [inverse(row.expand(5, 24).clone()) for row in torch.eye(24, dtype=DOUBLE)]
    matrix = torch.stack(columns, 2)
    g = rand(5, 24, seed=5)
    u = (matrix.mT @ g[:, :, None])[:, :, 0]
    close(torch.autograd.grad(z, f.inputs, g), f.pulled(info["z"], u), 1e-11)
    backward = info["backward"]
    assert backward["nfe"] == 1
    left = (f.jacobians(info["z"]).mT @ u[:, :, None])[:, :, 0] + g - u
    assert torch.allclose(backward["abs_lowest"], left.norm(dim=1), rtol=1e-7, atol=1e-9)


def test_shine_after_newton_is_exact() -> None:
    f = layer()
    gradient = {"name": "shine", "refine": 0, "threshold": 1e-6}
    (z,), info = get_deq(gradient=gradient, solver={"name": "newton", "tol": 1e-10})(f, f.z0)
    g = rand(4, 6, seed=5)
    found = torch.autograd.grad(z, f.inputs, g)
    close(found, f.pulled(info["z"], f.adjoint(info["z"], g)), 1e-6)
    assert info["backward"].converged.all()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_shine_refined_is_near_the_exact_gradient_for_a_fifth_of_its_products(dtype: torch.dtype) -> None:
    wide = hard(0.97, 48)
    f = Layer(wide.w.detach().to(dtype), wide.x.detach().to(dtype))
    found, products = {}, {}
    solver = {"name": "broyden", "tol": 1e-3, "max_iter": 100}
    for name in ("implicit", "shine", "one_step"):
        (z,), info = get_deq(gradient=name, solver=solver)(f, f.z0)
        found[name] = torch.autograd.grad(z, f.inputs, rand(5, 48, seed=5, dtype=dtype))
        products[name] = info["backward"]["nfe"] if "backward" in info else 0
    assert products["shine"] <= 0.25 * products["implicit"]
    assert cosine(found["shine"], found["implicit"]) > 0.95 > cosine(found["one_step"], found["implicit"])


@pytest.mark.parametrize("refine", [1, 3, 6])
def test_shine_makes_the_steps_it_was_asked_for(refine: int) -> None:
    f = hard(0.99, 40)
    errors = []
    for count in (0, refine):
        gradient = {"name": "shine", "refine": count, "fallback": "none", "threshold": 1e-4}
        deq = get_deq(gradient=gradient, solver={"name": "broyden", "tol": 1e-4, "max_iter": 100}, on_failure="ignore")
        (z,), info = deq(f, f.z0)
        g = rand(5, 40, seed=5)
        torch.autograd.grad(z, f.inputs, g)
        assert info["backward"]["nfe"] == count + 1
        assert (info["backward"]["status"] == Status.MAX_STEPS).all()
        assert info["backward"]["fallback"].all()
        u = info["backward"]["z"]
        left = (f.jacobians(info["z"]).mT @ u[:, :, None])[:, :, 0] + g - u
        assert torch.allclose(info["backward"]["abs_lowest"], left.norm(dim=1), rtol=1e-6)
        errors.append((u - f.adjoint(info["z"], g)).norm())
    assert errors[1] < errors[0]


def test_shine_falls_back_to_a_solve() -> None:
    f = hard(0.99, 40)
    for refine in (0, 2):
        gradient = {"name": "shine", "refine": refine, "threshold": 1e-3}
        (z,), info = get_deq(gradient=gradient, solver={"name": "broyden", "tol": 1e-3, "max_iter": 100})(f, f.z0)
        g = rand(5, 40, seed=5)
        found = torch.autograd.grad(z, f.inputs, g)
        backward = info["backward"]
        assert backward["fallback"].all()
        assert backward.converged.all()
        assert backward["nfe"] > refine + 1
        u = backward["z"]
        left = (f.jacobians(info["z"]).mT @ u[:, :, None])[:, :, 0] + g - u
        assert (left.norm(dim=1) <= 1.0001e-3 * g.norm(dim=1)).all()
        assert cosine(found, f.pulled(info["z"], f.adjoint(info["z"], g))) > 0.999


def test_shine_falls_back_to_one_step_for_poor_samples_only() -> None:
    f = hard(0.9, 24)
    with torch.no_grad():
        f.x[:2] = 50.0  # tanh is flat there: J is zero, and every estimate is right
    gradient = {"name": "shine", "refine": 0, "fallback": "one_step", "threshold": 0.2}
    (z,), info = get_deq(gradient=gradient, solver={"name": "broyden", "tol": 1e-4, "max_iter": 100})(f, f.z0)
    g = rand(5, 24, seed=5)
    torch.autograd.grad(z, f.inputs, g)
    backward = info["backward"]
    poor = backward["fallback"]
    assert poor.tolist() == [False, False, True, True, True]
    u = backward["z"]
    assert torch.equal(backward["z"][poor], g[poor])
    left = (f.jacobians(info["z"]).mT @ u[:, :, None])[:, :, 0] + g - u
    assert torch.allclose(backward["abs_lowest"], left.norm(dim=1), rtol=1e-7)
    assert backward["nfe"] == 2
    assert not backward.failed()  # it was asked for
    assert backward.converged.tolist() == [True, True, False, False, False]


def test_a_poor_estimate_that_is_used_as_it_is_is_no_secret() -> None:
    f = hard(0.99, 40)
    gradient = {"name": "shine", "refine": 0, "fallback": "none"}
    (z,), _ = get_deq(gradient=gradient, solver={"name": "broyden", "tol": 1e-3, "max_iter": 100})(f, f.z0)
    with pytest.warns(ConvergenceWarning, match="backward solve"):
        z.sum().backward()


@pytest.mark.parametrize("name", ["anderson", "fixed_point_iter", "newton_krylov"])
def test_shine_refuses_solvers_without_an_estimate(name: str) -> None:
    f = layer()
    with pytest.raises(ConfigError, match=rf"solver='{name}' has none. Use solver='broyden', 'auto', 'newton'"):
        get_deq(gradient="shine", solver=name)(f, f.z0)


def test_shine_refuses_compaction() -> None:
    f = Layer(orthogonal(6), rand(6, 6, seed=3) * torch.tensor([1e-6, 1, 1, 1, 1, 1], dtype=DOUBLE)[:, None])
    with pytest.raises(ConfigError, match="compact=False"):
        deq = get_deq(gradient="shine", solver={"name": "broyden", "tol": 1e-10, "max_iter": 60}, compact=True)
        deq(lambda z, x: torch.tanh(z @ f.w + x), f.z0, args=(f.x,))


def test_shine_refuses_states_before_the_last_one() -> None:
    f = layer()
    core = {"name": "indexing", "n_states": 3}
    z_out, _ = get_deq(gradient="shine", solver=BROYDEN, core=core, on_failure="ignore")(f, f.z0)  # phantom there
    assert len(z_out) == 3
    with pytest.raises(ConfigError, match="intermediate"):
        get_deq(gradient="shine", solver=BROYDEN, core={**core, "intermediate": ["shine"]})(f, f.z0)


def test_shine_checks_without_a_call() -> None:
    backend = Shine()
    backend.check(registry.create("solvers", "broyden"))
    with pytest.raises(ConfigError, match="'anderson' has none"):
        backend.check(registry.create("solvers", "anderson"))
    with pytest.raises(ConfigError, match="compact"):
        backend.check(registry.create("solvers", "broyden"), compact=True)


def test_shine_without_a_step_takes_the_identity() -> None:
    """The start is an equilibrium: the solver learned nothing."""
    f = layer()
    (start,), _ = get_deq(solver={**BROYDEN, "tol": 1e-13})(f, f.z0)
    gradient = {"name": "shine", "refine": 0, "fallback": "none"}
    (z,), info = get_deq(gradient=gradient, solver={"name": "broyden", "tol": 1e-6}, on_failure="ignore")(
        f, start.detach()
    )
    assert info["steps"].eq(0).all()
    g = rand(4, 6, seed=5)
    close(torch.autograd.grad(z, f.inputs, g), f.pulled(info["z"], g), 1e-12)


def test_shine_takes_another_ones_estimate() -> None:
    """A third party's solver: any linear map made of differentiable operations will do."""

    class Half(Solver[SolverSettings]):
        def step(self, problem: Any, z: Tensor, fz: Tensor, state: Any) -> Step:
            return Step(fz, z)

        def inverse(self, state: Any) -> Any:
            return lambda x: 2 * x.flip(1)

    class Detached(Half):
        def inverse(self, state: Any) -> Any:
            return lambda x: 2 * x.detach()

    f = layer()
    registry.register("solvers", "half", Half)
    registry.register("solvers", "detached", Detached)
    gradient = {"name": "shine", "refine": 0, "fallback": "none"}
    (z,), info = get_deq(gradient=gradient, solver={"name": "half", "tol": 1e-8, "max_iter": 200}, on_failure="ignore")(
        f, f.z0
    )
    g = rand(4, 6, seed=5)
    close(torch.autograd.grad(z, f.inputs, g), f.pulled(info["z"], 2 * g.flip(1)), 1e-12)
    with pytest.raises(ConfigError, match="differentiable"):
        get_deq(gradient="shine", solver="detached", on_failure="ignore")(f, f.z0)


@pytest.mark.parametrize("options", [{"refine": -1}, {"threshold": 0.0}, {"fallback": "implicit"}, {"steps": 2}])
def test_shine_refuses_wrong_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        get_deq(gradient={"name": "shine", **options}, solver="broyden")


# ---- all of them


@pytest.mark.parametrize("gradient", ["neumann", "shine"])
def test_more_than_first_derivatives_are_refused(gradient: str) -> None:
    f = layer()
    (z,), _ = make(gradient)(f, f.z0)
    (first,) = torch.autograd.grad(z.square().sum(), f.x, create_graph=True)
    with pytest.raises(GradientModeError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), f.x)


@pytest.mark.parametrize("gradient", ["neumann", "shine", "unrolled"])
def test_torch_func_is_refused(gradient: str) -> None:
    def loss(x: Tensor) -> Tensor:
        f = lambda z, x: torch.tanh(0.5 * z + x)  # noqa: E731
        options = {"gradient": gradient, "solver": solver_for(gradient)}
        return fixed_point(f, torch.zeros(2, 3, dtype=DOUBLE), (x,), **options).sum()

    with pytest.raises(GradientModeError):
        torch.func.grad(loss)(rand(2, 3))


@pytest.mark.parametrize("gradient", ALL)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_direction_is_that_of_the_exact_gradient(gradient: Any, training: bool, batch: int) -> None:
    f = layer(batch=batch, rho=0.4)
    (z,), info = make(gradient).train(training)(f, f.z0)
    assert torch.allclose(z, info["z"], rtol=0, atol=1e-12)
    g = rand(batch, 6, seed=5)
    found = torch.autograd.grad(z, f.inputs, g)
    assert cosine(found, f.pulled(info["z"], f.adjoint(info["z"], g))) > 0.9


@pytest.mark.parametrize("gradient", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states(gradient: Any, dtype: torch.dtype) -> None:
    w, x = orthogonal(6, 0.4).to(dtype), rand(4, 6, seed=3).to(dtype).requires_grad_()
    deq = make(gradient, tol=1e-3)
    z_out, info = deq(lambda z: torch.tanh(z @ w + x), torch.zeros(4, 6, dtype=dtype))
    assert z_out[-1].dtype == dtype
    (found,) = torch.autograd.grad(z_out[-1].float().sum(), x)
    assert found.dtype == dtype
    wide = Layer(w.double(), x.detach().double())
    u = wide.adjoint(info["z"].double(), torch.ones(4, 6, dtype=DOUBLE))
    assert cosine([found.double()], [wide.pulled(info["z"].double(), u)[1]]) > 0.85


@pytest.mark.parametrize("gradient", ALL)
def test_autocast(gradient: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 16, bias=False)
    nn.init.orthogonal_(linear.weight, 0.5)
    x = torch.randn(4, 16, requires_grad=True)

    def run(enabled: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            (z,), _ = make(gradient, tol=1e-2)(lambda z: torch.tanh(linear(z) + x), torch.zeros(4, 16))
        assert z.dtype == torch.float32
        return torch.autograd.grad(z.sum(), x)[0]

    assert cosine([run(True)], [run(False)]) > 0.99


@pytest.mark.parametrize("gradient", ALL)
def test_dict_states(gradient: Any) -> None:
    w, x = orthogonal(4, 0.4).requires_grad_(), rand(3, 4, seed=3).requires_grad_()

    def fn(z: dict[str, Any]) -> dict[str, Any]:
        joint = torch.tanh(torch.cat([z["h"], z["c"][0]], 1) @ w + x)
        return {"h": joint[:, :1], "c": [joint[:, 1:]]}

    zero = torch.zeros(3, 4, dtype=DOUBLE)
    (z,), _ = make(gradient)(fn, {"h": zero[:, :1], "c": [zero[:, 1:]]})
    found = torch.autograd.grad(z["h"].sum() + z["c"][0].square().sum(), [w, x])
    (flat,), _ = make(gradient)(lambda z: torch.tanh(z @ w + x), zero)
    close(found, torch.autograd.grad(flat[:, :1].sum() + flat[:, 1:].square().sum(), [w, x]), 1e-10)


@pytest.mark.parametrize("gradient", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_requires_grad(gradient: Any, training: bool) -> None:
    w, x = orthogonal(6), rand(4, 6)
    (z,), info = make(gradient).train(training)(lambda z: torch.tanh(z @ w + x), torch.zeros(4, 6, dtype=DOUBLE))
    assert not z.requires_grad
    assert torch.equal(z, info["z"])


@pytest.mark.parametrize("gradient", ALL)
def test_frozen_parameters_and_only_inputs(gradient: Any) -> None:
    f = layer(rho=0.4)
    (z,), _ = make(gradient)(f, f.z0)
    (expected,) = torch.autograd.grad(z.sum(), f.x)
    f.w.requires_grad_(False)
    (z,), _ = make(gradient)(f, f.z0)
    z.sum().backward()
    close([f.x.grad], [expected], 1e-12)
    assert f.w.grad is None


@pytest.mark.parametrize("gradient", ALL)
def test_no_grad_gives_the_state(gradient: Any) -> None:
    f = layer()
    for training in (True, False):
        with torch.no_grad():
            (z,), info = make(gradient).train(training)(f, f.z0)
        assert not z.requires_grad
        assert torch.equal(z, info["z"])


@pytest.mark.parametrize("gradient", ALL)
def test_a_sample_that_is_not_finite_leaves_the_others_alone(gradient: Any) -> None:
    w = orthogonal(6, 0.4)
    x = rand(4, 6, seed=3)
    bad = x.clone()
    bad[1] = torch.nan
    zero, cotangent = torch.zeros(4, 6, dtype=DOUBLE), rand(4, 6, seed=5)
    others = [0, 2, 3]
    found = []
    for given in (x, bad):
        given = given.clone().requires_grad_()
        (z,), info = make(gradient, tol=1e-6)(lambda z, x=given: torch.tanh(z @ w + x), zero)
        assert torch.isfinite(z[others]).all()
        (all_of_them,) = torch.autograd.grad(z, given, cotangent)
        found.append(all_of_them[others])
    assert info["status"][1] == Status.NON_FINITE
    assert cosine([found[1]], [found[0]]) > 0.95  # the others' solve may end at another step


@pytest.mark.parametrize("gradient", ALL)
def test_retain_graph_twice(gradient: Any) -> None:
    f = layer(rho=0.4)
    (z,), _ = make(gradient)(f, f.z0)
    loss = z.square().sum()
    first = torch.autograd.grad(loss, f.inputs, retain_graph=True)
    second = torch.autograd.grad(loss, f.inputs, retain_graph=True)
    third = torch.autograd.grad(loss, f.inputs)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("gradient", ALL)
def test_two_calls_in_one_graph(gradient: Any) -> None:
    f = layer(rho=0.4)
    deq = make(gradient)
    half = lambda z: 0.5 * f(z)  # noqa: E731
    (a,), _ = deq(f, f.z0)
    (b,), _ = deq(half, f.z0)
    joint = torch.autograd.grad(a.sum() + b.square().sum(), f.inputs)
    (a,), _ = deq(f, f.z0)
    (b,), _ = deq(half, f.z0)
    left, right = torch.autograd.grad(a.sum(), f.inputs), torch.autograd.grad(b.square().sum(), f.inputs)
    close(joint, [p + q for p, q in zip(left, right, strict=True)], 1e-12)


@pytest.mark.parametrize("gradient", ALL)
def test_two_calls_in_a_chain(gradient: Any) -> None:
    f, exact = layer(rho=0.3), []
    for kind in (gradient, EXACT):
        deq = make(kind, 1e-10)
        (a,), _ = deq(f, f.z0)
        (b,), _ = deq(lambda z, a=a: torch.tanh(z @ f.w + a), f.z0)
        exact.append(torch.autograd.grad(b.sum(), f.inputs))
    assert cosine(*exact) > 0.9


@pytest.mark.parametrize("gradient", ALL)
def test_copies_and_round_trips(gradient: Any) -> None:
    f = layer(rho=0.4)
    deq = make(gradient)
    cotangent = rand(4, 6, seed=5)

    def gradients(deq: Any) -> Any:
        (z,), _ = deq(f, f.z0)
        return torch.autograd.grad(z, f.inputs, cotangent)

    expected = gradients(deq)
    config = DEQConfig.load(deq.config.to_dict())
    assert config.gradient == deq.config.gradient
    for twin in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq)), get_deq(config)):
        for a, b in zip(gradients(twin), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", ALL)
def test_configurations_survive_a_file(gradient: Any, tmp_path: Any) -> None:
    deq = make(gradient)
    deq.config.save(tmp_path / "deq.toml")
    assert get_deq(tmp_path / "deq.toml").config == deq.config


@pytest.mark.parametrize("gradient", ALL)
def test_norms_and_dropout_are_those_of_the_solve(gradient: Any) -> None:
    """The gradient in the weights is that of the weight and the mask that the state was found with."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 6, bias=False).double()
    apply_norm(linear, "spectral_norm")
    drop = VariationalDropout(0.4)
    x = rand(4, 6, seed=3).requires_grad_()
    masks = []

    def fn(z: Tensor) -> Tensor:
        out = drop(0.5 * torch.tanh(linear(z) + x))
        masks.append((out.detach() == 0).clone())
        return out

    (z,), _ = make(gradient)(fn, torch.zeros(4, 6, dtype=DOUBLE))
    z.square().sum().backward()
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert masks[0].any()
    assert not x.grad[masks[0]].any()
    assert x.grad[~masks[0]].all()
    assert all(p.grad is not None and p.grad.any() for p in linear.parameters())


@pytest.mark.parametrize("gradient", ["one_step", "neumann", "shine", "unrolled"])
def test_fixed_point_takes_them_all(gradient: str) -> None:
    f = layer(rho=0.4)
    fn = lambda z, w, x: torch.tanh(z @ w + x)  # noqa: E731
    options = {"gradient": gradient, "solver": solver_for(gradient, 1e-10)}
    z, info = fixed_point(fn, f.z0, (f.w, f.x), return_info=True, **options)
    assert torch.allclose(z, info["z"], rtol=0, atol=1e-12)
    found = torch.autograd.grad(z.sum(), f.inputs)
    (z,), _ = get_deq(**options)(f, f.z0)
    close(found, torch.autograd.grad(z.sum(), f.inputs), 1e-9)
