"""The command line: flags, one file per command, and what a shell completes."""
