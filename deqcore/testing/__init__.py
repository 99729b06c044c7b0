"""What authors of implementations test with: problems with exact answers, solves at random, and a measure of memory."""

from __future__ import annotations

from .memory import peak_bytes, states_beyond
from .problems import PROBLEMS, ExactProblem, exact_problem, exact_problems, newton_answer
from .random_solves import Outcome, RandomCase, installed, random_case, random_cases

__all__ = [
    "PROBLEMS",
    "ExactProblem",
    "Outcome",
    "RandomCase",
    "exact_problem",
    "exact_problems",
    "installed",
    "newton_answer",
    "peak_bytes",
    "random_case",
    "random_cases",
    "states_beyond",
]
