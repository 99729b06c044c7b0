"""Solves drawn at random: whether what is called converged is, and what else comes out."""

from __future__ import annotations

from collections import Counter

from deqcore import Status
from deqcore.testing import RandomCase, installed, random_cases

from .options import Options
from .report import Table

__all__ = ["INTRO", "run"]

QUICK = 500
INTRO = (
    "Maps, states, settings, NaN and inf drawn at random (deqcore/testing/random_solves.py); each sample that is "
    "called converged is evaluated once more. `deqcore.testing.random_case(number, solver).run()` repeats a case."
)


def run(options: Options) -> list[Table]:
    """The tables; `quick` draws few cases."""
    names = installed("solvers")
    statuses: dict[str, Counter[Status]] = {name: Counter() for name in names}
    refused: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    wrong: list[tuple[RandomCase, str]] = []
    for case in random_cases(QUICK if options.quick else options.cases, names):
        name, outcome = case.solver["name"], case.run()
        drawn[name] += 1
        statuses[name].update(outcome.statuses)
        refused[name] += outcome.refused.startswith("ConfigError")
        wrong += [(case, violation) for violation in outcome.violations]
    table = Table(
        f"{sum(drawn.values())} cases",
        ("solver", "cases", "refused", *(status.name.lower() for status in Status), "violations"),
        notes="Samples by how they ended. Refused: settings that contradict each other, or a map that the solver does "
        "not take. Violations: a false `converged`, a state that is not finite, an error that is not deqcore's, a "
        "warning, a changed z0.",
    )
    for name in names:
        violations = sum(case.solver["name"] == name for case, _ in wrong)
        table.add(name, drawn[name], refused[name], *(statuses[name][status] for status in Status), violations)
    if not wrong:
        return [table]
    listing = Table("Violations", ("case", "what", "details"))
    for case, violation in wrong:
        listing.add(f"random_case({case.seed}, {case.solver['name']!r})", violation, repr(case))
    return [table, listing]
