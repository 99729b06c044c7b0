"""compact=True: finished samples leave the batch, and nothing else changes."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from solvers_support import F64, gaussian
from torch import nn

from deqcore import (
    ConfigError,
    ConvergenceError,
    DEQError,
    FunctionError,
    Status,
    VariationalDropout,
    VariationalDropout1d,
    get_deq,
    register_solver,
    registry,
)

SOLVERS = [
    "aitken",
    "anderson",
    "broyden",
    "chord",
    "damped",
    "fixed_point_iter",
    "newton",
    "newton_krylov",
    "pseudo_transient",
]
COUNTED = ["anderson", "broyden", "damped", "fixed_point_iter"]  # products with J aren't evaluations


class Rows:
    """tanh(rho W z) + x of a batch; `seen` are the rows that each call got, told by their x."""

    def __init__(self, batch=32, d=4, seed=0, rho=None):
        g = torch.Generator().manual_seed(seed)
        self.w = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=F64))[0]
        self.x = torch.randn(batch, d, generator=g, dtype=F64)
        self.rho = 0.05 + 0.85 * torch.rand(batch, 1, generator=g, dtype=F64) if rho is None else rho
        self.z0 = torch.zeros_like(self.x)
        self.counts = torch.zeros(batch, dtype=torch.int64)

    @property
    def args(self):
        return self.rho, self.x

    def plain(self, z, rho, x):
        return torch.tanh(rho * (z @ self.w.T)) + x

    def __call__(self, z, rho, x):
        which = (x.detach()[:, None] == self.x[None]).all(2).nonzero()[:, 1]
        assert len(which) == len(z)
        self.counts[which] += 1
        return self.plain(z, rho, x)

    def answer(self):
        z = self.z0
        for _ in range(2000):
            z = self.plain(z, *self.args)
        return z


def solve(name="anderson", fn=None, z0=None, args=(), compact=True, call=None, **options):
    settings = {"name": name, "tol": 1e-9, "max_iter": 400, **options.pop("solver", {})}
    if {"rtol", "atol"} & set(settings):
        del settings["tol"]
    deq = get_deq(solver=settings, compact=compact, **options).eval()
    with torch.no_grad():
        out, info = deq(fn, z0, args, **(call or {}))
    return out[0], info


def one_slow(batch=64):
    rho = torch.full((batch, 1), 0.1, dtype=F64)
    rho[5] = 0.99
    return Rows(batch, 8, rho=rho)


# ---- same answers, fewer evaluations


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("check_every", [1, 3])
def test_answers_are_the_same(name, check_every):
    rows = Rows()
    answer = rows.answer()
    z, info = solve(name, rows.plain, rows.z0, rows.args, check_every=check_every)
    assert info.converged.all()
    assert (z - answer).abs().max() < 1e-8 * 10
    assert (rows.plain(z, *rows.args) - z).norm(dim=1).max() <= 1e-9
    torch.testing.assert_close((rows.plain(z, *rows.args) - z).norm(dim=1), info["abs_lowest"], rtol=0, atol=1e-13)


def test_every_solver_that_is_not_refused_is_tested():
    left = set(registry.names("solvers")) - set(SOLVERS)
    known = {"auto", "forward_backward", "peaceman_rachford", "simple_fixed_point_iter"}
    assert left <= known


class Monotone:
    """relu(W z + U x + b) with W <= (1 - m) I, in the parts that the monotone splittings need."""

    def __init__(self, d=4):
        g = torch.Generator().manual_seed(2)
        a = torch.randn(d, d, generator=g, dtype=F64) / d**0.5
        self.w = 0.5 * torch.eye(d, dtype=F64) - a.T @ a

    def linear(self, z):
        return z @ self.w.T

    def linear_transpose(self, z):
        return z @ self.w

    def inject(self, x):
        return x

    def prox(self, v, alpha):
        return torch.relu(v)

    def inverse_step(self, v, alpha):
        eye = torch.eye(len(self.w), dtype=F64)
        return torch.linalg.solve(eye + alpha * (eye - self.w), v.T).T

    def __call__(self, z, x):
        return self.prox(self.linear(z) + self.inject(x), 1.0)


@pytest.mark.parametrize("name", ["forward_backward", "peaceman_rachford"])
def test_monotone_splittings(name):
    fn = Monotone()
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    x = x * torch.logspace(-6, 2, 32, dtype=F64)[:, None]
    z, info = solve(name, fn, torch.zeros_like(x), (x,), solver={"tol": 1e-9, "max_iter": 2000})
    assert info.converged.all()
    assert (fn(z, x) - z).norm(dim=1).max() <= 1e-9
    assert info["sample_nfe"].min() < info["sample_nfe"].max()


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("tol", [1e-6, 1e-10])
def test_one_slow_sample_costs_its_own_steps_only(name, tol):
    rows = one_slow()
    solver = {"rtol": tol, "max_iter": 2000}
    _, info = solve(name, rows, rows.z0, rows.args, solver=solver)
    assert info.converged.all()
    assert info["sample_nfe"].tolist() == rows.counts.tolist()
    together = int(rows.counts.sum())
    alone = 0
    for k in range(64):
        own = slice(k, k + 1)
        _, one = solve(name, rows.plain, rows.z0[own], (rows.rho[own], rows.x[own]), solver=solver)
        alone += one["nfe"]
    assert together <= 1.1 * alone, (together, alone)


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("check_every", [1, 3])
def test_sample_nfe_is_what_f_saw(name, check_every):
    rows = Rows(40)
    for mode in (True, False):
        rows.counts.zero_()
        deq = get_deq(solver={"name": name, "tol": 1e-9, "max_iter": 300}, compact=True, check_every=check_every).train(
            mode
        )
        _, info = deq(rows, rows.z0, rows.args)
        assert info["sample_nfe"].tolist() == rows.counts.tolist()
        assert info["sample_nfe"].max() > info["sample_nfe"].min()
        assert info["nfe"] >= int(info["sample_nfe"].max())


def test_sample_nfe_without_compaction():
    rows = Rows(6)
    _, info = solve("anderson", rows, rows.z0, rows.args, compact=False)
    assert info["sample_nfe"].tolist() == rows.counts.tolist() == [info["nfe"]] * 6


def test_results_are_in_order_and_of_the_whole_batch():
    rows = Rows(33)
    z, info = solve("fixed_point_iter", rows.plain, rows.z0, rows.args)
    torch.testing.assert_close(z, rows.answer(), rtol=0, atol=1e-7)
    checks = info["abs_trace"].shape[1]
    assert info["abs_trace"].shape == info["rel_trace"].shape == (33, checks)
    for key in ("status", "steps", "abs_lowest", "rel_lowest", "nstep", "sample_nfe"):
        assert info[key].shape == (33,), key
    assert checks == int(info["steps"].max()) + 1
    # A sample's steps, trace and last residual are what they are without the others.
    for k in (0, 7, 32):
        own = slice(k, k + 1)
        _, one = solve("fixed_point_iter", rows.plain, rows.z0[own], (rows.rho[own], rows.x[own]), compact=False)
        n = one["abs_trace"].shape[1]
        assert int(info["steps"][k]) == int(one["steps"])
        torch.testing.assert_close(info["abs_trace"][k, :n], one["abs_trace"][0], rtol=1e-9, atol=1e-13)
        assert bool((info["abs_trace"][k, n:] <= 1e-9).all())  # what it left with, or what it had until others left too
    assert (z == info["z"]).all()


def test_steps_agree_with_those_of_an_uncompacted_run():
    rows = Rows(33)
    runs = [solve("fixed_point_iter", rows.plain, rows.z0, rows.args, compact=c)[1] for c in (False, True)]
    assert runs[0]["steps"].tolist() == runs[1]["steps"].tolist()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_small_batches(batch):
    rows = Rows(batch)
    z, info = solve("broyden", rows, rows.z0, rows.args)
    torch.testing.assert_close(z, rows.answer(), rtol=0, atol=1e-8)
    assert info["sample_nfe"].tolist() == rows.counts.tolist()


def test_scalar_state():
    z, info = solve("anderson", torch.cos, torch.tensor(0.5, dtype=F64))
    assert abs(z.item() - 0.7390851332151607) < 1e-8
    assert info["sample_nfe"].tolist() == [info["nfe"]]


def test_all_done_at_the_start():
    rows = Rows(20)
    z0 = rows.answer()
    z, info = solve("anderson", rows, z0, rows.args)
    assert (z == z0).all()
    assert info["nfe"] == 1
    assert info["steps"].tolist() == [0] * 20
    assert z.data_ptr() != z0.data_ptr()


def test_some_done_at_the_start():
    rows = Rows(20)
    z0 = rows.z0.clone()
    z0[::2] = rows.answer()[::2]
    z, info = solve("anderson", rows, z0, rows.args)
    torch.testing.assert_close(z, rows.answer(), rtol=0, atol=1e-8)
    assert set(info["steps"][::2].tolist()) == {0}
    assert (info["sample_nfe"][::2] <= 3).all()
    assert info["sample_nfe"].tolist() == rows.counts.tolist()


def test_no_step_is_asked_for():
    rows = Rows(20)
    z, info = solve("anderson", rows, rows.z0, rows.args, solver={"max_iter": 0})
    assert (z == 0).all()
    assert set(info["status"].tolist()) == {Status.SKIPPED}


@pytest.mark.parametrize("limit", ["max_iter", "max_nfe"])
def test_samples_that_leave_at_the_last_step(limit):
    rows = Rows(64)
    answer = rows.answer()
    for last in range(1, 40):
        solver = {"max_iter": 200, limit: last, "tol": 1e-8}
        z, info = solve("fixed_point_iter", rows.plain, rows.z0, rows.args, solver=solver, on_failure="ignore")
        residual = (rows.plain(z, *rows.args) - z).norm(dim=1)
        torch.testing.assert_close(residual, info["abs_lowest"], rtol=1e-6, atol=1e-12)
        assert ((residual <= 1e-8) == info.converged).all()
        assert ((z - answer).norm(dim=1)[info.converged] < 1e-6).all()
        assert set(info["status"].tolist()) <= {Status.CONVERGED, Status.MAX_STEPS, Status.STALLED}
        if limit == "max_nfe":
            assert info["nfe"] <= last + 1  # the one that compaction is checked with


def test_small_first_residuals_are_no_solution_where_the_state_grows():
    """A residual is held against its own state's size, not against what the state has grown to since."""
    size = torch.full((32, 1), 1e6, dtype=F64)
    size[:16] = 1.0
    for compact in (False, True):
        z, info = solve(
            "fixed_point_iter",
            lambda z, size: 2 * z / (1 + z / size),
            torch.full((32, 1), 0.9, dtype=F64),
            (size,),
            compact=compact,
            solver={"rtol": 1e-6},
        )
        assert info.converged.all(), compact
        assert ((z / size - 1).abs() < 1e-5).all()


