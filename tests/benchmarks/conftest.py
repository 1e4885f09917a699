"""The benchmarks are not installed: their folder's parent goes to the end of the search path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT
