"""How many hostile cases are generated, and the counting of those that ran to their end."""

import functools
import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from regrad import distributions
from regrad_runner.cli.main import main
from regrad_runner.errors import BadInput, checking_input
from regrad_runner.settings.loading import read_settings

TIMES, COUNTS = "REGRAD_HOSTILE_TIMES", "REGRAD_HOSTILE_COUNTS"
offers = distributions.offers


@functools.cache
def offered(group):
    """Return what is installed: read anew by every case it would take most of the time."""
    return list(offers(group))


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


class Accepted(Exception):  # noqa: N818 - nothing is wrong
    """Raised in the place of a training: what was asked for is fit."""


def hostile(number, *strategies, **named):
    """Run a test on `number` generated cases, always the same; on TIMES as many new ones where that is set.

    Each case that ran to its end is a line of the file COUNTS, where that is set.
    """
    times = int(os.environ.get(TIMES, "1"))
    amount = {
        "max_examples": number * times,
        "derandomize": times == 1,
        "database": None,
        "deadline": None,
    }

    def decorate(test):
        @pytest.mark.timeout(900 * times)
        @settings(**amount, print_blob=True, suppress_health_check=CHECKS)
        @given(*strategies, **named)
        @functools.wraps(test)
        def counted(*args, **kwargs):
            with mock.patch.object(distributions, "offers", offered):
                test(*args, **kwargs)
            if COUNTS in os.environ:
                with Path(os.environ[COUNTS]).open("a", encoding="utf-8") as file:
                    file.write(f"{test.__name__}\n")

        return counted

    return decorate


def outcome(action):
    """Return what an action returns and None, or None and what it says against its input."""
    try:
        with checking_input():
            return action(), None
    except BadInput as problem:
        return None, str(problem)


def settings_in(file):
    """Return what a file of settings says."""
    return read_settings(file)


def is_clear(message):
    """Say whether a message is one line of a length that a person reads."""
    return 0 < len(message) <= 2000 and "\n" not in message


def command(*words):
    """Run the command; return its exit code, None where it would have trained, and what went to stdout and stderr."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(list(words))
        except Accepted:
            code = None
    return code, out.getvalue(), err.getvalue()
