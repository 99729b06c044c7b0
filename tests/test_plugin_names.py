"""Who a name belongs to, and what the environment switches off."""

from __future__ import annotations

import sys

import pytest
import torch
from plugins_support import ALLOW, DISABLE, EXPLODES, linear_map

from deqcore import (
    ConfigError,
    PluginClashError,
    PluginDisabledError,
    PluginWarning,
    get_deq,
    registry,
)

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
