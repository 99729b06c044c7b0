"""Threads that load plugins at the same time."""

from __future__ import annotations

import sys
import threading

from plugins_support import SOLVER

from deqcore import (
    BrokenPluginError,
    Solver,
    registry,
)

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
    site.solver(
        "acme",
        "bad",
        "acme_bad",
        "import time; time.sleep(0.05)\n" + SOLVER.replace("def deqcore_solver", "def deqcore_slover"),
    )
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
