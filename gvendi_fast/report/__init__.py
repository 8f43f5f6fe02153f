"""The report of a run: a page, its data, numbers and figures."""
