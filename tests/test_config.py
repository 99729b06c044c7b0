"""Every way into a DEQConfig, which source wins, and the way out to TOML, JSON, pickles and copies."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field

from deqcore import (
    ConfigError,
    ConfigTypeError,
    DEQConfig,
    DEQWarning,
    GradientBackend,
    GradientSettings,
    MissingExtraError,
    Solver,
    SolverChoice,
    SolverSettings,
    Step,
    UnknownKeyError,
    get_deq,
    registry,
)
from deqcore.files import to_toml, write_atomic

load = DEQConfig.load
Anderson = type(load("anderson").solver)
Implicit = type(load(gradient="implicit").gradient)


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return str(path)

    return write


# ---- the ways in

WANTED = dict(solver={"name": "anderson", "memory": 8, "max_iter": 50}, gradient={"name": "implicit"}, batch_dims=2)


class Attributes:
    """A program's settings as class attributes."""

    solver = types.MappingProxyType({"name": "anderson", "memory": 8, "max_iter": 50})
    f_max_iter = 50
    ift = True
    batch_dims = 2
    lr = 0.1

    @property
    def broken(self) -> None:
        raise RuntimeError("nobody asked for this one")

    def norm(self) -> None:
        """A method is no setting."""


class Slots:
    __slots__ = ("batch_dims", "f_solver", "gradient", "solver")

    def __init__(self) -> None:
        self.f_solver = "anderson"
        self.solver = {"memory": 8, "max_iter": 50}
        self.gradient = "implicit"
        self.batch_dims = 2


@dataclasses.dataclass
class Options:
    solver: Any = dataclasses.field(default_factory=lambda: {"name": "anderson", "memory": 8, "max_iter": 50})
    ift: bool = True
    batch_dims: int = 2
    epochs: int = 9


