"""Forward-backward and Peaceman-Rachford splitting on monotone operator equilibria."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers_support import F64, Calls, solve, states_of
from torch import nn

from deqcore import FunctionError, LinearProblem, Problem, StateSpec, Status, get_deq, iterate
from deqcore_solvers.fixed_point_iter import FixedPointIter
from deqcore_solvers.forward_backward import ForwardBackward
from deqcore_solvers.peaceman_rachford import PeacemanRachford

BOTH = pytest.mark.parametrize(
    "cls", [ForwardBackward, PeacemanRachford], ids=["forward_backward", "peaceman_rachford"]
)
NAMES = {ForwardBackward: "forward_backward", PeacemanRachford: "peaceman_rachford"}
TIGHT = {"rtol": 1e-12, "max_iter": 5000}


class Layer(nn.Module):
    """A monDEQ: z = prox(W z + U x + b), W = (1 - m) I - A^T A + B - B^T, with relu or soft thresholding."""

    def __init__(self, d=12, inputs=5, m=0.5, size=1.0, skew=1.0, soft=False, seed=0, dtype=F64):
        super().__init__()
        g = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=g, dtype=F64) / d**0.5

        a, b = size * random(d, d), skew * random(d, d)
        w = (1 - m) * torch.eye(d, dtype=F64) - a.T @ a + b - b.T
        self.weight = nn.Parameter(w.to(dtype))
        self.input = nn.Linear(inputs, d, dtype=dtype)
        with torch.no_grad():
            self.input.weight.copy_(2 * random(d, inputs))
            self.input.bias.copy_(random(d))
        self.soft = soft
        self.products = 0
        self.solves = 0

    def forward(self, z, x):
        return self.prox(self._product(z) + self.inject(x), 1.0)

    def _product(self, z):
        return z @ self.weight.T

    def linear(self, z):
        self.products += 1
        return self._product(z)

    def inject(self, x):
        return self.input(x)

    def prox(self, v, alpha):
        return v.sign() * (v.abs() - 0.3 * alpha).clamp_min(0) if self.soft else v.relu()

    def inverse_step(self, v, alpha):
        self.solves += 1
        eye = torch.eye(v.shape[-1], dtype=v.dtype)
        return torch.linalg.solve((1 + alpha) * eye - alpha * self.weight, v.mT).mT


def inputs(batch=4, n=5, seed=1, dtype=F64):
    return torch.randn(batch, n, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def by_active_sets(layer, x):
    """The relu equilibrium of each sample by semismooth Newton with dense solves, damped until it holds."""
    w, bias = layer.weight.detach(), layer.inject(x).detach()
    answers = []
    for b in bias:
        z = torch.zeros_like(b)
        for _ in range(500):
            active = torch.diag((w @ z + b > 0).to(b))
            target = torch.linalg.solve(torch.eye(len(b), dtype=b.dtype) - active @ w, active @ b)
            z = z + 0.5 * (target - z)
        assert float(((w @ z + b).relu() - z).abs().max()) < 1e-12
        answers.append(z)
    return torch.stack(answers)


# ---- answers


@BOTH
@pytest.mark.parametrize(("m", "size", "skew"), [(0.5, 1.0, 1.0), (0.1, 1.0, 0.3), (1.0, 2.0, 3.0)])
def test_relu_equilibria(cls, m, size, skew):
    layer, x = Layer(m=m, size=size, skew=skew), inputs()
    found = solve(cls(**TIGHT), layer, torch.zeros(4, 12, dtype=F64), (x,))
    assert bool(found.converged.all())
    torch.testing.assert_close(found["z"], by_active_sets(layer, x), atol=1e-9, rtol=0)


@BOTH
def test_a_prox_that_depends_on_alpha(cls):
    """Soft thresholding by .3: what is found must not depend on alpha, and must be a fixed point of f."""
    layer, x = Layer(soft=True, skew=2.0), inputs()
    found = [
        solve(cls(alpha=alpha, **TIGHT), layer, torch.zeros(4, 12, dtype=F64), (x,)) for alpha in (None, 0.02, 0.04)
    ]
    for each in found:
        assert bool(each.converged.all())
        torch.testing.assert_close(each["z"], found[0]["z"], atol=1e-9, rtol=0)
    torch.testing.assert_close(layer(found[0]["z"], x).detach(), found[0]["z"], atol=1e-10, rtol=0)
    assert bool((found[0]["z"] < 0).any())


@BOTH
def test_convergence_where_plain_iteration_diverges(cls):
    layer, x = Layer(m=1.0, size=2.0, skew=4.0), inputs()
    z0 = torch.zeros(4, 12, dtype=F64)
    assert solve(FixedPointIter(max_iter=200), layer, z0, (x,)).failed()
    assert bool(solve(cls(rtol=1e-9, max_iter=2000), layer, z0, (x,)).converged.all())


@BOTH
def test_float32_and_a_batch_of_one(cls):
    exact = by_active_sets(Layer(), inputs())
    found = solve(
        cls(rtol=1e-9, max_iter=600), Layer(dtype=torch.float32), torch.zeros(4, 12), (inputs(dtype=torch.float32),)
    )
    assert set(found.counts()) <= {Status.AT_PRECISION, Status.CONVERGED}
    torch.testing.assert_close(found["z"].double(), exact, atol=1e-5, rtol=0)
    alone = solve(cls(**TIGHT), Layer(), torch.zeros(1, 12, dtype=F64), (inputs()[:1],))
    torch.testing.assert_close(alone["z"], exact[:1], atol=1e-9, rtol=0)


class ComplexLayer(Layer):
    """Complex states: W = i K - A^H A with soft thresholding of absolute values."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(2)
        a = torch.randn(6, 6, generator=g, dtype=torch.complex128) / 6**0.5
        k = torch.randn(6, 6, generator=g, dtype=torch.complex128)
        self.matrix = 0.5 * torch.eye(6) - a.mH @ a + 0.3 * (k - k.mH)
        self.shift = torch.randn(3, 6, generator=g, dtype=torch.complex128)

    def forward(self, z):
        return self.prox(self.linear(z) + self.shift, 1.0)

    def linear(self, z):
        return z @ self.matrix.T

    def inject(self):
        return self.shift

    def prox(self, v, alpha):
        return torch.polar((v.abs() - 0.1 * alpha).clamp_min(0), v.angle())

    def inverse_step(self, v, alpha):
        eye = torch.eye(6, dtype=v.dtype)
        return torch.linalg.solve((1 + alpha) * eye - alpha * self.matrix, v.mT).mT


