"""The solver, the core and the backend as parts of deqcore: what is said, what is obeyed, what is refused."""

from __future__ import annotations

import deqcore_reversible
import pytest
import torch
from reversible_support import DOUBLE, close, contraction, noise, reversible, unrolled, weight

import deqcore
from deqcore import Status

# ---- the solver


def test_the_solver_makes_the_coupled_steps():
    f, _, x = contraction()
    for damping in (0.2, 0.8):
        solver = {"name": "reversible", "damping": damping, "max_iter": 7, "tol": 0.0, "return_final": True}
        (z,), info = deqcore.get_deq(solver=solver).eval()(f, torch.zeros_like(x), solver_kwargs={"max_iter": 7})
        torch.testing.assert_close(z.detach(), unrolled(f, torch.zeros_like(x), damping, 7)[-1].detach())
        assert float((f(z) - z).detach().norm(dim=1).max()) == pytest.approx(float(info["abs_lowest"].max()))


def test_two_evaluations_a_step():
    f, _, x = contraction()
    deq = deqcore.get_deq("reversible", f_max_iter=9, f_tol=0.0, on_failure="ignore").eval()
    with torch.no_grad():
        _, info = deq(f, torch.zeros_like(x), solver_kwargs={"max_iter": 9})
    assert info["nfe"] == 1 + 2 * 9


def test_the_solver_finds_the_fixed_point_and_compacts():
    w, x = weight(rho=0.6).detach(), noise(4, 6)
    x[0] = 0.0
    deq = deqcore.get_deq(solver={"name": "reversible", "tol": 1e-11, "max_iter": 400}, compact=True).eval()
    (z,), info = deq(lambda z, x: torch.tanh(z @ w.mT + x), torch.zeros_like(x), args=(x,))
    assert info.converged.all() and int(info["sample_nfe"][0]) < int(info["sample_nfe"][1])
    torch.testing.assert_close(torch.tanh(z @ w.mT + x), z, atol=1e-10, rtol=0)


def test_a_half_precision_state():
    w = weight(rho=0.6, dtype=torch.float32).detach()
    deq = deqcore.get_deq(solver={"name": "reversible", "tol": 0.02, "max_iter": 100}).eval()
    (z,), info = deq(lambda z: torch.tanh(z.float() @ w.mT + 1).to(z), torch.zeros(4, 6, dtype=torch.bfloat16))
    assert info.converged.all() and z.dtype == torch.bfloat16


# ---- the forward pass with core="reversible"


def test_it_stops_where_the_tolerance_is_met():
    f, w, x = contraction()
    z0 = torch.zeros_like(x)
    (z,), info = reversible(200, 0.5, tol=1e-6)(f, z0)
    made = int(info["steps"].max())
    assert info.converged.all() and 8 < made < 100 and info["nfe"] == 2 + 2 * made
    assert float((f(z) - z).detach().norm(dim=1).max()) == pytest.approx(float(info["abs_lowest"].max()))
    expected = torch.autograd.grad(unrolled(f, z0, 0.5, made)[-1].sum(), (w, x))
    close(torch.autograd.grad(z.sum(), (w, x)), expected)


def test_a_failure_of_the_forward_is_told():
    f, _, x = contraction()
    with pytest.warns(deqcore.ConvergenceWarning, match=r"forward solve: 4 of 4 samples max_steps"):
        _, info = reversible(5, tol=1e-9)(f, torch.zeros_like(x))
    assert info.counts() == {Status.MAX_STEPS: 4} and float(info["abs_lowest"].min()) > 1e-9
    with pytest.raises(deqcore.ConvergenceError, match="forward solve"):
        reversible(5, tol=1e-9, on_failure="raise")(f, torch.zeros_like(x))


def test_it_trains_without_grad_too():
    f, _, x = contraction()
    with torch.no_grad():
        (z,), info = reversible(5)(f, torch.zeros_like(x))
    torch.testing.assert_close(z, unrolled(f, torch.zeros_like(x), 0.5, 5)[-1].detach())
    assert not z.requires_grad and info["nfe"] == 11


def test_no_step_hands_the_start_on():
    f, _, _ = contraction()
    z0 = noise(4, 6, seed=3).requires_grad_()
    (z,), info = reversible()(f, z0, solver_kwargs={"f_max_iter": 0})
    assert torch.equal(z, z0) and info.counts() == {Status.SKIPPED: 4}
    close(torch.autograd.grad(z.square().sum(), z0), [2 * z0.detach()])