@pytest.mark.parametrize(
    ("args", "keywords"),
    [
        (None, WANTED),
        (None, dict(f_solver="anderson", f_max_iter=50, m=8, ift=True, batch_dims=2)),
        (None, dict(f_solver="anderson", solver={"max_iter": 50, "m": 8}, hook_ift=True, batch_dims=2)),
        (
            None,
            {"solver.name": "anderson", "solver.memory": 8, "f_max_iter": 50, "gradient": "implicit", "batch_dims": 2},
        ),
        (
            None,
            {
                "solver": "anderson",
                "solver.memory": 8,
                "solver.max_iter": 50,
                "gradient.name": "implicit",
                "batch_dims": 2,
            },
        ),
        ("anderson", {**WANTED, "solver": {"memory": 8, "max_iter": 50}}),
        (WANTED, {}),
        (types.MappingProxyType(WANTED), {}),
        (argparse.Namespace(**WANTED, lr=1e-3, epochs=4), {}),
        (
            argparse.Namespace(**{"solver.name": "anderson", "solver.memory": "8"}, f_max_iter=50, ift=True),
            {"batch_dims": 2},
        ),
        (
            types.SimpleNamespace(solver=types.SimpleNamespace(name="anderson", memory=8, max_iter=50), ift=1),
            {"batch_dims": 2},
        ),
        (Attributes(), {}),
        (Attributes, {}),
        (Slots(), {}),
        (Options(), {}),
        (DEQConfig(**WANTED), {}),
        (DEQConfig(solver="anderson"), {**WANTED, "solver": {"memory": 8, "max_iter": 50}}),
        (None, {**WANTED, "solver": Anderson(name="anderson", memory=8, max_iter=50)}),
        (None, {**WANTED, "gradient": Implicit(name="implicit")}),
        (dict(solver=Anderson(name="deqcore/anderson", memory=8, max_iter=50)), {**WANTED}),
        ("deqcore/anderson", {**WANTED, "solver": {"name": "anderson", "memory": 8, "max_iter": 50}}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_way_in_means_the_same(args, keywords):
    config = load(args, **keywords)
    assert config == DEQConfig(**WANTED)
    assert (config.solver.name, config.solver.memory, config.solver.max_iter) == ("anderson", 8, 50)
    assert get_deq(args, **keywords).config == config


FILES = {
    "deq.toml": """
        batch_dims = 2
        ift = true
        [solver]
        name = "anderson"
        memory = 8
        max_iter = 50
    """,
    "flat.toml": """
        f_solver = "anderson"
        f_max_iter = 50
        batch_dims = 2
        gradient.name = "implicit"
        solver.memory = 8
    """,
    "deq.json": '{"solver": {"name": "anderson", "m": 8, "max_iter": 50}, "gradient": "implicit", "batch_dims": 2}',
    "deq.yaml": """
        solver: {name: anderson, memory: 8, max_iter: 50}
        gradient: implicit
        batch_dims: 2
    """,
    "deq.yml": "{f_solver: anderson, f_max_iter: 5.0e+1, solver.memory: 8, ift: true, batch_dims: 2}",
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name, write, tmp_path):
    path = write(name, FILES[name])
    assert load(path) == load(tmp_path / name) == DEQConfig.from_file(path) == DEQConfig(**WANTED)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "deq.toml").write_bytes(b"\xef\xbb\xbff_solver = 'anderson'\n")
    assert load(tmp_path / "deq.toml").solver.name == "anderson"


def test_a_yaml_number_that_yaml_takes_for_a_text(write):
    assert load(write("deq.yaml", "f_tol: 1e-4")).solver.tol == 1e-4  # YAML 1.1 wants 1.0e-4


def test_empty_files_are_the_default(write):
    for name, text in (("a.toml", ""), ("a.json", "{}"), ("a.yaml", "# nothing\n")):
        assert load(write(name, text)) == DEQConfig()


def test_yaml_without_its_package_names_the_extra(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'deqcore\[yaml\]'"):
        load(write("deq.yaml", "f_tol: 1"))


def test_settings_with_a_nested_choice():
    for gradient in (
        {"name": "implicit", "solver": {"name": "anderson", "memory": 5}},
        {"name": "implicit", "solver": "anderson", "solver.memory": 5},
        {"name": "implicit", "solver": Anderson(name="anderson", memory=5, tol=1e-6)},
        Implicit(name="implicit", solver={"name": "anderson", "m": 5}),
    ):
        inner = load(gradient=gradient).gradient.solver
        assert (inner.name, inner.memory, inner.tol) == ("anderson", 5, 1e-6)
    dotted = load(**{"gradient": "implicit", "gradient.solver": "anderson", "gradient.solver.memory": 5})
    assert dotted == load(gradient={"name": "implicit", "solver": {"name": "anderson", "memory": 5}})


def test_a_nested_choice_without_a_name_refines_the_default():
    default = load(gradient="implicit").gradient.solver
    refined = load(gradient={"name": "implicit", "solver": {"max_iter": 7}}).gradient.solver
    assert refined == default.model_copy(update={"max_iter": 7})
    relative = load(gradient={"name": "implicit", "solver": {"rtol": 1e-9}}).gradient.solver
    assert relative.thresholds() == (0.0, 1e-9)
    assert relative.restart == default.restart


def test_one_regularizer_may_stand_alone():
    one = load(regularizers=[{"name": "jacobian", "weight": 0.5}])
    assert load(regularizers={"name": "jacobian", "weight": 0.5}) == one
    assert load(regularizers=one.regularizers[0]) == one
    assert load(regularizers="jacobian").regularizers[0].weight == 1.0


def test_numbers_and_flags_as_they_are_usually_spelled():
    config = load(f_max_iter=40.0, f_tol=1, solver={"patience": "3"}, keep_state="yes", ift=1)
    assert config.solver.max_iter == 40 and isinstance(config.solver.max_iter, int)
    assert (config.solver.tol, config.solver.patience, config.keep_state) == (1.0, 3, True)
    assert config.gradient.name == "implicit"


def test_numbers_of_numpys_and_torchs():
    import numpy as np

    config = load(f_max_iter=np.int64(7), f_tol=np.float32(0.5), indexing=np.array([2, 4]), grad=np.array([1, 2, 3]))
    assert (config.solver.max_iter, config.solver.tol, config.core.indexing) == (7, 0.5, (2, 4))
    assert [choice.steps for choice in (*config.core.intermediate, config.gradient)] == [1, 2, 3]
    assert load(argparse.Namespace(indexing=np.array([2, 4]), grad=np.int64(2))).core.indexing == (2, 4)
    assert load(f_tol=torch.tensor(0.5), indexing=range(1, 4), grad=(k for k in (1, 2, 3, 4))).core.indexing == (
        1,
        2,
        3,
    )
    assert type(load(f_max_iter=np.int64(7)).solver.max_iter) is int
    for wrong in (np.bool_(True), np.float64(2.5)):
        with pytest.raises(ConfigTypeError, match=r"solver.max_iter .* must be an int"):
            load(f_max_iter=wrong)
    with pytest.raises(ConfigTypeError, match=r"gradient.damping .* must be a number"):
        load(argparse.Namespace(tau=torch.ones(3)))


def test_none_is_not_given():
    assert load(solver=None, f_tol=None, indexing=None, sup_loc=None, no_stat=None, gradient=None) == DEQConfig()
    assert load({"norm": "spectral_norm"}, norm=None).norm is None
    assert load({"norm_type": "spectral_norm"}, norm_type="none").norm is None


def test_the_environment(monkeypatch):
    for variable, text in {
        "DEQCORE_SOLVER__NAME": "anderson",
        "DEQCORE_SOLVER__MEMORY": "8",
        "DEQCORE_F_MAX_ITER": "50",
        "DEQCORE_IFT": "True",
        "DEQCORE_GRADIENT__SOLVER__RESTART": "9",
        "DEQCORE_BATCH_DIMS": "2",
        "DEQCORE_REGULARIZERS": '[{name = "jacobian", weight = 0.5}]',
        "DEQCORE_INDEXING": "[3, 5]",
        "DEQCORE_NORM": '{name = "spectral_norm", clip = true}',
        "DEQCORE_CHECK_EVERY": "",  # as good as unset
        "DEQCORE_HOME": "/somewhere",  # somebody else's
    }.items():
        monkeypatch.setenv(variable, text)
    assert load() == DEQConfig(
        solver={"name": "anderson", "memory": 8, "max_iter": 50},
        gradient={"name": "implicit", "solver": {"restart": 9}},
        batch_dims=2,
        regularizers=[{"name": "jacobian", "weight": 0.5}],
        core={"indexing": [3, 5]},
        norm={"name": "spectral_norm", "clip": True},
    )


@pytest.mark.parametrize("text", ["false", "False", "0", "no"])
def test_a_flag_in_the_environment_can_say_no(text, monkeypatch):
    monkeypatch.setenv("DEQCORE_IFT", text)
    monkeypatch.setenv("DEQCORE_NO_STAT", text)
    monkeypatch.setenv("DEQCORE_NORM_NO_SCALE", text)
    config = load()
    assert config.gradient.name == "phantom" and config.keep_trace and config.norm.learn_scale


# ---- which source wins


@pytest.fixture
def five(write, monkeypatch):
    """Five sources for solver.max_iter; calling it with some of them loads a configuration."""

    def load_from(*which: str):
        args: Any = None
        keywords: dict[str, Any] = {}
        if "file" in which:
            args = write("deq.toml", "f_max_iter = 11\n[solver]\nrtol = 1e-3\n")
        if "environment" in which:
            monkeypatch.setenv("DEQCORE_SOLVER__MAX_ITER", "12")
        if "dict" in which:
            args = {"f_max_iter": 13}
        if "namespace" in which:
            args = argparse.Namespace(f_max_iter=14)
        if "config" in which:
            args = DEQConfig(solver={"max_iter": 15})
        if "keyword" in which:
            keywords = {"solver": {"max_iter": 16}}
        return load(args, **keywords).solver.max_iter

    return load_from


@pytest.mark.parametrize(
    ("given", "winner"),
    [
        ((), 40),
        (("file",), 11),
        (("environment",), 12),
        (("dict",), 13),
        (("namespace",), 14),
        (("config",), 15),
        (("keyword",), 16),
        (("file", "environment"), 12),
        (("file", "keyword"), 16),
        (("environment", "dict"), 13),
        (("environment", "namespace"), 14),
        (("environment", "config"), 15),
        (("environment", "keyword"), 16),
        (("dict", "keyword"), 16),
        (("namespace", "keyword"), 16),
        (("config", "keyword"), 16),
        (("file", "environment", "keyword"), 16),
    ],
)
def test_later_sources_win(given, winner, five):
    assert five(*given) == winner


def test_a_config_is_complete_and_the_environment_does_not_change_it(monkeypatch):
    config = DEQConfig(solver="anderson")
    monkeypatch.setenv("DEQCORE_SOLVER__MEMORY", "3")
    monkeypatch.setenv("DEQCORE_NORM", "spectral_norm")
    monkeypatch.setenv("DEQCORE_BATCH_DIMS", "0")
    assert load(config) is config
    assert load(config, check_every=2) == config.model_copy(update={"check_every": 2})
    assert load(solver=Anderson(name="anderson")).solver.memory == Anderson().memory


def test_aliases_are_one_setting_across_sources(write):
    path = write("deq.toml", "[solver]\nname = 'anderson'\nmemory = 3\nlam = 0.5\n")
    assert load(path, m=4).solver.memory == 4
    assert load(path, solver={"absolute_ridge": 0.0}).solver.absolute_ridge == 0.0
    assert load({"gradient": {"name": "phantom", "damping": 0.7}}, tau=0.5).gradient.damping == 0.5
    assert load({"tau": 0.7}, gradient={"name": "phantom", "damping": 0.5}).gradient.damping == 0.5
    assert load({"grad": 4}, gradient={"steps": 2}).gradient.steps == 2
    assert load({"gradient": {"steps": 2}}, grad=4).gradient.steps == 4
    assert load({"ift": True, "b_tol": 1e-3}, gradient={"solver": {"tol": 1e-4}}).gradient.solver.tol == 1e-4
    assert load({"gradient": {"name": "implicit", "solver": {"tol": 1e-3}}}, b_tol=1e-4).gradient.solver.tol == 1e-4


def test_a_tolerance_replaces_one_of_the_other_sort(write):
    path = write("deq.toml", "[solver]\nrtol = 1e-3\natol = 1e-9\n")
    assert load(path).solver.thresholds() == (1e-9, 1e-3)
    assert load(path, f_tol=1e-5).solver.thresholds() == (1e-5, 0.0)
    assert load(path, f_stop_mode="rel").solver.thresholds() == (0.0, 1e-3)
    assert load(path, solver={"rtol": 1e-4}).solver.thresholds() == (1e-9, 1e-4)
    assert load({"f_tol": 1e-5}, solver={"rtol": 1e-2}).solver.thresholds() == (0.0, 1e-2)


def test_another_implementation_keeps_what_all_of_its_kind_have(write):
    path = write("deq.toml", "[solver]\nname = 'anderson'\nmemory = 3\nmax_iter = 70\npatience = 5\n")
    chosen = load(path, f_solver="broyden").solver
    assert (chosen.name, chosen.max_iter, chosen.patience) == ("broyden", 70, 5)
    assert chosen.memory == load("broyden").solver.memory  # anderson's memory is not broyden's
    assert load(path, solver="anderson").solver.memory == 3
    inner = load(
        {"gradient": {"name": "implicit", "solver": {"name": "anderson", "memory": 3, "max_iter": 7}}},
        b_solver="broyden",
    )
    assert (inner.gradient.solver.max_iter, inner.gradient.solver.memory) == (7, load("broyden").solver.memory)
    other = load({"gradient": {"name": "implicit", "solver": "anderson"}}, gradient="phantom")
    assert other.gradient == load().gradient


def test_an_overridden_name_is_not_looked_up(write):
    path = write("deq.toml", "[solver]\nname = 'not_installed'\nspeed = 9\nmax_iter = 7\n")
    assert load(path, solver="anderson").solver.max_iter == 7


def test_flat_norm_options_survive_another_norm(write):
    path = write("deq.toml", "norm_type = 'weight_norm'\nnorm_clip = true\nsn_n_power_iters = 3\n")
    assert load(path).norm.clip and not hasattr(load(path).norm, "n_power_iterations")
    spectral = load(path, norm_type="spectral_norm").norm
    assert spectral.clip and spectral.n_power_iterations == 3


def test_the_callers_object_is_not_changed():
    nested = {
        "solver": {"name": "anderson", "memory": 8},
        "gradient": {"name": "implicit", "solver": {"name": "broyden"}},
        "regularizers": [{"name": "jacobian", "weight": 0.5}],
        "core": {"name": "sliced", "n_states": 2, "intermediate": [{"name": "phantom", "steps": 2}]},
    }
    flat = {"f_solver": "anderson", "ift": True, "grad": [1, 2], "n_states": 2, "indexing": [], "norm_no_scale": True}
    for args in (
        nested,
        flat,
        argparse.Namespace(**nested),
        argparse.Namespace(**flat),
        types.SimpleNamespace(**nested),
    ):
        before = copy.deepcopy(args)
        deq = get_deq(args, batch_dims=2)
        deq(lambda z: 0.5 * z + 1, torch.zeros(3, 4, 2))
        assert args == before
    config = load(nested)
    before_json = config.to_json()
    get_deq(config, f_solver="broyden", regularizers=[])
    assert config.to_json() == before_json


def test_a_config_can_not_be_changed():
    config = load("anderson")
    for target, field in ((config, "batch_dims"), (config.solver, "memory")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(target, field, 2)


# ---- a whole program's Namespace


@pytest.mark.parametrize(
    "foreign",
    [
        dict(lr=0.1, epochs=3, cores=4, grads=True, max_iter=7, m=3, lam=0.5, ls=True, tolerance=1, states=3, gama=2),
        dict(norm="batch", gradient=None, solver=torch.optim.SGD, regularizers=None),
        dict(norm=True, solver=7, gradient=1.5),
        dict(norm=["layer"], solver=object(), regularizers=0.1),
        dict(regularizers=["l2", "dropout"], solver="none", gradient=torch.zeros(3)),
        dict(jac_loss_weight=0.5, jac_loss_freq=0.5, jac_incremental=3, gamma=0.9, sradius_mode=True),
        dict(return_final=True, LBFGS_thres=3),
        {"_private": 1, "f": print, "solver.": None},
    ],
)
def test_a_programs_own_names_are_left_alone(foreign):
    assert load(argparse.Namespace(**foreign)) == DEQConfig()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("f_maxiter", "f_max_iter"),
        ("f_sovler", "f_solver"),
        ("fsolver", "f_solver"),
        ("f_max_itr", "f_max_iter"),
        ("n_state", "n_states"),
        ("on_failures", "on_failure"),
        ("indexng", "indexing"),
        ("batchdims", "batch_dims"),
    ],
)
def test_a_near_miss_in_a_namespace_is_a_warning(name, meant):
    with pytest.warns(
        DEQWarning, match=f"the Namespace's '{name}' is not a setting .* Did you mean '{meant}'"
    ) as caught:
        config = load(argparse.Namespace(**{name: 7}))
    assert config == DEQConfig()
    assert caught[0].filename == __file__


def test_a_misspelt_implementation_in_a_namespace_is_a_warning():
    with pytest.warns(DEQWarning, match="solver='andersn'.*taken for the program's own.*'anderson'"):
        assert load(argparse.Namespace(solver="andersn")) == DEQConfig()


def test_a_flag_left_at_its_default_gives_way_to_another_name_for_the_same_thing():
    args = argparse.Namespace(f_solver="fixed_point_iter", f_max_iter=40, solver={"name": "anderson", "max_iter": 9})
    assert (load(args).solver.name, load(args).solver.max_iter) == ("anderson", 9)
    args.f_max_iter = 41
    with pytest.raises(ConfigError, match=r"solver.max_iter is given twice.*41.*f_max_iter.*9"):
        load(args)


# ---- one thing twice in one source


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        (
            dict(f_max_iter=3, solver={"max_iter": 4}),
            "solver.max_iter is given twice: as 3 .*keyword f_max_iter.*4 .*keyword solver",
        ),
        (
            dict(f_solver="anderson", solver="broyden"),
            "solver.name is given twice: as 'anderson' .*f_solver.*'broyden' .*solver",
        ),
        (dict(m=3, solver={"name": "anderson", "memory": 4}), "solver.memory is given twice: as 3.*keyword m,"),
        (dict(solver={"name": "anderson", "m": 3, "memory": 4}), "solver.memory is given twice"),
        (dict(tau=0.5, gradient={"name": "phantom", "damping": 0.7}), "gradient.damping is given twice.*tau"),
        (dict(grad=3, gradient={"steps": 2}), "gradient.steps is given twice.*keyword grad"),
        (dict(ift=True, b_tol=1e-3, gradient={"solver": {"tol": 1e-4}}), "gradient.solver.tol is given twice.*b_tol"),
        (dict(eval_f_max_iter=3, eval_max_iter=4), "eval_max_iter is given twice"),
        (dict(no_stat=True, keep_trace=True), "keep_trace is given twice"),
        (dict(norm_no_scale=True, norm={"learn_scale": True}), "norm.learn_scale is given twice"),
        (dict(norm=None, norm_clip=True), "norm is given twice"),
        (dict(ift=True, gradient="phantom"), "ift=True contradicts 'phantom'"),
        (dict(ift=False, gradient="implicit"), "ift=False contradicts 'implicit'"),
        (dict(solver=Anderson(name="anderson", memory=3), m=4), "solver.memory is given twice"),
        ({"solver.memory": 3, "solver": {"name": "anderson", "memory": 4}}, "solver.memory is given twice"),
    ],
)
def test_a_thing_given_twice_with_two_values_is_an_error(keywords, text, write):
    with pytest.raises(ConfigError, match=text):
        load(**keywords)
    with pytest.raises(ConfigError, match=text.replace("keyword", "dict key")):
        load(keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        dict(f_max_iter=3, solver={"max_iter": 3.0}),
        dict(f_solver="anderson", solver="anderson", m=3, **{"solver.memory": 3}),
        dict(ift=True, hook_ift=True, gradient="implicit"),
        dict(ift=True, hook_ift=False, gradient="deqcore/implicit"),
        dict(indexing=[2, 3], core={"indexing": (2, 3)}),
        dict(no_stat=True, keep_trace=False),
    ],
)
def test_a_thing_given_twice_with_one_value_is_fine(keywords):
    load(**keywords)
    load(keywords)
    load(argparse.Namespace(**keywords))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "f_max_iter = 3\n[solver]\nmax_iter = 4\n"),
        ("a.json", '{"f_max_iter": 3, "f_max_iter": 4}'),
        ("b.json", '{"solver": {"max_iter": 3, "max_iter": 4}}'),
        ("a.yaml", "f_max_iter: 3\nf_max_iter: 4\n"),
        ("b.yaml", "solver:\n  max_iter: 3\n  max_iter: 4\n"),
        ("b.toml", "f_max_iter = 3\nf_max_iter = 4\n"),
    ],
)
def test_a_file_that_says_two_things(name, text, write):
    with pytest.raises(ConfigError, match=f"{name}.*"):
        load(write(name, text))