# ---- samples that fail


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_that_is_never_finite(name):
    rows = Rows(32)
    clean, _before = solve(name, rows.plain, rows.z0, rows.args)
    x = rows.x.clone()
    x[7, 0] = math.nan
    z, info = solve(name, rows.plain, rows.z0, (rows.rho, x), on_failure="ignore")
    others = torch.arange(32) != 7
    assert info["status"][7] == Status.NON_FINITE
    assert info.converged[others].all()
    torch.testing.assert_close(z[others], clean[others], rtol=0, atol=1e-7)
    assert torch.isfinite(z).all()
    assert info["sample_nfe"][7] <= info["sample_nfe"].max()


@pytest.mark.parametrize("name", COUNTED)
def test_a_sample_that_is_not_finite_costs_its_neighbours_nothing(name):
    rows = Rows(64)
    _, clean = solve(name, rows.plain, rows.z0, rows.args)
    x = rows.x.clone()
    x[7, 0] = math.nan
    _, info = solve(name, rows.plain, rows.z0, (rows.rho, x), on_failure="ignore")
    others = torch.arange(64) != 7
    extra = int(info["sample_nfe"][others].sum() - clean["sample_nfe"][others].sum())
    assert extra <= 0.02 * int(clean["sample_nfe"].sum()), extra


