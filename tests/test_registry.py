"""The index: what is installed is listed without being imported, and found by name."""

from __future__ import annotations

import sys

import pytest
from plugins_support import BUILTINS, EXPLODES, SOLVER, Point

import deqcore
from deqcore import (
    BrokenPluginError,
    ConfigError,
    ConfigTypeError,
    CoreSettings,
    Solver,
    SolverSettings,
    UnknownPluginError,
    get_deq,
    registry,
)
from deqcore.registry import kind_of

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
    for kind, names in BUILTINS.items():
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
    assert "Installed: aitken, anderson, auto, broyden" in text
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
