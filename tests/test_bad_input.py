"""Bad input, whatever the way in: a typed error that says what was given and where, what is allowed, and what to do."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

import deqcore
from deqcore import (
    BrokenPluginError,
    ConfigError,
    ConfigTypeError,
    DEQConfig,
    DEQError,
    FunctionError,
    FunctionTypeError,
    PluginClashError,
    PluginDisabledError,
    StateError,
    StateTypeError,
    UnknownKeyError,
    UnknownPluginError,
    add_deq_args,
    errors,
    get_deq,
    registry,
)

Z0 = torch.zeros(2, 3)


def refuse(error: type[Exception], call: Any, *texts: str) -> str:
    """Checks that `call` raises exactly `error`, whose text has all of `texts`; returns the text."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert isinstance(caught.value, DEQError)
    message = str(caught.value)
    for text in texts:
        assert text in message, message
    assert "pydantic" not in message and "\n" not in message and len(message) < 1200
    assert caught.value.__cause__ is None or isinstance(caught.value, ImportError | ConfigError)
    return message


def test_the_errors_are_what_python_users_expect():
    for error, bases in {
        errors.ConfigError: (ValueError,),
        errors.ConfigTypeError: (ConfigError, TypeError),
        errors.UnknownKeyError: (ConfigError,),
        errors.UnknownPluginError: (errors.PluginError, ValueError),
        errors.PluginClashError: (errors.PluginError, ValueError),
        errors.PluginDisabledError: (errors.PluginError, ValueError),
        errors.BrokenPluginError: (errors.PluginError, ImportError),
        errors.StateError: (ValueError,),
        errors.StateTypeError: (StateError, TypeError),
        errors.FunctionError: (ValueError,),
        errors.FunctionTypeError: (FunctionError, TypeError),
        errors.MissingExtraError: (ImportError,),
        errors.ConvergenceError: (RuntimeError,),
    }.items():
        assert issubclass(error, (*bases,)) and all(issubclass(error, base) for base in bases)
    for name in errors.__all__:
        thing = getattr(errors, name)
        assert issubclass(thing, errors.DEQWarning if name.endswith("Warning") else DEQError)
        assert getattr(deqcore, name) is thing


# ---- wrong names


@pytest.mark.parametrize(
    ("keywords", "path", "kind", "nearest"),
    [
        (dict(f_solver="andersn"), "solver (keyword f_solver)", "solver", "anderson"),
        (dict(solver="broyd"), "solver (keyword solver)", "solver", "broyden"),
        (dict(solver={"name": "Anderson"}), "solver (keyword solver)", "solver", "anderson"),
        (dict(gradient="implict"), "gradient (keyword gradient)", "gradient", "implicit"),
        (dict(ift=True, b_solver="andersn"), "gradient.solver (keyword b_solver)", "solver", "anderson"),
        (dict(b_solver="andersn"), "b_solver (keyword b_solver)", "solver", "anderson"),
        (dict(core="indexin"), "core (keyword core)", "core", "indexing"),
        (dict(norm="spectralnorm"), "norm (keyword norm)", "norm", "spectral_norm"),
        (dict(norm_type="weightnorm"), "norm (keyword norm_type)", "norm", "weight_norm"),
        (dict(regularizers=["jacobain"]), "regularizers.0 (keyword regularizers)", "regularizer", "jacobian"),
        (dict(core={"intermediate": ["phantm"]}), "core.intermediate.0 (keyword core)", "gradient", "phantom"),
    ],
)
def test_wrong_name(keywords, path, kind, nearest):
    name = f"no {kind} named"
    refuse(
        UnknownPluginError,
        lambda: get_deq(**keywords),
        path,
        name,
        f"Did you mean '{nearest}'",
        "Installed: ",
        "register it",
    )


def test_a_name_of_another_kind_says_so():
    refuse(
        UnknownPluginError, lambda: get_deq(solver="implicit"), "no solver named 'implicit'", "'implicit' is a gradient"
    )
    refuse(UnknownPluginError, lambda: get_deq("nowhere/anderson"), "'nowhere/anderson'", "deqcore/anderson")


