"""The acceptance run in a process of its own, and the document that it leaves."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_interpreter = pytest.mark.skipif(
    not HAS_TRITON or importlib.util.find_spec("numpy") is None, reason="needs Triton, and numpy for its interpreter"
)
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def run(*arguments, seconds=300, root=ROOT, module="benchmarks.gpu", **environment):
    """The command in a process of its own: its exit status, what it printed, and where it says so its document."""
    around = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "HPCLOSS_MACHINE")}
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], cwd=root, capture_output=True, text=True,
        timeout=seconds, env=around | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def document_of(folder):
    return json.loads((folder / "gpu.json").read_text())


def keys(value):
    """Every key in a document, at any depth."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys(inner)


def listed():
    return set(run("--list", "--dry").stdout.split("\n")) - {""}
