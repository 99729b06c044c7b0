"""torch.compile: what is one graph, where graphs break, and that values, gradients and info stay what they are."""

import copy
import shutil
import warnings

import pytest
import torch
from torch import nn

import deqcore
from deqcore import ConvergenceError, FunctionError, Solver, Step, UnknownKeyError, get_deq

F64 = torch.float64
SOLVERS = ("fixed_point_iter", "damped", "anderson")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # its own affairs
        yield


class Graphs:
    """A backend that keeps the graphs it is given, and runs them by another backend."""

    def __init__(self, backend="eager"):
        self.backend = torch._dynamo.lookup_backend(backend)
        self.found = []

    def __call__(self, graph, inputs):
        self.found.append(graph)
        return self.backend(graph, inputs)

    def with_call(self, target):
        """The graphs that call the function `target` somewhere."""
        return [g for g in self.found if any(node.target is target for node in g.graph.nodes)]


def compiled(model, backend="eager", **options):
    graphs = Graphs(backend)
    return torch.compile(model, backend=graphs, **options), graphs


class Model(nn.Module):
    """An equilibrium of a function that is made anew in every call, as programs do."""

    def __init__(self, features=8, dtype=F64, norm=None, dropout=0.0, **config):
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.layer = nn.Linear(features, features), nn.Linear(features, features)
        self.drop = deqcore.VariationalDropout(dropout)
        self.to(dtype)
        if norm is not None:
            deqcore.apply_norm(self.layer, norm)
        self.deq = get_deq(on_failure="ignore", **config)

    def forward(self, x):
        bias = self.inject(x)

        def fn(z):
            return torch.tanh(0.4 * self.drop(self.layer(z)) + bias)

        z_out, info = self.deq(fn, torch.zeros_like(x))
        return z_out[-1], info


