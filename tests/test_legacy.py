"""TorchDEQ's flat names and flags: what each means here, with torchdeq 0.1.0 beside."""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import pytest
import torch

import deqcore
from deqcore import (
    ConfigError,
    ConfigTypeError,
    DEQConfig,
    UnknownPluginError,
    add_deq_args,
    get_deq,
    register_deq,
    registry,
    reset_deq,
)
from deqcore.legacy import FLAT

torchdeq = pytest.importorskip("torchdeq")
load = DEQConfig.load


@pytest.fixture
def theirs():
    parser = argparse.ArgumentParser()
    torchdeq.utils.add_deq_args(parser) if hasattr(torchdeq.utils, "add_deq_args") else torchdeq.add_deq_args(parser)
    return parser


@pytest.fixture
def ours():
    parser = argparse.ArgumentParser()
    assert deqcore.utils.add_deq_args is add_deq_args
    add_deq_args(parser)
    return parser


def problem(seed: int = 0, batch: int = 5, d: int = 6, rho: float = 0.7):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(d, d, generator=generator, dtype=torch.float64)
    w = rho * w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(batch, d, generator=generator, dtype=torch.float64).requires_grad_()
    return (lambda z: torch.tanh(z @ w.T + x)), x, torch.zeros(batch, d, dtype=torch.float64)


def theirs_get_deq(*args: Any, **keywords: Any) -> Any:
    return torchdeq.get_deq(*[copy.deepcopy(a) for a in args], **keywords)  # it changes what it is given


# ---- defaults


def test_nothing_given_is_torchdeqs_default():
    other = theirs_get_deq()
    config = get_deq().config
    assert (config.solver.name, config.solver.max_iter, config.solver.tol) == (
        other.f_solver.__name__,
        other.f_max_iter,
        other.f_tol,
    )
    assert config.solver.stop_mode == other.f_stop_mode
    assert config.core.name == "sliced" and type(other).__name__ == "DEQSliced"
    assert (config.core.n_states, list(config.core.indexing)) == (other.arg_n_states, other.arg_indexing)
    assert (config.gradient.name, config.gradient.steps, config.gradient.damping) == ("phantom", 1, 1.0)
    assert int(config.solver.max_iter * config.eval_factor) == other.eval_f_max_iter
    assert config.norm is None and config.regularizers == ()


def test_the_flags_are_torchdeqs_with_its_defaults(theirs, ours):
    expected = vars(theirs.parse_args([]))
    parsed = vars(ours.parse_args([]))
    assert {key: parsed[key] for key in expected} == expected
    assert set(parsed) - set(expected) == {"deq_given"}
    assert [type(parsed[key]) for key in expected] == [type(value) for value in expected.values()]
    missing = {option for action in theirs._actions for option in action.option_strings} - {
        option for action in ours._actions for option in action.option_strings
    }
    assert missing == set()


def test_flags_take_what_torchdeqs_take(theirs, ours):
    line = """
        --f_solver anderson --b_solver broyden --f_max_iter 12 --b_max_iter 13 --f_tol 1e-4 --b_tol 1e-7
        --f_stop_mode rel --b_stop_mode rel --eval_factor 1.5 --eval_f_max_iter 30
        --norm_type spectral_norm --norm_no_scale --norm_clip --norm_clip_value 0.9 --norm_target_norm 0.8
        --sn_n_power_iters 2 --core indexing --ift --hook_ift --n_states 1 --indexing 3 5 --gamma 0.7
        --grad 1 2 3 --tau 0.5 --sup_gap 2 --sup_loc 1 2 --jac_loss_weight 0.1 --jac_loss_freq 0.2
        --jac_incremental 3 --sradius_mode
    """.split()
    expected, parsed = vars(theirs.parse_args(line)), vars(ours.parse_args(line))
    assert {key: parsed[key] for key in expected} == expected


def test_the_help_text_prints(ours):
    text = ours.format_help()
    assert "--gradient.solver.memory" in text and "--solver.memory" in text


def test_no_flag_written_is_the_default(ours):
    assert load(ours.parse_args([])) == load() == DEQConfig()


def test_a_plain_namespace_with_all_of_torchdeqs_defaults(theirs):
    config = load(theirs.parse_args([]))
    default = DEQConfig()
    assert (config.solver, config.gradient, config.core) == (default.solver, default.gradient, default.core)
    assert config.norm.name == "weight_norm"  # named there, put on by apply_norm only


