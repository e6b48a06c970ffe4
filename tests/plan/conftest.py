"""A native library that checks itself."""

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.tools.cases import ROOT


@pytest.fixture(scope="session")
def sanitized():
    """Environment in which the library checks every access, shift and sum. It is built once for each text of it."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "csrc").iterdir())))
    library = Path(tempfile.gettempdir()) / f"hpcloss-sanitized-{digest.hexdigest()[:16]}.so"
    flags = "-std=c++17 -O1 -g -ffp-contract=off -fPIC -shared -pthread -fsanitize=address,undefined".split()
    flags += ["-DHPCLOSS_ONE_TARGET"]  # the loader would choose among several before the sanitizers have begun
    sources = sorted((ROOT / "csrc").glob("*.cpp"))
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", *flags, "-fno-sanitize-recover=all", *sources, "-o", made], check=True)
        made.rename(library)  # whole or not at all: test processes share it
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(name).is_absolute() for name in runtime):
        pytest.skip("no runtime of the sanitizers")
    python = {"PYTHONPATH": str(ROOT), "PYTHONMALLOC": "malloc"}
    options = {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": " ".join(runtime), "HPCLOSS_LIBRARY": str(library)}
    return os.environ | python | options