# ---- plugins of somebody else's with sections of their own


class PolishSettings(SolverSettings):
    rough: SolverChoice = Field(default="anderson", validate_default=True)  # type: ignore[assignment]
    fine: SolverChoice | None = Field(default="broyden", validate_default=True)  # type: ignore[assignment]
    table: dict[str, float] = Field(default_factory=dict)
    label: str | None = "none yet"


class Polish(Solver[PolishSettings]):
    def step(self, problem, z, fz, state):
        return Step(fz, state)


class RelaySettings(GradientSettings):
    inner: SolverChoice = Field(default={"name": "polish", "max_iter": 9}, validate_default=True)  # type: ignore[assignment]


class Relay(GradientBackend[RelaySettings]):
    def attach(self, problem, solution):
        return solution["z"]


@pytest.fixture
def polish():
    with registry.scope():
        registry.register("solvers", "polish", Polish)
        registry.register("gradients", "relay", Relay)
        yield


@pytest.mark.usefixtures("polish")
class TestNestedSections:
    def test_defaults_and_refinements(self):
        assert load("polish").solver.rough.name == "anderson"
        refined = load(solver={"name": "polish", "rough": {"m": 3}}).solver
        assert (refined.rough.name, refined.rough.memory) == ("anderson", 3)
        deep = load(gradient={"name": "relay", "inner": {"rough": {"memory": 4}}}).gradient
        assert (deep.inner.name, deep.inner.max_iter, deep.inner.rough.memory) == ("polish", 9, 4)

    def test_dotted_names_and_precedence(self, write, monkeypatch):
        path = write(
            "deq.toml", "[solver]\nname = 'polish'\n[solver.rough]\nname = 'broyden'\nmemory = 3\nmax_iter = 8\n"
        )
        monkeypatch.setenv("DEQCORE_SOLVER__ROUGH__MAX_ITER", "9")
        rough = load(path, **{"solver.rough.LBFGS_thres": 5}).solver.rough
        assert (rough.name, rough.memory, rough.max_iter) == ("broyden", 5, 9)
        rough = load(path, **{"solver.rough": "anderson"}).solver.rough
        assert (rough.memory, rough.max_iter) == (Anderson().memory, 9)

    def test_a_section_that_may_be_none(self):
        assert load(solver={"name": "polish", "fine": None}).solver.fine is None
        assert (
            load({"solver": {"name": "polish", "fine": None}}, **{"solver.fine": "anderson"}).solver.fine.name
            == "anderson"
        )

    def test_a_dict_that_is_no_section_stays_one(self):
        assert load(solver={"name": "polish", "table": {"a.b": 1, "c": 2.5}}).solver.table == {"a.b": 1.0, "c": 2.5}
        replaced = load({"solver": {"name": "polish", "table": {"a": 1}}}, solver={"table": {"b": 2}}).solver.table
        assert replaced == {"b": 2.0}

    def test_errors_have_the_whole_path(self):
        with pytest.raises(
            ConfigError, match=r"gradient.inner.rough.memory \(keyword gradient\) must be an int, at least 1, got -1"
        ):
            load(gradient={"name": "relay", "inner": {"rough": {"memory": -1}}})
        with pytest.raises(
            UnknownKeyError, match=r"gradient.inner.rough \(keyword gradient\): unknown key 'memry'.*'memory'"
        ):
            load(gradient={"name": "relay", "inner": {"rough": {"memry": 1}}})
        with pytest.raises(ConfigTypeError, match=r"solver.fine .*got 3 \(int\)"):
            load(solver={"name": "polish", "fine": 3})

    def test_flags(self):
        from deqcore import add_deq_args

        parser = argparse.ArgumentParser()
        add_deq_args(parser)
        args = parser.parse_args(["--solver.name", "polish", "--solver.rough.memory", "4", "--gradient.name", "relay"])
        assert load(args).solver.rough.memory == 4 and load(args).gradient.name == "relay"

    def test_round_trip(self, tmp_path):
        config = load(
            solver={"name": "polish", "fine": None, "rough": {"m": 3}, "table": {"a b.c": math.inf}, "label": None},
            gradient={"name": "relay", "inner": {"name": "anderson", "rtol": 1e-3}},
        )
        assert DEQConfig.from_dict(json.loads(config.to_json())) == config
        assert pickle.loads(pickle.dumps(config)) == config
        with pytest.raises(ConfigError, match=r"solver.(fine|label) is None .* TOML can't say; write JSON"):
            config.to_toml()
        speakable = load(config, **{"solver.fine": "anderson", "solver.label": '\x7f\\ "ü\n'})
        speakable.save(tmp_path / "deq.toml")
        assert DEQConfig.from_file(tmp_path / "deq.toml") == speakable


