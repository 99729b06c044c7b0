"""All that TorchDEQ offers, under the same names: torchdeq 0.1.0 is run beside (PARITY.md, section 1)."""

from __future__ import annotations

import importlib
import inspect
import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deqcore

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchdeq = pytest.importorskip("torchdeq")

DOUBLE = torch.float64
INFO = ("abs_lowest", "rel_lowest", "abs_trace", "rel_trace", "nstep", "sradius")
SOLVERS = ("fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden")
BOTH = [pytest.param(torchdeq, id="torchdeq"), pytest.param(deqcore, id="deqcore")]
PROGRAM = Path(__file__).with_name("torchdeq_program.py")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weight(size: int, rho: float = 0.6, seed: int = 1) -> Tensor:
    return torch.linalg.qr(rand(size, size, seed=seed))[0] * rho


# ---- a program

RUNS = {
    "phantom": "classifier --f_max_iter 6 --f_tol 0 --grad 2 --tau 0.8 --jac_loss_weight 0.3",
    "simple": "classifier --f_solver simple_fixed_point_iter --f_max_iter 5 --n_states 2 --core indexing --mem",
    "exact": "classifier --ift --f_max_iter 60 --f_tol 1e-5 --b_tol 1e-7 --sradius_mode",
    "dropout": "classifier --f_max_iter 6 --f_tol 0 --dropout 0.3 --indexing 2 4 --grad 1 2 1 --norm_no_scale",
    "spectral": "classifier --f_solver anderson --norm_type spectral_norm --dropout 0.3 --hook_ift --b_solver anderson",
    "states": "multiscale --f_max_iter 7 --f_tol 0 --n_states 2 --norm_type none",
    "masked": "multiscale --f_solver broyden --f_tol 1e-6 --dropout 0.2",
}
#: Runs whose numbers mean the same in both, and how near they must come: both compute in float32.
SAME = {"phantom": 1e-5, "simple": 1e-5, "exact": 1e-4, "dropout": 1e-5, "states": 1e-5, "masked": 1e-5}
NUMBERS = ("losses", "logits", "fewer", "skipped", "eval")