@pytest.mark.parametrize("name", ["anderson", "broyden", "damped", "fixed_point_iter"])
@pytest.mark.parametrize("check_every", [1, 3])
def test_a_sample_that_is_not_finite_at_some_calls(name, check_every):
    rows = Rows(32)
    calls = []

    def fn(z, rho, x):
        calls.append(len(z))
        out = rows.plain(z, rho, x)
        mine = (x == rows.x[9]).all(1)
        return torch.where(mine[:, None], math.nan, out) if len(calls) in (4, 11) else out

    z, info = solve(name, fn, rows.z0, rows.args, check_every=check_every, on_failure="ignore")
    assert info.converged.all()
    torch.testing.assert_close(z, rows.answer(), rtol=0, atol=1e-7)
    assert torch.isfinite(info["abs_lowest"]).all()


def test_frozen_samples_leave_once_enough_are_finished():
    rows = Rows(64)
    x = rows.x.clone()
    x[:8, 0] = math.inf
    seen = []

    def fn(z, rho, x):
        seen.append(bool(torch.isinf(x).any()))
        return torch.where(torch.isinf(x), math.nan, rows.plain(z, rho, x.nan_to_num(0, 0, 0)))

    _, info = solve("fixed_point_iter", fn, rows.z0, (rows.rho, x), on_failure="ignore")
    assert info["status"][:8].tolist() == [Status.NON_FINITE] * 8
    assert info.converged[8:].all()
    assert not any(seen[8:])


def test_everything_is_not_finite():
    z, info = solve("anderson", lambda z, x: z / 0 * x, torch.zeros(16, 3), (torch.ones(16, 3),), on_failure="ignore")
    assert set(info["status"].tolist()) == {Status.NON_FINITE}
    assert (z == 0).all()


@pytest.mark.parametrize("name", ["fixed_point_iter", "damped"])
def test_diverging_samples_leave_with_their_status(name):
    rows = Rows(48)
    slope = torch.full((48, 1), 0.97, dtype=F64)
    slope[:12] = 3.0
    seen = []

    def fn(z, slope, x):
        seen.append(bool((slope > 1).any()))
        return slope * z + x

    z, info = solve(
        name,
        fn,
        rows.z0,
        (slope, rows.x),
        on_failure="ignore",
        solver={"rtol": 1e-10, "divergence_factor": 1e4, "max_iter": 3000},
    )
    if name == "fixed_point_iter":
        assert info["status"][:12].tolist() == [Status.DIVERGED] * 12
        assert sum(seen) < 16
        assert (z[:12] == 0).all()  # its best state
    assert info.converged[12:].all()
    torch.testing.assert_close(z[12:], rows.x[12:] / 0.03, rtol=1e-6, atol=1e-6)


def test_stalled_samples_leave_with_their_status():
    rows = Rows(48)
    slope = torch.full((48, 1), 0.97, dtype=F64)
    slope[:12] = -1.0  # 0, x, 0, x: the residual stays
    seen = []

    def fn(z, slope, x):
        seen.append(bool((slope < 0).any()))
        return slope * z + x

    _, info = solve(
        "fixed_point_iter",
        fn,
        rows.z0,
        (slope, rows.x),
        on_failure="ignore",
        solver={"rtol": 1e-10, "patience": 5, "max_iter": 2000},
    )
    assert info["status"][:12].tolist() == [Status.STALLED] * 12
    assert info.converged[12:].all()
    assert sum(seen) <= 8
    assert info["sample_nfe"][0] <= 9