# ---- the way out

tolerances = st.one_of(
    st.fixed_dictionaries({}, optional={"tol": st.floats(0, 10), "stop_mode": st.sampled_from(["abs", "rel"])}),
    st.fixed_dictionaries({"rtol": st.floats(0, 1)}, optional={"atol": st.floats(0, 1e300)}),
    st.fixed_dictionaries({"atol": st.floats(0, 1)}),
)
common = st.fixed_dictionaries(
    {},
    optional={
        "max_iter": st.integers(0, 10**12),
        "residual_norm": st.sampled_from(["l2", "rms", "max"]),
        "return_final": st.booleans(),
        "patience": st.none() | st.integers(1, 100),
        "divergence_factor": st.floats(1.5, allow_nan=False, allow_infinity=True),
    },
)
damped = st.fixed_dictionaries({}, optional={"damping": st.floats(1e-300, 2)})
own = {
    "fixed_point_iter": damped,
    "simple_fixed_point_iter": damped,
    "anderson": st.fixed_dictionaries(
        {},
        optional={
            "m": st.integers(1, 50),
            "tau": st.floats(1e-3, 2),
            "ridge": st.none() | st.floats(0, 1),
            "lam": st.floats(0, 1),
        },
    ),
    "broyden": st.fixed_dictionaries({}, optional={"LBFGS_thres": st.none() | st.integers(0, 90), "ls": st.booleans()}),
}


