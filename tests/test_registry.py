"""The registry: what is installed is listed without being imported, and found, refused or repaired by name."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import threading
import warnings

import pytest
import torch
from plugins_support import SOLVER, run_python

import deqcore
from deqcore import (
    BrokenPluginError,
    ConfigError,
    ConfigTypeError,
    Core,
    CoreSettings,
    PluginAPIError,
    PluginClashError,
    PluginDisabledError,
    PluginError,
    PluginWarning,
    Solver,
    SolverSettings,
    Step,
    Stretch,
    UnknownPluginError,
    get_deq,
    register_deq,
    register_solver,
    registry,
)
from deqcore.registry import KINDS, kind_of

DISABLE, ALLOW = "DEQCORE_DISABLE_PLUGINS", "DEQCORE_ALLOW_PLUGINS"
EXPLODES = "raise RuntimeError('imported')"


class Distribution:
    def __init__(self, name, version):
        self.name, self.version = name, version


class Point:
    """The least an entry point can be: what an index from elsewhere would give."""

    def __init__(self, group, name, value, dist=("fake-dist", "0.1")):
        self.group, self.name, self.value = group, name, value
        self.dist = Distribution(*dist) if dist else None
        self.loads = 0

    def load(self):
        self.loads += 1
        __import__(self.value)
        return sys.modules[self.value]


class Halfway(Solver[SolverSettings]):
    def step(self, problem, z, fz, state):
        return Step((z + fz) / 2, state)


def linear_map(seed=0, batch=3, size=5):
    """f(z) = A z + b with spectral radius below 1, and its fixed point from a dense solve."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=generator, dtype=torch.float64)
    a = 0.5 * a / torch.linalg.matrix_norm(a, 2)
    b = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - a, b.mT).mT
    return (lambda z: z @ a.mT + b), torch.zeros_like(b), exact


# ---- the index


def test_the_index_imports_nothing(site):
    site.solver("acme-solvers", "acme", "acme_explodes", EXPLODES)
    assert "acme" in registry.names("solvers")
    assert "acme" in registry.index("solvers")
    entry = registry.find("solvers", "acme")
    assert entry in registry.entries("solvers") and entry in registry.entries()
    assert "acme_explodes" not in sys.modules
    with pytest.raises(BrokenPluginError, match="imported"):
        registry.get("solvers", "acme")


def test_only_the_named_entry_is_imported(site):
    site.install(
        "acme-solvers",
        {"acme_one": SOLVER, "acme_two": SOLVER},
        {"deqcore.solvers": {"one": "acme_one", "two": "acme_two"}},
    )
    found = registry.get("solvers", "one")
    assert issubclass(found, Solver)
    assert found is sys.modules["acme_one"].Halfway
    assert "acme_two" not in sys.modules


def test_provenance(site):
    site.solver("acme-solvers", "acme", "acme_solver", version="4.5.6")
    entry = registry.find("solvers", "acme")
    assert (entry.kind, entry.name, entry.value) == ("solvers", "acme", "acme_solver")
    assert (entry.origin, entry.version, entry.builtin) == ("acme-solvers", "4.5.6", False)
    for part in ("solver 'acme'", "acme_solver", "acme-solvers", "4.5.6"):
        assert part in str(entry)
    registry.get("solvers", "acme")
    assert registry.manager.get_name(sys.modules["acme_solver"]) == "solvers:acme@acme-solvers"


def test_built_ins_come_through_the_same_index():
    entries = {(entry.kind, entry.name): entry for entry in registry.entries()}
    for kind, names in {
        "solvers": ["anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter"],
        "gradients": ["implicit", "phantom"],
        "cores": ["indexing", "sliced"],
        "norms": ["spectral_norm", "weight_norm"],
        "regularizers": ["fixed_point_correction", "jacobian"],
    }.items():
        for name in names:
            entry = entries[kind, name]
            assert entry.builtin and entry.origin == "deqcore" and entry.version == deqcore.__version__
            assert entry.point is not None and not entry.value.startswith("deqcore.")


def test_entry_points_can_be_handed_over(site):
    site.path.joinpath("acme_handed.py").write_text(SOLVER)
    points = [Point("deqcore.solvers", "one", "acme_handed"), Point("other.solvers", "two", "acme_handed")]
    with registry.scope(entry_points=points):
        assert [entry.name for entry in registry.entries()] == ["one"]
        first = registry.get("solvers", "one")
        assert registry.get("solvers", "fake-dist/one") is first
        assert points[0].loads == 1
        with pytest.raises(UnknownPluginError):
            registry.get("solvers", "anderson")
    assert issubclass(registry.get("solvers", "anderson"), Solver)


