"""The acceptance run without a GPU: every row launched on a stand-in for the driver, every row in the interpreter.

Also what a GPU run meets and these runs do not: a smoke test that fails, rows that hang or break their process, stages
without time, tests that are skipped. What this cannot see: times, and what only a device computes (graphs, launches
that the profiler counts, host syncs, the native library and the sanitizer on a device).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import check, interpreter, library, sanitizer, supervisor
from benchmarks.gpu import tests as stage
from tests.tools.gpu_run import ROOT, document_of, keys, listed, needs_cc, needs_interpreter, run
from tests.tools.kernels import compile_or_skip

# ---------------------------------------------------------------------------------------------------- the whole of it


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """All of a run on the stand-in, in tiny sizes."""
    compile_or_skip()
    folder = tmp_path_factory.mktemp("stand-in")
    done = run("--stand-in", 90, "--quick", "--out", folder, TRITON_CACHE_DIR=str(folder / "cache"))
    return done, folder


# Rows that launch no kernel of ours: a competitor launches ours once, to compare.
WITHOUT_KERNELS = re.compile(r"ceilings|kernels of .*|partition.*|compiled supcon.*")


@needs_cc
def test_every_row_is_launched(launched):
    done, folder = launched
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    document = document_of(folder)
    rows = {row["name"]: row for row in document["rows"]}
    assert len(rows) == len(document["rows"])
    assert {*supervisor.STAGES, *rows} == listed()
    for name, row in rows.items():
        assert row["status"] == "launched" or (row["status"] == "skipped" and row["message"]), row
        assert bool(row["launched"]) != bool(WITHOUT_KERNELS.fullmatch(name)), row
    assert len({kernel for row in rows.values() for kernel in row["launched"]}) >= 12
    assert {row["status"] for row in document["smoke"]} == {"launched", "skipped"}
    assert sum(row["status"] == "launched" and bool(row["launched"]) for row in document["smoke"]) == 5


@needs_cc
def test_what_was_launched_is_no_measurement(launched):
    """No time, error, share or bar is in the document, and the first line for people says why."""
    _, folder = launched
    document = document_of(folder)
    assert document["machine"]["kind"] == "stand-in" and "nothing is measured" in document["machine"]["notice"]
    assert (folder / "gpu.txt").read_text().startswith("NO MEASUREMENT: a stand-in for the driver")
    measured = re.compile(r"(^|_)(ms|share|errors?|peak|bars|times|ratio|met|launches)(_|$)")
    assert not [key for row in document["rows"] + document["smoke"] for key in keys(row) if measured.search(key)]
    assert document["ceilings"] == {}


@needs_cc
def test_tests_and_sanitizer_are_commands_that_can_run(launched):
    """They are not run here; each names files that are there, and pytest finds what the sanitizer is to watch."""
    _, folder = launched
    document = document_of(folder)
    assert document["tests"]["status"] == document["sanitizer"]["status"] == "not run"
    assert document["tests"]["command"] == " ".join(stage.command(stage.FILES))
    assert document["sanitizer"]["command"].startswith("compute-sanitizer --tool memcheck --error-exitcode 9 ")
    assert all((ROOT / "tests" / name).exists() for name in (*stage.FILES, *sanitizer.FILES, *stage.WITHOUT_KERNELS))
    command = [*stage.command(sanitizer.FILES, "-k", sanitizer.CHOSEN), "--collect-only", "-q"]
    environment = {name: x for name, x in stage.environment(0, 1, folder / "results").items() if x is not None}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100,
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = set(re.findall(r"\btest_\w+", done.stdout))
    assert {"test_sizes", "test_edges", "test_pair_lse_both", "test_native_is_the_same_on_the_gpu"} <= found


@pytest.mark.parametrize("value, gradient", [(2e-2, 0.0), (0.0, 2e-2), (float("nan"), 0.0), (float("inf"), 0.0)])
def test_a_row_that_is_wrong_is_no_row(value, gradient):
    assert check.judged(5e-3, 5e-3, "float16")["allowed_error"] == 1e-2
    with pytest.raises(AssertionError, match="relative error"):
        check.judged(value, gradient, "float16")


# ------------------------------------------------------------------------------------------------ what it is made with

MENDED = """
import numpy, torch, triton, triton.language as tl
from triton.runtime import interpreter
from benchmarks.gpu.interpreter import mend
def as_in_triton_3_6(tensor, *scope, patch=interpreter._patch_lang_tensor):
    patch(tensor, *scope)
    (scope[0].set_attr if scope else setattr)(tensor, "__index__", lambda self: int(self.handle.data))
