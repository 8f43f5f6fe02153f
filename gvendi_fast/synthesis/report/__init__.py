"""The report of a synthesis run."""
