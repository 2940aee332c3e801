"""What pytest must not import by itself."""

# Its suites put it among the installed distributions of the process that imports them.
collect_ignore = ["own_engine"]