@BOTH
def test_complex_states(cls):
    layer = ComplexLayer()
    found = solve(cls(**TIGHT), layer, torch.zeros(3, 6, dtype=torch.complex128))
    assert bool(found.converged.all())
    z = torch.view_as_complex(found["z"].reshape(3, 6, 2))
    torch.testing.assert_close(layer(z), z, atol=1e-9, rtol=0)


class Image(Layer):
    """States of shape (B, 3, 2, 2): the layer over their features."""

    def _product(self, z):
        return super()._product(z.flatten(1)).view_as(z)

    def inject(self, x):
        return super().inject(x).view(-1, 3, 2, 2)

    def prox(self, v, alpha):
        assert isinstance(alpha, float) or alpha.shape == (v.shape[0], 1, 1, 1)
        return super().prox(v, alpha)

    def inverse_step(self, v, alpha):
        return super().inverse_step(v.flatten(1), alpha).view_as(v)


@BOTH
def test_states_keep_the_users_shape(cls):
    found = solve(cls(**TIGHT), Image(soft=True), torch.zeros(4, 3, 2, 2, dtype=F64), (inputs(),))
    flat = solve(cls(**TIGHT), Layer(soft=True), torch.zeros(4, 12, dtype=F64), (inputs(),))
    torch.testing.assert_close(found["z"], flat["z"], atol=1e-10, rtol=0)