@pytest.mark.parametrize("wrong", [3, 2.5, True, b"anderson", ["anderson"], torch.zeros(2)])
def test_something_that_is_no_name(wrong):
    message = refuse(ConfigTypeError, lambda: get_deq(solver=wrong), "solver (keyword solver)", type(wrong).__name__)
    assert "name" in message and "dict" in message
    refuse(
        ConfigTypeError, lambda: get_deq(solver={"name": wrong}), "solver (keyword solver)", "picked by its name, a str"
    )


@pytest.mark.parametrize("wrong", [3, 2.5, True, b"anderson", ["anderson"], {"anderson"}, lambda z: z, print])
def test_something_that_is_no_configuration(wrong):
    refuse(
        ConfigTypeError,
        lambda: get_deq(wrong),
        "a configuration is a file's path, a solver's name, a dict",
        type(wrong).__name__,
    )


# ---- wrong keys, by every way in


WRONG_KEYS = [
    ({"f_maxiter": 7}, "f_maxiter", "f_max_iter"),
    ({"solvr": "anderson"}, "solvr", "solver"),
    ({"on_fail": "raise"}, "on_fail", "on_failure"),
    ({"batchdims": 0}, "batchdims", "batch_dims"),
    ({"solver": {"name": "anderson", "memry": 7}}, "memry", "memory"),
    (
        {"gradient": {"name": "implicit", "solver": {"name": "broyden", "linesearch": True}}},
        "linesearch",
        "line_search",
    ),
    ({"gradient": {"name": "phantom", "step": 3}}, "step", "steps"),
    ({"core": {"n_state": 3}}, "n_state", "n_states"),
    ({"norm": {"name": "weight_norm", "clip_val": 3}}, "clip_val", "clip_value"),
    ({"regularizers": [{"name": "jacobian", "wieght": 3}]}, "wieght", "weight"),
    ({"core": {"n_states": 2, "intermediate": [{"name": "phantom", "stps": 3}]}}, "stps", "steps"),
]


def as_toml(values: Any) -> str:
    from deqcore.files import to_toml

    return to_toml(values)


@pytest.mark.parametrize(("values", "key", "nearest"), WRONG_KEYS)
def test_wrong_key(values, key, nearest, tmp_path, monkeypatch):
    told = (f"unknown key '{key}'", f"Did you mean '{nearest}'", "takes: ")
    (top,) = values
    refuse(UnknownKeyError, lambda: get_deq(**values), "keyword" if top == key else f"keyword {top}", *told)
    refuse(UnknownKeyError, lambda: get_deq(values), "dict key" if top == key else f"dict key {top}", *told)
    path = tmp_path / "deq.toml"
    path.write_text(as_toml(values))
    refuse(UnknownKeyError, lambda: get_deq(str(path)), f"file {path}", *told)
    variable = f"DEQCORE_{top.upper()}"
    monkeypatch.setenv(variable, as_toml({"x": [values[top]]})[5:-2])  # inline
    refuse(UnknownKeyError, get_deq, f"environment variable {variable}", *told)


@pytest.mark.parametrize(
    "name", ["DEQCORE_SOLVER__MEMRY", "DEQCORE_SOLVR__MEMORY", "DEQCORE_F_MAXITER", "DEQCORE_ON_FAILUR"]
)
def test_a_wrong_variable_is_called_by_its_real_name(name, monkeypatch):
    monkeypatch.setenv("DEQCORE_F_SOLVER", "anderson")
    monkeypatch.setenv(name, "3")
    refuse(UnknownKeyError, get_deq, f"environment variable {name}", "unknown key", "Did you mean")