def test_a_start_within_the_tolerance_still_gets_a_gradient():
    f, w, x = contraction()
    deq = reversible(300, tol=1e-10, gradient={"steps": 6})
    (z,), info = deq(f, torch.zeros_like(x))
    (again,), second = deq(f, torch.zeros_like(x), warm_start=info)
    assert second.converged.all() and second["nfe"] < 20
    expected = torch.autograd.grad(unrolled(f, z.detach(), 0.5, 6)[-1].sum(), (w, x))
    close(torch.autograd.grad(again.sum(), (w, x)), expected)


def test_each_sample_has_the_gradient_of_the_state_it_returned():
    """Far steps make some samples worse: the best state of each is returned, from different steps."""
    w, x = weight(rho=2.5, seed=3), (2 * noise(5, 6)).requires_grad_()
    z0 = noise(5, 6, seed=2)

    def f(z):
        return torch.sin(z @ w.mT + x)

    (z,), info = reversible(9, 0.7, tol=1e-9, on_failure="ignore")(f, z0)
    steps = info["nstep"].long()
    assert len(set(steps.tolist())) > 2
    states = torch.stack(unrolled(f, z0, 0.7, 9))
    expected = states[steps, torch.arange(5)]
    close([z.detach()], [expected.detach()])
    cotangent = noise(5, 6, seed=5)
    found = torch.autograd.grad((z * cotangent).sum(), (w, x))
    close(found, torch.autograd.grad((expected * cotangent).sum(), (w, x)), 1e-9)


def test_a_sample_that_is_not_finite_leaves_the_others_their_gradient():
    w, x = weight(rho=0.6), noise(4, 6).requires_grad_()

    def f(z, x):
        wild = torch.where((z.detach().abs().amax(1) > 0.05) & bad, torch.nan, 1.0)
        return torch.tanh(z @ w.mT + x) * wild[:, None]

    bad = torch.tensor([False, True, False, False])
    z0 = torch.zeros(4, 6, dtype=DOUBLE)
    deq = reversible(30, 0.3, tol=1e-12, on_failure="ignore")
    (z,), info = deq(f, z0, args=(x,))
    assert info["status"].tolist()[1] == Status.NON_FINITE
    z[[0, 2, 3]].sum().backward()
    found = w.grad.clone(), x.grad.clone()
    w.grad = x.grad = None
    bad = torch.zeros(3, dtype=torch.bool)
    (others,), _ = deq(f, z0[1:], args=(x[[0, 2, 3]],))
    others.sum().backward()
    close(found, (w.grad, x.grad), 1e-9)
    assert bool((found[1][1] == 0).all())


# ---- from the state that another solver found


def test_a_few_steps_from_the_equilibrium_tend_to_the_implicit_gradient():
    f, w, x = contraction()
    solver = {"name": "anderson", "tol": 1e-12, "max_iter": 200}
    exact = deqcore.get_deq(solver=solver, gradient={"name": "implicit", "solver": {"tol": 1e-12}})
    (z,), _ = exact(f, torch.zeros_like(x))
    expected = torch.autograd.grad(z.square().sum(), (w, x))
    errors = []
    for steps in (2, 8, 50):
        deq = deqcore.get_deq(solver=solver, gradient={"name": "reversible", "steps": steps, "damping": 0.8})
        (z,), info = deq(f, torch.zeros_like(x))
        assert info.converged.all()
        found = torch.autograd.grad(z.square().sum(), (w, x))
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)))
        assert info["backward"]["nfe"] == 2 * steps
    assert errors[0] > 1e-2 and errors[1] < errors[0] / 3 and errors[2] < 1e-9


def test_eval_mode_keeps_the_value():
    f, w, x = contraction()
    deq = reversible(300, tol=1e-8, gradient={"steps": 5}).eval()
    with torch.no_grad():
        (plain,), _ = deq(f, torch.zeros_like(x))
    (z,), info = deq(f, torch.zeros_like(x))
    assert torch.equal(z, plain)
    expected = torch.autograd.grad(unrolled(f, plain, 0.5, 5)[-1].sum(), (w, x))
    close(torch.autograd.grad(z.sum(), (w, x)), expected)
    assert info["backward"]["steps"].tolist() == [5] * 4


def test_in_fixed_point():
    w, x = weight(rho=0.6), noise(4, 6).requires_grad_()
    keywords = {"solver": {"name": "anderson", "tol": 1e-10}, "gradient": {"name": "reversible", "steps": 60}}
    z = deqcore.fixed_point(lambda z, x, w: torch.tanh(z @ w.mT + x), torch.zeros_like(x), (x, w), **keywords)
    keywords["gradient"] = "implicit"
    other = deqcore.fixed_point(lambda z, x, w: torch.tanh(z @ w.mT + x), torch.zeros_like(x), (x, w), **keywords)
    close(torch.autograd.grad(z.sum(), (w, x)), torch.autograd.grad(other.sum(), (w, x)), 1e-5)


