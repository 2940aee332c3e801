"""From the runs of a comparison to one honest verdict per arm."""