def inputs(batch=6, features=8, dtype=F64, seed=1):
    return torch.randn(batch, features, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def config(solver, gradient="phantom", tol=0.0, max_iter=3, **settings):
    return {"solver": {"name": solver, "tol": tol, "max_iter": max_iter, **settings}, "gradient": gradient}


def step(run, model, x):
    """State, info and gradients of one training step of `run`, which runs `model`."""
    model.zero_grad()
    torch.manual_seed(2)
    z, info = run(x)
    if z.requires_grad:
        (z**3).sum().backward()
    return z.detach(), info, [p.grad for p in model.parameters() if p.grad is not None]


def compare(model, x, atol=1e-12, backend="eager", calls=2, **options):
    """Compiled and plain calls give the same; returns the graphs and the compiled call's info."""
    plain = copy.deepcopy(model)
    run, graphs = compiled(model, backend, **options)
    for _ in range(calls):
        z, info, grads = step(run, model, x)
        right, right_info, right_grads = step(plain, plain, x)
    torch.testing.assert_close(z, right, atol=atol, rtol=0)
    assert len(grads) == len(right_grads)
    for mine, theirs in zip(grads, right_grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol * 100, rtol=atol)
    same_info(info, right_info, atol)
    return graphs, info


def same_info(mine, theirs, atol):
    assert type(mine) is deqcore.Solution
    assert set(mine) == set(theirs)
    for key in set(theirs) - {"backward"}:
        if isinstance(theirs[key], torch.Tensor):
            torch.testing.assert_close(mine[key], theirs[key], atol=10 * atol, rtol=1e-5 if atol > 1e-9 else 1e-9)
        else:
            assert mine[key] == theirs[key], key
    if "backward" in theirs:
        same_info(mine["backward"], theirs["backward"], max(atol, 1e-9))


def breaks():
    return sum(torch._dynamo.utils.counters["graph_break"].values())


# ---- one graph


@pytest.mark.parametrize(
    ("solver", "mode"), [*((solver, mode) for solver in SOLVERS for mode in ("train", "no_grad")), ("anderson", "eval")]
)
def test_a_fixed_number_of_steps_is_one_graph(solver, mode):
    model = Model(**config(solver))
    model.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        graphs, info = compare(model, inputs(), fullgraph=True)
    assert len(graphs.found) == 1 and breaks() == 0
    assert info["abs_trace"].shape == (6, 4) and info["steps"].tolist() == [3] * 6


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_graph_in_single_precision_by_aot_autograd(solver):
    gradient = {"name": "phantom", "steps": 2, "damping": 0.7}
    model = Model(dtype=torch.float32, **config(solver, gradient))
    graphs, _ = compare(model, inputs(dtype=torch.float32), 1e-6, "aot_eager", fullgraph=True)
    assert len(graphs.found) == 1


def test_implicit_without_grad_is_one_graph():
    model = Model(**config("anderson", "implicit")).eval()
    with torch.no_grad():
        graphs, _ = compare(model, inputs(), fullgraph=True)
    assert len(graphs.found) == 1


@pytest.mark.parametrize(
    "settings",
    [{"residual_norm": "max", "max_nfe": 2}, {"residual_norm": "rms", "return_final": True}],
    ids=lambda settings: settings["residual_norm"],
)
def test_solver_settings_in_the_graph(settings):
    compare(Model(**config("fixed_point_iter", **settings)), inputs(), fullgraph=True)


def test_kernel_settings_in_the_graph():
    compare(Model(**config("fixed_point_iter"), check_every=2, keep_trace=False), inputs(), fullgraph=True)


def test_a_solver_that_looks_at_nothing_is_one_graph_whatever_its_tolerance():
    compare(Model(**config("simple_fixed_point_iter", tol=1e-3)), inputs(), fullgraph=True)


def test_steps_of_one_call_and_of_eval():
    fn, x = torch.cos, inputs()
    deq = get_deq(**config("anderson", memory=10, max_iter=3), eval_max_iter=5)
    for mode, options in ((True, {"f_max_iter": 4}), (True, {"max_iter": 2}), (False, None)):
        deq.train(mode)
        run = torch.compile(lambda x, given=options: deq(fn, x, solver_kwargs=given), backend="eager", fullgraph=True)
        right, info = deq(fn, x, solver_kwargs=options)
        (z,), mine = run(x)
        torch.testing.assert_close(z, right[-1], atol=1e-12, rtol=0)
        same_info(mine, info, 1e-12)


def half(z):
    return 0.5 * torch.cos(z) + 0.2


STATES = {
    "images": (torch.randn(3, 2, 4), half, {}),
    "one equilibrium": (torch.randn(3, 4), lambda z: half(z.roll(1, 0)), {"batch_dims": 0}),
    "complex": (torch.randn(3, 4, dtype=torch.complex128), lambda z: (0.5 + 0.2j) * z + 1, {}),
    "bfloat16": (torch.randn(3, 4, dtype=torch.bfloat16), half, {}),
    "pair": ((torch.randn(3, 4), torch.randn(3, 2).double()), lambda a, b: (half(a), half(b)), {}),
    "list": ([torch.randn(3, 4), torch.randn(3, 2).bfloat16()], lambda a, b: [half(a), half(b)], {}),
}


@pytest.mark.parametrize("name", STATES)
def test_states_in_the_graph(name):
    z0, fn, options = STATES[name]
    deq = get_deq(**config("fixed_point_iter", max_iter=3), **options)
    right, info = deq(fn, z0)
    (z,), mine = torch.compile(lambda z0: deq(fn, z0), backend="eager", fullgraph=True)(z0)
    assert type(z) is type(right[-1])
    for a, b in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (z, right[-1])), strict=True):
        torch.testing.assert_close(a, b, atol=0 if a.dtype == torch.bfloat16 else 1e-12, rtol=0)
    same_info(mine, info, 1e-6)


