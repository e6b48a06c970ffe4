"""Kernels of the acceptance run that are compiled beforehand and carried to another machine."""

import re

import pytest

from benchmarks.gpu import cache
from tests.tools.gpu_run import document_of, needs_cc, run
from tests.tools.kernels import compile_or_skip


@needs_cc
@pytest.mark.parametrize("capability", [90])
def test_prepared_kernels_are_found_in_another_place(tmp_path, capability):
    """The copy holds machine code and its description alone. A second process builds nothing, in a folder elsewhere;
    without the keys of a carried cache it builds all of them."""
    compile_or_skip()
    out, only = tmp_path / "prepared", ["--only", "pack, channels last"]
    done = run("--capability", capability, "--out", out, *only, module="benchmarks.gpu.prepare")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    compiled, loaded = map(int, re.search(r"(\d+) kernels compiled, (\d+) loaded", done.stdout).groups())
    assert compiled == 0 and loaded >= 2
    assert {path.suffix for path in out.rglob("*") if path.is_file()} == {".cubin", ".json"}
    manifest = cache.unpack(out, tmp_path / "elsewhere")
    assert manifest["capability"] == capability and manifest["kernels"] == loaded
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "elsewhere")}
    for carried, built in (("1", 0), ("", loaded)):
        done = run(
            "--stand-in", capability, "--full-size", *only, "--out", tmp_path / "again",
            **environment, **{cache.CARRIED: carried},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert document_of(tmp_path / "again")["kernels"]["bars"]["compiled"] == built
