"""Files to rows, to work units, to the parts of a run directory, to a pool."""
