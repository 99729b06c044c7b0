"""Solves drawn at random: what is called converged is, and nothing but deqcore's own errors comes out.

RANDOM_SOLVES=10000 in the environment runs that many cases; `python -m benchmarks random` does too, with a table.
"""

from __future__ import annotations

import math
import os
from collections import Counter

import pytest
import torch

from deqcore import Status, registry
from deqcore.report import Report
from deqcore.testing import RandomCase, installed, random_case

SOLVERS = installed("solvers")
CASES = int(os.environ.get("RANDOM_SOLVES", "500"))


@pytest.mark.parametrize("solver", SOLVERS)
def test_converged_is_true_and_errors_are_typed(solver):
    wrong = []
    for seed in range(math.ceil(CASES / len(SOLVERS))):
        found = random_case(seed, solver).run().violations
        if found:
            wrong.append(f"random_case({seed}, {solver!r}).run(): {'; '.join(found)}")
    assert not wrong, "\n".join(wrong)


def test_every_builtin_solver_is_drawn():
    assert {entry.name for entry in registry.entries("solvers") if entry.builtin} <= set(SOLVERS)


def test_cases_are_what_they_were():
    assert random_case(3, "anderson") == random_case(3, "anderson")
    assert len({repr(random_case(seed, "anderson")) for seed in range(50)}) == 50


def test_cases_reach_every_end():
    """All statuses, dtypes and layouts occur, and few cases are refused."""
    statuses, refused, cases = Counter(), 0, [random_case(seed, "anderson") for seed in range(300)]
    for case in cases:
        outcome = case.run()
        statuses.update(outcome.statuses)
        refused += outcome.refused.startswith("ConfigError")
    assert set(statuses) == set(Status)
    assert refused < 30
    assert len({case.dtype for case in cases}) == 6 and len({case.layout for case in cases}) == 4
    assert statuses[Status.CONVERGED] > 500


def plain(**changed) -> RandomCase:
    given = {
        **{"seed": 0, "solver": {"name": "fixed_point_iter", "tol": 1e-6, "max_iter": 5}, "kind": "linear"},
        **{"config": {"batch_dims": 1, "on_failure": "ignore"}, "layout": "flat", "batch": 3, "features": 4},
        **{"dtype": torch.float64, "row": 1, "faults": (), "since": None, "value": math.nan, "start": 1.0},
        **{"again": False, **changed},
    }
    return RandomCase(**given)


def test_a_false_claim_is_found(monkeypatch):
    assert plain().run().violations == []
    monkeypatch.setattr(Report, "status", lambda self: torch.zeros(self.batch, dtype=torch.int64))
    assert "is called converged" in plain().run().violations[0]


def test_an_error_of_another_kind_is_found(monkeypatch):
    def fail(self, *given):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(Report, "solution", fail)
    assert plain().run().violations == ["raised ZeroDivisionError: on purpose"]


def test_faults_hit_their_sample_only():
    case = plain(faults=(1,), layout="tuple")
    fn, z0, x = case.pose()
    faulty, numbers = case.faulty(fn), torch.arange(3)
    clean = faulty(*z0, x, numbers)
    spoilt = faulty(*z0, x, numbers)
    for good, bad in zip(clean, spoilt, strict=True):
        assert torch.equal(good[[0, 2]], bad[[0, 2]]) and bad[1].isnan().all()
