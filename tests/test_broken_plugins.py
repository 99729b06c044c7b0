"""Plugins that can't be used: an error when selected and only then, with all it takes to repair them."""

from __future__ import annotations

import shutil
import sys
import warnings

import pytest
import torch
from plugins_support import DISABLE, SOLVER, linear_map

from deqcore import (
    BrokenPluginError,
    PluginAPIError,
    PluginDisabledError,
    PluginError,
    PluginWarning,
    Solver,
    get_deq,
    registry,
)
from deqcore.registry import KINDS

BROKEN_MODULES = {
    "ImportError": "import nothing_of_that_name",
    "SyntaxError": "def broken(:",
    "RuntimeError": "raise RuntimeError('no licence')",
    "SystemExit": "import sys; sys.exit('needs a display')",
    "BaseException": "class Odd(BaseException): pass\nraise Odd('odd one')",
    "DEQError": "from deqcore.errors import MissingExtraError\nraise MissingExtraError('x', 'y', 'z')",
    "PluginError": "from deqcore import registry\nregistry.get('solvers', 'nobody')",
    "no_hook": "x = 1",
    "not_marked": "def deqcore_solver(): return None",
    "misspelt": "from deqcore import hookimpl\n@hookimpl\ndef deqcore_slover(): return None",
    "both_spellings": SOLVER + "\n@hookimpl\ndef deqcore_slover(): return Halfway",
    "arguments": "from deqcore import hookimpl\n@hookimpl\ndef deqcore_solver(problem): return None",
    "other_kind": "from deqcore import hookimpl\n@hookimpl\ndef deqcore_norm(): return None",
    "raises": "from deqcore import hookimpl\n@hookimpl\ndef deqcore_solver(): raise KeyError('inside')",
    "exits": "from deqcore import hookimpl\n@hookimpl\ndef deqcore_solver(): raise SystemExit(3)",
    "none": "from deqcore import hookimpl\n@hookimpl\ndef deqcore_solver(): return None",
    "instance": SOLVER.replace("return Halfway", "return Halfway()"),
    "wrong_class": "from deqcore import Norm, hookimpl\n@hookimpl\ndef deqcore_solver(): return Norm",
    "base_class": "from deqcore import Solver, hookimpl\n@hookimpl\ndef deqcore_solver(): return Solver",
}

CAUSES = {
    "ImportError": "importing it raised ModuleNotFoundError: No module named 'nothing_of_that_name'",
    "SyntaxError": "importing it raised SyntaxError: invalid syntax",
    "RuntimeError": "importing it raised RuntimeError: no licence",
    "SystemExit": "importing it raised SystemExit: needs a display",
    "BaseException": "importing it raised Odd: odd one",
    "DEQError": "importing it raised MissingExtraError: x needs the package 'y'",
    "PluginError": "importing it raised UnknownPluginError: no solver named 'nobody'",
    "no_hook": "no hook deqcore_solver() marked with @hookimpl",
    "not_marked": "deqcore_solver(): that function lacks the mark @hookimpl",
    "misspelt": "hooks that don't exist: deqcore_slover. Did you mean 'deqcore_solver'",
    "both_spellings": "hooks that don't exist: deqcore_slover. Did you mean 'deqcore_solver'",
    "arguments": "problem",
    "other_kind": "it has deqcore_norm(): its entry point belongs in the group deqcore.norms",
    "raises": "deqcore_solver() raised KeyError: 'inside'",
    "exits": "deqcore_solver() raised SystemExit: 3",
    "none": "must return a subclass of deqcore.Solver, got None",
    "instance": "must return a subclass of deqcore.Solver, got Halfway(",
    "wrong_class": "must return a subclass of deqcore.Solver, got <class 'deqcore.interfaces.Norm'>",
    "base_class": "must return a subclass of deqcore.Solver, got <class 'deqcore.interfaces.Solver'>",
}


@pytest.mark.parametrize("case", BROKEN_MODULES)
def test_broken_plugin(site, monkeypatch, case):
    site.solver("acme-broken", "acme", "acme_broken", BROKEN_MODULES[case], version="0.7")
    site.solver("acme-good", "good", "acme_good")

    f, z0, exact = linear_map()
    z_out, _ = get_deq(solver={"name": "good", "max_iter": 100, "tol": 1e-10}).eval()(f, z0)  # others are not affected
    torch.testing.assert_close(z_out[-1], exact, atol=1e-8, rtol=0)
    assert "acme" in registry.names("solvers")

    with pytest.raises(BrokenPluginError) as caught:
        get_deq("acme")
    text = str(caught.value)
    with pytest.raises(BrokenPluginError) as again:  # must not say something else the second time
        get_deq("acme")
    assert str(again.value) == text
    for part in ("solver 'acme'", "'acme_broken'", "acme-broken 0.7", CAUSES[case], "uninstall"):
        assert part in text, f"{part!r} is missing in: {text}"
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, PluginError)

    state, cause = registry.state_of(registry.find("solvers", "acme"))
    assert state == "broken" and cause == text
    assert registry.state_of(registry.find("solvers", "good")) == ("ok", "")

    advice = f"{DISABLE}=acme-broken/acme"
    assert advice in text
    monkeypatch.setenv(*advice.split("="))  # what the error advises works
    assert registry.state_of(registry.entries("solvers")[0])[0] == "disabled"
    with pytest.raises(PluginDisabledError):
        get_deq("acme")