# ---- every name


@pytest.mark.parametrize(
    ("given", "path", "value"),
    [
        (dict(f_solver="broyden"), "solver.name", "broyden"),
        (dict(f_max_iter=12), "solver.max_iter", 12),
        (dict(f_max_iter=12.0), "solver.max_iter", 12),
        (dict(f_tol=1e-5), "solver.tol", 1e-5),
        (dict(f_stop_mode="rel"), "solver.stop_mode", "rel"),
        (dict(f_solver="anderson", m=8), "solver.memory", 8),
        (dict(f_solver="anderson", lam=1e-3), "solver.absolute_ridge", 1e-3),
        (dict(f_solver="anderson", solver={"tau": 0.5}), "solver.damping", 0.5),
        (dict(f_solver="broyden", LBFGS_thres=7), "solver.memory", 7),
        (dict(f_solver="broyden", ls=True), "solver.line_search", True),
        (dict(return_final=True), "solver.return_final", True),
        (dict(ift=True), "gradient.name", "implicit"),
        (dict(hook_ift=True), "gradient.name", "implicit"),
        (dict(ift=True, b_solver="anderson"), "gradient.solver.name", "anderson"),
        (dict(ift=True, b_solver="simple_fixed_point_iter"), "gradient.solver.name", "simple_fixed_point_iter"),
        (dict(ift=True, b_max_iter=9), "gradient.solver.max_iter", 9),
        (dict(ift=True, b_tol=1e-9), "gradient.solver.tol", 1e-9),
        (dict(ift=True, b_stop_mode="rel"), "gradient.solver.stop_mode", "rel"),
        (dict(ift=True, b_solver="anderson"), "gradient.solver.tol", 1e-6),
        (dict(ift=True, b_solver="anderson"), "gradient.solver.max_iter", 40),
        (dict(grad=3), "gradient.steps", 3),
        (dict(grad=[3]), "gradient.steps", 3),
        (dict(grad=(3,)), "gradient.steps", 3),
        (dict(tau=0.5), "gradient.damping", 0.5),
        (dict(sup_gap=2), "gradient.sup_gap", 2),
        (dict(sup_loc=[1, 2]), "gradient.sup_loc", (1, 2)),
        (dict(core="indexing"), "core.name", "indexing"),
        (dict(n_states=3), "core.n_states", 3),
        (dict(indexing=[2, 4]), "core.indexing", (2, 4)),
        (dict(eval_factor=1.5), "eval_factor", 1.5),
        (dict(eval_f_max_iter=9), "eval_max_iter", 9),
        (dict(no_stat=True), "keep_trace", False),
        (dict(no_stat=False), "keep_trace", True),
        (dict(norm_type="spectral_norm"), "norm.name", "spectral_norm"),
        (dict(norm_type="spectral_norm", sn_n_power_iters=3), "norm.n_power_iterations", 3),
        (dict(norm_no_scale=True), "norm.learn_scale", False),
        (dict(norm_clip=True), "norm.clip", True),
        (dict(norm_clip_value=0.5), "norm.clip_value", 0.5),
        (dict(norm_target_norm=0.5), "norm.target_norm", 0.5),
        (dict(norm_clip=True), "norm.name", "weight_norm"),
        (dict(norm_type="none"), "norm", None),
        (dict(norm_type="none", norm_clip=True), "norm", None),
    ],
)
def test_what_each_name_means(given, path, value):
    for config in (load(**given), load(given), get_deq(**given).config):
        found: Any = config
        for part in path.split("."):
            found = getattr(found, part)
        assert found == value
    if not given.keys() & {"m", "lam", "LBFGS_thres", "ls", "return_final"}:  # a program's own affair there
        assert load(argparse.Namespace(**given)) == load(**given)


def test_names_that_are_the_programs_own_affair_attach_nothing():
    given = dict(gamma=0.9, jac_loss_weight=0.5, jac_loss_freq=0.3, jac_incremental=2, sradius_mode=True)
    assert load(**given) == load(given) == load(argparse.Namespace(**given)) == DEQConfig()