def test_a_wrong_key_in_a_nested_object():
    args = argparse.Namespace(solver={"name": "anderson", "memry": 3})
    refuse(UnknownKeyError, lambda: get_deq(args), "solver (Namespace attribute solver)", "'memry'", "'memory'")
    args = types.SimpleNamespace(gradient=types.SimpleNamespace(name="phantom", stps=3))
    refuse(UnknownKeyError, lambda: get_deq(args), "gradient (SimpleNamespace attribute gradient)", "'stps'", "'steps'")


def test_several_wrong_keys_are_told_at_once():
    message = refuse(UnknownKeyError, lambda: get_deq(f_maxiter=7, solver={"name": "anderson", "memry": 1}))
    assert "'f_maxiter'" in message and "'memry'" in message


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        (dict(solver="anderson", memory=8), "Did you mean solver={'memory': ...}"),
        (dict(max_iter=8), "Did you mean solver={'max_iter': ...}"),
        (dict(gradient="phantom", steps=8), "Did you mean gradient={'steps': ...}"),
        (dict(norm="spectral_norm", clip=True), "Did you mean norm={'clip': ...}"),
    ],
)
def test_a_setting_given_one_level_too_high(values, hint):
    refuse(UnknownKeyError, lambda: get_deq(**values), "keyword: unknown key", hint)


def test_wrong_keys_where_settings_are_made_by_hand():
    settings = type(get_deq("anderson").config.solver)
    refuse(
        UnknownKeyError,
        lambda: settings(memry=3),
        "unknown key 'memry'. Did you mean 'memory'",
        "AndersonSettings takes",
    )
    refuse(UnknownKeyError, lambda: DEQConfig(solvr=3), "unknown key 'solvr'. Did you mean 'solver'", "DEQConfig takes")
    refuse(
        UnknownKeyError,
        lambda: DEQConfig(f_max_iter=3),
        "'f_max_iter'",
        "DEQConfig.load() and get_deq() take that name",
    )
    refuse(
        UnknownKeyError,
        lambda: DEQConfig.from_dict({"solver": {"name": "anderson", "memry": 3}}),
        "solver: unknown key",
    )


# ---- wrong types and ranges, by every way in

