"""The command line: arguments in, one call out. Everything heavy is imported inside the command that needs it."""

from prefopt.cli.app import main

__all__ = ["main"]