@pytest.mark.parametrize("spelling", ["solver", "solvers", "Solver", " SOLVERS "])
def test_kinds_may_be_singular_or_plural(spelling):
    assert kind_of(spelling) == "solvers"
    assert registry.names(spelling) == registry.names("solvers")
    assert registry.find(spelling, "anderson").kind == "solvers"
    assert registry.get(spelling, "anderson") is registry.get("solvers", "anderson")
    assert registry.create(spelling, "anderson").settings.name == "anderson"
    assert {entry.kind for entry in registry.entries(spelling)} == {"solvers"}


@pytest.mark.parametrize("spelling", ["linear-solver", "linear solvers", "linear_solver", "Linear-Solvers"])
def test_kinds_of_two_words(spelling):
    assert kind_of(spelling) == "linear_solvers"


def test_unknown_kinds_are_refused():
    with pytest.raises(UnknownPluginError, match=r"'sovlers' is no kind.*linear_solvers.*Did you mean 'solvers'"):
        registry.get("sovlers", "anderson")
    with pytest.raises(ValueError):  # the built-in type that Python users expect
        registry.names("sovlers")
    with pytest.raises(TypeError, match="a kind of plugin is a str, got 3"):
        kind_of(3)


# ---- names that lead nowhere


def test_unknown_name_says_what_is_near_and_what_is_installed():
    with pytest.raises(UnknownPluginError) as caught:
        registry.get("solvers", "andersen")
    text = str(caught.value)
    assert "no solver named 'andersen'" in text and "Did you mean 'anderson'?" in text
    assert "Installed: anderson, broyden, fixed_point_iter" in text
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, deqcore.DEQError)


def test_unknown_name_in_every_way_in():
    for call in (
        lambda: get_deq("andersen"),
        lambda: get_deq(solver="andersen"),
        lambda: get_deq(solver={"name": "andersen"}),
        lambda: get_deq(f_solver="andersen"),
        lambda: get_deq(gradient={"name": "implicit", "solver": "andersen"}),
        lambda: deqcore.get_solver("andersen"),
    ):
        with pytest.raises(UnknownPluginError, match="Did you mean 'anderson'"):
            call()


def test_unknown_name_that_another_kind_has():
    with pytest.raises(UnknownPluginError, match="'implicit' is a gradient"):
        registry.get("solvers", "implicit")
    with pytest.raises(UnknownPluginError, match="'anderson' is a solver"):
        get_deq(gradient="anderson")


def test_unknown_name_of_a_distribution():
    with pytest.raises(UnknownPluginError, match=r"'acme' has none of that name; deqcore/anderson exist"):
        registry.get("solvers", "acme/anderson")
    with pytest.raises(UnknownPluginError, match="no solver named 'acme/nothing'"):
        registry.get("solvers", "acme/nothing")


def test_a_misspelt_group_is_hinted_at(site):
    site.install("acme", {"acme_stray": SOLVER}, {"deqcore.solver": {"stray": "acme_stray"}})
    assert "stray" not in registry.names("solvers")
    with pytest.raises(
        UnknownPluginError, match=r"entry-point group 'deqcore.solver', .*Did you mean 'deqcore.solvers'"
    ):
        registry.get("solvers", "stray")


@pytest.mark.parametrize("name", [None, 3, ["anderson"], object()])
def test_names_are_text(name):
    with pytest.raises(ConfigTypeError, match="picked by its name"):
        registry.get("solvers", name)


def test_settings_say_what_they_are_of():
    with pytest.raises(ConfigError, match="without a name"):
        registry.settings("solvers", SolverSettings())
    with pytest.raises(ConfigTypeError, match="not settings of a solver"):
        registry.settings("solvers", CoreSettings(name="sliced"))
    with pytest.raises(ConfigError, match=r"needs a 'name'; installed: .*jacobian"):
        registry.settings("regularizers", {})
    with pytest.raises(ConfigTypeError, match="name or as a dict"):
        registry.settings("solvers", 7)
    with pytest.raises(ConfigError, match="command has no settings"):
        registry.settings("commands", "demo")


