"""Fetching a data set: what is asked of MONAI, where it lies, and one line for every failure."""

import hashlib
import shutil
import tarfile

import pytest

pytest.importorskip("monai", reason="the examples need the `examples` extra")

from examples import download  # noqa: E402
from examples.data.folders import read_folder  # noqa: E402
from tests.tools.small_folders import write_msd  # noqa: E402


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive that stands at the address of the set, with its checksum."""
    source = tmp_path / "server/Task04_Hippocampus"
    write_msd(source)
    with tarfile.open(tmp_path / "server/Task04_Hippocampus.tar", "w") as file:
        file.add(source, "Task04_Hippocampus")
    path = tmp_path / "server/Task04_Hippocampus.tar"
    checksum = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(download.DecathlonDataset.resource, "Task04_Hippocampus", path.as_uri())
    monkeypatch.setitem(download.DecathlonDataset.md5, "Task04_Hippocampus", checksum)
    return path


def test_the_set_is_fetched_once_and_read(archive, tmp_path, capsys):
    out = tmp_path / "data"
    assert download.main(["hippocampus", "--to", str(out)]) == 0
    assert "python -m examples.three_stage --data" in capsys.readouterr().out
    assert len(read_folder(out / "Task04_Hippocampus")) == 18
    archive.unlink()
    assert download.main(["hippocampus", "--to", str(out)]) == 0
    assert "is there already" in capsys.readouterr().out


def test_failures_are_one_line(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(download.DecathlonDataset.md5, "Task04_Hippocampus", "0" * 32)
    assert download.main(["hippocampus", "--to", str(tmp_path / "wrong")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: {tmp_path}/wrong/Task04_Hippocampus.tar: ") and "md5" in said
    monkeypatch.setitem(download.DecathlonDataset.resource, "Task04_Hippocampus", "http://127.0.0.1:9/none.tar")
    assert download.main(["hippocampus", "--to", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    shutil.rmtree(tmp_path / "none")
    with pytest.raises(SystemExit):
        download.main(["liverwurst"])


def test_every_set_of_the_decathlon_has_a_name():
    assert {"hippocampus", "heart", "prostate", "braintumour", "hepaticvessel"} <= set(download.NAMES)
    assert len(download.NAMES) == len(download.DecathlonDataset.resource) == 10