def test_info_can_be_read_in_the_graph():
    deq, x = get_deq(**config("fixed_point_iter", max_iter=3)), inputs()
    keys = ("abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep", "sradius", "steps", "sample_nfe", "z")

    def read(x):
        info = deq(half, x)[1]
        return [info[key] for key in keys], info["nfe"], info["nvjp"]

    mine, right = torch.compile(read, backend="eager", fullgraph=True)(x), read(x)
    torch.testing.assert_close(mine[0], right[0])
    assert mine[1:] == right[1:] == (5, 0)


def test_info_outlives_the_graph_and_starts_the_next_solve():
    deq, x = get_deq(**config("anderson", max_iter=3)), inputs()
    info = torch.compile(deq, backend="eager", fullgraph=True)(half, x)[1]
    assert info.counts() == {deqcore.Status.MAX_STEPS: 6}
    assert "max_steps" in repr(info)
    after = deq(half, x, warm_start=info)[1]
    assert bool((after["abs_lowest"] < info["abs_lowest"]).all())


def test_a_row_of_nan_is_reported_and_harms_no_other():
    x = inputs()
    x[2] = torch.nan
    model = Model(**config("anderson"))
    run, _ = compiled(model, fullgraph=True)
    z, info = run(x)
    right, right_info = model(x)
    torch.testing.assert_close(z, right, equal_nan=True)
    assert info["status"].tolist() == right_info["status"].tolist() == [1, 1, 3, 1, 1, 1]


def test_f_that_works_in_place_does_no_harm():
    deq, x = get_deq(**config("fixed_point_iter")), inputs()
    (z,), _ = torch.compile(lambda x: deq(lambda z: z.mul_(0.5).add_(1), x), backend="aot_eager", fullgraph=True)(x)
    (right,), _ = deq(lambda z: 0.5 * z + 1, x)
    torch.testing.assert_close(z, right, atol=1e-12, rtol=0)


def test_batch_sizes_share_a_graph():
    model = Model(**config("anderson"))
    run, graphs = compiled(model, fullgraph=True)
    for batch in (6, 5, 9, 3):
        x = inputs(batch)
        torch.testing.assert_close(run(x)[0], model(x)[0], atol=1e-12, rtol=0)
    assert len(graphs.found) <= 2  # one for the first size, one for any other


def test_a_deq_in_a_deq_is_one_graph():
    inner = get_deq(**config("fixed_point_iter", max_iter=2))
    outer = get_deq(**config("fixed_point_iter", max_iter=2))

    def fn(z):
        return 0.5 * inner(lambda y: 0.3 * torch.sin(y) + z, torch.zeros_like(z))[0][-1] + 0.1

    x = inputs()
    (z,), info = torch.compile(lambda x: outer(fn, x), backend="eager", fullgraph=True)(x)
    (right,), right_info = outer(fn, x)
    torch.testing.assert_close(z, right, atol=1e-12, rtol=0)
    same_info(info, right_info, 1e-12)


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
    assert len(graphs.with_call(torch.tanh)) == 2  # without and with grad
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
    assert sorted(tanh) == [0, 1, 3]  # what is before the solve, f for the gradient, the solve


def test_batch_sizes_with_a_stop_test():
    model = Model(**config("anderson", "implicit", tol=1e-8, max_iter=60))
    run, graphs = compiled(model)
    for batch in (6, 5, 9, 3):
        x = inputs(batch)
        torch.testing.assert_close(run(x)[0], model(x)[0], atol=1e-12, rtol=0)
    assert len(graphs.with_call(torch.tanh)) <= 4  # two sorts of sizes, with and without grad


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
    assert len(graphs.found) == 2


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
    model = Model(**config("anderson", tol=1e-3))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"fixed number of steps \(tol=0\)"):
        torch.compile(model, backend="eager", fullgraph=True)(inputs())


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
    assert len(graphs.with_call(torch.tanh)) == 2
    assert len(torch._dynamo.utils.counters["graph_break"]) == 1


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


# ---- a real compiler


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_inductor():
    model = Model(dtype=torch.float32, **config("fixed_point_iter", max_iter=3))
    compare(model, inputs(dtype=torch.float32), 1e-6, "inductor", fullgraph=True)