def test_settings_of_the_base_class_become_the_implementations():
    anderson = registry.create("solvers", SolverSettings(name="anderson", max_iter=7))
    assert anderson.settings.memory == registry.create("solvers", "anderson").settings.memory
    assert anderson.settings.max_iter == 7
    made = registry.settings("solvers", {"name": "anderson", "memory": 3})
    assert registry.settings("solvers", made) is made
    with pytest.raises(deqcore.UnknownKeyError, match="memory"):  # Anderson's own do not silently serve plain iteration
        registry.settings("solvers", made.model_copy(update={"name": "fixed_point_iter"}))


# ---- broken plugins: an error when selected, and only then

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


# ---- two of one name


def test_a_built_in_keeps_its_name(site):
    site.solver("acme-solvers", "anderson", "acme_anderson")
    with pytest.warns(PluginWarning) as seen:
        deq = get_deq("anderson")
        get_deq("anderson")
        registry.get("solvers", "anderson")
    assert len(seen) == 1
    assert "acme-solvers/anderson" in str(seen[0].message) and "not imported" in str(seen[0].message)
    assert type(deq.solver).__module__ == "deqcore_solvers.anderson"
    assert "acme_anderson" not in sys.modules
    states = {entry.origin: registry.state_of(entry) for entry in registry.index("solvers")["anderson"]}
    assert states["deqcore"] == ("ok", "")
    assert states["acme-solvers"][0] == "shadowed" and "acme-solvers/anderson" in states["acme-solvers"][1]


def test_the_other_is_had_by_its_full_name(site):
    site.solver("acme-solvers", "anderson", "acme_anderson")
    deq = get_deq("acme-solvers/anderson")
    assert type(deq.solver) is sys.modules["acme_anderson"].Halfway
    assert type(get_deq(deq.config.to_dict()).solver) is type(deq.solver)  # the full name travels in the configuration
    assert type(get_deq("deqcore/anderson").solver).__module__ == "deqcore_solvers.anderson"
    assert type(get_deq("Acme.Solvers/anderson").solver) is type(deq.solver)  # spelt as package indexes allow
    f, z0, exact = linear_map()
    z_out, _ = get_deq({"solver": {"name": "acme-solvers/anderson", "max_iter": 100, "tol": 1e-10}}).eval()(f, z0)
    torch.testing.assert_close(z_out[-1], exact, atol=1e-8, rtol=0)


def test_a_disabled_built_in_gives_its_name_away(site, monkeypatch):
    site.solver("acme-solvers", "anderson", "acme_anderson")
    monkeypatch.setenv(DISABLE, "deqcore/anderson")
    assert type(get_deq("anderson").solver) is sys.modules["acme_anderson"].Halfway


def test_a_disabled_rival_is_not_warned_of(site, monkeypatch):
    site.solver("acme-solvers", "anderson", "acme_anderson")
    monkeypatch.setenv(DISABLE, "acme-solvers/*")
    assert type(get_deq("anderson").solver).__module__ == "deqcore_solvers.anderson"


def test_two_third_parties_with_one_name(site, monkeypatch):
    site.solver("acme", "swift", "acme_swift", version="1.0")
    site.solver("bolt", "swift", "bolt_swift", version="2.0")
    assert registry.names("solvers").count("swift") == 1
    with pytest.raises(PluginClashError) as caught:
        get_deq("swift")
    text = str(caught.value)
    for part in ("'swift'", "acme 1.0", "bolt 2.0", "acme/swift", "bolt/swift", DISABLE):
        assert part in text
    assert "acme_swift" not in sys.modules and "bolt_swift" not in sys.modules
    assert type(get_deq("acme/swift").solver) is sys.modules["acme_swift"].Halfway
    assert "bolt_swift" not in sys.modules
    assert type(get_deq("bolt/swift").solver) is sys.modules["bolt_swift"].Halfway
    assert {registry.state_of(entry)[0] for entry in registry.index("solvers")["swift"]} == {"clash"}
    monkeypatch.setenv(DISABLE, "acme/swift")
    assert type(get_deq("swift").solver) is sys.modules["bolt_swift"].Halfway


# ---- switched off by the environment


@pytest.fixture
def two(site):
    """acme has a solver `swift` and a gradient `swift`, bolt a solver `brisk`; none may be imported."""
    site.install(
        "acme-plugins",
        {"acme_never": EXPLODES},
        {"deqcore.solvers": {"swift": "acme_never"}, "deqcore.gradients": {"swift": "acme_never"}},
    )
    site.solver("bolt", "brisk", "bolt_never", EXPLODES)
    yield [("solvers", "swift"), ("gradients", "swift"), ("solvers", "brisk"), ("solvers", "anderson")]
    assert "acme_never" not in sys.modules and "bolt_never" not in sys.modules


