"""Settings of every test: Hypothesis profiles, quiet backends, and guarded memory for op tests."""

import os
import signal

import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the fuzz tests skip themselves
    settings = None

if settings is not None:
    _common = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    # every drawn test takes its number of examples from here: `make test-slow` asks for "ci"
    settings.register_profile("quick", max_examples=25, derandomize=True, **_common)
    settings.register_profile("ci", max_examples=200, derandomize=True, **_common)
    settings.register_profile("nightly", max_examples=5000, **_common)
    settings.load_profile(os.environ.get("AST_FAST_HYPOTHESIS", "quick"))

# a shell starts background jobs with Ctrl-C ignored, and the commands under test would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def unchanged_backend_choice():
    """A test that leaves a backend chosen for the process would change every test after it."""
    from ast_fast import backend

    before = backend._global_request
    yield
    after, backend._global_request = backend._global_request, before
    assert after == before, f"the test left use_backend({after!r}) behind"


@pytest.fixture
def one_thread():
    """Results to the bit, and no contention between tests that run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def guarded():
    """Whatever ast_fast allocates in the test starts as NaN and lies between guard zones."""
    from ast_fast.testing import guarded_memory

    with guarded_memory() as zones:
        yield zones


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
