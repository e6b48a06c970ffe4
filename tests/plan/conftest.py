"""A native library that checks itself."""

import os
import subprocess
from pathlib import Path

import pytest
from tests.tools.cases import ROOT


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Environment in which the library checks every access, shift and sum."""
    library = tmp_path_factory.mktemp("sanitized") / "libhpcloss.so"
    flags = "-std=c++17 -O1 -g -ffp-contract=off -fPIC -shared -pthread -fsanitize=address,undefined".split()
    sources = sorted((ROOT / "csrc").glob("*.cpp"))
    subprocess.run(["g++", *flags, "-fno-sanitize-recover=all", *sources, "-o", library], check=True)
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(name).is_absolute() for name in runtime):
        pytest.skip("no runtime of the sanitizers")
    python = {"PYTHONPATH": str(ROOT), "PYTHONMALLOC": "malloc"}
    options = {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": " ".join(runtime), "HPCLOSS_LIBRARY": str(library)}
    return os.environ | python | options