WRONG_VALUES = [
    (("solver", "anderson", "max_iter"), -1, ConfigError, "an int, at least 0"),
    (("solver", "anderson", "max_iter"), 2.5, ConfigTypeError, "an int, at least 0"),
    (("solver", "anderson", "max_iter"), True, ConfigTypeError, "an int, at least 0"),
    (("solver", "anderson", "max_iter"), "many", ConfigTypeError, "an int, at least 0"),
    (("solver", "anderson", "max_iter"), [3], ConfigTypeError, "an int, at least 0"),
    (("solver", "anderson", "tol"), -1e-3, ConfigError, "a finite number, at least 0"),
    (("solver", "anderson", "tol"), float("nan"), ConfigError, "a finite number, at least 0"),
    (("solver", "anderson", "tol"), float("inf"), ConfigError, "a finite number, at least 0"),
    (("solver", "anderson", "tol"), "tight", ConfigTypeError, "a finite number, at least 0"),
    (("solver", "anderson", "tol"), False, ConfigTypeError, "a finite number, at least 0"),
    (("solver", "anderson", "rtol"), -1, ConfigError, "a finite number, at least 0, or None"),
    (("solver", "anderson", "rtol"), True, ConfigTypeError, "a finite number, at least 0, or None"),
    (("solver", "anderson", "stop_mode"), "both", ConfigError, "'abs' or 'rel'"),
    (("solver", "anderson", "stop_mode"), 3, ConfigError, "'abs' or 'rel'"),
    (("solver", "anderson", "residual_norm"), "l1", ConfigError, "'l2', 'rms' or 'max'"),
    (("solver", "anderson", "patience"), 0, ConfigError, "an int, at least 1, or None"),
    (("solver", "anderson", "divergence_factor"), 1, ConfigError, "a number, greater than 1"),
    (("solver", "anderson", "memory"), 0, ConfigError, "an int, at least 1"),
    (("solver", "anderson", "damping"), 0, ConfigError, "a number, greater than 0, at most 2"),
    (("solver", "anderson", "damping"), 2.5, ConfigError, "a number, greater than 0, at most 2"),
    (("solver", "anderson", "return_final"), "perhaps", ConfigTypeError, "true or false"),
    (("solver", "anderson", "return_final"), 2, ConfigTypeError, "true or false"),
    (("solver", "broyden", "memory"), -1, ConfigError, "an int, at least 0"),
    (("gradient", "phantom", "steps"), 0, ConfigError, "an int, at least 1"),
    (("gradient", "phantom", "damping"), 1.5, ConfigError, "a number, greater than 0, at most 1"),
    (("core", "sliced", "n_states"), 0, ConfigError, "an int, at least 1"),
    (("core", "sliced", "n_states"), True, ConfigTypeError, "an int, at least 1"),
    (("core", "sliced", "indexing"), 3, ConfigTypeError, "a list, each an int"),
    (("core", "sliced", "indexing"), [True, 3], ConfigTypeError, "a list, each an int"),
    (("core", "sliced", "intermediate"), 3, ConfigTypeError, "a list, each a gradient: its name, or a dict"),
    (("norm", "weight_norm", "clip"), 3, ConfigTypeError, "true or false"),
    (("on_failure",), "explode", ConfigError, "'ignore', 'warn' or 'raise'"),
    (("on_failure",), 3, ConfigError, "'ignore', 'warn' or 'raise'"),
    (("batch_dims",), -1, ConfigError, "an int, at least 0"),
    (("batch_dims",), True, ConfigTypeError, "an int, at least 0"),
    (("check_every",), 0, ConfigError, "an int, at least 1"),
    (("keep_trace",), "perhaps", ConfigTypeError, "true or false"),
    (("eval_factor",), -0.5, ConfigError, "a finite number, at least 0"),
    (("eval_factor",), float("inf"), ConfigError, "a finite number, at least 0"),
    (("eval_max_iter",), -3, ConfigError, "an int, at least 0"),
    (("regularizers",), 3, ConfigTypeError, "a list, each a regularizer: its name, or a dict"),
]


@pytest.mark.parametrize(("path", "value", "error", "allowed"), WRONG_VALUES)
def test_wrong_value(path, value, error, allowed, tmp_path, monkeypatch):
    dotted = ".".join((path[0], path[-1])) if len(path) > 1 else path[0]
    values: dict[str, Any] = {path[0]: value} if len(path) == 1 else {path[0]: {"name": path[1], path[2]: value}}
    told = (f"must be {allowed}", f"got {value!r} ({type(value).__name__})")
    refuse(error, lambda: get_deq(**values), f"{dotted} (keyword {path[0]})", *told)
    refuse(error, lambda: get_deq(values), f"{dotted} (dict key {path[0]})", *told)
    if path[0] != "regularizers":  # a Namespace's, such as a number, is the program's own
        refuse(error, lambda: get_deq(argparse.Namespace(**values)), f"{dotted} (Namespace attribute {path[0]})", *told)
    refuse(error, lambda: DEQConfig(**values), dotted, *told)
    refuse(error, lambda: DEQConfig.from_dict(values), dotted, *told)
    file = tmp_path / "deq.toml"
    file.write_text(as_toml(values))
    refuse(error, lambda: get_deq(file), f"{dotted} (file {file})", *told)
    refuse(error, lambda: DEQConfig.from_file(file), f"{dotted} (file {file})", *told)
    variable = f"DEQCORE_{path[0].upper()}" + (f"__{path[-1].upper()}" if len(path) > 1 else "")
    monkeypatch.setenv(variable, as_toml({"x": value})[4:].strip())
    if len(path) > 1:
        monkeypatch.setenv(f"DEQCORE_{path[0].upper()}__NAME", path[1])
    refuse(error, get_deq, f"{dotted} (environment variable {variable})", *told)


