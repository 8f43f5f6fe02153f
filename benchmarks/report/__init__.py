"""Results into tables and the record of faster backends: `python -m benchmarks.report`."""