interpreter._patch_lang_tensor = as_in_triton_3_6
@triton.jit
def kernel(x):
    for i in range(tl.load(x), tl.load(x + 1)):
        tl.store(x + i, i)
def launch():
    x = torch.tensor([2, 5, 0, 0, 0, 0])
    kernel[(1,)](x)
    return x.tolist()
try:
    launch()
    needed = False
except Exception as error:
    needed = "0-dimensional" in str(error)
mended = mend()
assert launch() == [2, 5, 2, 3, 4, 0], launch()
print(needed, mended, tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4))
"""


@needs_interpreter
def test_the_interpreter_of_triton_3_6_is_mended_for_newer_numpy(tmp_path):
    """Its `int(data)` of one element raises from numpy 2.4 on; older numpy needs no help and gets none."""
    (tmp_path / "mended.py").write_text(MENDED)  # the interpreter reads kernels from their file
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "mended.py")], capture_output=True, text=True, env=environment, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 1, done.stdout
    assert callable(interpreter.mend)


def flags_of_setup():
    text = (ROOT / "setup.py").read_text()
    return {
        name: re.search(rf"^{name} = (\[.*\])", text, re.M)[1] for name in ("GNU_FLAGS", "NVCC_FLAGS")
    }  # fmt: skip


def test_the_native_library_is_built_with_the_flags_of_the_package():
    flags = {name: re.findall(r'"([^"]+)"', found) for name, found in flags_of_setup().items()}
    command = library.command(Path("lib.so"), "90")
    assert set(library.FLAGS) <= set(flags["NVCC_FLAGS"]) and {"--fmad=false", "-O3", "-std=c++17"} <= set(
        library.FLAGS
    )
    assert set(library.HOST_FLAGS) - {"-fPIC"} == set(flags["GNU_FLAGS"]) - {"-std=c++17", "-O3"}
    assert "-gencode=arch=compute_90,code=sm_90" in command and "-cudart=static" in command
    assert {Path(word).name for word in command if word.startswith("csrc/")} == {
        path.name for path in (ROOT / "csrc").iterdir() if path.suffix in (".cu", ".cpp")
    }


@pytest.mark.slow
@pytest.mark.skipif(library.find_nvcc() is None, reason="no nvcc")
def test_the_native_library_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "capability", lambda: "90")
    built = library.Build(tmp_path / "libhpcloss.so").result(300.0)
    assert built["status"] == "built", built
    assert_serves(built)


BUILT = """
import json, sys
from benchmarks.gpu import smoke
from hpcloss.plan import native
class Worker:
    rows = []
    def say(self, **answer):
        self.rows += [answer["row"]] if "row" in answer else []
    def row(self, name, check, known):
        return {"name": name, "status": "ok", **check(known)}
smoke.step = lambda *_: {}
smoke.run(Worker(), json.loads(sys.argv[1]))
loaded, *_ = native._find()
print(Worker.rows[0]["name"], Worker.rows[0]["library"] == loaded._name)
"""


def assert_serves(built):
    """The smoke test takes the library that was built, and partition and sample run with it."""
    environment = {"HPCLOSS_MACHINE": "interpreter", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BUILT, json.dumps(built)], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | environment, timeout=100,
    )  # fmt: skip
    assert done.stdout.strip() == "native library True", done.stdout + done.stderr


def test_the_smoke_test_takes_the_library_that_was_built(tmp_path):
    shipped = next((ROOT / "hpcloss").glob("libhpcloss.[sd]*"), None)
    if shipped is None:
        pytest.skip("there is no native library")
    library = shutil.copy(shipped, tmp_path)
    assert_serves({"status": "built", "library": str(library), "command": "", "build_seconds": 0.0})


def test_a_library_that_does_not_build_or_a_missing_compiler_is_told(tmp_path, monkeypatch):
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho some error; exit 2\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setattr(library, "find_nvcc", lambda: str(tmp_path / "nvcc"))
    failed = library.Build(tmp_path / "lib.so").result(20.0)
    assert failed["status"] == "failed" and "some error" in failed["message"]
    (tmp_path / "nvcc").write_text("#!/bin/sh\nsleep 100\n")
    late = library.Build(tmp_path / "lib.so").result(0.5)
    assert late["status"] == "failed" and "no result in time" in late["message"]
    monkeypatch.setattr(library, "find_nvcc", lambda: None)
    missing = library.Build(tmp_path / "lib.so").result(1.0)
    assert missing["status"] == "missing" and missing["message"].startswith("NO NATIVE LIBRARY")