@pytest.mark.parametrize(("path", "value", "error", "allowed"), [case for case in WRONG_VALUES if len(case[0]) > 1])
def test_wrong_value_in_settings_made_by_hand(path, value, error, allowed):
    settings = type(getattr(DEQConfig.load(**{path[0]: path[1]}), path[0]))
    refuse(error, lambda: settings(**{path[2]: value}), f"{path[2]} must be {allowed}", f"got {value!r}")
    kind = {"solver": "solvers", "gradient": "gradients", "core": "cores", "norm": "norms"}[path[0]]
    owner = f"{path[0]} '{path[1]}': {path[2]} must be {allowed}"
    refuse(error, lambda: registry.settings(kind, {"name": path[1], path[2]: value}), owner)
    refuse(error, lambda: registry.get(kind, path[1])(**{path[2]: value}), f"{path[2]} must be {allowed}")


@pytest.mark.parametrize(
    ("flat", "path", "value", "error"),
    [
        ("f_max_iter", "solver.max_iter", -1, ConfigError),
        ("f_max_iter", "solver.max_iter", True, ConfigTypeError),
        ("f_max_iter", "solver.max_iter", 40.5, ConfigTypeError),
        ("f_tol", "solver.tol", -1.0, ConfigError),
        ("f_tol", "solver.tol", True, ConfigTypeError),
        ("f_stop_mode", "solver.stop_mode", "both", ConfigError),
        ("b_max_iter", "gradient.solver.max_iter", -1, ConfigError),
        ("b_tol", "gradient.solver.tol", -1.0, ConfigError),
        ("n_states", "core.n_states", 0, ConfigError),
        ("eval_f_max_iter", "eval_max_iter", -1, ConfigError),
    ],
)
def test_wrong_flat_value_is_told_by_its_path_and_its_name(flat, path, value, error, monkeypatch):
    values = {flat: value, "ift": True}
    refuse(error, lambda: get_deq(**values), f"{path} (keyword {flat})", f"got {value!r}")
    refuse(error, lambda: get_deq(values), f"{path} (dict key {flat})")
    refuse(error, lambda: get_deq(argparse.Namespace(**values)), f"{path} (Namespace attribute {flat})")
    monkeypatch.setenv("DEQCORE_IFT", "true")
    monkeypatch.setenv(f"DEQCORE_{flat.upper()}", str(value).lower())
    refuse(error, get_deq, f"{path} (environment variable DEQCORE_{flat.upper()})")


def test_wrong_flags():
    parser = argparse.ArgumentParser()
    add_deq_args(parser)
    for line, path, origin in (
        ("--f_max_iter -3", "solver.max_iter", "Namespace attribute f_max_iter"),
        ("--solver.max_iter -3", "solver.max_iter", "flag --solver.max_iter"),
        ("--solver.max_iter true", "solver.max_iter", "flag --solver.max_iter"),
        ("--ift --gradient.solver.tol -1", "gradient.solver.tol", "flag --gradient.solver.tol"),
    ):
        refuse_any(lambda line=line: get_deq(parser.parse_args(line.split())), f"{path} ({origin}) must be")