def enabled(names):
    found = []
    for kind, name in names:
        try:
            registry.find(kind, name)
        except PluginDisabledError:
            state, cause = registry.state_of(registry.index(kind)[name][0])
            assert state == "disabled" and "DEQCORE_" in cause
        else:
            found.append(f"{kind}:{name}")
    return found


@pytest.mark.parametrize(
    "patterns, left",
    [
        ("", "solvers:swift gradients:swift solvers:brisk solvers:anderson"),
        ("solvers:swift", "gradients:swift solvers:brisk solvers:anderson"),
        ("solver:swift", "gradients:swift solvers:brisk solvers:anderson"),
        (" solvers:swift , solvers:brisk ,", "gradients:swift solvers:anderson"),
        ("solvers:*", "gradients:swift"),
        ("*:swift", "solvers:brisk solvers:anderson"),
        ("*:*", ""),
        ("acme-plugins/*", "solvers:brisk solvers:anderson"),
        ("Acme_Plugins/*", "solvers:brisk solvers:anderson"),
        ("acme*/*", "solvers:brisk solvers:anderson"),
        ("acme-plugins/swift", "solvers:brisk solvers:anderson"),
        ("acme-plugins/other", "solvers:swift gradients:swift solvers:brisk solvers:anderson"),
        ("third-party", "solvers:anderson"),
        ("deqcore/anderson", "solvers:swift gradients:swift solvers:brisk"),
        ("norms:nobody", "solvers:swift gradients:swift solvers:brisk solvers:anderson"),
    ],
)
def test_disable(two, monkeypatch, patterns, left):
    monkeypatch.setenv(DISABLE, patterns)
    assert enabled(two) == left.split()


@pytest.mark.parametrize(
    "patterns, left",
    [
        ("", "solvers:swift gradients:swift solvers:brisk solvers:anderson"),
        ("solvers:swift", "solvers:swift solvers:anderson"),
        ("bolt/*", "solvers:brisk solvers:anderson"),
        ("acme_plugins/swift,bolt/brisk", "solvers:swift gradients:swift solvers:brisk solvers:anderson"),
        ("third-party", "solvers:swift gradients:swift solvers:brisk solvers:anderson"),
        ("norms:nobody", "solvers:anderson"),
    ],
)
def test_allow(two, monkeypatch, patterns, left):
    monkeypatch.setenv(ALLOW, patterns)
    assert enabled(two) == left.split()


def test_disable_goes_before_allow(two, monkeypatch):
    monkeypatch.setenv(ALLOW, "third-party")
    monkeypatch.setenv(DISABLE, "acme-plugins/*")
    assert enabled(two) == ["solvers:brisk", "solvers:anderson"]


def test_disabled_plugins_say_so(two, monkeypatch):
    monkeypatch.setenv(DISABLE, "bolt/*")
    with pytest.raises(PluginDisabledError) as caught:
        get_deq("brisk")
    assert "bolt 1.2.3" in str(caught.value) and f"{DISABLE} has 'bolt/*'" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(PluginDisabledError):
        registry.get("solvers", "bolt/brisk")
    monkeypatch.delenv(DISABLE)
    monkeypatch.setenv(ALLOW, "acme-plugins/*")
    with pytest.raises(PluginDisabledError, match=f"{ALLOW} does not have it"):
        get_deq("brisk")


@pytest.mark.parametrize("variable", [DISABLE, ALLOW])
@pytest.mark.parametrize(
    "pattern",
    ["anderson", "third_party", "sovlers:anderson", "slov*:x", "solvers:", ":anderson", "acme/", "/x", "a:b/c:"],
)
def test_bad_patterns(monkeypatch, variable, pattern):
    monkeypatch.setenv(variable, f"solvers:nobody,{pattern}")
    if pattern == "a:b/c:":  # a distribution's name may hold anything, a local one does hold a colon
        registry.find("solvers", "broyden")
        return
    with pytest.raises(ConfigError) as caught:
        registry.find("solvers", "broyden")
    assert variable in str(caught.value) and repr(pattern) in str(caught.value)


# ---- registered in this process


def function_solver(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, weight=1.0):
    for _ in range(max_iter):
        x0 = torch.lerp(x0, func(x0), weight)
    return x0, [], {}


