"""What tests of the files share."""

import pytest
from small_runs import make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{is of an earlier version: a run directory}."""
    return {is_old: make_run(tmp_path_factory.mktemp("run") / "run", is_old) for is_old in (False, True)}
