"""What the front-end tests share: each backend of a CPU."""

import pytest

from ast_fast import cpp


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    """The name of a backend; without the extension its turn is skipped."""
    if request.param == "cpp" and not cpp.available():
        pytest.skip(cpp.why_unavailable())
    return request.param