@st.composite
def solvers(draw):
    name = draw(st.sampled_from(sorted(own)))
    name_given = draw(st.sampled_from([name, f"deqcore/{name}"]))
    return {"name": name_given, **draw(common), **draw(tolerances), **draw(own[name])}


phantoms = st.fixed_dictionaries(
    {"name": st.just("phantom")},
    optional={
        "steps": st.integers(1, 9),
        "damping": st.floats(0.01, 1),
        "sup_gap": st.integers(-1, 5),
        "sup_loc": st.lists(st.integers(1, 9), max_size=3),
    },
)
implicits = st.fixed_dictionaries(
    {"name": st.just("implicit")}, optional={"solver": solvers() | st.sampled_from(sorted(own))}
)
gradients = phantoms | implicits


@st.composite
def cores(draw):
    core: dict[str, Any] = {"name": draw(st.sampled_from(["sliced", "indexing"]))}
    states = draw(st.integers(1, 4))
    if draw(st.booleans()):
        core["n_states"] = states
    else:
        core["indexing"] = draw(
            st.lists(st.integers(1, 50), min_size=states - 1, max_size=states - 1, unique=True).map(sorted)
        )
    count = draw(st.sampled_from(sorted({0, 1, states - 1})))
    core["intermediate"] = draw(st.lists(gradients, min_size=count, max_size=count))
    return core


