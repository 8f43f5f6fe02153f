"""The `gvendi` commands on sketches that are there already, one file each."""
