"""Checks of candidates, in processes that can be ended."""
