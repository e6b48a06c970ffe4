"""The tests of the C++ library's arguments and errors over a native library that checks itself."""

import importlib.util
import shutil
import subprocess
import sys

import pytest

from tests.tools.cases import ROOT

needs_gnu = pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux")


# ---------------------------------------------------------------------------- sanitizers


@needs_gnu
@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="needs pytest-xdist to switch it off")
def test_sanitizers_have_nothing_to_say(sanitized):
    """The tests of arguments and errors, over a library that checks itself."""
    files = ["tests/plan/test_native.py", "tests/plan/test_native_floats.py"]
    chosen = "(native and not cuda and not torch) and not sanitizers and not forked and not emulated and not library"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files, "-k", chosen]
    done = subprocess.run(command, env=sanitized, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
