"""From a corpus' files to rows, work units, the parts of a run directory and a pool of sketches."""
