"""A native library that checks itself sees an overrun."""

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
