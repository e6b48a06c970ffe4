"""What the Triton backend refuses, and how it says so; with the interpreter and without."""

import json
import sys
from pathlib import Path

import pytest
import torch

import hpcloss
from hpcloss import backends
from hpcloss.backends import resolve, unsupported
from tests.tools.cases import choice, rows
from tests.tools.kernels import INTERPRETED

LOSS = hpcloss.RegionPHPCLoss(2, backend="triton")
LABELS = choice([0, 1, 2], 1, 4, 4)


@pytest.fixture
def fresh():
    """What was found out about the devices is forgotten before and after."""
    backends.forget()
    yield
    backends.forget()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_cpu_without_the_interpreter():
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run this call: .*'cpu'.*TRITON_INTERPRET=1"):
        LOSS(rows(1, 3, 4, 4, dtype=torch.float32), LABELS)


def test_float64():
    with pytest.raises(NotImplementedError, match="float64 needs backend 'blockwise'"):
        LOSS(rows(1, 3, 4, 4), LABELS)


def test_channels():
    with pytest.raises(NotImplementedError, match="at most 512 channels fit its tiles, got 513"):
        LOSS(torch.zeros(1, 513, 4, 4), LABELS)
    assert not any("channels" in reason for reason in unsupported("triton", torch.zeros(1, 512)))


def test_rows():
    # A zero-stride view: no memory.
    too_many = torch.zeros(1, 1).expand(2**31, 1)
    assert any("at most 2^31 - 1 rows fit its row numbers" in reason for reason in unsupported("triton", too_many))


def test_all_reasons_at_once():
    with pytest.raises(NotImplementedError, match="float64 needs .*; at most 512 channels"):
        resolve("triton", torch.zeros(1, 600, dtype=torch.float64))


def test_without_triton(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(NotImplementedError, match="Triton is not installed .pip install triton."):
        LOSS(rows(1, 3, 4, 4, dtype=torch.float32), LABELS)
    assert "backend triton: not available, Triton is not installed" in hpcloss.info()
    assert resolve("auto", torch.zeros(1, 3)) == "pytorch"


def test_info():
    lines = hpcloss.info().splitlines()
    assert "backend dense: available" in lines and "backend blockwise: available" in lines
    (line,) = [line for line in lines if line.startswith("backend triton: ")]
    if INTERPRETED and not torch.cuda.is_available():
        assert line == "backend triton: available"
    elif not torch.cuda.is_available():
        assert "not available, " in line and "'cpu'" in line and "TRITON_INTERPRET=1" in line


def installed(folder, version, **direct_url):
    """The folder as a place of installed distributions, of which it has this version of the package."""
    information = folder / f"hpcloss-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: hpcloss\nVersion: {version}\n")
    if direct_url:
        (information / "direct_url.json").write_text(json.dumps(direct_url))
    return str(folder)


def test_info_says_which_package_was_imported(tmp_path, monkeypatch):
    """A checkout in the working directory is imported before the package that is installed."""
    package = Path(hpcloss.__file__).resolve().parent
    other = tmp_path / "another checkout"
    said = {
        "": [installed(tmp_path / "own", "0.1.0", url=package.parent.as_uri(), dir_info={"editable": True})],
        f", not the installed 0.0.7 in {tmp_path.resolve() / 'site/hpcloss'}": [installed(tmp_path / "site", "0.0.7")],
        f", not the installed 0.2 in {other.resolve() / 'hpcloss'}": [
            installed(tmp_path / "editable", "0.2", url=other.as_uri(), dir_info={"editable": True})
        ],
        ", which is not installed": [],
    }
    # Metadata in the checkout itself, as a build leaves it, does not hide the installation.
    both = [*said[""], str(tmp_path / "site")]
    for remark, path in [*said.items(), (list(said)[1], both)]:
        monkeypatch.setattr(sys, "path", path)
        assert hpcloss.info().splitlines()[0] == f"hpcloss: imported from {package}{remark}"


def test_auto_on_the_cpu_is_pytorch():
    """Under the interpreter too, which is for tests."""
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert resolve("auto", torch.zeros(1, 3, dtype=dtype)) == "pytorch"


def test_a_backend_that_is_not_asked_for_is_not_refused():
    assert resolve("blockwise", torch.zeros(1, 600, dtype=torch.float64)) == "blockwise"