def test_every_flat_name_is_tried():
    tried = {
        key
        for mark in vars(test_what_each_name_means)["pytestmark"]
        for given, *_ in mark.args[1]
        for key in given
        if mark.name == "parametrize"
    }
    own = {"gamma", "jac_loss_weight", "jac_loss_freq", "jac_incremental", "sradius_mode"}
    assert set(FLAT) - tried - own == set()


# ---- the gradient's options


def steps_of(config: DEQConfig) -> list[Any]:
    before = [choice.steps for choice in config.core.intermediate]
    return [*before, config.gradient.steps if config.gradient.name == "phantom" else config.gradient.name]


def test_grad_is_one_for_all_or_one_each():
    assert steps_of(load(grad=[1, 2, 3], n_states=3)) == [1, 2, 3]
    assert steps_of(load(grad=[1, 2, 3], indexing=[4, 8])) == [1, 2, 3]
    assert steps_of(load(grad=[1, 2], n_states=2, ift=True)) == [1, "implicit"]
    assert [g.settings.steps for g in get_deq(grad=3, n_states=4).gradients] == [3, 3, 3, 3]
    assert [g.settings.steps for g in get_deq(grad=3, n_states=3, ift=True).gradients[:-1]] == [3, 3]
    last = load(grad=[1, 2], n_states=2, tau=0.5)
    assert (last.gradient.damping, last.core.intermediate[0].damping) == (0.5, 0.5)


def test_grad_above_an_explicit_list_of_intermediate_gradients():
    nested = {"n_states": 2, "core": {"intermediate": [{"name": "phantom", "steps": 7}]}}
    assert steps_of(load(nested)) == [7, 1]
    assert steps_of(load(nested, grad=[2, 3])) == [2, 3]
    assert steps_of(load({"grad": [2, 3], "n_states": 2}, core={"intermediate": ["phantom"]})) == [1, 3]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (dict(grad=0), ConfigError, r"grad \(keyword grad\).*at least one step.*got 0"),
        (dict(grad=-2), ConfigError, "at least one step"),
        (dict(grad=[]), ConfigTypeError, r"an int, or a list with one int a state, got \[\]"),
        (dict(grad=[1, 2]), ConfigError, "has 2 values for 1 state"),
        (dict(grad=[1, 2], n_states=3), ConfigError, "has 2 values for 3 state"),
        (dict(grad=[1, 2, 3, 4], indexing=[3, 5]), ConfigError, "has 4 values for 3 state"),
        (dict(grad="2"), ConfigTypeError, "an int, or a list"),
        (dict(grad=True), ConfigTypeError, "an int, or a list"),
        (dict(grad=[1.5]), ConfigTypeError, "an int, or a list"),
        (dict(grad=2.5), ConfigTypeError, "an int, or a list"),
        (
            dict(tau=0),
            ConfigError,
            r"gradient.damping \(keyword tau\) must be a number, greater than 0, at most 1, got 0",
        ),
        (
            dict(ift=True, tau=3.0, n_states=2),
            ConfigError,
            r"core.intermediate.0.damping \(keyword tau\).*at most 1, got 3",
        ),
        (dict(sup_loc=["x"]), ConfigTypeError, r"gradient.sup_loc.0 \(keyword sup_loc\)"),
        (dict(ift="maybe"), ConfigTypeError, r"ift \(keyword ift\) must be true or false, got 'maybe'"),
        (dict(b_max_iter=-1), ConfigError, r"b_max_iter \(keyword b_max_iter\) must be an int, at least 0, got -1"),
        (dict(b_tol=-1), ConfigError, "b_tol .*at least 0, got -1"),
        (dict(b_tol="x"), ConfigTypeError, "b_tol .*got 'x'"),
        (dict(b_stop_mode="both"), ConfigError, "b_stop_mode .*'abs' or 'rel', got 'both'"),
        (
            dict(b_solver="andersn"),
            UnknownPluginError,
            r"b_solver \(keyword b_solver\): no solver named 'andersn'.*'anderson'",
        ),
        (dict(ift=True, b_max_iter=-1), ConfigError, r"gradient.solver.max_iter \(keyword b_max_iter\).*got -1"),
        (
            dict(ift=True, b_solver="andersn"),
            UnknownPluginError,
            r"gradient.solver \(keyword b_solver\): no solver named",
        ),
        (
            dict(f_solver="broyden", m=3),
            ConfigError,
            r"solver \(keyword m\): unknown key 'm'. .*solver 'broyden' takes",
        ),
        (dict(n_states=2, indexing=[3]), ConfigError, "give n_states or indexing, not both"),
        (dict(indexing=[3, 3]), ConfigError, "indexing must be increasing steps from 1 on"),
        (dict(indexing=[0]), ConfigError, "indexing must be increasing steps from 1 on"),
        (dict(indexing=[True]), ConfigTypeError, "core.indexing .*got"),
        (dict(n_states=0), ConfigError, r"core.n_states .*at least 1, got 0"),
    ],
)
def test_wrong_values_of_flat_options(given, error, text):
    with pytest.raises(error, match=text):
        get_deq(**given)