def test_patience_is_each_samples_own():
    """One that improves does not keep one that doesn't, and survives compaction with its own clock."""
    rows = Rows(32, rho=torch.linspace(0.1, 0.98, 32, dtype=F64)[:, None])
    slope = rows.rho.clone()
    slope[3] = -1.0
    _, info = solve(
        "fixed_point_iter",
        lambda z, slope, x: slope * z + x,
        rows.z0,
        (slope, rows.x),
        on_failure="ignore",
        solver={"rtol": 1e-8, "patience": 10, "max_iter": 3000},
    )
    assert info["status"][3] == Status.STALLED
    assert info.converged[torch.arange(32) != 3].all()


def test_failure_policy():
    rows = Rows(20)
    x = rows.x.clone()
    x[3] = math.nan
    with pytest.raises(ConvergenceError, match="1 of 20 samples non_finite") as caught:
        solve("anderson", rows.plain, rows.z0, (rows.rho, x), on_failure="raise")
    assert caught.value.args
    with pytest.warns(match="1 of 20 samples non_finite"):
        solve("anderson", rows.plain, rows.z0, (rows.rho, x))


# ---- states and args


def test_tuple_state():
    rows = Rows(24, d=6)
    seen = []

    def fn(a, b, rho, x):
        seen.append(len(a))
        z = rows.plain(torch.cat((a.flatten(1), b), 1), rho, x)
        return z[:, :4].unflatten(1, (2, 2)), z[:, 4:]

    z0 = rows.z0[:, :4].unflatten(1, (2, 2)), rows.z0[:, 4:]
    (a, b), _ = solve("anderson", fn, z0, rows.args)
    torch.testing.assert_close(torch.cat((a.flatten(1), b), 1), rows.answer(), rtol=0, atol=1e-8)
    assert seen[-1] < 24


def test_dict_state():
    rows = Rows(24, d=6)

    def fn(state, rho, x):
        z = rows.plain(torch.cat((state["a"], state["b"]), 1), rho, x)
        return {"b": z[:, 4:], "a": z[:, :4]}

    out, _ = solve("broyden", fn, {"a": rows.z0[:, :4], "b": rows.z0[:, 4:]}, rows.args)
    torch.testing.assert_close(torch.cat((out["a"], out["b"]), 1), rows.answer(), rtol=0, atol=1e-8)


@dataclass
class State:
    a: torch.Tensor
    b: torch.Tensor


@dataclass
class Inputs:
    rho: torch.Tensor
    x: torch.Tensor


def test_dataclass_state():
    rows = Rows(24, d=6)

    def fn(state, rho, x):
        z = rows.plain(torch.cat((state.a, state.b), 1), rho, x)
        return State(z[:, :4], z[:, 4:])

    out, _ = solve("anderson", fn, State(rows.z0[:, :4], rows.z0[:, 4:]), rows.args)
    torch.testing.assert_close(torch.cat((out.a, out.b), 1), rows.answer(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["anderson", "broyden", "fixed_point_iter", "damped", "aitken"])
def test_complex_state(name):
    g = torch.Generator().manual_seed(3)
    w = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.complex128))[0]
    x = torch.randn(24, 4, generator=g, dtype=torch.complex128)
    rho = 0.9 * torch.rand(24, 1, generator=g, dtype=F64)
    seen = []

    def fn(z, rho, x):
        seen.append(len(z))
        return rho * (z @ w.T) + x

    z, info = solve(name, fn, torch.zeros_like(x), (rho, x))
    exact = torch.stack([torch.linalg.solve(torch.eye(4) - r * w, b) for r, b in zip(rho, x, strict=True)])
    assert info.converged.all()
    assert (z - exact).abs().max() < 1e-7
    assert min(seen) < 24


@pytest.mark.parametrize("name", ["anderson", "broyden", "fixed_point_iter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_states(name, dtype):
    rows = Rows(24)
    w = rows.w.to(dtype)
    seen = []

    def fn(z, rho, x):
        seen.append(len(z))
        assert z.dtype == dtype
        return torch.tanh(rho * (z @ w.T)) + x

    args = rows.rho.to(dtype), rows.x.to(dtype)
    z, info = solve(name, fn, rows.z0.to(dtype), args, solver={"tol": 0.02}, on_failure="ignore")
    assert z.dtype == dtype
    assert all(Status(code).ok for code in info["status"].tolist())
    assert (z.double() - rows.answer()).abs().max() < 0.2
    assert min(seen) < 24


def test_autocast():
    rows = Rows(24)
    w = rows.w.float()
    seen = []

    def fn(z, rho, x):
        seen.append(len(z))
        out = z @ w.T
        assert out.dtype == torch.bfloat16
        return torch.tanh(rho * out) + x

    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _info = solve("anderson", fn, rows.z0.float(), (rows.rho.float(), rows.x.float()), solver={"tol": 0.02})
    assert (z.double() - rows.answer()).abs().max() < 0.2
    assert min(seen) < 24
    assert z.dtype == torch.float32


Pair = namedtuple("Pair", "rho x")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda rho, x: {"deep": [(rho, x)]},
        lambda rho, x: {"deep": [Pair(rho, x)]},
        lambda rho, x: {"deep": [Inputs(rho, x)]},
    ],
    ids=["tuple", "namedtuple", "dataclass"],
)
def test_args_in_containers(wrap):
    rows = Rows(24)
    seen = []

    def fn(z, given, other, none, text):
        pair = given["deep"][0]
        rho, x = (pair.rho, pair.x) if isinstance(pair, Inputs) else pair
        assert none is None
        assert text == "text"
        assert other.shape == (7, 3)
        seen.append(len(z))
        return rows.plain(z, rho, x)

    z, _info = solve("anderson", fn, rows.z0, (wrap(*rows.args), torch.zeros(7, 3), None, "text"))
    torch.testing.assert_close(z, rows.answer(), rtol=0, atol=1e-8)
    assert seen[-1] < 24


