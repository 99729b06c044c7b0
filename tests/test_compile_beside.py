"""torch.compile where a call can't be part of a graph: f is compiled once, and all else is as without a compiler."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from compile_support import SOLVERS, Model, breaks, compare, compiled, config, half, inputs
from torch import nn

import deqcore
from deqcore import ConvergenceError, FunctionError, Solver, Step, UnknownKeyError, get_deq

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# ---- with a stop test


@pytest.mark.parametrize("solver", [*SOLVERS, "broyden"])
def test_with_a_stop_test_f_is_compiled_once_and_nothing_again(solver):
    model, x = Model(**config(solver, tol=1e-8, max_iter=60)), inputs()
    with torch.no_grad():
        graphs, info = compare(model, x, calls=3)
        assert bool(info.converged.all())
        assert len(graphs.with_call(torch.tanh)) == 1
        assert breaks() <= len(info["abs_trace"][0])  # one a check at most
        # The one graph before the solve, and f.
        assert len(graphs.found) == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("gradient", ["phantom", "implicit"])
def test_training_with_a_stop_test(gradient, backend):
    model, x = Model(**config("anderson", gradient, tol=1e-9, max_iter=60)), inputs()
    graphs, info = compare(model, x, 1e-12, backend, calls=3)
    assert len(graphs.with_call(torch.tanh)) == 1
    assert ("backward" in info) == (gradient == "implicit")


def test_the_number_of_breaks_that_dynamo_tells():
    model, x = Model(**config("anderson", "implicit", tol=1e-8, max_iter=60)), inputs()
    with torch.no_grad():
        told = torch._dynamo.explain(model)(x)
        info = model(x)[1]
    assert told.graph_break_count < len(info["abs_trace"][0])


def test_training_implicitly_with_a_fixed_number_of_steps_breaks_once():
    model = Model(**config("anderson", "implicit"))
    graphs, _ = compare(model, inputs())
    assert len(torch._dynamo.utils.counters["graph_break"]) == 1  # reasons; every frame on the way counts it
    tanh = [sum(node.target is torch.tanh for node in g.graph.nodes) for g in graphs.found]
    assert sorted(tanh) == [0, 3]  # what is before the solve, and the solve


def test_batch_sizes_with_a_stop_test():
    model = Model(**config("anderson", "implicit", tol=1e-8, max_iter=60))
    run, graphs = compiled(model)
    for batch in (6, 5, 9, 3):
        x = inputs(batch)
        torch.testing.assert_close(run(x)[0], model(x)[0], atol=1e-12, rtol=0)
    assert len(graphs.with_call(torch.tanh)) <= 2  # one for the first size, one for any other


@pytest.mark.parametrize("kind", ["module", "method", "callable"])
def test_f_of_any_kind_is_compiled(kind):
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double()

    class Halved:
        def __call__(self, z):
            return 0.5 * torch.tanh(z) + 0.1

        def method(self, z):
            return 0.5 * torch.tanh(z) + 0.1

    fn = {"module": net, "method": Halved().method, "callable": Halved()}[kind]
    deq, x = get_deq(**config("anderson", tol=1e-8), on_failure="ignore"), inputs()
    run, graphs = compiled(lambda x: deq(fn, x))
    with torch.no_grad():
        for _ in range(2):
            (z,), _ = run(x)
        torch.testing.assert_close(z, deq(fn, x)[0][-1], atol=1e-12, rtol=0)
    assert len(graphs.found) == 1


def test_many_functions_don_t_exhaust_dynamo():
    """Dynamo compiles one piece of code eight times at most, so every f needs a piece of its own."""
    deq, x = get_deq(**config("anderson", tol=1e-8), on_failure="ignore"), inputs()
    nets = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double() for _ in range(9)]
    run, graphs = compiled(lambda x: [deq(net, x)[0][-1] for net in nets])
    with torch.no_grad():
        run(x)
        for mine, net in zip(run(x), nets, strict=True):
            torch.testing.assert_close(mine, deq(net, x)[0][-1], atol=1e-12, rtol=0)
    assert len(graphs.found) == 9


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_function_that_the_user_compiled(backend):
    layer, x = nn.Linear(8, 8).double(), inputs()
    deq = get_deq(**config("anderson", "implicit", tol=1e-9, max_iter=60))
    fn, graphs = compiled(lambda z: torch.tanh(0.4 * layer(z) + x), backend)
    for _ in range(2):
        layer.zero_grad()
        z_out, _ = deq(fn, torch.zeros_like(x))
        z_out[-1].pow(3).sum().backward()
    mine = layer.weight.grad.clone()
    layer.zero_grad()
    right, _ = deq(lambda z: torch.tanh(0.4 * layer(z) + x), torch.zeros_like(x))
    right[-1].pow(3).sum().backward()
    torch.testing.assert_close(z_out[-1], right[-1], atol=1e-12, rtol=0)
    torch.testing.assert_close(mine, layer.weight.grad, atol=1e-9, rtol=0)
    assert len(graphs.found) == 1  # of the solve; the gradient's own evaluation is watched, which dynamo sits out


def test_the_function_of_a_solver():
    solver, x = deqcore.get_solver("anderson"), inputs()
    run, graphs = compiled(lambda x: solver(half, x, tol=1e-8)[0])
    torch.testing.assert_close(run(x), solver(half, x, tol=1e-8)[0], atol=1e-12, rtol=0)
    assert len(graphs.found) == 1


# ---- what a solve keeps


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "dropout"])
@pytest.mark.parametrize("solve", ["fixed", "fixed implicit", "stop"])
def test_weights_and_masks_are_made_once_a_solve(kind, solve):
    options = {
        "fixed": config("fixed_point_iter"),
        "fixed implicit": config("fixed_point_iter", "implicit"),
        "stop": config("anderson", "implicit", tol=1e-8, max_iter=60),
    }[solve]
    made = {"dropout": 0.3} if kind == "dropout" else {"norm": kind}
    model = Model(**made, **options)
    graphs, _ = compare(model, inputs(), calls=3, fullgraph=solve == "fixed")
    assert len(graphs.found) <= 3


# ---- what is no graph


def test_fullgraph_says_what_it_needs():
    """In a process of its own: after such an error, dynamo runs every frame its own way, which keeps tensors longer."""
    code = """
        import torch
        from compile_support import Model, config, inputs

        try:
            torch.compile(Model(**config("anderson", tol=1e-3)), backend="eager", fullgraph=True)(inputs())
        except torch._dynamo.exc.Unsupported as error:
            print(error)
    """
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert "fixed number of steps (tol=0)" in said.stdout, said.stderr


class Peeking(Solver):
    """Looks at values, and says so."""

    traceable = False

    def step(self, problem, z, fz, state):
        return Step(fz if fz.sum().item() < 1e9 else z, None)


def test_a_solver_that_can_t_be_traced_is_left_out():
    with deqcore.registry.scope():
        deqcore.register_solver("peeking", Peeking)
        model = Model(**config("peeking"))
        graphs, _ = compare(model, inputs())
    assert len(graphs.with_call(torch.tanh)) == 1
    assert len(torch._dynamo.utils.counters["graph_break"]) == 1


@pytest.mark.parametrize("solver", ["newton_krylov", "broyden"])
def test_solvers_of_other_kinds(solver):
    model = Model(**config(solver, "implicit", tol=1e-8, max_iter=60))
    compare(model, inputs(), 1e-10, "aot_eager")


def test_second_derivatives():
    """A compiled backward could not be differentiated again."""
    settings = {"name": "phantom", "steps": 2}
    model, x = Model(**config("anderson", settings, tol=1e-8, max_iter=60)), inputs()

    def penalty(run):
        z, _ = run(x)
        (grad,) = torch.autograd.grad(z.sum(), model.layer.weight, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), model.inject.weight)[0]

    run = compiled(model)[0]
    torch.testing.assert_close(penalty(run), penalty(model), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"core": {"name": "sliced", "n_states": 2}},
        {"regularizers": [{"name": "jacobian", "weight": 0.1}]},
        {"keep_state": True},
    ],
    ids=lambda o: next(iter(o)),
)
def test_other_configurations_run_beside_the_graph(options):
    torch.manual_seed(0)
    compare(Model(**config("fixed_point_iter"), **options), inputs())
    assert len(torch._dynamo.utils.counters["graph_break"]) == 1


def test_options_of_a_call_run_beside_the_graph():
    deq, x, seen = get_deq(**config("fixed_point_iter"), on_failure="ignore"), inputs(), []
    run, _ = compiled(lambda x, **options: deq(half, x, **options))
    assert run(x, callback=lambda k, z, r: seen.append(k))[1]["nfe"] == 5
    assert seen == [1, 2, 3]
    assert run(x, solver_kwargs={"tol": 1.0})[1]["nfe"] < 5
    assert run(x, solver_kwargs={"max_iter": 0})[1]["status"].tolist() == [6] * 6
    warm = run(x)[1]
    assert bool((run(x, warm_start=warm)[1]["abs_lowest"] <= warm["abs_lowest"]).all())
    deq.eval()
    torch.testing.assert_close(run(x, sradius_mode=True)[1]["sradius"], deq(half, x, sradius_mode=True)[1]["sradius"])


def test_dicts_and_scalars_run_beside_the_graph():
    deq = get_deq(**config("fixed_point_iter"), on_failure="ignore")
    run, _ = compiled(lambda z0, fn: deq(fn, z0)[0][-1])
    z0 = {"a": inputs()}
    torch.testing.assert_close(
        run(z0, lambda s: {"a": half(s["a"])})["a"], deq(half, z0["a"])[0][-1], atol=1e-12, rtol=0
    )
    torch.testing.assert_close(run(torch.tensor(0.3), half), deq(half, torch.tensor(0.3))[0][-1])


def test_errors_are_the_same():
    x = inputs()
    for tol in (0.0, 1e-6):
        deq = get_deq(**config("fixed_point_iter", tol=tol), on_failure="ignore")
        run, _ = compiled(lambda x, fn=half, deq=deq, **options: deq(fn, x, **options))
        with pytest.raises(FunctionError, match=r"f returned shape \(6, 2\)"):
            run(x, lambda z: z[:, :2])
        with pytest.raises(UnknownKeyError, match="max_itr"):
            run(x, solver_kwargs={"max_itr": 3})
        with pytest.raises(deqcore.FunctionTypeError, match="args must be a tuple"):
            run(x, args=x)


@pytest.mark.parametrize("tol", [0.0, 1e-12])
def test_failures_raise_where_they_are_to(tol):
    solver = {"name": "fixed_point_iter", "tol": tol, "max_iter": 3}
    deq, x = get_deq(solver=solver, gradient="phantom", on_failure="raise"), inputs()
    with pytest.raises(ConvergenceError, match="6 of 6 samples"):
        torch.compile(lambda x: deq(lambda z: torch.log(-1 - z * z) if tol == 0 else half(z), x), backend="eager")(x)


def test_failures_warn_at_the_user_s_line():
    deq, x = get_deq(solver={"name": "anderson", "tol": 1e-12, "max_iter": 2}, gradient="phantom"), inputs()
    run, _ = compiled(lambda x: deq(half, x)[0][-1])
    with pytest.warns(deqcore.ConvergenceWarning, match="max_steps") as caught:
        run(x)
    assert caught[0].filename == __file__
