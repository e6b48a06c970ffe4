"""The acceptance run in Triton's interpreter: every row that can run without a GPU does."""

import shutil

from benchmarks.gpu import supervisor
from tests.tools.gpu_run import ROOT, document_of, listed, needs_interpreter, run


@needs_interpreter
def test_every_row_is_interpreted(tmp_path):
    """`--dry`: every row that can run without a GPU does, and the others say why not."""
    done = run("--dry", "--quick", "--out", tmp_path, seconds=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    text = (tmp_path / "gpu.txt").read_text()
    assert done.stdout.rstrip().endswith(text.rstrip()) and text.startswith("NO MEASUREMENT: Triton's interpreter")
    document = document_of(tmp_path)
    assert document["tests"]["status"] == "ok" and document["tests"]["passed"] > 0
    assert all(rate > 0 for rate in document["ceilings"].values())
    rows = {row["name"]: row for row in document["rows"]}
    assert {*supervisor.STAGES, *rows} == listed()
    for name, row in rows.items():
        assert row["status"] in ("ok", "skipped"), (name, row)
        assert row["status"] == "ok" or row["message"], name
    measured = [row for row in rows.values() if "flops" in row]
    assert len(measured) >= 15
    for row in measured:
        assert all(row[key] > 0 for key in ("n", "dim", "flops", "forward_ms", "backward_ms", "ms", "share")), row
        assert {"dtype", "peak_bytes"} <= set(row) or row["name"].startswith("pair_"), row
    for row in rows.values():
        for bar in row.get("bars", ()):
            assert set(bar) == {"bar", "ratio", "met"}
        if "error_gradient" in row:
            assert row["error_gradient"] <= row["allowed_error"] and row["error_value"] <= row["allowed_error"]
    smoke = {row["name"]: row for row in document["smoke"]}
    assert len(smoke) == 11 and smoke["native library"]["status"] == "skipped"
    assert all(max(row["errors"]) <= row["allowed_error"] for row in smoke.values() if row["status"] == "ok")


@needs_interpreter
def test_some_rows_are_interpreted(tmp_path):
    done = run("--dry", "--only", "partition", "--only", "pack, ", "--out", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    rows = {row["name"]: row for row in document_of(tmp_path)["rows"]}
    chosen = {name for name in listed() if "partition" in name or "pack, " in name}
    assert set(rows) == chosen | {"ceilings"} and len(chosen) >= 6
    assert rows["pack, channels first"]["error_value"] > 0
    assert not {"tests", "smoke", "sanitizer"} & set(document_of(tmp_path))


def copied(folder, path, old, new):
    """The sources with one mistake."""
    for name in ("hpcloss", "benchmarks", "tests", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "results", "__pycache__"))
    text = (folder / path).read_text()
    assert text.count(old) == 1
    (folder / path).write_text(text.replace(old, new))
    return folder


@needs_interpreter
def test_a_smoke_test_that_fails_ends_the_run(tmp_path):
    """At once, with its trace, and with an exit status; nothing else is begun."""
    root = copied(
        tmp_path / "sources", "hpcloss/backends/triton/rows.py",
        "        x *= tl.expand_dims(inverse, C)\n", "        x *= tl.expand_dims(1.05 * inverse, C)\n",
    )  # fmt: skip
    done = run("--dry", "--out", tmp_path / "out", root=root, seconds=150)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" in done.stdout and "AssertionError: relative errors" in done.stdout
    document = document_of(tmp_path / "out")
    assert [row["status"] for row in document["smoke"]] == ["skipped", "error"]  # no device for the library
    assert document["rows"] == [] and not {"tests", "sanitizer"} & set(document)
