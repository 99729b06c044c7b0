"""torch.compile with a fixed number of steps: one graph, with the values, gradients and info of a plain call."""

import shutil

import pytest
import torch
from compile_support import SOLVERS, Model, breaks, compare, compiled, config, half, inputs, same_info

import deqcore
from deqcore import get_deq

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


# ---- a real compiler


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_inductor():
    model = Model(dtype=torch.float32, **config("fixed_point_iter", max_iter=3))
    compare(model, inputs(dtype=torch.float32), 1e-6, "inductor", fullgraph=True)