def test_ift_by_keyword_over_a_namespace(ours):
    args = argparse.Namespace(ift=True, grad=[2])
    assert load(args).gradient.name == "implicit"
    assert load(args, ift=False).gradient.name == "phantom" and load(args, ift=False).gradient.steps == 2
    assert load(args, hook_ift=False).gradient.name == "implicit"  # ift still says so
    assert load(argparse.Namespace(hook_ift=True), hook_ift=False).gradient.name == "phantom"
    assert load(args, gradient="phantom").gradient.name == "phantom"
    assert load({"gradient": "implicit"}, ift=False).gradient.name == "phantom"
    assert load({"gradient": {"name": "phantom", "steps": 5}}, ift=True).gradient.name == "implicit"
    assert load(ours.parse_args(["--ift"]), ift=False).gradient.name == "phantom"
    assert load(ours.parse_args([]), ift=True).gradient.name == "implicit"
    assert load(argparse.Namespace(ift=False, gradient="implicit")).gradient.name == "implicit"


def test_the_environment_below_flags(ours, monkeypatch):
    monkeypatch.setenv("DEQCORE_F_SOLVER", "broyden")
    monkeypatch.setenv("DEQCORE_IFT", "true")
    monkeypatch.setenv("DEQCORE_F_TOL", "1e-5")
    unwritten = load(ours.parse_args([]))
    assert (unwritten.solver.name, unwritten.solver.tol, unwritten.gradient.name) == ("broyden", 1e-5, "implicit")
    written = load(ours.parse_args(["--f_solver", "fixed_point_iter", "--f_tol", "1e-3"]))  # the defaults, but written
    assert (written.solver.name, written.solver.tol) == ("fixed_point_iter", 1e-3)
    args = ours.parse_args([])
    args.f_tol = 0.5  # the program's own doing
    assert load(args).solver.tol == 0.5
    ours.set_defaults(f_solver="anderson")
    assert load(ours.parse_args([])).solver.name == "anderson"


def test_dotted_flags(ours):
    line = (
        "--solver.name anderson --solver.memory 3 --solver.ridge 1e-9 --solver.return_final true --core.indexing [2,4] "
        "--gradient.name implicit --gradient.solver.name anderson --gradient.solver.memory 7 "
        "--gradient.solver.tol 1e-9 --norm.name spectral_norm --norm.clip true --f_max_iter 9"
    )
    args = ours.parse_args(line.split())
    assert load(args) == DEQConfig(
        solver={"name": "anderson", "memory": 3, "ridge": 1e-9, "return_final": True, "max_iter": 9},
        core={"indexing": [2, 4]},
        gradient={"name": "implicit", "solver": {"name": "anderson", "memory": 7, "tol": 1e-9}},
        norm={"name": "spectral_norm", "clip": True},
    )
    assert load(vars(args)) == load(args)
    assert load(copy.deepcopy(args)) == load(args)
    with pytest.raises(
        ConfigTypeError, match=r"solver.memory \(flag --solver.memory\) must be an int, at least 1, got 'many'"
    ):
        load(ours.parse_args(["--solver.name", "anderson", "--solver.memory", "many"]))
    with pytest.raises(
        ConfigError, match=r"solver \(flag --solver.memory\): unknown key 'memory'. .*'fixed_point_iter' takes"
    ):
        load(ours.parse_args(["--solver.memory", "3"]))
    with pytest.raises(
        ConfigError, match=r"solver.max_iter is given twice: as 3 .*attribute f_max_iter.*4 .*flag --solver.max_iter"
    ):
        load(ours.parse_args(["--f_max_iter", "3", "--solver.max_iter", "4"]))