# ---- the backward's own report


def test_f_that_does_not_repeat_itself_is_reported():
    w, x = weight(rho=0.6), noise(4, 6).requires_grad_()
    told = []
    generator = torch.Generator().manual_seed(0)

    def f(z):
        drawn = torch.rand(z.shape, generator=generator, dtype=z.dtype)
        return torch.tanh(z @ w.mT + x) * (0.5 + drawn)

    (z,), info = reversible(20, 0.3)(f, torch.zeros_like(x), backward_writer=told.append)
    with pytest.warns(deqcore.ConvergenceWarning, match=r"backward solve: 4 of 4 samples stalled"):
        z.sum().backward()
    assert told == [info["backward"]] and not told[0]["repeats"]
    assert float(told[0]["rel_lowest"].min()) > 1e-3
    (z,), _ = reversible(20, 0.3, on_failure="raise")(f, torch.zeros_like(x))
    with pytest.raises(deqcore.ConvergenceError, match="backward solve"):
        z.sum().backward()


def test_the_report_does_not_depend_on_the_losss_scale():
    f, w, x = contraction()
    (z,), info = reversible(30)(f, torch.zeros_like(x))
    found = torch.autograd.grad(z.sum(), w, retain_graph=True)[0]
    residual = info["backward"]["rel_lowest"]
    for scale in (1e-4, 1e-30, 1e20):
        other = torch.autograd.grad(scale * z.sum(), w, retain_graph=True)[0]
        close([other / scale], [found], 1e-12)
        torch.testing.assert_close(info["backward"]["rel_lowest"], residual, rtol=0, atol=0)


# ---- settings and names


@pytest.mark.parametrize("wrong", [{"damping": 1.0}, {"damping": 0.0}, {"damping": "half"}, {"damping": -0.5}])
def test_the_damping_is_checked(wrong):
    with pytest.raises(deqcore.ConfigError, match=r"solver\.damping"):
        deqcore.get_deq(solver={"name": "reversible", **wrong})
    with pytest.raises(deqcore.ConfigError, match=r"gradient\.damping"):
        deqcore.get_deq(gradient={"name": "reversible", **wrong})


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"tolerance": 0}, {"tolerance": float("inf")}, {"toleranec": 1e-3}])
def test_settings_are_checked(wrong):
    with pytest.raises(deqcore.ConfigError, match=rf"gradient\.{next(iter(wrong))}|tolerance"):
        deqcore.get_deq(gradient={"name": "reversible", **wrong})


def test_two_dampings_for_one_iteration_are_refused():
    f, _, x = contraction()
    with pytest.raises(deqcore.ConfigError, match=r"gradient\.damping=0\.4 and solver\.damping=0\.5 differ"):
        reversible(gradient={"damping": 0.4})(f, torch.zeros_like(x))
    reversible(damping=0.4, gradient={"beta": 0.4})(f, torch.zeros_like(x))


@pytest.mark.parametrize("several", [{"n_states": 3}, {"indexing": (2,)}])
def test_the_core_returns_one_state(several):
    with pytest.raises(deqcore.ConfigError, match="core='reversible' returns one state"):
        deqcore.get_deq("reversible", gradient="reversible", core={"name": "reversible", **several})


def test_states_on_the_way_with_the_sliced_core():
    f, w, x = contraction()
    solver = {"name": "reversible", "max_iter": 12, "tol": 0.0, "return_final": True}
    gradient = {"name": "reversible", "steps": 3}
    deq = deqcore.get_deq(solver=solver, gradient=gradient, core={"n_states": 2})
    states, _ = deq(f, torch.zeros_like(x))
    start = unrolled(f, torch.zeros_like(x), 0.5, 6)[-1].detach()
    expected = unrolled(f, start, 0.5, 3)[-1]
    close([states[0].detach()], [expected.detach()])
    close(torch.autograd.grad(states[0].sum(), (w, x)), torch.autograd.grad(expected.sum(), (w, x)))


def test_where_they_come_from():
    kinds = {
        "solver": deqcore_reversible.Reversible,
        "gradient": deqcore_reversible.ReversibleGradient,
        "core": deqcore_reversible.ReversibleCore,
    }
    for kind, cls in kinds.items():
        entry = deqcore.registry.find(kind, "reversible")
        assert (entry.origin, entry.version) == ("deqcore-reversible", "0.1.0")
        assert deqcore.registry.get(kind, "deqcore-reversible/reversible") is cls
