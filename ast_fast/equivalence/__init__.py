"""Proof on the user's machine: error budgets, equivalence runs, and the monitor for training."""

from .budgets import FLOORS, Budget, budget, precision_of
from .measures import Errors, measure
from .monitor import EquivalenceError, EquivalenceMonitor, MonitorRow
from .report import Report, Row
from .run import check_equivalence, run_verify

__all__ = [
    "FLOORS",
    "Budget",
    "EquivalenceError",
    "EquivalenceMonitor",
    "Errors",
    "MonitorRow",
    "Report",
    "Row",
    "budget",
    "check_equivalence",
    "measure",
    "precision_of",
    "run_verify",
]
