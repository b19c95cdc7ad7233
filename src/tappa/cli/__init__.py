"""The command line: parse, call, print. A file for each group of commands."""

from tappa.cli.app import app, main

__all__ = ["app", "main"]