def refuse_any(call: Any, *texts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert all(text in str(caught.value) for text in texts), str(caught.value)


def test_a_nested_value_has_its_whole_path():
    wrong = {"name": "implicit", "solver": {"name": "anderson", "memory": -1}}
    refuse(
        ConfigError,
        lambda: get_deq(gradient=wrong),
        "gradient.solver.memory (keyword gradient) must be an int, at least 1, got -1",
    )
    core = {"n_states": 3, "intermediate": ["phantom", wrong]}
    refuse(
        ConfigError,
        lambda: get_deq(core=core),
        "core.intermediate.1.solver.memory (keyword core) must be an int, at least 1",
    )
    regularizers = ["jacobian", {"name": "fixed_point_correction", "weight": -1}]
    refuse(
        ConfigError,
        lambda: get_deq(regularizers=regularizers),
        "regularizers.1.weight (keyword regularizers)",
        "got -1",
    )


def test_several_wrong_values_are_told_at_once():
    message = refuse(
        ConfigError, lambda: get_deq(f_max_iter=-1, batch_dims=-1, gradient={"name": "phantom", "steps": 0})
    )
    for path in ("solver.max_iter", "batch_dims", "gradient.steps"):
        assert path in message


def test_values_that_contradict_each_other():
    refuse(
        ConfigError,
        lambda: get_deq(solver={"tol": 1e-3, "rtol": 1e-3}),
        "solver",
        "tol=0.001",
        "rtol=0.001",
        "give either",
    )
    refuse(ConfigError, lambda: get_deq(n_states=2, indexing=[3]), "core", "n_states=2", "indexing=[3]", "not both")
    refuse(ConfigError, lambda: get_deq(core={"indexing": [3, 2]}), "core", "increasing steps from 1 on, got [3, 2]")
    wrong = {"n_states": 4, "intermediate": ["phantom", "phantom"]}
    refuse(
        ConfigError,
        lambda: get_deq(core=wrong),
        "core",
        "2 gradients for 3 states before the last",
        "give one, or one each",
    )
    refuse(ConfigError, lambda: get_deq(regularizers=["jacobian", "jacobian"]), "regularizers", "at most once")
    refuse(ConfigError, lambda: get_deq(regularizers=[{"weight": 1}]), "regularizers.0", "needs a 'name'", "jacobian")


def test_settings_of_another_kind_or_without_a_name():
    anderson = type(get_deq("anderson").config.solver)
    refuse(ConfigError, lambda: get_deq(solver=anderson(memory=3)), "solver (keyword solver)", "set name=")
    refuse(
        ConfigTypeError,
        lambda: get_deq(gradient=anderson(name="anderson")),
        "gradient",
        "AndersonSettings are not settings of a gradient",
    )


def test_a_huge_value_is_shortened():
    message = refuse(ConfigTypeError, lambda: get_deq(f_max_iter=list(range(10**5))))
    assert len(message) < 300


# ---- wrong files


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.toml", "[solver\n", "is not a valid TOML file"),
        ("a.json", "{", "is not a valid JSON file"),
        ("a.yaml", "a: [", "is not a valid YAML file"),
        ("a.yaml", "[1]: 2\n? [x]\n: 3\n", "is not a valid YAML file"),
        ("a.json", "[1, 2]", "must hold a table of settings, it holds [1, 2] (list)"),
        ("a.yaml", "anderson", "must hold a table of settings, it holds 'anderson' (str)"),
        ("a.toml", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("a.cfg", "solver = anderson", "a configuration file ends in .toml, .json, .yaml, .yml"),
    ],
)
def test_wrong_file(name, content, text, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse_any(lambda: get_deq(str(path)), str(path), text)
    refuse_any(lambda: get_deq(path), str(path), text)


def test_no_such_file(tmp_path):
    refuse(ConfigError, lambda: get_deq(str(tmp_path / "deq.toml")), "can't read", "deq.toml", "No such file")
    refuse(ConfigError, lambda: get_deq(tmp_path), "a configuration file ends in")
    (tmp_path / "folder.toml").mkdir()
    refuse(ConfigError, lambda: get_deq(tmp_path / "folder.toml"), "can't read", "folder.toml")


# ---- wrong states and functions: tests/test_state.py has them all


@pytest.mark.parametrize(
    ("error", "fn", "z0", "texts"),
    [
        (StateTypeError, lambda z: z, Z0.long(), ("z0 is an int64 tensor", ".float()")),
        (StateTypeError, lambda z: z, None, ("z0 is None", "tensors only")),
        (StateError, lambda z: z, Z0 * torch.nan, ("z0 holds NaN or inf in 2 of 2 samples",)),
        (StateError, lambda z: z, Z0[:0], ("z0 is empty", "Skip the call")),
        (StateError, lambda *z: z, (Z0, Z0[:1]), ("different batch sizes", "batch_dims=0")),
        (FunctionTypeError, lambda z: None, Z0, ("f returned None", "must return the same structure")),
        (FunctionTypeError, lambda z: z.long(), Z0, ("f returned an int64 tensor", "float32")),
        (FunctionError, lambda z: z[:1], Z0, ("f returned shape (1, 3)", "(2, 3)", "Give a z0")),
        (FunctionError, lambda z: z.mul_(2), Z0, ("f changed its input in place", "z = z + ...")),
        (FunctionTypeError, 3, Z0, ("f must be callable, got int",)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_state_or_function(error, fn, z0, texts, training):
    refuse(error, lambda: get_deq().train(training)(fn, z0.clone() if isinstance(z0, torch.Tensor) else z0), *texts)


def test_nan_from_f_is_a_status_not_an_error():
    _, info = get_deq(on_failure="ignore")(lambda z: z * torch.nan, Z0)
    assert [deqcore.Status(code).name for code in info["status"].tolist()] == ["NON_FINITE"] * 2


def test_an_exception_of_fs_passes_through():
    raised = ZeroDivisionError("mine")

    def fn(z):
        raise raised

    for training in (True, False):
        with pytest.raises(ZeroDivisionError) as caught:
            get_deq().train(training)(fn, Z0)
        assert caught.value is raised


# ---- plugins that are wrong


def test_a_plugin_that_can_not_be_imported(site):
    site.solver("bad-dist", "bad", "bad_module", "import nothing_of_that_name\n")
    for call in (lambda: get_deq("bad"), lambda: get_deq(gradient={"name": "implicit", "solver": "bad"})):
        message = refuse(
            BrokenPluginError, call, "'bad'", "bad-dist 1.2.3", "nothing_of_that_name", "DEQCORE_DISABLE_PLUGINS"
        )
        assert message.startswith(("solver", "gradient"))
    get_deq("anderson")


def test_a_plugin_whose_hook_is_misspelt(site):
    source = """
        from deqcore import Solver, SolverSettings, hookimpl

        @hookimpl
        def deqcore_sovler():
            return Solver
    """
    site.solver("typo-dist", "typo", "typo_module", source)
    refuse(
        BrokenPluginError, lambda: get_deq("typo"), "deqcore_sovler", "Did you mean 'deqcore_solver'", "typo-dist 1.2.3"
    )


def test_two_plugins_with_one_name(site):
    site.solver("one-dist", "same", "one_module")
    site.solver("two-dist", "same", "two_module")
    refuse(
        PluginClashError,
        lambda: get_deq("same"),
        "is claimed by",
        "one-dist 1.2.3",
        "two-dist 1.2.3",
        "one-dist/same",
        "two-dist/same",
    )
    assert get_deq("two-dist/same").config.solver.name == "two-dist/same"


def test_a_plugin_that_is_switched_off(monkeypatch):
    monkeypatch.setenv("DEQCORE_DISABLE_PLUGINS", "solver:anderson")
    refuse(PluginDisabledError, lambda: get_deq("anderson"), "DEQCORE_DISABLE_PLUGINS", "disabled", "solver:anderson")


# ---- nothing is checked by assert


def test_the_same_errors_under_python_o():
    code = """
import torch
from deqcore import ConfigError, FunctionError, StateError, get_deq
for call in (
    lambda: get_deq(f_max_iter=-1),
    lambda: get_deq(f_maxiter=1),
    lambda: get_deq()(lambda z: None, torch.zeros(2)),
    lambda: get_deq()(lambda z: z, torch.zeros(0)),
):
    try:
        call()
    except (ConfigError, FunctionError, StateError) as error:
        print(type(error).__name__)
"""
    run = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["ConfigError", "UnknownKeyError", "FunctionTypeError", "StateError"]


def test_a_dataclass_as_a_program_settings_object():
    @dataclasses.dataclass
    class Args:
        f_max_iter: int = -1
        lr: float = 0.1

    refuse(
        ConfigError,
        lambda: get_deq(Args()),
        "solver.max_iter (Args attribute f_max_iter) must be an int, at least 0, got -1",
    )
