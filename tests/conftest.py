"""Fixtures shared by all rooms' tests."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the real text sets and the small trained model; not part of the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the shared data folder beside the repository, which a plain clone does not have")
    return SHARED / "data"
