"""The command line."""

from tinyexperts.cli.entry_point import main

__all__ = ["main"]