def test_args_without_a_batch_are_left_alone():
    rows = Rows(24)
    scale = torch.tensor(0.5, dtype=F64)
    row = torch.ones(1, 4, dtype=F64)

    def fn(z, rho, x, scale, row, w):
        assert scale.dim() == 0
        assert row.shape == (1, 4)
        assert w.shape == (4, 4)
        return torch.tanh(scale * rho * (z @ w.T)) + x * row

    z, _info = solve("anderson", fn, rows.z0, (*rows.args, scale, row, rows.w))
    assert (fn(z, *rows.args, scale, row, rows.w) - z).norm(dim=1).max() <= 1e-9


def test_integer_and_bool_args_are_batched_too():
    rows = Rows(24)
    mask = torch.arange(24) % 3 == 0
    index = torch.arange(24)
    seen = []

    def fn(z, rho, x, mask, index):
        assert (rows.rho[index] == rho).all()
        seen.append(len(z))
        return torch.where(mask[:, None], 0.0, rows.plain(z, rho, x))

    z, _info = solve("anderson", fn, rows.z0, (*rows.args, mask, index))
    assert (z[mask] == 0).all()
    assert seen[-1] < 24


def test_kwargs_of_none():
    rows = Rows(24)
    deq = get_deq(solver={"name": "anderson", "tol": 1e-9}, compact=True).eval()
    out, _ = deq(rows.plain, rows.z0, rows.args, None)
    torch.testing.assert_close(out[0].detach(), rows.answer(), rtol=0, atol=1e-8)


# ---- functions that don't suit it


def test_batched_tensors_in_the_closure():
    rows = Rows(24)
    with pytest.raises(FunctionError, match=r"args=\(x, \.\.\.\).*compact=False"):
        solve("anderson", lambda z: rows.plain(z, *rows.args), rows.z0)


def test_a_batch_of_equal_samples_in_the_closure_is_no_wrong_answer():
    x = torch.ones(24, 3, dtype=F64)
    rho = torch.linspace(0, 0.9, 24, dtype=F64)[:, None]
    with pytest.raises(FunctionError, match="args"):
        solve("fixed_point_iter", lambda z, rho: rho * z + x, torch.zeros_like(x), (rho,))


@pytest.mark.parametrize("what", ["weight", "zero bias", "bias", "scale"])
def test_a_weight_of_the_batchs_size_in_args(what):
    d = 8
    rows = Rows(d, d)
    b = {"zero bias": torch.zeros(d, dtype=F64), "bias": rows.x[0] * 0.1, "scale": torch.ones(d, dtype=F64)}

    def weight(z, rho, x, w):
        return torch.tanh(rho * (z @ w.T)) + x

    def bias(z, rho, x, b):
        return torch.tanh(rho * (z @ rows.w.T) + b) + x

    def scale(z, rho, x, s):
        return torch.tanh(rho * (z @ rows.w.T) * s) + x

    fn = {"weight": weight, "scale": scale}.get(what, bias)
    given = (*rows.args, rows.w if what == "weight" else b[what])
    try:
        z, _info = solve("fixed_point_iter", fn, rows.z0, given)
    except FunctionError as error:
        assert "compact=False" in str(error)
        assert "keep other tensors" in str(error)
    else:
        assert (fn(z, *given) - z).norm(dim=1).max() <= 1e-9


@pytest.mark.parametrize("which", [0, -1, 3])
@pytest.mark.parametrize("shift", [0, 2, 4, 7])
def test_a_table_of_the_batchs_size_in_args(which, shift):
    """Its rows are renumbered with every sample that leaves: what f picks from it by number is another one then."""
    rows = Rows(8, 8, rho=torch.linspace(0.1, 0.9, 8, dtype=F64)[:, None])
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=F64)
    rho = rows.rho.roll(shift, 0)  # so that the samples leave in another order

    def fn(z, rho, x, table):
        return torch.tanh(rho * z * table[which]) + x

    given = (rho, rows.x, table)
    try:
        z, info = solve("fixed_point_iter", fn, rows.z0, given, on_failure="ignore")
    except FunctionError as error:
        assert "compact=False" in str(error)
    else:
        residual = (fn(z, *given) - z).norm(dim=1)
        assert (residual[info.converged] <= 1e-8).all()