norms = st.none() | st.fixed_dictionaries(
    {"name": st.sampled_from(["weight_norm", "spectral_norm"])},
    optional={
        "learn_scale": st.booleans(),
        "clip": st.booleans(),
        "clip_value": st.floats(0.01, 5),
        "target_norm": st.floats(0.01, 5),
    },
)
regularizers = st.lists(
    st.fixed_dictionaries(
        {"name": st.just("jacobian")}, optional={"weight": st.floats(0, 9), "vecs": st.integers(1, 3)}
    )
    | st.fixed_dictionaries(
        {"name": st.just("fixed_point_correction")},
        optional={"gamma": st.none() | st.floats(0, 1), "weight_func": st.text(max_size=8)},
    ),
    max_size=2,
    unique_by=lambda choice: choice["name"],
)
configs = st.fixed_dictionaries(
    {},
    optional={
        "solver": solvers() | st.sampled_from(sorted(own)),
        "gradient": gradients,
        "core": cores(),
        "norm": norms,
        "regularizers": regularizers,
        "on_failure": st.sampled_from(["ignore", "warn", "raise"]),
        "batch_dims": st.integers(0, 3),
        "check_every": st.integers(1, 10**9),
        "keep_trace": st.booleans(),
        "keep_state": st.booleans(),
        "eval_factor": st.floats(0, 1e300),
        "eval_max_iter": st.integers(0, 99),
    },
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(values=configs)
def test_round_trip(values, tmp_path):
    config = DEQConfig(**values)
    assert load(values) == config
    assert load(**values) == config
    assert DEQConfig.from_dict(config.to_dict()) == config
    for name in ("deq.toml", "deq.json"):
        config.save(tmp_path / name)
        assert DEQConfig.from_file(tmp_path / name) == config
        assert load(tmp_path / name) == config
    for again in (
        pickle.loads(pickle.dumps(config)),
        copy.copy(config),
        copy.deepcopy(config),
        load(config, f_tol=None),
    ):
        assert again == config
        assert again.to_dict() == config.to_dict()
        assert ("norm" in again.model_fields_set) == ("norm" in config.model_fields_set)  # None may have been asked for
    assert load(config, batch_dims=5).to_dict() == {**config.to_dict(), "batch_dims": 5}


@pytest.mark.parametrize("given_norm", [None, "none", {"name": "none"}])
def test_no_norm_is_not_the_default_and_travels(given_norm, tmp_path):
    from torch.nn.utils.parametrize import is_parametrized

    config = DEQConfig(norm=given_norm)
    config.save(tmp_path / "deq.toml")
    for again in (
        config,
        load(norm=given_norm),
        load({"norm": given_norm}),
        load(tmp_path / "deq.toml"),
        copy.copy(config),
    ):
        deq = pickle.loads(pickle.dumps(get_deq(again)))
        assert deq.config.norm is None and not is_parametrized(deq.apply_norm(torch.nn.Linear(2, 2)))
    assert is_parametrized(get_deq().apply_norm(torch.nn.Linear(2, 2)))


def test_values_that_were_given_and_defaults_read_alike():
    assert DEQConfig(solver={"max_iter": 40}) == DEQConfig()
    assert DEQConfig().to_dict()["solver"]["max_iter"] == 40
    assert "patience" not in DEQConfig().to_dict()["solver"]
    json.loads(DEQConfig().to_json(), parse_constant=pytest.fail)


def test_the_text_of_a_toml_file():
    text = load("anderson", gradient="implicit", regularizers=["jacobian"]).to_toml()
    assert '[solver]\nname = "anderson"\nmax_iter = 40\n' in text
    assert "[gradient.solver]" in text
    assert 'regularizers = [{ name = "jacobian", weight = 1.0, vecs = 1 }]' in text


def test_toml_of_odd_keys_and_values():
    import tomllib

    table = {
        "a b": {'"': [1, [2.5, -math.inf], {"x.y": True}]},
        "": "\x00\x1f\x7f\t'\"\\é🙂",
        "n": -(10**30),
        "f": 1e-320,
    }
    assert tomllib.loads(to_toml(table)) == table
    assert math.isnan(tomllib.loads(to_toml({"x": math.nan}))["x"])


class TestSaving:
    def test_only_toml_and_json(self, tmp_path):
        with pytest.raises(ConfigError, match=r"'deq.yaml'.*ends in .toml or .json"):
            DEQConfig().save(tmp_path / "deq.yaml")

    def test_whole_or_not_at_all(self, tmp_path, monkeypatch):
        target = tmp_path / "deq.toml"
        load("anderson").save(target)
        before = target.read_text()

        def fails(*args):
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fails)
        with pytest.raises(OSError, match="disk full"):
            load("broyden").save(target)
        assert target.read_text() == before
        assert list(tmp_path.iterdir()) == [target]

    def test_a_writer_that_fails_leaves_nothing(self, tmp_path):
        def half(path):
            path.write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_atomic(tmp_path / "x.bin", half)
        assert list(tmp_path.iterdir()) == []

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "real.toml").write_text("")
        (tmp_path / "link.toml").symlink_to(tmp_path / "real.toml")
        load("anderson").save(tmp_path / "link.toml")
        assert (tmp_path / "link.toml").is_symlink()
        assert DEQConfig.from_file(tmp_path / "real.toml").solver.name == "anderson"

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            DEQConfig().save(tmp_path / "nowhere" / "deq.toml")

    def test_readers_never_see_half_a_file(self, tmp_path):
        target = tmp_path / "deq.json"
        configs = [load(solver={"name": "anderson", "memory": k}) for k in range(1, 9)]
        configs[0].save(target)
        done = threading.Event()
        seen: list[Any] = []

        def read():
            while not done.is_set():
                seen.append(DEQConfig.from_file(target).solver.memory)

        reader = threading.Thread(target=read)
        reader.start()
        for config in configs * 3:
            config.save(target)
        done.set()
        reader.join()
        assert seen and set(seen) <= set(range(1, 9))


