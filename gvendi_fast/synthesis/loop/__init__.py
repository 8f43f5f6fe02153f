"""Propose, sketch, judge, accept, repeat."""