# ---- samples are independent


@BOTH
def test_every_row_steps_as_it_does_alone_and_in_any_order(cls):
    layer, x = Layer(skew=3.0), inputs()
    z0, options = torch.zeros(4, 12, dtype=F64), {"tol": 0, "max_iter": 12}
    together = torch.stack(states_of(cls(**options), layer, z0, (x,)))
    for k in range(4):
        alone = torch.stack(states_of(cls(**options), layer, z0[:1], (x[k : k + 1],)))
        torch.testing.assert_close(alone[:, 0], together[:, k], atol=1e-11, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    permuted = torch.stack(states_of(cls(**options), layer, z0, (x[order],)))
    torch.testing.assert_close(permuted, together[:, order], atol=1e-11, rtol=0)


@BOTH
def test_a_row_of_nan_harms_no_other(cls):
    layer, x = Layer(), inputs()
    spoilt = x.clone()
    spoilt[2] = torch.nan
    found = solve(cls(**TIGHT), layer, torch.zeros(4, 12, dtype=F64), (spoilt,))
    assert found["status"].tolist() == [0, 0, 3, 0]
    others = [0, 1, 3]
    torch.testing.assert_close(found["z"][others], by_active_sets(layer, x)[others], atol=1e-9, rtol=0)


@BOTH
def test_a_product_that_fails_once_is_made_good(cls):
    layer = Layer()
    part = "linear" if cls is ForwardBackward else "inverse_step"
    counted = Calls(getattr(layer, part))

    def spoilt(*args):
        out = counted(*args)
        return out.clone().index_fill(0, torch.tensor([1]), torch.nan) if counted.count == 3 else out

    setattr(layer, part, spoilt)
    found = solve(cls(**TIGHT), layer, torch.zeros(4, 12, dtype=F64), (inputs(),))
    assert bool(found.converged.all())
    torch.testing.assert_close(found["z"], by_active_sets(Layer(), inputs()), atol=1e-9, rtol=0)


# ---- the methods


def test_forward_backward_is_the_papers_algorithm():
    layer, x = Layer(soft=True), inputs()
    z, alpha = torch.zeros(4, 12, dtype=F64), 0.1
    seen = states_of(ForwardBackward(alpha=alpha, tol=0, max_iter=10), layer, z, (x,))
    for state in seen:
        z = layer.prox((1 - alpha) * z + alpha * (z @ layer.weight.T + layer.inject(x)), alpha).detach()
        torch.testing.assert_close(state, z, atol=1e-12, rtol=0)


def test_peaceman_rachford_is_the_papers_algorithm():
    """The paper's iterates are prox(u); the states here are its z at half steps, which share their limit."""
    layer, x, alpha = Layer(soft=True), inputs(), 0.7
    bias, eye = layer.inject(x).detach(), torch.eye(12, dtype=F64)
    inverse = torch.linalg.inv((1 + alpha) * eye - alpha * layer.weight.detach())
    seen = states_of(PeacemanRachford(alpha=alpha, tol=0, max_iter=10), layer, torch.zeros(4, 12, dtype=F64), (x,))
    u = alpha * bias  # from z = 0
    for state in seen:
        z = layer.prox(u, alpha)
        u_half = 2 * z - u
        z_half = (u_half + alpha * bias) @ inverse.T
        u = 2 * z_half - u_half
        torch.testing.assert_close(state, z_half, atol=1e-12, rtol=0)


def test_step_sizes_stay_between_the_guarantee_and_plain_iteration():
    layer, x = Layer(m=0.2, size=1.5, skew=2.0), inputs()
    a = torch.eye(12, dtype=F64) - layer.weight.detach()
    m = torch.linalg.eigvalsh((a + a.T) / 2)[0]
    lipschitz = torch.linalg.matrix_norm(a, 2)
    found = solve(ForwardBackward(**TIGHT), layer, torch.zeros(4, 12, dtype=F64), (x,), keep_state=True)
    alpha = found.solver_state.alpha
    assert bool(((alpha >= m / lipschitz**2) & (alpha <= 1)).all())
    assert len(alpha.unique()) > 1  # each sample's own
    fixed = solve(ForwardBackward(alpha=float(m / lipschitz**2), **TIGHT), layer, torch.zeros(4, 12, dtype=F64), (x,))
    assert found["nfe"] < 0.5 * fixed["nfe"]


def test_peaceman_rachford_takes_its_step_size_from_m_and_l():
    layer, x = Layer(), inputs()
    z0 = torch.zeros(4, 12, dtype=F64)
    layer.monotonicity, layer.lipschitz = 0.5, torch.tensor(8.0)
    seen = states_of(PeacemanRachford(tol=0, max_iter=5), layer, z0, (x,))
    given = states_of(PeacemanRachford(alpha=0.5, tol=0, max_iter=5), layer, z0, (x,))
    torch.testing.assert_close(torch.stack(seen), torch.stack(given), atol=0, rtol=0)
    layer.lipschitz = -1.0
    with pytest.raises(FunctionError, match=r"f.lipschitz is -1.0"):
        solve(PeacemanRachford(), layer, z0, (x,))


def test_what_a_step_costs():
    layer, x = Layer(), inputs()
    z0 = torch.zeros(4, 12, dtype=F64)
    found = solve(ForwardBackward(**TIGHT), layer, z0, (x,))
    steps = int(found["steps"].max())
    assert layer.products == steps + 1  # and the start
    assert found["nfe"] == steps + 3  # f itself at both ends
    layer = Layer()
    found = solve(PeacemanRachford(**TIGHT), layer, z0, (x,))
    steps = int(found["steps"].max())
    assert (layer.solves, layer.products) == (steps, 1)
    assert found["nfe"] == steps + 3


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.floats(0.25, 2.0),  # forward_backward takes about (L / m)^2 log(1 / rtol) steps, and L may be 5
    skew=st.floats(0.0, 4.0),
    soft=st.booleans(),
    which=st.sampled_from([ForwardBackward, PeacemanRachford]),
)
def test_every_strongly_monotone_layer_converges(seed, m, skew, soft, which):
    layer, x = Layer(d=6, m=m, skew=skew, soft=soft, seed=seed), inputs(2)
    found = solve(which(rtol=1e-6, max_iter=20000), layer, torch.zeros(2, 6, dtype=F64), (x,), keep_trace=False)
    assert not found.failed()
    z = found["z"]
    error = (layer(z, x) - z).norm(dim=1)
    assert bool((error <= 1e-6 * layer(z, x).norm(dim=1) + 1e-14).all())


