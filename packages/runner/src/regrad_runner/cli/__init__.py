"""The command line: flags, one file per command, and what a shell completes.

`regrad_runner.cli.main(arguments)` runs a command in this process and returns its exit code.
"""

from regrad_runner.cli.main import main

__all__ = ["main"]
