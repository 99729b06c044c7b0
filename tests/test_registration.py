"""What a program registers for itself, how it is undone, and one registry under two names."""

from __future__ import annotations

import os
import pickle
import sys

import pytest
import torch
from plugins_support import ALLOW, DISABLE, Halfway, function_solver, linear_map, run_python

from deqcore import (
    ConfigError,
    ConfigTypeError,
    Core,
    CoreSettings,
    PluginClashError,
    PluginDisabledError,
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


def test_register_a_class():
    with registry.scope():
        assert register_solver("mine", Halfway) is Halfway
        entry = registry.find("solvers", "mine")
        assert entry.origin == "local:plugins_support" and entry.version == "" and not entry.builtin
        assert registry.state_of(entry) == ("ok", "")
        assert type(get_deq("mine").solver) is Halfway
        assert registry.get("solvers", "local:plugins_support/mine") is Halfway
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
    with pytest.raises(PluginClashError, match="local:plugins_support"):
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
        for pattern in ("solvers:mine", "local:plugins_support/*", "local:*/mine"):
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