def test_every_setting_of_every_installed_implementation_has_a_flag(ours):
    options = {option for action in ours._actions for option in action.option_strings}
    for section, kind in (("solver", "solvers"), ("gradient", "gradients"), ("core", "cores"), ("norm", "norms")):
        for name in registry.names(kind):
            for field in registry.get(kind, name).settings_type.model_fields:
                if (section, field) in (("gradient", "solver"), ("solver", "linear_solver")):
                    assert f"--{section}.{field}.name" in options
                else:
                    assert f"--{section}.{field}" in options
    for name in registry.names("solvers"):
        for field in registry.get("solvers", name).settings_type.model_fields:
            if field != "linear_solver":  # a solver inside the solver inside the gradient has no flags
                assert f"--gradient.solver.{field}" in options


def test_flags_beside_the_programs_own_and_in_subcommands():
    parser = argparse.ArgumentParser()
    parser.add_argument("--solver", default="adam")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--check_every", type=int, default=1)
    train = parser.add_subparsers().add_parser("train")
    add_deq_args(train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(parser.parse_args(["train"])) == DEQConfig()
        assert load(parser.parse_args(["--solver", "sgd", "train", "--f_max_iter", "7"])).solver.max_iter == 7


def test_defaults_of_lists_are_not_shared(ours):
    args = ours.parse_args([])
    args.grad.append(5)
    args.indexing.append(3)
    assert FLAT["grad"].default == [1] and FLAT["indexing"].default == []
    assert steps_of(load(args)) == [1, 5]


def test_a_broken_plugin_does_not_take_the_flags_down(site):
    site.solver("dist-ok", "fine_one", "fine_module")
    site.solver("dist-bad", "bad_one", "bad_module", "raise RuntimeError('no')")
    site.solver("dist-shadow", "anderson", "shadow_module")
    parser = argparse.ArgumentParser()
    add_deq_args(parser)
    assert load(parser.parse_args(["--f_max_iter", "3"])).solver.max_iter == 3
    assert load(parser.parse_args(["--solver.name", "fine_one", "--solver.max_iter", "3"])).solver.name == "fine_one"


# ---- the same program on both


NEVER = dict(f_tol=1e-14, f_max_iter=9)  # a fixed number of steps: where an early stop lands is each one's own


@pytest.mark.parametrize(
    "options",
    [
        NEVER,
        dict(NEVER, f_stop_mode="rel"),
        dict(NEVER, grad=3),
        dict(NEVER, grad=4, tau=0.6),
        dict(NEVER, grad=4, sup_gap=2),
        dict(NEVER, grad=4, sup_loc=[1, 3]),
        dict(NEVER, n_states=3),
        dict(NEVER, n_states=2, grad=[2, 3]),
        dict(NEVER, indexing=[3, 6]),
        dict(NEVER, indexing=[3], grad=[1, 2]),
        dict(NEVER, core="indexing", n_states=3),
        dict(NEVER, core="indexing", n_states=2),
        dict(NEVER, core="indexing", indexing=[4], grad=[2, 1]),
        dict(f_solver="simple_fixed_point_iter", f_max_iter=25),
        dict(f_solver="simple_fixed_point_iter", f_max_iter=9, n_states=3),
    ],
    ids=str,
)
def test_states_and_gradients_are_the_same(options):
    (z_theirs, info_theirs, grad_theirs), (z_ours, info_ours, grad_ours) = both(options)
    assert len(z_theirs) == len(z_ours)
    for a, b in zip(z_theirs, z_ours, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    torch.testing.assert_close(grad_theirs, grad_ours, rtol=0, atol=1e-13)
    assert info_ours["abs_lowest"].shape == info_theirs["abs_lowest"].shape == (5,)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 5e-3),
        (dict(f_tol=1e-9, f_max_iter=200), 1e-7),
        (dict(f_stop_mode="rel", f_tol=1e-9, f_max_iter=200), 1e-7),
        (dict(f_tol=1e-9, f_max_iter=200, f_solver="anderson"), 1e-7),
        (dict(f_tol=1e-9, f_max_iter=200, f_solver="broyden"), 1e-7),
        (dict(ift=True, f_tol=1e-10, f_max_iter=200, b_tol=1e-12, b_max_iter=300), 1e-8),
        (dict(ift=True, f_tol=1e-10, f_max_iter=200, b_tol=1e-12, b_max_iter=300, b_solver="anderson"), 1e-8),
        (dict(hook_ift=True, f_tol=1e-10, f_max_iter=200, b_tol=1e-12, b_max_iter=300), 1e-8),
    ],
    ids=str,
)
def test_what_stops_early_agrees_within_its_tolerance(options, tolerance):
    (z_theirs, _, grad_theirs), (z_ours, _, grad_ours) = both(options)
    assert len(z_theirs) == len(z_ours) == 1
    torch.testing.assert_close(z_theirs[0], z_ours[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(grad_theirs, grad_ours, rtol=0, atol=tolerance)


def both(options: dict[str, Any]) -> list[Any]:
    """(states, info, gradient) of torchdeq and of deqcore for one program."""
    results = []
    for make in (theirs_get_deq, get_deq):
        fn, x, z0 = problem()
        extra = {"on_failure": "ignore"} if make is get_deq else {}
        z_out, info = make(**options, **extra)(fn, z0)
        sum((k + 1) * z.square().sum() for k, z in enumerate(z_out)).backward()
        results.append((z_out, info, x.grad))
    return results


def test_eval_factor_and_eval_f_max_iter_count_alike():
    for options in (
        dict(f_max_iter=10, eval_factor=1.5),
        dict(f_max_iter=10, eval_factor=0.35),
        dict(eval_f_max_iter=4),
        {},
    ):
        counts = []
        for make in (theirs_get_deq, get_deq):
            fn, _, z0 = problem(rho=0.999)
            calls = []
            extra = {"on_failure": "ignore"} if make is get_deq else {}
            deq = make(**options, f_tol=1e-14, **extra).eval()
            with torch.no_grad():
                deq(lambda z, fn=fn, calls=calls: calls.append(1) or fn(z), z0)
            counts.append(len(calls))
        steps = theirs_get_deq(**options).eval_f_max_iter
        assert counts[1] in (steps, steps + 1)  # one evaluation more tells the residual of what is returned
        assert abs(counts[0] - counts[1]) <= 1


def test_a_program_that_overrides_its_namespace(theirs):
    args = theirs.parse_args(["--f_solver", "anderson", "--f_max_iter", "11"])
    assert get_deq(args, f_max_iter=5, f_solver="broyden").config.solver.max_iter == 5
    assert args.f_max_iter == 11 and args.f_solver == "anderson"


# ---- registering and resetting


class TestRegisterDeq:
    def test_a_factory_gets_everything_the_program_gave(self):
        seen: list[Any] = []
        with registry.scope():
            register_deq("mine", lambda args: seen.append(args) or torch.nn.Identity())
            assert isinstance(
                get_deq(argparse.Namespace(core="mine", width=3, f_max_iter=9), f_tol=1e-2), torch.nn.Identity
            )
            args = seen.pop()
            assert (args.width, args.f_max_iter, args.get("f_tol"), args.get("nothing", 5)) == (3, 9, 1e-2, 5)
            assert args.get("f_solver", "theirs") == "theirs"  # not given
            assert args.config.solver.max_iter == 9

    def test_a_factory_with_keywords_or_a_file(self, tmp_path):
        seen: list[Any] = []
        with registry.scope():
            register_deq("mine", lambda args: seen.append(args))
            get_deq(core="mine", solver={"max_iter": 9}, n_states=2)
            args = seen.pop()
            assert args.gradient.name == "phantom"
            assert (args.get("f_max_iter", 40), args.get("n_states"), args.config.solver.max_iter) == (9, 2, 9)
            (tmp_path / "deq.toml").write_text("core = 'mine'\nf_tol = 0.5\n")
            get_deq(tmp_path / "deq.toml")
            assert seen.pop().get("f_tol") == 0.5
            get_deq(DEQConfig(core="mine"))
            assert seen.pop().config.core.name == "mine"

    def test_a_class(self):
        class Own(torch.nn.Module):
            def __init__(self, args):
                super().__init__()
                self.steps = args.get("f_max_iter", 40)

        with registry.scope():
            register_deq("own", Own)
            assert get_deq(dict(core="own", f_max_iter=3)).steps == 3
            assert get_deq(core="own").steps == 40

    def test_neither_class_nor_callable(self):
        with pytest.raises(ConfigTypeError, match="class or a callable"):
            register_deq("mine", 3)


def test_reset_deq_takes_any_model():
    reset_deq(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()))
