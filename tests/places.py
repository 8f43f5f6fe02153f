"""Where things lie in the repository."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PACKAGE = ROOT / "gvendi_fast"
BENCHMARKS = ROOT / "benchmarks"
# Results of earlier code that must not change.
GOLDEN = TESTS / "golden"
