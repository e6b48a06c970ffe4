"""Seconds: when each stage ends at the latest, so that all of them end within the limit of the whole run."""

from __future__ import annotations

from typing import NamedTuple

LIMIT = 570.0  # a command of 600 s, and what starts and ends it
SMOKE = 120.0  # expected: 20; more where all kernels are compiled
TESTS, SANITIZER = 150.0, 50.0
CLOSING = 5.0  # to kill, to read and to write
FEWEST = 5.0  # with less than this no row, and with three times this no other stage begins
ROW = 100.0  # after these a row is given up
ONE_TEST = 60.0  # a test that runs longer when it is stopped has failed


class Ends(NamedTuple):
    """Seconds from the start of the run."""

    smoke: float
    bars: float
    tests: float
    sanitizer: float


def ends(limit: float, tests: bool = True, sanitizer: bool = True) -> Ends:
    """Tests and sanitizer have seconds kept for them, at most a share of the limit; what is not used goes to them."""
    last = limit - min(CLOSING, 0.05 * limit)
    of_sanitizer = min(SANITIZER, 0.1 * limit) if sanitizer else 0.0
    of_tests = min(TESTS, 0.3 * limit) if tests else 0.0
    bars = last - of_sanitizer - of_tests
    return Ends(min(SMOKE, bars), bars, last - of_sanitizer, last)