def test_register_a_class():
    with registry.scope():
        assert register_solver("mine", Halfway) is Halfway
        entry = registry.find("solvers", "mine")
        assert entry.origin == f"local:{__name__}" and entry.version == "" and not entry.builtin
        assert registry.state_of(entry) == ("ok", "")
        assert type(get_deq("mine").solver) is Halfway
        assert registry.get("solvers", f"local:{__name__}/mine") is Halfway
        f, z0, exact = linear_map()
        z_out, info = get_deq(solver={"name": "mine", "max_iter": 100, "tol": 1e-10}).eval()(f, z0)
        torch.testing.assert_close(z_out[-1], exact, atol=1e-8, rtol=0)
        assert bool(info.converged.all())
    with pytest.raises(UnknownPluginError):
        get_deq("mine")


def test_register_a_function():
    with registry.scope():
        assert register_solver("mine", function_solver) is function_solver
        deq = get_deq(solver={"name": "mine", "weight": 0.5, "max_iter": 100, "tol": 1e-10}).eval()
        f, z0, exact = linear_map()
        torch.testing.assert_close(deq(f, z0)[0][-1], exact, atol=1e-8, rtol=0)
        assert pickle.loads(pickle.dumps(deq)).config == deq.config


def test_names_that_are_taken(site):
    site.solver("acme", "swift", "acme_taken")
    for name, owner in (("anderson", "deqcore"), ("swift", "acme 1.2.3")):
        with pytest.raises(PluginClashError, match=rf"'{name}' is taken by .*{owner}.*replace=True"):
            register_solver(name, Halfway)
        assert type(get_deq(name).solver) is not Halfway
    assert "acme_taken" in sys.modules
    register_solver("mine", Halfway)
    with pytest.raises(PluginClashError, match=f"local:{__name__}"):
        register_solver("mine", function_solver)
    assert registry.get("solvers", "mine") is Halfway


def test_replace_means_it():
    with registry.scope():
        register_solver("anderson", Halfway, replace=True)
        assert type(get_deq("anderson").solver) is Halfway
        built_in = registry.index("solvers")["anderson"][0]
        assert registry.state_of(built_in)[0] == "shadowed"
        assert type(get_deq("deqcore/anderson").solver).__module__ == "deqcore_solvers.anderson"
        register_solver("anderson", function_solver, replace=True)
        assert registry.get("solvers", "anderson").function is function_solver
    assert type(get_deq("anderson").solver).__module__ == "deqcore_solvers.anderson"


def test_the_same_again_is_fine_as_in_a_notebook():
    def define(step):
        namespace = {"__name__": "__main__", "Solver": Solver, "SolverSettings": SolverSettings, "Step": Step}
        exec(f"class Mine(Solver[SolverSettings]):\n  def step(self, p, z, fz, s): return Step({step}, s)\n", namespace)
        return namespace["Mine"]

    with registry.scope():
        register_solver("mine", Halfway)
        register_solver("mine", Halfway)
        register_solver("mine_too", function_solver)
        register_solver("mine_too", function_solver)
        register_solver("cell", define("z"))
        later = register_solver("cell", define("fz"))
        assert registry.get("solvers", "cell") is later


@pytest.mark.parametrize("name", ["", "a/b", "solvers:a", "a,b", "a*", " a", "a\n"])
def test_illegal_names(name):
    with registry.scope(), pytest.raises(ConfigError, match="can't be a name"):
        register_solver(name, Halfway)


@pytest.mark.parametrize("name", [None, 3, Halfway])
def test_names_of_the_wrong_type(name):
    with registry.scope(), pytest.raises(TypeError, match="a name is a str"):
        registry.register("solvers", name, Halfway)


def test_things_that_are_no_solver():
    with registry.scope():
        for thing in (3, None, "anderson", object()):
            with pytest.raises(TypeError, match="a solver is a Solver class or a function"):
                register_solver("mine", thing)
        with pytest.raises(ConfigTypeError, match=r"a solver is a subclass of deqcore.Solver"):
            register_solver("mine", dict)
        with pytest.raises(ConfigTypeError, match=r"a core is a subclass of deqcore.Core"):
            registry.register("core", "mine", Halfway)
        with pytest.raises(ConfigTypeError, match="a command is something to call"):
            registry.register("commands", "mine", 3)
        with pytest.raises(TypeError, match="a core is a class or a callable"):
            register_deq("mine", 3)
        assert "mine" not in registry.names("solvers")