# ---- what f must provide


class Missing(nn.Module):
    def forward(self, z):
        return 0.5 * z

    def linear(self, z):
        return z


@BOTH
def test_an_f_without_parts_is_told_what_is_needed(cls):
    name = NAMES[cls]
    with pytest.raises(
        FunctionError, match=rf"'{name}'.*linear\(z\) -> W z; inject.*f is 'Missing' and lacks inject, prox"
    ):
        solve(cls(), Missing(), torch.ones(2, 3))
    with pytest.raises(FunctionError, match=r"f is 'function' and lacks linear, inject, prox.*not a lambda around it"):
        solve(cls(), lambda z: 0.5 * z, torch.ones(2, 3))
    with pytest.raises(FunctionError, match=r"takes a state of one tensor"):
        solve(cls(), Layer(), (torch.zeros(2, 12), torch.zeros(2, 12)), (inputs(2),), fz=torch.ones(2, 24))
    b = torch.zeros(2, 3)
    with torch.no_grad(), pytest.raises(FunctionError, match=r"needs its parts from f"):
        iterate(cls(), LinearProblem(lambda u: 0.5 * u, None, b + 1), b)


def test_peaceman_rachford_alone_needs_the_inverse():
    class NoInverse(Layer):
        inverse_step = None  # pyright: ignore[reportAssignmentType]

    z0, x = torch.zeros(4, 12, dtype=F64), inputs()
    assert not solve(ForwardBackward(**TIGHT), NoInverse(), z0, (x,)).failed()
    with pytest.raises(FunctionError, match=r"lacks inverse_step\."):
        solve(PeacemanRachford(), NoInverse(), z0, (x,))


