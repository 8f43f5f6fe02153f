"""Choosing the most diverse rows of a pool: `select`, its objectives and its methods."""

from gvendi_fast.selection.problem import equal_quotas
from gvendi_fast.selection.selection import METHODS, Selection, select

__all__ = ["METHODS", "Selection", "equal_quotas", "select"]
