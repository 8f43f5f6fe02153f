"""Sketches -> G-Vendi: the score of a matrix of rows, the mergeable state, the jackknife and what is left without
the mean of the rows, in one place.

`score`, `score_K`, `score_X` and `score_dual` take the arguments that users of `vendi-score` know, so that
`from gvendi_fast import vendi` can replace `from vendi_score import vendi`.
"""

from __future__ import annotations

from gvendi_fast.vendi.between_sources import Decomposition, Source, between_source
from gvendi_fast.vendi.centered import Centered, RowMean, centered, centered_blocks, equal_mean
from gvendi_fast.vendi.diagnosis import Diagnosis, diagnose
from gvendi_fast.vendi.growth import Growth, growth
from gvendi_fast.vendi.jackknife import Interval, jackknife, leave_one_out
from gvendi_fast.vendi.of_rows import gvendi
from gvendi_fast.vendi.similarity import score, score_dual, score_K, score_X
from gvendi_fast.vendi.state import VendiState
from gvendi_fast.vendi.unlimited_k import UnlimitedK, unlimited_k

__all__ = [
    "Centered",
    "Decomposition",
    "Diagnosis",
    "Growth",
    "Interval",
    "RowMean",
    "Source",
    "UnlimitedK",
    "VendiState",
    "between_source",
    "centered",
    "centered_blocks",
    "diagnose",
    "equal_mean",
    "growth",
    "gvendi",
    "jackknife",
    "leave_one_out",
    "score",
    "score_K",
    "score_X",
    "score_dual",
    "unlimited_k",
]