@pytest.mark.parametrize(
    "value, cause",
    [
        ("acme_missing", "No module named 'acme_missing'"),
        ("acme_present.inner", "No module named 'acme_present.inner'"),
        ("acme_present:Missing", "has no attribute 'Missing'"),
        ("acme_present:Halfway", "must name a module, and 'acme_present:Halfway' is of type"),
        ("not a module!", "importing it raised"),
    ],
)
def test_entry_points_that_name_nothing_useful(site, value, cause):
    site.install("acme", {"acme_present": SOLVER}, {"deqcore.solvers": {"bad": value, "good": "acme_present"}})
    with pytest.raises(BrokenPluginError) as caught:
        registry.get("solvers", "bad")
    assert cause in str(caught.value) and repr(value) in str(caught.value) and "acme 1.2.3" in str(caught.value)
    assert issubclass(registry.get("solvers", "good"), Solver)


def test_keyboard_interrupt_is_nobodys_fault(site):
    site.solver("acme", "slow", "acme_interrupted", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        registry.get("solvers", "slow")


def test_the_cause_stays_attached(site):
    site.solver("acme", "acme", "acme_caused", "1 / 0")
    with pytest.raises(BrokenPluginError) as caught:
        registry.get("solvers", "acme")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_plugin_repaired_in_place_works(site):
    site.solver("acme", "acme", "acme_repaired", "raise RuntimeError('first')")
    with pytest.raises(BrokenPluginError):
        registry.get("solvers", "acme")
    site.path.joinpath("acme_repaired.py").write_text(SOLVER)
    registry.refresh()
    assert issubclass(registry.get("solvers", "acme"), Solver)


@pytest.mark.parametrize("version", ["99", "0", "'1'", "None"])
def test_api_version_out_of_range(site, version):
    site.solver("acme-future", "acme", "acme_future", f"DEQCORE_API_VERSION = {version}\n" + SOLVER)
    with pytest.raises(PluginAPIError) as caught:
        registry.get("solvers", "acme")
    text = str(caught.value)
    assert f"asks for plugin API version {version}; this deqcore offers 1 to 1" in text
    assert "acme-future 1.2.3" in text and isinstance(caught.value, BrokenPluginError)
    assert registry.state_of(registry.find("solvers", "acme")) == ("broken", text)


def test_api_version_in_range(site):
    site.solver("acme", "acme", "acme_present_day", "DEQCORE_API_VERSION = 1\n" + SOLVER)
    assert issubclass(registry.get("solvers", "acme"), Solver)


def test_optional_hooks_of_a_later_version_are_let_be(site):
    later = SOLVER + "\n@hookimpl(optionalhook=True)\ndef deqcore_not_yet(x): return 1\n"
    site.solver("acme", "acme", "acme_later", later)
    assert issubclass(registry.get("solvers", "acme"), Solver)


def test_one_module_may_bring_several_kinds(site):
    source = SOLVER + "\nfrom deqcore import Core\nclass Mine(Core): pass\n@hookimpl\ndef deqcore_core(): return Mine\n"
    points = {"deqcore.solvers": {"a": "acme_double", "b": "acme_double"}, "deqcore.cores": {"c": "acme_double"}}
    site.install("acme", {"acme_double": source}, points)
    site.solver("bolt", "between", "bolt_between")
    for name, module in (("a", "acme_double"), ("between", "bolt_between"), ("b", "acme_double")):
        assert registry.get("solvers", name) is sys.modules[module].Halfway
    assert registry.get("cores", "c") is sys.modules["acme_double"].Mine


@pytest.mark.parametrize("kind", ["models", "commands"])
def test_models_and_commands_are_things_to_call(site, kind):
    hook = KINDS[kind].hook
    bad = f"from deqcore import hookimpl\n@hookimpl\ndef {hook}(): return None\n"
    good = bad.replace("return None", "return dict")
    modules = {f"acme_bad_{kind}": bad, f"acme_good_{kind}": good}
    site.install("acme", modules, {f"deqcore.{kind}": {name.removesuffix(f"_{kind}"): name for name in modules}})
    assert registry.get(kind, "acme_good") is dict
    with pytest.raises(BrokenPluginError, match="must return something to call, got None"):
        registry.get(kind, "acme_bad")


# ---- damaged metadata


def test_a_distribution_without_metadata(site):
    site.solver("acme-bare", "bare", "acme_bare")
    site.path.joinpath("acme_bare-1.2.3.dist-info", "METADATA").unlink()
    registry.refresh()
    assert issubclass(registry.get("solvers", "anderson"), Solver)
    entry = registry.find("solvers", "bare")
    assert entry.origin == "unknown distribution" and registry.state_of(entry) == ("ok", "")


def test_unreadable_entry_points_are_left_out_with_a_warning(site, tmp_path, monkeypatch):
    site.solver("acme-good", "good", "acme_good")
    shutil.copytree(site.path, tmp_path / "behind")  # another copy, further down the path, is nobody's rival
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "behind")])
    site.solver("acme-torn", "torn", "acme_torn")
    site.path.joinpath("acme_torn-1.2.3.dist-info", "entry_points.txt").write_text(
        "[deqcore.solvers]\nno equals sign\n"
    )
    registry.refresh()
    with pytest.warns(PluginWarning, match="entry points of acme-torn can't be read") as seen:
        assert issubclass(registry.get("solvers", "good"), Solver)
    assert len(seen) == 1
    assert issubclass(registry.get("solvers", "anderson"), Solver)


def test_import_warnings_of_a_plugin_pass_through(site):
    site.solver("acme", "old", "acme_old", "import warnings\nwarnings.warn('old', DeprecationWarning)\n" + SOLVER)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        registry.get("solvers", "old")
    assert [str(one.message) for one in seen] == ["old"]