def test_local_registrations_can_be_switched_off_too(monkeypatch):
    with registry.scope():
        register_solver("mine", Halfway)
        monkeypatch.setenv(ALLOW, "acme/*")  # what is allowed in speaks of what is installed
        assert registry.get("solvers", "mine") is Halfway
        monkeypatch.setenv(DISABLE, "third-party")
        assert registry.get("solvers", "mine") is Halfway
        for pattern in ("solvers:mine", f"local:{__name__}/*", "local:*/mine"):
            monkeypatch.setenv(DISABLE, pattern)
            with pytest.raises(PluginDisabledError):
                registry.get("solvers", "mine")


def test_register_a_core_class():
    class Twice(Core[CoreSettings]):
        def plan(self, max_steps):
            return [Stretch(max_steps // 2, 0, True), Stretch(max_steps, 1, True)]

    with registry.scope():
        assert register_deq("twice", Twice) is Twice
        deq = get_deq(core="twice", f_tol=1e-10, f_max_iter=100, ift=True)
        assert type(deq.core) is Twice
        f, z0, exact = linear_map()
        z_out, _ = deq(f, z0)
        assert len(z_out) == 2
        torch.testing.assert_close(z_out[-1], exact, atol=1e-8, rtol=0)
    with pytest.raises(UnknownPluginError):
        get_deq(core="twice")


def test_register_a_whole_deq_of_ones_own():
    class Own(torch.nn.Module):
        def __init__(self, args):
            super().__init__()
            self.args = args

        def forward(self, fn, z0):
            return [fn(z0)], {}

    with registry.scope():
        assert register_deq("own", Own) is Own
        assert registry.find("cores", "own").origin == f"local:{__name__}"
        deq = get_deq(core="own", f_max_iter=7)
        assert type(deq) is Own
        assert deq.args.solver.max_iter == 7
        assert torch.equal(deq(lambda z: z + 1, torch.zeros(2, 3))[0][-1], torch.ones(2, 3))
        given = {"core": "own"}
        assert get_deq(given).args is given
        register_deq("own", Own)  # a notebook cell run twice
        with pytest.raises(PluginClashError):
            register_deq("sliced", Own)


# ---- scope


def test_scope_undoes_everything():
    before = registry.names("solvers")
    with registry.scope() as same:
        assert same is registry
        register_solver("outer", Halfway)
        with registry.scope():
            register_solver("inner", Halfway)
            register_solver("outer", function_solver, replace=True)
            with registry.scope(entry_points=[]):
                assert registry.names("solvers") == ["inner", "outer"]  # what was registered here stays
                register_solver("anderson", Halfway)
                assert registry.index("solvers") == {}
            assert set(registry.names("solvers")) == {*before, "inner", "outer"}
            assert type(get_deq("anderson").solver) is not Halfway
            assert registry.get("solvers", "outer") is not Halfway
        assert registry.get("solvers", "outer") is Halfway
        assert "inner" not in registry.names("solvers")
    assert registry.names("solvers") == before


def test_scope_undoes_everything_after_an_error():
    before = registry.names("solvers")
    with pytest.raises(ZeroDivisionError), registry.scope(entry_points=[]), registry.scope():
        register_solver("mine", Halfway)
        raise ZeroDivisionError
    assert registry.names("solvers") == before


def test_scope_undoes_a_refresh(site):
    before = registry.names("solvers")
    with registry.scope():
        site.solver("acme", "acme_scoped", "acme_scoped")
        assert "acme_scoped" in registry.names("solvers")
    assert registry.names("solvers") == before


def test_refresh_sees_what_was_installed_and_removed(site):
    with pytest.raises(ModuleNotFoundError):
        __import__("acme_fresh")  # Python has now read the folder, and looks again only when its time stamp changes
    stamp = site.path.stat().st_mtime_ns
    site.solver("acme", "fresh", "acme_fresh")
    os.utime(site.path, ns=(stamp, stamp))
    registry.refresh()
    assert issubclass(registry.get("solvers", "fresh"), Solver)
    for file in site.path.joinpath("acme-1.2.3.dist-info").iterdir():
        file.unlink()
    assert "fresh" in registry.names("solvers")  # read once
    registry.refresh()
    assert "fresh" not in registry.names("solvers")


# ---- two names of one package


def test_two_names_share_one_registry():
    out = run_python(
        """
        import sys, deqcore
        sys.modules["torchdeq"] = deqcore
        import torchdeq
        import torchdeq.solver, torchdeq.norm, torchdeq.dropout
        import torchdeq.utils as utils
        from torchdeq import get_deq, apply_norm
        from torchdeq.loss import fp_correction, jac_reg, power_method
        from torchdeq.solver import get_solver
        from torchdeq.norm import remove_norm
        from torchdeq.dropout import VariationalDropout
        import deqcore.solver, deqcore.norm, deqcore.dropout, deqcore.loss, deqcore.utils

        for part in ("solver", "norm", "dropout", "loss", "utils"):
            assert sys.modules[f"torchdeq.{part}"] is sys.modules[f"deqcore.{part}"] is getattr(deqcore, part), part
            assert sys.modules[f"deqcore.{part}"].__spec__.name == f"deqcore.{part}"
            assert sys.modules[f"deqcore.{part}"].__name__ == f"deqcore.{part}"
        assert utils is deqcore.utils
        assert (fp_correction, jac_reg, power_method) == (deqcore.fp_correction, deqcore.jac_reg, deqcore.power_method)
        assert get_deq is deqcore.get_deq and apply_norm is deqcore.apply_norm
        assert remove_norm is deqcore.remove_norm and get_solver is deqcore.get_solver
        assert VariationalDropout is deqcore.VariationalDropout

        import torchdeq.cli  # one that nothing had imported
        assert torchdeq.cli is sys.modules["deqcore.cli"]

        def mine(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None):
            return func(x0), [], {}
        torchdeq.register_solver("mine", mine)
        assert deqcore.get_solver("mine") is mine
        assert isinstance(torchdeq.get_deq("mine"), deqcore.DEQ)

        for missing in ("torchdeq.nothing", "torchdeq.solver.nothing"):
            try:
                __import__(missing)
            except ModuleNotFoundError as error:
                assert missing in str(error) or "not a package" in str(error), error
            else:
                raise SystemExit(missing)
        try:
            import torchdeq.registry  # would put the module where the registry is
        except ModuleNotFoundError:
            assert isinstance(deqcore.registry, deqcore.Registry)
        else:
            raise SystemExit("torchdeq.registry")
        print("shared")
        """
    )
    assert out.strip() == "shared"


# ---- threads


SLOW = """
import time
import counted_imports
counted_imports.count += 1
time.sleep(0.1)
from deqcore import Solver, SolverSettings, hookimpl

@hookimpl
def deqcore_solver():
    time.sleep(0.02)
    class Fresh(Solver[SolverSettings]): pass   # another class at every call
    return Fresh
"""


def in_threads(work, count=8):
    """Run `work` in several threads at once; returns what they returned, errors included."""
    results, barrier = [], threading.Barrier(count)

    def call():
        barrier.wait()
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    return results


def test_threads_that_load_one_plugin_at_once(site):
    site.install(
        "acme", {"acme_slow": SLOW, "counted_imports": "count = 0"}, {"deqcore.solvers": {"slow": "acme_slow"}}
    )
    found = in_threads(lambda: registry.get("solvers", "slow"))
    assert len(set(map(id, found))) == 1 and issubclass(found[0], Solver)
    assert sys.modules["counted_imports"].count == 1


def test_threads_that_meet_a_broken_plugin_at_once(site):
    site.solver("acme", "bad", "acme_bad", "import time; time.sleep(0.05)\n" + BROKEN_MODULES["misspelt"])
    found = in_threads(lambda: registry.get("solvers", "bad"))
    assert {type(error) for error in found} == {BrokenPluginError}
    assert len({str(error) for error in found}) == 1


def test_a_plugin_that_uses_the_registry_while_it_is_imported(site):
    """One thread imports the module, another asks the registry for it: neither may wait for the other for ever."""
    source = "import time; time.sleep(0.1)\nfrom deqcore import registry\nregistry.get('solvers', 'broyden')\n" + SOLVER
    site.solver("acme", "user", "acme_user", source)
    turn = iter(range(8))
    found = in_threads(lambda: registry.get("solvers", "user") if next(turn) % 2 else __import__("acme_user"))
    assert len(found) == 8 and not [one for one in found if isinstance(one, BaseException)]


# ---- the examples in the hook specifications


def example_of(kind):
    """The code in the docstring of the hook of `kind`."""
    import inspect

    from deqcore import hookspecs

    text = inspect.getdoc(getattr(hookspecs, KINDS[kind].hook)) or ""
    assert text.count("::\n") == 1
    return "\n".join(line.removeprefix("    ") for line in text.split("::\n")[1].splitlines())


@pytest.fixture
def example(site, request):
    kind = request.param
    site.install(
        "acme-example", {f"example_{kind}": example_of(kind)}, {f"deqcore.{kind}": {"example": f"example_{kind}"}}
    )
    found = registry.get(kind, "example")
    assert registry.state_of(registry.find(kind, "example")) == ("ok", "")
    assert registry.manager.get_name(sys.modules[f"example_{kind}"]) == f"{kind}:example@acme-example"
    return found


@pytest.mark.parametrize("example", ["solvers"], indirect=True)
def test_example_solver(example):
    f, z0, exact = linear_map()
    deq = get_deq(solver={"name": "example", "max_iter": 100, "tol": 1e-10}).eval()
    z_out, info = deq(f, z0)
    assert type(deq.solver) is example
    torch.testing.assert_close(z_out[-1], exact, atol=1e-8, rtol=0)
    assert 1 < info["nfe"] < 101


@pytest.mark.parametrize("example", ["linear_solvers"], indirect=True)
def test_example_linear_solver(example):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    a = 0.4 * a / torch.linalg.matrix_norm(a, 2)
    b = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    problem = deqcore.LinearProblem(lambda u: u @ a.mT, lambda u: u @ a, b)
    found = deqcore.iterate(example(max_iter=100, tol=1e-12), problem, b)
    exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - a, b.mT).mT
    torch.testing.assert_close(found.solution["z"], exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("example", ["gradients"], indirect=True)
def test_example_gradient(example):
    deq = get_deq(solver={"name": "anderson", "tol": 1e-12}, gradient="example")
    assert type(deq.gradients[-1]) is example
    x = torch.full((2, 3), 0.3, dtype=torch.float64, requires_grad=True)
    z_out, _ = deq(lambda z: 0.5 * z + x, torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(z_out[-1], torch.full_like(x, 0.6), atol=1e-9, rtol=0)
    z_out[-1].sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))  # one step of f; the whole gradient is 2


@pytest.mark.parametrize("example", ["cores"], indirect=True)
def test_example_core(example):
    deq = get_deq(core="example", f_tol=1e-12, ift=True)
    assert type(deq.core) is example
    x = torch.full((2, 3), 0.3, dtype=torch.float64, requires_grad=True)
    z_out, _ = deq(lambda z: 0.5 * z + x, torch.zeros(2, 3, dtype=torch.float64))
    assert len(z_out) == 1
    z_out[-1].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("example", ["norms"], indirect=True)
def test_example_norm(example):
    assert issubclass(example, deqcore.Norm)
    layer = torch.nn.Linear(3, 4, dtype=torch.float64)
    before = layer.weight.detach().clone()
    deqcore.apply_norm(layer, "example")
    torch.testing.assert_close(layer.weight, before / (1 + before.norm()))
    assert torch.nn.utils.parametrize.is_parametrized(layer, "weight")


@pytest.mark.parametrize("example", ["regularizers"], indirect=True)
def test_example_regularizer(example):
    deq = get_deq("anderson", regularizers=[{"name": "example", "weight": 0.5}], f_tol=1e-10)
    x = torch.full((2, 3), 0.3, requires_grad=True)
    _, info = deq(lambda z: 0.5 * z + x, torch.zeros(2, 3))
    torch.testing.assert_close(info["regularizers"]["example"], torch.tensor(0.36))
    torch.testing.assert_close(info["regularization"], torch.tensor(0.18))
    info["regularization"].backward()
    assert x.grad is not None and bool((x.grad > 0).all())


@pytest.mark.parametrize("example", ["models"], indirect=True)
def test_example_model(example):
    assert isinstance(example(), torch.nn.Module)


@pytest.mark.parametrize("example", ["commands"], indirect=True)
def test_example_command(example, capsys):
    example()
    example("reader")
    assert capsys.readouterr().out == "hello world\nhello reader\n"


def test_every_kind_has_an_example():
    for kind in KINDS:
        compile(example_of(kind), kind, "exec")
        assert f"def {KINDS[kind].hook}()" in example_of(kind)


def test_import_warnings_of_a_plugin_pass_through(site):
    site.solver("acme", "old", "acme_old", "import warnings\nwarnings.warn('old', DeprecationWarning)\n" + SOLVER)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        registry.get("solvers", "old")
    assert [str(one.message) for one in seen] == ["old"]