def run_here(path: Path) -> dict[str, Any]:
    """The program's report, run in this process."""
    program = runpy.run_path(str(path))
    report = {"helpers": program["helpers"]()}
    for name, line in RUNS.items():
        kind, *argv = line.split()
        report[name] = program["train_multiscale" if kind == "multiscale" else "train_classifier"](
            program["parse"](argv)
        )
    return report


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    starter = (
        "import json, runpy, sys, torch, deqcore\n"
        "torch.set_num_threads(1)\n"
        "sys.modules['torchdeq'] = deqcore\n"
        f"sys.argv = ['program', {json.dumps([line.split() for line in RUNS.values()])!r}]\n"
        f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
        "assert not any(name == 'torchdeq' and module is not deqcore for name, module in sys.modules.items())\n"
        "assert sys.modules['torchdeq.norm'] is deqcore.norm\n"
    )
    aliased = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", starter], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    renamed = tmp_path_factory.mktemp("program") / "program.py"
    text = PROGRAM.read_text(encoding="utf-8").replace("import torchdeq\n", "import deqcore as torchdeq\n")
    renamed.write_text(text.replace("from torchdeq", "from deqcore"), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {"torchdeq": run_here(PROGRAM), "renamed": run_here(renamed)}
    out, error = aliased.communicate(timeout=300)
    assert aliased.returncode == 0, error
    found["aliased"] = dict(zip(["helpers", *RUNS], json.loads(out).values(), strict=True))
    return found


@pytest.mark.parametrize("way", ["renamed", "aliased"])
@pytest.mark.parametrize("run", RUNS)
def test_a_program_sees_the_same(reports: dict[str, Any], way: str, run: str) -> None:
    theirs, ours = reports["torchdeq"][run], reports[way][run]
    assert ours.keys() == theirs.keys()
    for key in theirs:
        if key in ("train_info", "eval_info", "backward"):
            same_shapes(ours[key], theirs[key])
        elif key in NUMBERS and run in SAME:
            assert ours[key] == pytest.approx(theirs[key], rel=SAME[run], abs=SAME[run]), key
        elif key in ("nstep", "radius"):
            assert len(ours[key]) == len(theirs[key])
        elif key not in NUMBERS:
            assert ours[key] == theirs[key], key
    assert all(loss == loss for loss in ours["losses"])
    assert ours["losses"][-1] < ours["losses"][0]


def same_shapes(ours: Any, theirs: Any) -> None:
    """The shapes of an info, but for the number of columns of a trace."""
    if isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            same_shapes(one, other)
        return
    for key in INFO:
        if key.endswith("trace"):
            assert len(ours[key]) == 2
            assert ours[key][0] == theirs[key][0]
        else:
            assert ours[key] == theirs[key], key


def test_the_programs_helpers_are_the_same(reports: dict[str, Any]) -> None:
    theirs = reports["torchdeq"]["helpers"]
    for way in ("renamed", "aliased"):
        ours = reports[way]["helpers"]
        assert ours["start"] == theirs["start"]
        assert ours["solved"] == pytest.approx(theirs["solved"], abs=1e-5)
        same_shapes(ours["info"], theirs["info"])


# ---- names and arguments

PUBLIC = {
    "": "get_deq reset_deq register_deq add_deq_args get_solver register_solver solver_stat_from_final_step apply_norm "
    "reset_norm remove_norm register_norm register_norm_module VariationalDropout VariationalDropout1d "
    "VariationalDropout2d VariationalDropout3d VariationalDropToken1d VariationalDropToken2d VariationalDropToken3d "
    "reset_dropout jac_reg power_method fp_correction register_weight_func mem_gc mixed_init",
    "solver": "get_solver register_solver solver_stat_from_final_step anderson_solver broyden_solver fixed_point_iter "
    "simple_fixed_point_iter",
    "norm": "apply_norm reset_norm remove_norm register_norm register_norm_module",
    "loss": "jac_reg power_method fp_correction register_weight_func",
    "dropout": "VariationalDropout VariationalDropout1d VariationalDropout2d VariationalDropout3d "
    "VariationalDropToken1d VariationalDropToken2d VariationalDropToken3d reset_dropout",
    "utils": "add_deq_args mem_gc mixed_init",
}
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names.split()]


def part(package: ModuleType, module: str) -> ModuleType:
    return importlib.import_module(f"{package.__name__}.{module}") if module else package


