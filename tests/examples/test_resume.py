"""The three-stage trainer killed, stopped and resumed: the weights are those of a run that was not."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import MethodType

import pytest
import torch

for package in ("monai", "lightning", "nibabel", "h5py", "matplotlib", "tensorboard"):
    pytest.importorskip(package, reason="the examples need the `examples` extra")

from examples import three_stage  # noqa: E402
from examples.arms import Arms  # noqa: E402
from examples.data.splits import draw_split  # noqa: E402
from examples.settings import Settings  # noqa: E402
from examples.stages import (  # noqa: E402
    ImagePretraining,
    PixelPretraining,
    SemiSupervised,
)
from examples.training import quiet, train  # noqa: E402
from tests.examples.test_examples import arguments, check_schema, stage_weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_and_steady")
ROOT = Path(three_stage.__file__).parents[1]


def test_a_killed_run_resumes_and_ends_with_the_same_weights(msd, slices, tmp_path, monkeypatch):
    monkeypatch.setattr(three_stage, "Settings", Settings)  # as in the other process
    steps = (6, 6, 6)
    whole = tmp_path / "whole"
    settings = Settings(iterations=steps, crop=(32, 32), checkpoint_every=2)
    quiet()
    arms = Arms(slices, draw_split(slices, 2, None, 0), settings, 0, whole / "seed0", "cpu")
    for stage in "123":
        arms.train(stage)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "examples.three_stage", *arguments(msd, out, "--resume", iterations=steps)]
    for moment in ("seed0/stage1/last.ckpt", "seed0/stage3/last.ckpt"):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while not (out / moment).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert (out / moment).exists(), errors
        assert process.returncode == -signal.SIGKILL, "it was to be killed, not to end"
    assert three_stage.main(arguments(msd, out, "--resume", iterations=steps)) == 0
    for stage in ("stage1", "stage2", "stage3"):
        expected, found = stage_weights(whole / "seed0" / stage), stage_weights(out / "seed0" / stage)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), stage
    check_schema(json.loads((out / "results.json").read_text())["runs"][0]["arms"]["ours"]["stages"], {"stage1": dict})


@pytest.mark.parametrize("kind", [ImagePretraining, PixelPretraining, SemiSupervised])
@pytest.mark.parametrize("step", [4, 5])
def test_a_stage_stopped_inside_resumes_to_the_same_weights(slices, tmp_path, kind, step):
    quiet()
    settings = Settings(crop=(32, 32), checkpoint_every=2, validate_every=4, samples_per_class=4)

    def train_in(folder):
        torch.manual_seed(0)
        stage = kind(slices, draw_split(slices, 2, 1, 0), settings, 9, 0)
        return stage, lambda: train(stage, folder, settings, "cpu")

    _, go = train_in(tmp_path / "seed0" / "whole")
    whole = go()
    stage, go = train_in(tmp_path / "seed0" / "stopped")

    def stop(self, batch, index):
        if self.trainer.global_step == step:
            raise RuntimeError("stopped")
        return kind.training_step(self, batch, index)

    stage.training_step = MethodType(stop, stage)
    with pytest.raises(RuntimeError, match="stopped"):
        go()
    assert torch.load(tmp_path / "seed0/stopped/last.ckpt", weights_only=True)["global_step"] == 4
    _, go = train_in(tmp_path / "seed0" / "stopped")
    resumed = go()
    assert resumed["iterations"] == whole["iterations"] == 9 and resumed["seconds"] > 0
    assert [p["dice"] for p in resumed["curve"]][-1:] == [p["dice"] for p in whole["curve"]][-1:]
    expected, found = (stage_weights(tmp_path / "seed0" / name) for name in ("whole", "stopped"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_ctrl_c_ends_in_one_line(msd, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning.Trainer.fit", lambda *args, **kwargs: sys.exit(1))  # as Lightning does on Ctrl-C
    assert three_stage.main(arguments(msd, tmp_path / "out")) == 130
    assert capsys.readouterr().err == f"stopped; go on with --resume --out {tmp_path / 'out'}\n"
