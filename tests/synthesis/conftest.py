"""Fixtures shared by the tests of the synthesis loop."""

import pytest

from gvendi_fast.synthesis.report import page


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures, which take more time than a small run, for tests of all else."""
    for name in ("growth_figure", "acceptance_figure", "clusters_figure"):
        monkeypatch.setattr(page.figures, name, lambda data: {"wide": "", "narrow": ""})