def test_what_can_not_be_written_says_so():
    from deqcore import register_solver

    def mine(func, x0, hook=None, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None):
        return func(x0), [], {}

    with registry.scope():
        register_solver("mine", mine)
        with pytest.raises(ConfigTypeError, match="can't be written as plain values"):
            load(solver={"name": "mine", "hook": torch.nn.Linear(1, 1).forward}).to_json()
        config = load(solver={"name": "mine", "hook": "plain"})
        assert pickle.loads(pickle.dumps(config)) == config
        assert DEQConfig.from_dict(config.to_dict()) == config


# ---- other processes and threads

CHILD = """
import pickle, sys
payload = pickle.load(sys.stdin.buffer)
import deqcore, torch
config, deq = pickle.loads(payload)
z_out, info = deq(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
sys.stdout.buffer.write(pickle.dumps((config, z_out[-1].tolist(), dict(info.counts()))))
"""


def test_a_config_and_a_deq_in_another_process():
    config = load(solver={"name": "anderson", "rtol": 1e-6, "m": 4}, ift=True, n_states=2, grad=[2, 1])
    payload = pickle.dumps(pickle.dumps((config, get_deq(config))))
    run = subprocess.run([sys.executable, "-c", CHILD], input=payload, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    there, z, _ = pickle.loads(run.stdout)
    assert there == config
    assert torch.allclose(torch.tensor(z), torch.full((2, 3), 2.0), atol=1e-4)


def test_threads_load_alike():
    barrier = threading.Barrier(4)
    found: list[Any] = []

    def work(k: int) -> None:
        barrier.wait()
        for _ in range(10):
            found.append((k, load({"f_solver": "anderson", "f_max_iter": 10 + k}, ift=bool(k % 2))))

    with registry.scope(), warnings.catch_warnings():
        registry.refresh()
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 40
    for k, config in found:
        assert config == load({"f_solver": "anderson", "f_max_iter": 10 + k}, ift=bool(k % 2))
