"""A native library that checks itself: it sees an overrun, and the tests of partitions make none."""

import importlib.util
import shutil
import subprocess
import sys

import pytest

from tests.tools.cases import ROOT

needs_gnu = pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux")


# ---------------------------------------------------------------------------- sanitizers

OVERRUN = """
import ctypes, torch
from hpcloss.plan import native
labels = (ctypes.c_int64 * 1000)()
lying = torch.zeros(0, dtype=torch.int64)
lying.data_ptr, lying.numel = lambda: ctypes.addressof(labels), lambda: 5000
native.class_sort(lying, None, [], [], False, 1, range(2), None, [], torch.int32)
"""


@needs_gnu
def test_sanitizers_see_an_overrun(sanitized):
    done = subprocess.run([sys.executable, "-c", OVERRUN], env=sanitized, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]


@needs_gnu
@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="needs pytest-xdist to switch it off")
def test_sanitizers_have_nothing_to_say(sanitized):
    """The tests of the partition, over a library that checks itself."""
    files = ["tests/plan/test_partition.py"]
    chosen = "(native and not cuda and not torch) and not sanitizers and not forked and not emulated and not library"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files, "-k", chosen]
    done = subprocess.run(command, env=sanitized, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
