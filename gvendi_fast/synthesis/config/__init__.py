"""The configuration of a synthesis run."""
