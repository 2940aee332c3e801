"""What every member's tests share."""

from hypothesis import settings

# A timed assertion fails on a busy machine: tests judge numbers, benchmarks judge time.
settings.register_profile("regrad", deadline=None)
settings.load_profile("regrad")