@BOTH
def test_parts_that_make_another_map_are_refused(cls):
    class Other(Layer):
        def forward(self, z, x):
            return super().forward(z, x) + 0.01

    with pytest.raises(FunctionError, match=r"f is not prox\(linear\(z\) \+ inject\(\), 1\): they differ by 0.01"):
        solve(cls(), Other(), torch.zeros(4, 12, dtype=F64), (inputs(),))


@BOTH
def test_nothing_is_called_converged_on_the_parts_word(cls):
    """An f that agrees with its parts at the start only: the loop evaluates f itself at the end."""

    class Turncoat(Layer):
        def forward(self, z, x):
            return super().forward(z, x) + 0.1 * (z.abs().sum(1, keepdim=True) > 0)

    z0, x = torch.zeros(4, 12, dtype=F64), inputs()
    with pytest.raises(FunctionError, match=r"f is not prox"):
        solve(cls(rtol=1e-9, max_iter=300), Turncoat(), z0, (x,))
    found = solve(cls(rtol=1e-9, max_iter=5), Turncoat(), z0, (x,))
    error = (Turncoat()(found["z"], x) - found["z"]).norm(dim=1)
    torch.testing.assert_close(found["abs_lowest"], error.detach(), atol=1e-12, rtol=0)
    assert not bool(found.converged.any())


@BOTH
def test_states_can_be_selected(cls):
    layer, x, rows = Layer(skew=3.0), inputs(), torch.tensor([3, 1])
    solver = cls()
    with torch.no_grad():
        z = torch.zeros(4, 12, dtype=F64)
        problem = Problem.of(layer, StateSpec(z), (x,))
        fz = problem(z)
        state = solver.init(problem, z, fz)
        for _ in range(3):
            z, state, fz = solver.step(problem, z, fz, state)
        fewer = Problem.of(layer, StateSpec(z[rows]), (x[rows],))
        kept = solver.select(state, rows)
        some = solver.step(fewer, kept.z, fz[rows], kept).z
        every = solver.step(problem, z, fz, state).z
    torch.testing.assert_close(some, every[rows], atol=1e-12, rtol=0)


# ---- by name


@BOTH
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_by_name_with_an_exact_gradient(cls, mode):
    layer, x = Layer(), inputs().requires_grad_()
    gradient = {"name": "implicit", "solver": {"name": "anderson", "rtol": 1e-12, "max_iter": 300}}
    deq = getattr(get_deq(solver={"name": NAMES[cls], **TIGHT}, gradient=gradient), mode)()
    z_out, info = deq(layer, torch.zeros(4, 12, dtype=F64), args=(x,))
    assert bool(info.converged.all())
    g = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=F64)
    (grad,) = torch.autograd.grad(z_out[-1], x, g)
    active = torch.diag_embed((layer(z_out[-1], x).detach() > 0).to(F64))
    matrix = torch.eye(12, dtype=F64) - active @ layer.weight.detach()
    adjoint = torch.linalg.solve(matrix.mT, g[:, :, None])
    expected = (active @ adjoint)[:, :, 0] @ layer.input.weight.detach()
    torch.testing.assert_close(grad, expected, atol=1e-9, rtol=0)


@BOTH
def test_evaluations_of_f_itself_are_few(cls):
    layer, x = Layer(), inputs()
    counted = Calls(layer.forward)
    layer.forward = counted
    solve(cls(**TIGHT), layer, torch.zeros(4, 12, dtype=F64), (x,))
    assert counted.count == 2
