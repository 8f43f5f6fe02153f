"""The command line: `gvendi`."""

from gvendi_fast.cli.app import main

__all__ = ["main"]