def test_errors_in_f_that_are_not_about_the_batch_keep_their_cause():
    rows = Rows(24)

    def fn(z, rho, x):
        if len(z) < 24:
            raise KeyError("mine")
        return rows.plain(z, rho, x)

    with pytest.raises(FunctionError, match="mine") as caught:
        solve("anderson", fn, rows.z0, rows.args)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_the_whole_batch_is_the_users_own():
    rows = Rows(24)

    def fn(z, rho, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        solve("anderson", fn, rows.z0, rows.args)


def test_deqcore_errors_in_f_pass_through():
    rows = Rows(24)
    inner = get_deq(solver={"name": "fixed_point_iter", "max_iter": 1, "tol": 1e-12}, on_failure="raise")

    def fn(z, rho, x):
        if len(z) < 24:
            inner(lambda y: 0.9 * y + 1, z)
        return rows.plain(z, rho, x)

    with pytest.raises(ConvergenceError):
        solve("anderson", fn, rows.z0, rows.args)


@pytest.mark.parametrize("shape", [(24, 4), (24, 4, 5)])
def test_batch_statistics(shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=g)
    rho = torch.linspace(0.1, 0.7, 24).view(24, *[1] * (len(shape) - 1))
    norm = nn.BatchNorm1d(4)

    def fn(z, rho, x):
        return rho * torch.tanh(norm(z + x)) + x

    deq = get_deq(solver={"name": "anderson", "tol": 1e-4, "max_iter": 60}, compact=True)
    with pytest.raises(FunctionError, match="no batch statistics"):
        deq(fn, torch.zeros(shape), (rho, x))
    norm.eval()
    _out, info = deq.eval()(fn, torch.zeros(shape), (rho, x))
    assert info.converged.all()


def test_rows_that_depend_on_each_other():
    rows = Rows(24)
    with pytest.raises(FunctionError, match="without the rest of the batch"):
        solve("anderson", lambda z, rho, x: rows.plain(z, rho, x) + 0.1 * z.mean(0), rows.z0, rows.args)


def test_random_f():
    rows = Rows(24)

    def fn(z, rho, x):
        return rows.plain(z, rho, x) + 1e-3 * torch.rand_like(z)

    torch.manual_seed(0)
    with pytest.raises(FunctionError):
        solve("fixed_point_iter", fn, rows.z0, rows.args, solver={"tol": 3e-3})


# ---- what is fixed for a solve


@pytest.mark.parametrize("dims", [2, 3])
def test_dropout_masks_stay_the_samples_own(dims):
    rows = Rows(24)
    shape = (24, 4) if dims == 2 else (24, 3, 4)
    drop = VariationalDropout(0.4) if dims == 2 else VariationalDropout1d(0.4)
    rho = rows.rho.view(24, *[1] * (dims - 1))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64)

    def fn(z, rho, x):
        return 0.6 * torch.tanh(rho * drop(z @ rows.w.T)) + x

    found = []
    for compact in (False, True):
        torch.manual_seed(5)
        deq = get_deq(solver={"name": "anderson", "tol": 1e-9, "max_iter": 100}, compact=compact, gradient="implicit")
        w = rows.w.clone().requires_grad_()
        out, info = deq(lambda z, rho, x, w=w: fn(z, rho, x) + 0.1 * (z @ w), torch.zeros(shape, dtype=F64), (rho, x))
        out[-1].square().sum().backward()
        found.append((out[-1].detach(), w.grad))
        assert info.converged.all()
    assert info["sample_nfe"].min() < info["sample_nfe"].max()
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-7)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["flattened", "batch second"])
def test_dropout_that_does_not_see_the_batch_first_is_refused_or_right(how):
    """A mask drawn anew for a part would make the samples left solve another equation."""
    rows = Rows(24)
    drop = VariationalDropout(0.4)
    x = torch.randn(24, 3, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    rho = rows.rho[:, :, None]

    def fn(z, rho, x):
        y = rho * (z @ rows.w.T)
        y = drop(y.flatten(0, 1)).view_as(y) if how == "flattened" else drop(y.transpose(0, 1)).transpose(0, 1)
        return 0.6 * torch.tanh(y) + x

    torch.manual_seed(0)
    deq = get_deq(solver={"name": "anderson", "tol": 1e-9, "max_iter": 100}, compact=True)
    whole = get_deq(solver={"name": "anderson", "tol": 1e-9, "max_iter": 100})
    try:
        with torch.no_grad():
            out, _ = deq(fn, torch.zeros_like(x), (rho, x))
    except FunctionError as error:
        assert "compact=False" in str(error)
    else:
        torch.manual_seed(0)
        with torch.no_grad():
            torch.testing.assert_close(out[-1], whole(fn, torch.zeros_like(x), (rho, x))[0][-1], rtol=0, atol=1e-7)


# ---- gradients


def loss_of(rows, compact, gradient, mode, name="anderson", **options):
    w = rows.w.clone().requires_grad_()
    x = rows.x.clone().requires_grad_()
    deq = get_deq(
        solver={"name": name, "tol": 1e-11, "max_iter": 300}, gradient=gradient, compact=compact, **options
    ).train(mode)
    out, _ = deq(lambda z, rho, x: torch.tanh(rho * (z @ w.T)) + x, rows.z0, (rows.rho, x))
    sum((z * z).sum() for z in out).backward()
    return w.grad, x.grad


@pytest.mark.parametrize(
    "gradient",
    [
        {"name": "implicit", "solver": {"name": "gmres", "tol": 1e-10}},
        {"name": "implicit", "solver": {"name": "anderson", "tol": 1e-10, "max_iter": 200}},
        {"name": "phantom", "steps": 3},
    ],
    ids=["implicit gmres", "implicit anderson", "phantom"],
)
@pytest.mark.parametrize("mode", [True, False])
def test_gradients(gradient, mode):
    rows = Rows(20)
    gradient = gradient if gradient["name"] == "implicit" else {"name": "phantom"}
    for a, b in zip(loss_of(rows, False, gradient, mode), loss_of(rows, True, gradient, mode), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


# ---- trajectory, callbacks, warm start


@pytest.mark.parametrize("core", [{"n_states": 3}, {"indexing": (2, 9)}, {"name": "indexing", "indexing": (2, 9)}])
def test_sampled_states_are_of_the_whole_batch(core):
    rows = Rows(20)
    found = []
    for compact in (False, True):
        deq = get_deq(
            solver={"name": "fixed_point_iter", "tol": 1e-4, "max_iter": 90},
            core={"name": "sliced", **core},
            compact=compact,
        )
        with torch.no_grad():
            out, info = deq(rows.plain, rows.z0, rows.args)
        found.append(out)
        assert all(z.shape == (20, 4) for z in out)
        assert info["z"].shape == (20, 4)
    assert len(found[0]) == len(found[1]) == 3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)
    torch.testing.assert_close(found[1][-1], rows.answer(), rtol=0, atol=2e-3)


def test_sample_nfe_over_several_stretches():
    rows = Rows(20)
    deq = get_deq(
        solver={"name": "anderson", "tol": 1e-9, "max_iter": 90},
        core={"n_states": 3},
        compact=True,
        on_failure="ignore",
    )
    _, info = deq(rows, rows.z0, rows.args)
    assert info["sample_nfe"].tolist() == rows.counts.tolist()


def test_callbacks_see_the_whole_batch():
    rows = Rows(20)
    seen = []
    _z, info = solve(
        "fixed_point_iter",
        rows.plain,
        rows.z0,
        rows.args,
        call={"callback": lambda step, z, residual: seen.append((step, z.clone(), residual.clone()))},
    )
    assert [step for step, _, _ in seen] == list(range(1, len(seen) + 1))
    for step, state, residual in seen:
        assert state.shape == (20, 4)
        assert residual.shape == (20,)
        torch.testing.assert_close((rows.plain(state, *rows.args) - state).norm(dim=1), residual, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(residual, info["abs_trace"][:, step], rtol=1e-6, atol=1e-9)
    assert (seen[-1][2] <= 1e-9).all()


def test_a_callback_may_end_the_run():
    rows = Rows(20)
    z, info = solve(
        "fixed_point_iter",
        rows.plain,
        rows.z0,
        rows.args,
        on_failure="ignore",
        call={"callback": lambda step, z, residual: step == 9},
    )
    assert info["abs_trace"].shape == (20, 10)
    residual = (rows.plain(z, *rows.args) - z).norm(dim=1)
    torch.testing.assert_close(residual, info["abs_lowest"], rtol=1e-7, atol=1e-14)
    assert ((residual <= 1e-9) == info.converged).all()
    assert 0 < int(info.converged.sum()) < 20


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_warm_start(name):
    rows = Rows(20)
    z, info = solve(name, rows.plain, rows.z0, rows.args, keep_state=True)
    again, second = solve(name, rows, rows.z0, (rows.rho, rows.x), call={"warm_start": info}, keep_state=True)
    assert second["nfe"] == 1
    assert (again == z).all()
    x = rows.x + 1e-4 * torch.randn(20, 4, generator=torch.Generator().manual_seed(4), dtype=F64)
    moved, third = solve(name, rows.plain, rows.z0, (rows.rho, x), call={"warm_start": info})
    assert third.converged.all()
    assert int(third["sample_nfe"].sum()) < int(info["sample_nfe"].sum())
    assert (rows.plain(moved, rows.rho, x) - moved).norm(dim=1).max() <= 1e-9


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_solver_state_of_an_uncompacted_run_is_resumed(name):
    rows = Rows(20)
    _, info = solve(name, rows.plain, rows.z0, rows.args, keep_state=True, compact=False)
    x = rows.x * 1.001
    z, second = solve(name, rows.plain, rows.z0, (rows.rho, x), call={"warm_start": info}, keep_state=True)
    assert second.converged.all()
    assert (rows.plain(z, rows.rho, x) - z).norm(dim=1).max() <= 1e-9


# ---- the module


def test_modes_and_copies():
    rows = Rows(20)
    deq = get_deq(solver={"name": "anderson", "tol": 1e-9, "max_iter": 100}, compact=True)
    for again in (deq, copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        for mode in (True, False):
            with torch.no_grad():
                out, info = again.train(mode)(rows.plain, rows.z0, rows.args)
            assert (rows.plain(out[-1], *rows.args) - out[-1]).norm(dim=1).max() <= 1e-8
            assert info["sample_nfe"].min() < info["sample_nfe"].max()
            loaded = pickle.loads(pickle.dumps(info))
            assert (loaded["sample_nfe"] == info["sample_nfe"]).all()
            assert (loaded["abs_trace"] == info["abs_trace"]).all()


def test_trace_that_is_not_kept():
    rows = Rows(20)
    z, info = solve("anderson", rows.plain, rows.z0, rows.args, keep_trace=False)
    torch.testing.assert_close(z, rows.answer(), rtol=0, atol=1e-8)
    assert info["abs_trace"].shape == (20, 1)
    assert info.converged.all()


def test_threads():
    rows = [Rows(20, seed=k) for k in range(2)]
    drop = VariationalDropout(0.2).double()
    deq = get_deq(solver={"name": "anderson", "tol": 1e-9, "max_iter": 100}, compact=True, on_failure="ignore")
    failures = []

    def work(mine):
        try:
            for _ in range(15):
                with torch.no_grad():
                    out, info = deq(lambda z, r, x: 0.5 * drop(mine.plain(z, r, x)), mine.z0, mine.args)
                assert info.converged.all()
                with torch.no_grad():
                    out, info = deq(mine.plain, mine.z0, mine.args)
                torch.testing.assert_close(out[-1], mine.answer(), rtol=0, atol=1e-7)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(r,)) for r in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("inner_compact", [False, True])
def test_a_deq_in_f(inner_compact):
    rows = Rows(20)
    drop = VariationalDropout(0.3)
    inner = get_deq(solver={"name": "anderson", "tol": 1e-12, "max_iter": 100}, compact=inner_compact).train()

    def fn(z, rho, x):
        y = inner(lambda y, z, rho: 0.5 * rho * torch.tanh(drop(y)) + z, z, (z, rho))[0][-1]
        return torch.tanh(rho * (0.4 * y @ rows.w.T)) + x

    found = []
    for compact in (False, True):
        torch.manual_seed(2)
        deq = get_deq(solver={"name": "anderson", "tol": 1e-9, "max_iter": 100}, compact=compact)
        with torch.no_grad():
            out, info = deq(fn, rows.z0, rows.args)
        assert info.converged.all()
        found.append(out[-1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-7)


def test_configured_by_file_and_environment(tmp_path, monkeypatch):
    rows = Rows(20)
    path = tmp_path / "deq.toml"
    path.write_text('compact = true\n[solver]\nname = "anderson"\ntol = 1e-9\n')
    by_file = get_deq(str(path))
    monkeypatch.setenv("DEQCORE_COMPACT", "true")
    by_environment = get_deq(solver={"name": "anderson", "tol": 1e-9})
    for deq in (by_file, by_environment):
        assert deq.config.compact is True
        with torch.no_grad():
            _, info = deq.eval()(rows.plain, rows.z0, rows.args)
        assert info["sample_nfe"].min() < info["sample_nfe"].max()
    assert "compact = true" in by_file.config.to_toml()


@pytest.mark.parametrize("dims", [0, 2])
def test_other_batches_are_refused(dims):
    with pytest.raises(ConfigError, match=f"batch_dims={dims}"):
        get_deq(solver="anderson", compact=True, batch_dims=dims)


def own_loop(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None):
    for _ in range(max_iter):
        x0 = func(x0)
    return x0, [], {}


def test_solvers_that_are_refused():
    with pytest.raises(ConfigError, match="simple_fixed_point_iter"):
        get_deq(solver="simple_fixed_point_iter", compact=True)
    with registry.scope():
        register_solver("own_loop", own_loop)
        with pytest.raises(ConfigError, match="own_loop"):
            get_deq(solver="own_loop", compact=True)


@pytest.mark.parametrize("given", [{"return_final": True}, {"tol": 0.0}])
def test_a_run_of_a_fixed_number_of_steps_has_no_finished_samples(given):
    """Nobody leaves it: its answers are those without compaction."""
    rows = Rows(20)
    runs = [
        solve("fixed_point_iter", rows.plain, rows.z0, rows.args, compact=c, solver={"max_iter": 12, **given})
        for c in (False, True)
    ]
    assert (runs[0][0] == runs[1][0]).all()
    assert runs[1][1]["sample_nfe"].tolist() == [13] * 20


def test_wrong_answers_never_pass_as_converged():
    """Random maps, sizes and solvers: whatever is called converged is, and only deqcore's errors are raised."""
    g = torch.Generator().manual_seed(9)
    names = ["anderson", "broyden", "fixed_point_iter", "damped", "aitken"]
    for case in range(60):
        batch, d = int(torch.randint(2, 40, (), generator=g)), int(torch.randint(1, 6, (), generator=g))
        w = gaussian(d, 1.0, g) if d > 1 else torch.ones(1, 1, dtype=F64)
        rho = 1.4 * torch.rand(batch, 1, generator=g, dtype=F64)
        x = torch.randn(batch, d, generator=g, dtype=F64)
        x[torch.rand(batch, generator=g) < 0.1] = math.nan if case % 3 == 0 else 1.0
        tol = 10.0 ** -int(torch.randint(1, 11, (), generator=g))
        try:
            z, info = solve(
                names[case % 5],
                lambda z, rho, x, w=w: rho * torch.tanh(z @ w.T) + x,
                torch.zeros(batch, d, dtype=F64),
                (rho, x),
                solver={"rtol": tol, "max_iter": int(torch.randint(1, 80, (), generator=g)), "patience": 30},
                check_every=1 + case % 3,
                on_failure="ignore",
            )
        except DEQError as error:
            pytest.fail(f"case {case}: {error}")
        fz = rho * torch.tanh(z @ w.T) + x
        size = fz.norm(dim=1)
        residual = (fz - z).norm(dim=1)
        good = info.converged
        assert bool((residual[good] <= (1 + 1e-6) * tol * size[good] + 1e-15).all()), case
        assert torch.isfinite(z).all(), case
