"""What `make wheel` made, run by the Python that it is installed in: the file, and that nothing had to compile."""

import os
import re
import shutil
import zipfile
from pathlib import Path

import hpcloss

ROOT = Path(__file__).parents[2]
MOST_BYTES = 10e6
CUDA = os.environ.get("HPCLOSS_CUDA") == "1"


def test_the_file():
    (wheel,) = (ROOT / "dist").glob("*.whl")
    assert re.fullmatch(rf"hpcloss-{hpcloss.__version__}-py3-none-(manylinux|macosx)_\d+_\d+_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < MOST_BYTES
    report = zipfile.ZipFile(wheel).read("hpcloss/libhpcloss.txt").decode()
    assert re.match(r"C\+\+: built with .+\nCUDA: " + ("nvcc" if CUDA else ""), report), report


def test_the_installation_needs_no_compiler():
    assert not [name for name in ("nvcc", "c++", "g++", "cc", "clang++") if shutil.which(name)]
    assert not Path(hpcloss.__file__).is_relative_to(ROOT / "hpcloss")
    native = dict(line.split(": ", 1) for line in hpcloss.info().splitlines() if line.startswith("native library"))
    assert native["native library"] == "available"
    # Where there is no GPU, CUDA's own library says so.
    there = ("available", "not available, there is no CUDA driver")
    assert not CUDA or native["native library, CUDA"] in there, native