def test_the_list_of_names_is_complete() -> None:
    for module, names in PUBLIC.items():
        theirs = part(torchdeq, module)
        public = {name for name in getattr(theirs, "__all__", dir(theirs)) if not name.startswith("_")}
        functions = {name for name in public if not isinstance(getattr(theirs, name), ModuleType)}
        assert functions <= set(names.split()), module


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_public_name_takes_the_same_arguments(module: str, name: str) -> None:
    theirs, ours = (getattr(part(package, module), name) for package in (torchdeq, deqcore))
    assert isinstance(ours, type) == isinstance(theirs, type)
    expected = inspect.signature(theirs).parameters
    found = inspect.signature(ours).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in found.values())
    names = [p.name for p in found.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for position, parameter in enumerate(expected.values()):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name in names:
            # TorchDEQ's simple_fixed_point_iter lacks tol and stop_mode, which here all solvers have.
            assert names.index(parameter.name) == position or name == "simple_fixed_point_iter"
            if parameter.default is not parameter.empty:
                assert found[parameter.name].default == parameter.default
        else:
            assert open_ended, parameter.name


def test_modules_that_are_imported_by_both_names_are_one() -> None:
    for module in ("solver", "norm", "loss", "dropout", "utils"):
        assert part(deqcore, module).__name__ == f"deqcore.{module}"
        for name in PUBLIC[module].split():
            if hasattr(deqcore, name):
                assert getattr(deqcore, name) is getattr(part(deqcore, module), name)


# ---- the call


@pytest.mark.parametrize("package", BOTH)
def test_arguments_by_position_and_by_name(package: ModuleType) -> None:
    x = torch.ones(3, 4, requires_grad=True)
    heard: list[Any] = []

    def f(z: Tensor) -> Tensor:
        return 0.5 * z + x

    deq = package.get_deq(ift=True, f_max_iter=60)
    for z_out, _ in (
        deq(f, torch.zeros(3, 4), {"f_max_iter": 50}, False, heard.append),
        deq(f, torch.zeros(3, 4), None, False, heard.append),
        deq(f, torch.zeros(3, 4), solver_kwargs={"f_max_iter": 50}, backward_writer=heard.append),
        deq(f, torch.zeros(3, 4), {}, backward_writer=heard.append, sradius_mode=False),
    ):
        z_out[-1].sum().backward()
    assert len(heard) == 4
    assert heard[0]["abs_lowest"].shape == (3,)
    deq.eval()
    for _, info in (deq(f, torch.zeros(3, 4), None, True), deq(f, torch.zeros(3, 4), sradius_mode=True)):
        assert info["sradius"].shape == (3,)
        assert torch.allclose(info["sradius"], torch.full((3,), 0.5))


def states(kind: str) -> tuple[Any, Any]:
    """f and z0 of several kinds; float64."""
    w = weight(6)
    if kind == "tensor":
        return lambda z: torch.tanh(z @ w + 0.2), torch.zeros(3, 6, dtype=DOUBLE)
    if kind == "image":
        return lambda z: 0.4 * torch.tanh(z.flip(1)) + 0.2, torch.zeros(2, 3, 4, 4, dtype=DOUBLE)
    if kind == "vector":
        return lambda z: 0.4 * torch.cos(z), torch.zeros(5, dtype=DOUBLE)

    def f(a: Tensor, b: Tensor) -> Any:
        joint = torch.tanh(torch.cat([a, b.flatten(1)], 1) @ w + 0.2)
        return type(z0)((joint[:, :2], joint[:, 2:].reshape(3, 2, 2)))

    z0 = (torch.zeros(3, 2, dtype=DOUBLE), torch.zeros(3, 2, 2, dtype=DOUBLE))
    z0 = list(z0) if kind == "list" else z0
    return f, z0


def parts(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


@pytest.mark.parametrize("kind", ["tensor", "image", "vector", "tuple", "list"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_of_what_is_returned(kind: str, solver: str, training: bool) -> None:
    if (kind, solver) == ("vector", "simple_fixed_point_iter"):
        pytest.skip("TorchDEQ fails there")
    f, z0 = states(kind)
    found: dict[str, Any] = {}
    for package in (torchdeq, deqcore):
        deq = package.get_deq(f_solver=solver, f_max_iter=30, n_states=2, f_tol=1e-4).train(training)
        found[package.__name__] = deq(f, z0)
    (theirs, their_info), (ours, our_info) = found["torchdeq"], found["deqcore"]
    assert isinstance(ours, list)
    assert len(ours) == len(theirs) == (2 if training else 1)
    for one, other in zip(ours, theirs, strict=True):
        assert isinstance(one, Tensor) == isinstance(other, Tensor)
        if solver != "simple_fixed_point_iter":  # there TorchDEQ returns what f does
            assert type(one) is type(other)
        for a, b in zip(parts(one), parts(other), strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert torch.allclose(a, b, atol=1e-3)
    same_shapes({key: list(our_info[key].shape) for key in INFO}, {key: list(their_info[key].shape) for key in INFO})
    for key in INFO:
        assert key in our_info
        assert not our_info[key].requires_grad


def test_info_is_used_as_the_dict_that_it_was() -> None:
    _, info = deqcore.get_deq()(lambda z: 0.5 * z, torch.zeros(3, 4))
    assert set(INFO) <= set(info)
    assert info.get("nothing", 7) == 7
    assert {**info}.keys() == info.keys() == dict(info.items()).keys()
    info["loss"] = 1.0
    info.update(accuracy=0.5, epoch=3)
    assert (info["loss"], info["accuracy"], info.pop("epoch")) == (1.0, 0.5, 3)
    assert "epoch" not in info
    assert "abs_lowest" in info


def test_info_of_a_call_without_steps() -> None:
    for training in (True, False):
        z_out, info = deqcore.get_deq().train(training)(torch.cos, torch.ones(3, 4), solver_kwargs={"f_max_iter": 0})
        for key in ("abs_lowest", "rel_lowest", "nstep"):
            assert info[key].shape == (3,)
        assert torch.equal(z_out[-1], torch.ones(3, 4).cos() if training else torch.ones(3, 4))


@pytest.mark.parametrize("package", BOTH)
@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_steps_by_call(package: ModuleType, core: str) -> None:
    deq = package.get_deq(core=core, f_tol=0.0, f_max_iter=40, indexing=[2])
    z_out, _ = deq(lambda z: z + 1, torch.zeros(1, 1), solver_kwargs={"f_max_iter": 5, "return_final": True})
    assert [z.item() for z in z_out] == ([3, 7] if core == "sliced" else [3, 6])


# ---- values

GRID = [
    {},
    {"grad": 3},
    {"grad": 3, "tau": 0.5},
    {"grad": 4, "sup_gap": 2},
    {"grad": 4, "sup_loc": [2], "tau": 0.9},
    {"n_states": 3, "grad": 2},
    {"n_states": 2, "grad": [2, 1]},
    {"indexing": [2, 5]},
    {"indexing": [3], "grad": [1, 3], "tau": 0.7},
    {"f_solver": "simple_fixed_point_iter"},
    {"f_solver": "simple_fixed_point_iter", "n_states": 3},
    {"no_stat": True},
]


@pytest.mark.parametrize("kind", ["tensor", "tuple"])
@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("options", GRID, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default")
def test_truncated_solves_are_the_same_number_by_number(core: str, options: dict[str, Any], kind: str) -> None:
    """f contracts, so that every step is the best so far, and both return the last one."""
    f, z0 = states(kind)
    x = rand(*parts(z0)[0].shape, seed=9).requires_grad_()

    def driven(*z: Tensor) -> Any:
        out = f(*z)
        return out + 0.1 * x if isinstance(out, Tensor) else (out[0] + 0.1 * x, out[1])

    found: list[tuple[list[Tensor], Tensor]] = []
    for package in (torchdeq, deqcore):
        z_out, _ = package.get_deq(core=core, f_max_iter=9, f_tol=0.0, **options)(driven, z0)
        flat = [torch.cat([p.flatten(1) for p in parts(z)], 1) for z in z_out]
        (gradient,) = torch.autograd.grad(sum((k + 1) * z.square().sum() for k, z in enumerate(flat)), x)
        found.append((flat, gradient))
    (theirs, their_gradient), (ours, our_gradient) = found
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert torch.allclose(our_gradient, their_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("b_solver", ["fixed_point_iter", "anderson", "broyden"])
@pytest.mark.parametrize("flag", ["ift", "hook_ift"])
def test_implicit_gradients_agree_where_both_converge(solver: str, b_solver: str, flag: str) -> None:
    w, x = weight(6), rand(4, 6).requires_grad_()
    gradients: list[Tensor] = []
    for package in (torchdeq, deqcore):
        options = {
            "f_tol": 1e-9,
            "b_tol": 1e-10,
            "f_max_iter": 150,
            "b_max_iter": 150,
            "b_stop_mode": "rel",
            flag: True,
        }
        z_out, _ = package.get_deq(f_solver=solver, b_solver=b_solver, **options)(
            lambda z: torch.tanh(z @ w + x), torch.zeros(4, 6, dtype=DOUBLE)
        )
        gradients.append(torch.autograd.grad(z_out[-1].square().sum(), x)[0])
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


# ---- solvers as functions


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fixed_point_iter", {"tau": 0.8}),
        ("anderson", {"m": 4, "lam": 1e-8, "tau": 0.9}),
        ("broyden", {"LBFGS_thres": 20, "ls": True}),
        ("broyden", {"LBFGS_thres": None}),
        ("anderson", {"return_final": True}),
    ],
)
def test_solver_functions_take_torchdeqs_options(name: str, options: dict[str, Any]) -> None:
    w = weight(6)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ w + 0.2)

    answers = []
    for package in (torchdeq, deqcore):
        solver = package.get_solver(name)
        z, trajectory, info = solver(
            f, torch.zeros(3, 6, dtype=DOUBLE), max_iter=60, tol=1e-7, stop_mode="rel", indexing=[3, 60], **options
        )
        assert isinstance(trajectory, list)
        assert z.shape == (3, 6)
        assert info["abs_lowest"].shape == info["nstep"].shape == (3,)
        answers.append(z)
    assert torch.allclose(*answers, atol=1e-5)


def test_damped_steps_as_a_function_are_the_same() -> None:
    answers = [
        package.get_solver("fixed_point_iter")(torch.cos, rand(3, 6), 11, 0.0, "abs", [2, 7], tau=0.6)
        for package in (torchdeq, deqcore)
    ]
    for theirs, ours in zip([answers[0][0], *answers[0][1]], [answers[1][0], *answers[1][1]], strict=True):
        assert torch.allclose(theirs, ours, rtol=0, atol=1e-13)


@pytest.mark.parametrize("package", BOTH)
def test_a_registered_function_is_a_solver_forward_and_backward(package: ModuleType) -> None:
    seen: list[dict[str, Any]] = []

    def halves(func: Any, x0: Tensor, max_iter: int = 50, tol: float = 1e-3, share: float = 0.5, **kwargs: Any) -> Any:
        seen.append({"max_iter": max_iter, "tol": tol, "share": share})
        x = x0
        for _ in range(max_iter):
            x = share * func(x) + (1 - share) * x
        return x, [], package.solver_stat_from_final_step(x, func(x), max_iter)

    name = f"halves_{package.__name__}"
    x = torch.ones(2, 3, dtype=DOUBLE, requires_grad=True)
    with deqcore.registry.scope():
        package.register_solver(name, halves)
        assert package.get_solver(name) is halves
        deq = package.get_deq(f_solver=name, b_solver=name, f_max_iter=70, b_max_iter=60, ift=True, f_tol=1e-6)
        z_out, _ = deq(lambda z: 0.5 * z + x, torch.zeros(2, 3, dtype=DOUBLE), solver_kwargs={"share": 0.75})
        (gradient,) = torch.autograd.grad(z_out[-1].sum(), x)
    assert torch.allclose(z_out[-1], torch.full_like(x, 2.0))
    assert torch.allclose(gradient, torch.full_like(x, 2.0))
    assert [call["max_iter"] for call in seen] == [70, 60]
    assert [call["share"] for call in seen] == [0.75, 0.5]


@pytest.mark.parametrize("package", BOTH)
def test_a_registered_deq_class_gets_the_configuration(package: ModuleType) -> None:
    class Mine(nn.Module):
        def __init__(self, args: Any) -> None:
            super().__init__()
            self.args = args

    name = f"mine_{package.__name__}"
    with deqcore.registry.scope():
        package.register_deq(name, Mine)
        made = package.get_deq({"core": name, "f_max_iter": 3})
    assert type(made) is Mine
    assert made.args is not None


@pytest.mark.parametrize("batch", [1, 4])
def test_statistics_of_a_final_step(batch: int) -> None:
    for z, fz in (
        (rand(batch, 3), rand(batch, 3, seed=1)),
        ([rand(batch, 3), rand(batch, 2, 2)], [rand(batch, 3, seed=1), rand(batch, 2, 2, seed=1)]),
    ):
        theirs, ours = (package.solver_stat_from_final_step(z, fz, 5) for package in (torchdeq, deqcore))
        for key in INFO:
            assert theirs[key].shape == ours[key].shape
            assert torch.allclose(theirs[key].double(), ours[key].double())


# ---- losses and helpers


@pytest.mark.parametrize("vecs", [1, 3])
def test_the_jacobian_penalty_is_the_same(vecs: int) -> None:
    w = weight(5).float().requires_grad_()
    found = []
    for package in (torchdeq, deqcore):
        torch.manual_seed(3)
        z = rand(4, 5).float().requires_grad_()
        loss = package.jac_reg(torch.tanh(z @ w), z, vecs=vecs)
        found.append((loss.detach(), *torch.autograd.grad(loss, w)))
    for theirs, ours in zip(*found, strict=True):
        assert torch.allclose(theirs, ours)


def test_the_spectral_radius_is_the_same_where_it_is_real() -> None:
    for package in (torchdeq, deqcore):
        torch.manual_seed(0)
        z = rand(3, 4).requires_grad_()
        scale = torch.tensor([0.2, 0.5, 0.9], dtype=DOUBLE)[:, None]
        vector, radius = package.power_method(scale * z * torch.tensor([1.0, 0.3, 0.2, 0.1]), z, n_iters=60)
        assert torch.allclose(radius, scale[:, 0])
        assert vector.shape == z.shape


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.5},
        {"weight_func": "linear"},
        {"weight_func": "linear", "gamma": 0.3, "bias": 0.1},
        {"return_loss_values": True},
    ],
)
def test_the_correction_is_the_same(options: dict[str, Any]) -> None:
    outputs = [rand(4, 3, seed=k) for k in range(4)]
    args = (outputs, rand(4, 3, seed=9), [torch.ones(4, 3), 2 * torch.ones(4, 3)])

    def crit(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        return ((a - b) * mask).abs().mean()

    theirs, ours = (package.fp_correction(crit, args, **options) for package in (torchdeq, deqcore))
    if "return_loss_values" in options:
        assert ours[1] == pytest.approx(theirs[1])
        theirs, ours = theirs[0], ours[0]
    assert torch.allclose(theirs, ours)


@pytest.mark.parametrize("package", BOTH)
def test_a_registered_weight_function(package: ModuleType) -> None:
    package.register_weight_func("by_place", lambda n, k, step=1.0: step * (k + 1) / n)
    loss = package.fp_correction(torch.mean, ([torch.ones(2), 3 * torch.ones(2)],), weight_func="by_place", step=2.0)
    assert loss.item() == pytest.approx(2 * (0.5 * 1 + 1.0 * 3))


@pytest.mark.parametrize("package", BOTH)
def test_recomputing_in_the_backward(package: ModuleType) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = rand(3, 4).requires_grad_()
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    again = torch.autograd.grad(package.mem_gc(layer, (x,)).square().sum(), [x, *layer.parameters()])
    for a, b in zip(plain, again, strict=True):
        assert torch.allclose(a, b)
    assert torch.equal(package.mem_gc(nn.Identity(), (x,)), x)


def test_mixed_starts_are_the_same() -> None:
    found = []
    for package in (torchdeq, deqcore):
        torch.manual_seed(5)
        found.append(package.mixed_init((50, 40), device="cpu"))
    assert torch.equal(*found)
    assert 0.45 < (found[1] == 0).double().mean() < 0.55


@pytest.mark.parametrize("package", BOTH)
def test_reset_deq_renews_norms_and_masks(package: ModuleType) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), package.VariationalDropout(0.5))
    package.apply_norm(net, "weight_norm")
    net(torch.ones(2, 5))
    before = net[1].mask.clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    package.reset_deq(net)
    assert net(torch.ones(2, 5)).shape == (2, 5)
    assert not torch.equal(net[1].mask, before)
    package.remove_norm(net)
    assert [name for name, _ in net.named_parameters()] == ["0.bias", "0.weight"]
