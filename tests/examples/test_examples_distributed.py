"""The three stages under torchrun: two processes with their own samples, contrast of the whole batch, one set of files.

The test launches this file; each process then runs the trainer's command line and checks what it did.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

for package in ("monai", "lightning", "nibabel", "matplotlib", "tensorboard"):
    pytest.importorskip(package, reason="the examples need the `examples` extra")

from tests.tools.small_folders import write_msd  # noqa: E402

ROOT = Path(__file__).parents[2]
STEPS = 4
SETTINGS = {"image_batch": 4, "pixel_batch": 2, "labelled_batch": 1, "samples_per_class": 2048}  # all are drawn


def test_two_processes_train_resume_and_contrast_the_whole_batch(tmp_path):
    (tmp_path / "msd").mkdir()
    write_msd(tmp_path / "msd", cases=8)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=230)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("all checks passed") == 2


def watched(kind, calls):
    """The loss, which notes what it is given and what it gives."""

    class Watched(kind):
        def forward(self, *args, **options):
            found = super().forward(*args, **options)
            calls.append((self, args, options, found[0] if isinstance(found, tuple) else found))
            return found

    return Watched


def of_all(value):
    """What the processes hold, of tensors one after the other."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return torch.cat(values) if torch.is_tensor(value) else values


def check_whole_batch(loss, args, options, value):
    assert loss.gather and of_all(value.item()) == [value.item()] * 2
    inputs, named = [of_all(x.detach()) for x in args], dict(options)
    if "groups" in named:
        named["groups"] = of_all(named["groups"])
    assert not torch.equal(*inputs[0].chunk(2)), "each process has samples of its own"
    loss.gather = False
    whole = loss(*inputs, **named)
    loss.gather = True
    whole = whole[0] if isinstance(whole, tuple) else whole
    torch.testing.assert_close(value.detach(), whole, rtol=1e-5, atol=0)


def weights(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def on_each_process(folder):
    from examples import arms, stages, three_stage, training
    from examples.data.folders import read_folder
    from examples.data.splits import draw_split
    from examples.settings import Settings

    number, calls = int(os.environ["RANK"]), []
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(three_stage, "Settings", partial(Settings, **SETTINGS))
        for name in ("IHPCLoss", "RegionPHPCLoss"):
            patch.setattr(stages, name, watched(getattr(stages, name), calls))
        written, measured = [], []
        replace, dice_table = os.replace, arms.dice_table
        patch.setattr(os, "replace", lambda *paths: (written.append(paths), replace(*paths)))
        for module in (arms, stages):
            patch.setattr(module, "dice_table", lambda *args: (measured.append(args), dice_table(*args))[1])

        def run(out, stage, *more):
            fixed = ["--data", str(folder / "msd"), "--device", "cpu", "--crop", "32", "32", "--checkpoint-every", "2"]
            steps = ["--iterations", *[str(STEPS)] * 3]
            return three_stage.main([*fixed, *steps, "--out", str(folder / out), "--stage", stage, *more])

        assert [run("whole", stage) for stage in "123"] == [0, 0, 0]
        step = stages.ImagePretraining.training_step

        def stopping(self, batch, index):
            if self.trainer.global_step == 3:
                raise RuntimeError("stopped")
            return step(self, batch, index)

        with pytest.MonkeyPatch.context() as inner, pytest.raises(RuntimeError, match="stopped"):
            inner.setattr(stages.ImagePretraining, "training_step", stopping)
            run("stopped", "1")
        assert run("stopped", "1", "--resume") == 0
        whole, resumed = (weights(folder / out / "seed0/stage1") for out in ("whole", "stopped"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        with pytest.raises(SystemExit):
            run("other", "1", "--devices", "3")
        # Equal seconds are those of the first process: the second, whose clock is faster, trains as many steps.
        slices = read_folder(folder / "msd")
        settings = Settings(crop=(32, 32), checkpoint_every=2, devices=2, **SETTINGS)
        timed = stages.SupervisedByClock(slices, draw_split(slices, 2, 1, 0), settings, 0, 0, budget=5.0)
        seconds = iter(range(0, 1000, 1 + 2 * number))
        patch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
        done = training.train(timed, folder / "clock" / "seed0" / "arm", settings, "cpu")
        assert of_all(done["iterations"]) == [done["iterations"]] * 2 and done["seconds"] >= 5
    assert len(calls) == 2 * STEPS + 3 + 2, (
        "stages 1 and 2; stage 1 stopped at the fourth step, resumed after the second"
    )
    for call in tuple(calls):  # checking adds to them
        check_whole_batch(*call)
    assert bool(written) == bool(measured) == (number == 0)
    print("all checks passed")


if __name__ == "__main__":
    on_each_process(Path(sys.argv[1]))
