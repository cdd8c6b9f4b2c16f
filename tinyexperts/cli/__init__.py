"""The command line."""

from tinyexperts.cli.parser import main

__all__ = ["main"]
