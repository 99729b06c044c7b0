"""Solvers as plain functions: TorchDEQ's signature taken in by name."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pickle

import pytest
import torch
import torchdeq
import torchdeq.solver
from plugins_support import linear_map

import deqcore
from deqcore import (
    BrokenPluginError,
    ConfigError,
    ConfigTypeError,
    Status,
    UnknownKeyError,
    get_deq,
    get_solver,
    register_norm,
    register_solver,
    registry,
)
from deqcore.functions import adapt_solver

BUILT_IN = ["anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter"]


@pytest.fixture(autouse=True)
def _scope():
    with registry.scope():
        yield


class Recorder:
    """A solver function that notes what it was called with."""

    def __init__(self):
        self.calls = []
        self.starts = []

    def __call__(self, func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, weight=1.0, mode="plain"):
        given = {"max_iter": max_iter, "tol": tol, "stop_mode": stop_mode, "indexing": indexing}
        self.calls.append({**given, "weight": weight, "mode": mode})
        self.starts.append(x0)
        states, x = [], x0
        for k in range(max_iter):
            x = torch.lerp(x, func(x), weight)
            if indexing and k + 1 in indexing:
                states.append(x)
        return x, states, {}


def test_a_function_is_called_as_torchdeq_calls_it():
    recorder = Recorder()
    register_solver("mine", recorder)
    f, z0, exact = linear_map()
    deq = get_deq("mine", f_max_iter=60, f_tol=1e-9, f_stop_mode="rel").eval()
    z_out, info = deq(f, z0)
    (call,) = recorder.calls
    assert call == {
        "max_iter": 60, "tol": 1e-9, "stop_mode": "rel", "indexing": None, "weight": 1.0, "mode": "plain",
    }  # fmt: skip
    assert recorder.starts[0].shape == z0.shape
    torch.testing.assert_close(z_out[-1], exact, atol=1e-9, rtol=0)
    assert bool(info.converged.all())
    residual = torch.linalg.vector_norm(f(z_out[-1]) - z_out[-1], dim=1)
    torch.testing.assert_close(info["abs_lowest"], residual)  # measured by the kernel, whatever the function says


def test_evaluations_are_counted():
    register_solver("mine", Recorder())
    f, z0, _ = linear_map()
    seen = []
    _, info = get_deq(solver={"name": "mine", "max_iter": 7}, on_failure="ignore").eval()(
        lambda z: seen.append(0) or f(z), z0
    )
    assert len(seen) == info["nfe"]
    assert 7 <= info["nfe"] <= 9  # seven steps, a look at the result, and eval's gradient


def test_options_become_settings():
    recorder = Recorder()
    register_solver("mine", recorder)
    deq = get_deq(solver={"name": "mine", "weight": 0.5}, on_failure="ignore").eval()
    f, z0, _ = linear_map()
    deq(f, z0)
    deq(f, z0, solver_kwargs={"weight": 0.25, "f_max_iter": 3})
    deq(f, z0)
    assert [call["weight"] for call in recorder.calls] == [0.5, 0.25, 0.5]
    assert [call["max_iter"] for call in recorder.calls] == [40, 3, 40]
    assert deq.config.solver.weight == 0.5
    assert {"weight", "mode"} <= set(type(deq.config.solver).known_keys())
    assert list(type(deq.config.solver).own_fields()) == ["weight", "mode"]


def test_unknown_options_are_refused():
    register_solver("mine", Recorder())
    with pytest.raises(UnknownKeyError, match=r"unknown key 'wieght'. Did you mean 'weight'"):
        get_deq(solver={"name": "mine", "wieght": 0.5})
    with pytest.raises(UnknownKeyError, match="indexing"):  # the core's, not the solver's
        get_deq(solver={"name": "mine", "indexing": [3]})


def test_options_without_a_default_must_be_given():
    def needy(func, x0, weight, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None):
        return torch.lerp(x0, func(x0), weight), [], {}

    register_solver("needy", needy)
    with pytest.raises(ConfigError, match=r"solver\.weight.*required"):
        get_deq("needy")
    assert get_deq(solver={"name": "needy", "weight": 0.5}).config.solver.weight == 0.5


def test_annotated_options_are_checked():
    def typed(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, depth: int = 2, pick: str | None = None):
        return func(x0), [], {}

    register_solver("typed", typed)
    with pytest.raises(ConfigTypeError, match=r"solver\.depth.*'deep'"):
        get_deq(solver={"name": "typed", "depth": "deep"})
    assert get_deq(solver={"name": "typed", "depth": 3, "pick": None}).config.solver.depth == 3


def test_kwargs_take_anything():
    seen = {}

    def loose(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, weight=1.0, **kwargs):
        seen.update(kwargs, weight=weight)
        return func(x0), [], {}

    register_solver("loose", loose)
    f, z0, _ = linear_map()
    get_deq(solver={"name": "loose", "weight": 0.5, "colour": "red"}, on_failure="ignore").eval()(f, z0)
    assert seen == {"weight": 0.5, "colour": "red"}
    with pytest.raises(ConfigError, match="max_iter"):  # what is the kernel's is checked all the same
        get_deq(solver={"name": "loose", "max_iter": -1})


def test_a_function_that_takes_less():
    """What the kernel judges by itself a function may leave out; the step limit it may not."""

    def short(func, x0, max_iter):
        for _ in range(max_iter):
            x0 = func(x0)
        return x0

    register_solver("short", short)
    f, z0, exact = linear_map()
    z_out, info = get_deq("short", f_tol=1e-9, f_max_iter=60).eval()(f, z0)
    torch.testing.assert_close(z_out[-1], exact, atol=1e-9, rtol=0)
    assert bool(info.converged.all())
    with pytest.raises(ConfigTypeError, match=r"'endless' does not take max_iter"):
        register_solver("endless", lambda func, x0, tol=1e-3: x0)


def test_an_option_that_all_solvers_have():
    seen = []

    def patient(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, patience=9):
        seen.append(patience)
        return func(x0), [], {}

    register_solver("patient", patient)
    f, z0, _ = linear_map()
    get_deq(solver={"name": "patient"}, on_failure="ignore").eval()(f, z0)
    get_deq(solver={"name": "patient", "patience": 4}, on_failure="ignore").eval()(f, z0)
    assert seen == [9, 4]


@pytest.mark.parametrize("option", ["name", "copy", "thresholds", "_hidden"])
def test_options_that_can_not_be_settings(option):
    namespace = {}
    exec(f"def odd(func, x0, max_iter=50, {option}=None): return x0, [], {{}}", namespace)
    with pytest.raises(ConfigTypeError, match=f"'odd' has an option called '{option}'.*rename it"):
        register_solver("odd", namespace["odd"])


def test_one_relative_or_one_absolute_tolerance():
    recorder = Recorder()
    register_solver("mine", recorder)
    f, z0, _ = linear_map()
    for given in ({"rtol": 1e-5}, {"atol": 1e-6}):
        get_deq(solver={"name": "mine", "max_iter": 60, **given}).eval()(f, z0)
    assert [(call["tol"], call["stop_mode"]) for call in recorder.calls] == [(1e-5, "rel"), (1e-6, "abs")]
    both = get_deq(solver={"name": "mine", "rtol": 1e-5, "atol": 1e-6}).eval()
    with pytest.raises(ConfigError, match="give one of them"):
        both(f, z0)


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_trajectory(core):
    recorder = Recorder()
    register_solver("mine", recorder)
    f, z0, exact = linear_map()
    deq = get_deq("mine", core=core, indexing=[2, 5], f_max_iter=60, f_tol=1e-9, ift=True)
    z_out, _ = deq(f, z0)
    expected = [z0]
    for _ in range(5):
        expected.append(f(expected[-1]))
    assert len(z_out) == 3
    torch.testing.assert_close(z_out[-1], exact, atol=1e-9, rtol=0)
    if core == "indexing":
        assert recorder.calls[0]["indexing"][:2] == [2, 5]
        assert len(recorder.calls) == 1
    else:
        assert [call["max_iter"] for call in recorder.calls] == [2, 3, 55]
    assert all(state.shape == z0.shape for state in z_out)


def test_sampled_states_are_those_of_the_function():
    register_solver("mine", Recorder())
    f, z0, _ = linear_map()
    spec = deqcore.StateSpec(z0)
    chosen = registry.create("solvers", {"name": "mine", "max_iter": 6})
    run = deqcore.iterate(chosen, deqcore.Problem.of(f, spec), spec.pack(z0), sample_at=[1, 4])
    states = [z0]
    for _ in range(6):
        states.append(f(states[-1]))
    torch.testing.assert_close(run.samples, [states[1], states[4]])
    torch.testing.assert_close(run.solution["z"], states[6])


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 6), (4, 1)])
def test_the_function_sees_the_state_as_the_user_wrote_it(shape):
    recorder = Recorder()
    register_solver("mine", recorder)
    f, z0, exact = linear_map(shape)
    z_out, _ = get_deq("mine", f_max_iter=80, f_tol=1e-9).eval()(f, z0)
    assert recorder.starts[0].shape == shape
    torch.testing.assert_close(z_out[-1], exact, atol=1e-9, rtol=0)


def test_several_states_come_packed():
    recorder = Recorder()
    register_solver("mine", recorder)
    a0, b0 = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, 2, dtype=torch.float64)
    deq = get_deq("mine", f_max_iter=80, f_tol=1e-9).eval()
    z_out, _ = deq(lambda a, b: (0.5 * a + b.sum(1) * 0.1 + 1, 0.3 * b + 0.1 * a[:, None] - 1), (a0, b0))
    assert recorder.starts[0].shape == (3, 6)
    a, b = z_out[-1]
    torch.testing.assert_close(a, 0.5 * a + b.sum(1) * 0.1 + 1, atol=1e-9, rtol=0)
    torch.testing.assert_close(b, 0.3 * b + 0.1 * a[:, None] - 1, atol=1e-9, rtol=0)


def test_complex_and_half_precision_states():
    recorder = Recorder()
    register_solver("mine", recorder)
    deq = get_deq("mine", f_max_iter=80, f_tol=1e-9).eval()
    shift = torch.tensor([1 + 2j, -1j], dtype=torch.complex128)
    z_out, _ = deq(lambda z: 0.5j * z + shift, torch.zeros(3, 2, dtype=torch.complex128))
    torch.testing.assert_close(z_out[-1], (shift / (1 - 0.5j)).expand(3, 2), atol=1e-8, rtol=0)
    assert recorder.starts[-1].dtype == torch.complex128
    half = get_deq("mine", f_max_iter=80, f_tol=1e-2).eval()
    z_out, _ = half(lambda z: 0.5 * z + 1, torch.zeros(3, 2, dtype=torch.bfloat16))
    assert z_out[-1].dtype == torch.bfloat16 and recorder.starts[-1].dtype == torch.float32
    assert torch.equal(z_out[-1], torch.full((3, 2), 2.0, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "returned, got",
    [
        (lambda x: None, "got None"),
        (lambda x: (), "got None"),
        (lambda x: (x.tolist(), [], {}), "got [["),
        (lambda x: (x[:1], [], {}), "of shape (1, 5)"),
        (lambda x: (x.mT, [], {}), "of shape (5, 3)"),
        (lambda x: (x.flatten(), [], {}), "of shape (15,)"),
        (lambda x: (x, [x, None], {}), "got None"),
        (lambda x: (x, [x[0]], {}), "of shape (5,)"),
        (lambda x: (x + 0j, [], {}), "complex128"),
    ],
)
def test_wrong_returns(returned, got):
    def wrong(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None):
        return returned(x0)

    register_solver("wrong", wrong)
    f, z0, _ = linear_map()
    with pytest.raises(BrokenPluginError) as caught:
        get_deq("wrong").eval()(f, z0)
    text = str(caught.value)
    assert "'wrong' must return (z, trajectory, info)" in text and "shape (3, 5)" in text and got in text


def test_its_own_errors_pass_through():
    def raises(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None):
        raise ZeroDivisionError("mine")

    register_solver("raises", raises)
    f, z0, _ = linear_map()
    with pytest.raises(ZeroDivisionError, match="mine"):
        get_deq("raises").eval()(f, z0)


def test_a_function_that_fails_to_converge_is_found_out():
    def lazy(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None):
        return func(x0), [], {"abs_lowest": torch.zeros(len(x0))}  # claims success

    register_solver("lazy", lazy)
    f, z0, _ = linear_map()
    with pytest.warns(deqcore.ConvergenceWarning, match="3 of 3 samples"):
        _, info = get_deq("lazy").eval()(f, z0)
    assert not info.converged.any()


def test_as_the_backward_solver():
    register_solver("mine", Recorder())
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    deq = get_deq(ift=True, f_tol=1e-12, f_max_iter=200, b_solver="mine", b_max_iter=100, b_tol=1e-10)
    z_out, info = deq(lambda z: torch.tanh(0.5 * z + x), torch.zeros(1, 2, dtype=torch.float64))
    (found,) = torch.autograd.grad(z_out[-1].sum(), x)
    slope = 1 - z_out[-1].detach() ** 2
    torch.testing.assert_close(found, slope / (1 - 0.5 * slope), atol=1e-8, rtol=0)
    assert bool(info["backward"].converged.all())


def test_callables_of_other_forms():
    class Callable:
        def __call__(self, func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, extra=0):
            return func(x0), [], {}

    def base(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, weight=1.0):
        return torch.lerp(x0, func(x0), weight), [], {}

    f, z0, _ = linear_map()
    for name, thing in (
        ("object", Callable()),
        ("partial", functools.partial(base, weight=0.5)),
        ("lambda", lambda g, x, **k: g(x)),
    ):
        assert register_solver(name, thing) is thing
        assert get_solver(name) is thing
        get_deq(name, on_failure="ignore").eval()(f, z0)


def test_a_configuration_with_a_function_round_trips():
    register_solver("mine", Recorder())
    deq = get_deq(solver={"name": "mine", "weight": 0.5, "max_iter": 9})
    again = deqcore.DEQConfig.from_dict(json.loads(deq.config.to_json()))
    assert again == deq.config
    for copied in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert copied.config == deq.config and copied.solver.settings.weight == 0.5


def test_the_class_carries_the_functions_own_words():
    def documented(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None):
        """What it does."""
        return func(x0), [], {}

    adapted = adapt_solver("documented", documented)
    assert inspect.getdoc(adapted) == "What it does."
    assert adapted.__module__ == __name__
    with pytest.raises(ConfigTypeError, match="a solver is a Solver class or a function, got int"):
        adapt_solver("number", 3)


def test_torchdeqs_own_functions_run_here():
    f, z0, exact = linear_map()
    for name in BUILT_IN:
        register_solver(f"td_{name}", torchdeq.solver.get_solver(name))
    for name in BUILT_IN:
        deq = get_deq(f"td_{name}", f_max_iter=60, f_tol=1e-8, ift=True)
        z_out, info = deq(f, z0)
        torch.testing.assert_close(z_out[-1], exact, atol=1e-7, rtol=0)
        assert bool((info["status"] == Status.CONVERGED).all())
    deq = get_deq(solver={"name": "td_anderson", "m": 3, "lam": 1e-6}, f_max_iter=60, f_tol=1e-8).eval()
    assert deq.config.solver.m == 3
    torch.testing.assert_close(deq(f, z0)[0][-1], exact, atol=1e-7, rtol=0)


def test_register_norm():
    class Scaled(deqcore.Norm[deqcore.NormSettings]):
        def parametrization(self, weight, dim):
            return torch.nn.Identity()

    assert register_norm("scaled", Scaled) is Scaled
    assert registry.get("norms", "scaled") is Scaled
    with pytest.raises(ConfigTypeError, match=r"a norm is a subclass of deqcore.Norm"):
        register_norm("other", torch.nn.Identity)
