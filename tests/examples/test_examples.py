"""The three-stage trainer on tiny data: results and report, what it refuses, and its small parts."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

for package in ("monai", "lightning", "nibabel", "h5py", "matplotlib", "tensorboard"):
    pytest.importorskip(package, reason="the examples need the `examples` extra")

from matplotlib.colors import to_hex  # noqa: E402
from PIL import Image  # noqa: E402

from examples import figures, probes, stages, three_stage, training  # noqa: E402
from examples.batches import Crops, Steps  # noqa: E402
from examples.data.folders import read_folder  # noqa: E402
from examples.data.splits import draw_split  # noqa: E402
from examples.evaluate import dice_table, predict, segment, subject_dice  # noqa: E402
from examples.files import write_atomically  # noqa: E402
from examples.metrics import volume_table  # noqa: E402
from examples.networks import DECODER, HEAD, build_network, feature_swap, load_body, swap_halves  # noqa: E402
from examples.report import check_line, cost_rows, hardness_map  # noqa: E402
from examples.results import check_probes, spread, summarise, titles_of  # noqa: E402
from examples.settings import Settings  # noqa: E402
from examples.stages import (  # noqa: E402
    ImagePretraining,
    PixelPretraining,
    SemiSupervised,
    Supervised,
    SupervisedByClock,
    ramp_up,
    shuffled,
)
from examples.training import Progress, quiet, train  # noqa: E402
from tests.tools.small_folders import (  # noqa: E402
    volume,
    write_acdc,
    write_h5,
    write_instances,
    write_la,
    write_msd,
    write_nnunet,
    write_pictures,
)

pytestmark = pytest.mark.usefixtures("small_and_steady")
ROOT = Path(three_stage.__file__).parents[1]
ARMS = ("ours", "supervised_iterations", "supervised_seconds", "probe_random", "probe_stage2", "probe_shuffled")


def arguments(data, out, *more, iterations=(2, 2, 2)):
    fixed = ["--data", str(data), "--out", str(out), "--device", "cpu", "--crop", "32", "32", "--checkpoint-every", "2"]
    return [*fixed, "--iterations", *map(str, iterations), *more]


def stage_weights(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


# --------------------------------------------------------------------------------------------------- a whole run


def watched(draw, path):
    """The function, which writes the shapes of the arrays that it draws to a file."""

    def drawing(*args):
        shapes = [
            array.shape for arg in args if isinstance(arg, list) for array in arg if isinstance(array, np.ndarray)
        ]
        path.write_text(json.dumps(shapes))
        return draw(*args)

    return drawing


@pytest.fixture(scope="module")
def finished(msd, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    more = ("--seeds", "0", "1", "--equal-seconds")
    assert three_stage.main(arguments(msd, out, *more)) == 0
    before = json.loads((out / "results.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("segmentations", "hard_positives"):
            patch.setattr(figures, name, watched(getattr(figures, name), out / f"{name}.json"))
        assert three_stage.main(arguments(msd, out, *more, "--resume", "--final")) == 0
    return out, before, json.loads((out / "results.json").read_text())


NUMBER = (int, float)
POINT = {"iteration": int, "seconds": NUMBER, "dice": (int, float, type(None))}
DICE = {"all": dict}
TRAINED = {"iterations": int, "seconds": NUMBER, "curve": [POINT], "dice": {"validation": DICE, "test": DICE}}
PROBE = {"dice": {"validation": DICE, "test": DICE}}
SPREAD = {"mean": NUMBER, "sd": (int, float, type(None)), "values": [NUMBER]}
SCHEMA = {
    "format": int,
    "settings": {"iterations": [int], "crop": [int], "labelled": int, "embedding_dim": int},
    "data": {"layout": str, "classes": [str], "size": [int]},
    "versions": dict.fromkeys(("python", "torch", "monai", "lightning", "hpcloss"), str),
    "splits": dict.fromkeys(("train", "val", "test"), [str]),
    "runs": [
        {
            "seed": int,
            "labelled": [str],
            "arms": {
                "ours": TRAINED | {"stages": dict.fromkeys(("stage1", "stage2", "stage3"), {"seconds": NUMBER})},
                "supervised_iterations": TRAINED,
                "supervised_seconds": TRAINED,
                "probe_random": PROBE,
                "probe_stage2": PROBE,
                "probe_shuffled": PROBE,
            },
        }
    ],
    "summary": {
        part: {
            "dice": {arm: {"Anterior": SPREAD, "Posterior": SPREAD, "mean": SPREAD} for arm in ARMS},
            "ours_minus": dict.fromkeys(("supervised_iterations", "supervised_seconds"), {"mean": SPREAD}),
        }
        for part in ("validation", "test")
    },
    "checks": [{"seed": int, "probe_gain": NUMBER, "shuffled_loss": NUMBER}],
}


def check_schema(value, schema, where="results"):
    """A dict names required keys, a list the form of every item, a type or a tuple of types the value itself."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for key, part in schema.items():
            assert key in value, f"{where}.{key} is missing"
            check_schema(value[key], part, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for number, item in enumerate(value):
            check_schema(item, schema[0], f"{where}[{number}]")
    else:
        assert isinstance(value, schema), f"{where} = {value!r}"


def test_results_have_their_schema(finished):
    check_schema(finished[2], SCHEMA)


def test_the_schema_check_notices_errors(finished):
    for change in ({"splits": {}}, {"checks": [{"seed": "0"}]}, {"format": "1"}, {"runs": []}):
        with pytest.raises(AssertionError):
            check_schema(finished[2] | change, SCHEMA)


def test_arms_share_their_budget_and_splits(finished):
    out, _, results = finished
    for run in results["runs"]:
        assert run["arms"]["ours"]["iterations"] == run["arms"]["supervised_iterations"]["iterations"] == 6
        assert run["arms"]["ours"]["seconds"] > 0
        split = json.loads((out / f"seed{run['seed']}" / "split.json").read_text())
        assert split["labelled"] == run["labelled"]


def test_no_test_id_is_trained_on(finished):
    out, _, results = finished
    splits, subject_of = results["splits"], lambda name: name.split("/")[0]
    held_out = {subject_of(name) for name in splits["val"] + splits["test"]}
    assert held_out and not held_out & {subject_of(name) for name in splits["train"]}
    for run in results["runs"]:
        assert set(run["labelled"]) <= set(splits["train"])


@pytest.mark.parametrize("kind", [ImagePretraining, PixelPretraining, SemiSupervised, Supervised])
def test_batches_hold_training_slices_only(slices, kind):
    split = draw_split(slices, 2, 1, 0)
    stage = kind(slices, split, Settings(), 2, 0)
    drawn = set()

    def draw(rng, positions, views):
        drawn.update(int(position) for position in positions)
        return torch.zeros(1), torch.zeros(1), [torch.zeros(1)] * views

    stage.crops.draw = draw
    for seed in range(20):
        stage.draw(np.random.RandomState(seed))
    assert drawn <= set(split.train) and not drawn & set(split.val + split.test)
    if kind in (PixelPretraining, Supervised):
        assert drawn == set(split.labelled)


def test_the_test_part_is_read_by_final_alone(finished):
    _, before, after = finished
    assert set(before["summary"]) == {"validation"} and set(after["summary"]) == {"validation", "test"}
    assert before["summary"]["validation"] == after["summary"]["validation"]
    assert before["runs"][0]["arms"]["ours"]["seconds"] == after["runs"][0]["arms"]["ours"]["seconds"], "trained again"


def test_the_report_shows_every_figure(finished):
    out, _, results = finished
    report = (out / "report.md").read_text()
    names = {"dice", "curves", "segmentations", "hard_positives", "embeddings"}
    assert {path.stem for path in (out / "figures").iterdir()} == names
    assert all(f"![{name}](figures/{name}.png)" in report for name in names)
    assert all((out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    for text in ("Dice on test", "three stages - supervised, equal seconds (", "over 2 seeds"):
        assert text in report
    assert "asked" not in report and "FAILED" not in report, "that is the demonstration's"
    assert all(name in report for run in results["runs"] for name in run["labelled"][:1])
    assert list(out.glob("tensorboard/seed0/stage1/events*")), "Lightning's log"


@pytest.mark.parametrize("name", ["segmentations", "hard_positives"])
def test_figures_show_no_padding(finished, name):
    shapes = json.loads((finished[0] / f"{name}.json").read_text())
    assert shapes and all(shape == [20, 28] for shape in shapes)


def test_progress_without_a_terminal_is_a_line_a_minute(capsys, monkeypatch):
    seconds = iter([0, 30, 61, 61, 100, 130, 130])
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    progress, trainer = Progress("stage2"), SimpleNamespace(is_global_zero=True)
    done = iter(range(5))
    stage = SimpleNamespace(amount=lambda: (next(done), 9, "step"))
    progress.on_train_start(trainer, stage)
    for _ in range(4):
        progress.on_train_batch_end(trainer, stage)
    progress.teardown(trainer, stage, stage="fit")
    assert capsys.readouterr().err.splitlines() == ["stage2: step 2 of 9", "stage2: step 4 of 9"]


def test_probes_and_arms_are_told_as_they_end(msd, tmp_path, capsys):
    assert three_stage.main(arguments(msd, tmp_path)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("seed 0  ")]
    told = [words[2] for words in lines if words[-1] == "s"]
    measured = [words[2] for words in lines if words[-1] == "%"]
    heads = ["probe_random", "probe_stage2", "probe_shuffled"]
    assert measured == ["stage3", "supervised_iterations", *heads], "Dice, network by network"
    trained = ["stage1", "stage2", "stage3", "supervised_iterations", "stage2_shuffled"]
    assert told == [*trained, *heads], "no equal seconds unasked"
    assert not (tmp_path / "seed0/supervised_seconds").exists()
    assert (tmp_path / "figures/segmentations.png").is_file(), "against equal iterations"


def test_a_probe_without_a_terminal_is_a_line_a_minute(slices, capsys, monkeypatch):
    seconds = iter(range(0, 10_000, 40))
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    network = build_network(1, 3, Settings.features)
    split = draw_split(slices, 2, 1, 0)
    probes.linear_probe(network, slices, split, Settings(probe_iterations=4), 0, "probe_random")
    told = capsys.readouterr().err.splitlines()
    assert told == ["probe_random: step 2 of 4", "probe_random: step 4 of 4"]


def test_what_is_asked_of_the_probes_belongs_to_the_demonstration():
    dice = {"probe_random": 30.0, "probe_stage2": 44.0, "probe_shuffled": 35.0}
    arms = {name: {"dice": {"validation": {"all": {"mean": value}}}} for name, value in dice.items()}
    demonstration, other = (check_probes({"seed": 3, "arms": arms}, own) for own in (True, False))
    assert demonstration == {"seed": 3, "probe_gain": 14.0, "shuffled_loss": 9.0, "passed": False}
    assert "(asked: 20) and +9.0 over stage 2 on shuffled labels (asked: 10): FAILED" in check_line(demonstration)
    assert other == {"seed": 3, "probe_gain": 14.0, "shuffled_loss": 9.0}
    assert check_line(other).endswith("+14.0 Dice over a random body and +9.0 over stage 2 on shuffled labels")


def timed(*pairs):
    arms = [
        {"ours": {"iterations": 9, "seconds": a}, "supervised_seconds": {"iterations": 7, "seconds": b}}
        for a, b in pairs
    ]
    return [{"seed": seed, "arms": own} for seed, own in enumerate(arms)]


def test_equal_seconds_carry_their_factor_in_the_tables():
    runs = timed((100.0, 101.0), (100.0, 95.0))
    assert titles_of(runs[:1])["supervised_seconds"] == "supervised, equal seconds (1.01 x)"
    title = titles_of(runs)["supervised_seconds"]
    assert title == "supervised, equal seconds (0.95 to 1.01 x)"
    rows = cost_rows(runs, titles_of(runs))
    assert rows[0][-1] == "seconds / three stages" and rows[1:] == [
        ["three stages", "9", "100.0", "1.00"],
        [title, "7", "98.0", "0.98"],
    ]
    assert (
        titles_of([{"seed": 0, "arms": {"ours": {"seconds": 9.0}}}])["supervised_seconds"]
        == "supervised, equal seconds"
    )


def by_clock(slices, budget):
    quiet()
    torch.manual_seed(0)
    settings = Settings(crop=(32, 32), checkpoint_every=4, validate_every=4)
    stage = SupervisedByClock(slices, draw_split(slices, 2, 1, 0), settings, 0, 0, budget=budget)
    return stage, lambda folder: train(stage, folder, settings, "cpu")


def test_equal_seconds_are_those_of_the_clock_however_fast_the_steps_are(slices, tmp_path, monkeypatch):
    """Steps that become slower and slower, as where another process takes a core."""
    now, rates, step = [0.0], [], Supervised.training_step
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(stages, "time", clock)

    def slow(self, batch, index):
        now[0] += 1 + self.trainer.global_step  # 1, 2, 3, ... seconds
        rates.append(self.optimizers().param_groups[0]["lr"])
        return step(self, batch, index)

    monkeypatch.setattr(SupervisedByClock, "training_step", slow)
    stage, go = by_clock(slices, 50.0)
    done = go(tmp_path / "seed0" / "clock")
    assert done["iterations"] == 10 and done["seconds"] == 55.0, "1 + 2 + ... + 10 seconds; 9 steps take 45"
    assert [point["iteration"] for point in done["curve"]] == [4, 8, 10]
    largest = Settings.scratch_lr
    expected = []
    for spent in (0, 1, 3, 6, 10, 15, 21, 28, 36, 45):  # OneCycle over the budget, its rise a fifth of it
        share = spent / 50 * 999
        low, high, part = (
            (largest / 25, largest, share / 199) if share < 199 else (largest / 25e4, largest, (999 - share) / 800)
        )
        expected.append(high + (low - high) * (1 + np.cos(np.pi * part)) / 2)
    assert rates == pytest.approx(expected)
    assert torch.load(tmp_path / "seed0/clock/last.ckpt", weights_only=True)["global_step"] == 10
    assert go(tmp_path / "seed0" / "clock") == done


def test_a_stopped_arm_of_the_clock_resumes_with_the_seconds_it_had(slices, tmp_path, monkeypatch):
    now, step = [0.0], Supervised.training_step
    monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def stopping(self, batch, index):
        now[0] += 1
        if now[0] == 7:
            raise RuntimeError("stopped")
        return step(self, batch, index)

    monkeypatch.setattr(SupervisedByClock, "training_step", stopping)
    _, go = by_clock(slices, 10.0)
    with pytest.raises(RuntimeError, match="stopped"):
        go(tmp_path / "seed0" / "clock")
    now[0] = 1000.0
    _, go = by_clock(slices, 10.0)
    done = go(tmp_path / "seed0" / "clock")
    assert done["iterations"] == 10 and done["seconds"] == 10.0, "4 steps before, 6 after"


def test_one_core_is_left_to_others(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    three_stage.leave_a_core()
    assert set_to == [], "OMP_NUM_THREADS is set"
    monkeypatch.delenv("OMP_NUM_THREADS")
    for cores in (1, 2, 8):
        monkeypatch.setattr(three_stage, "CORES", cores)
        three_stage.leave_a_core()
    assert set_to == [1, 1, 7]


def test_the_key_of_colours_is_in_the_figure(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure))
    image = np.zeros((20, 28))
    names, shown = (
        ("background", "left atrium", "scar"),
        ["a/000"],
    )
    figures.segmentations(tmp_path, shown, [image], [image], [image], [image], names, "supervised")
    figures.hard_positives(tmp_path, shown, [image], [image], [image + 1], names, 16)
    for figure in kept:
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        keys = {
            text.get_text(): patch.get_facecolor()
            for key in legends
            for text, patch in zip(key.get_texts(), key.get_patches())
        }
        colours = figures.class_map(3)["cmap"].colors
        assert all(to_hex(keys[name]) == colour for name, colour in zip(names, colours, strict=True))
    keys = [text.get_text() for axes in kept[0].axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    assert {"gained", "lost"} <= set(keys)


def test_a_second_run_needs_resume_and_the_same_settings(finished, msd, capsys):
    out, _, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert three_stage.main(arguments(msd, out)) == 2
    assert "already holds a run; go on with --resume" in capsys.readouterr().err
    assert three_stage.main(arguments(msd, out, "--resume", iterations=(3, 2, 2))) == 2
    assert "run.json: was started with iterations = [2, 2, 2], now [3, 2, 2]" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_stages_run_alone_and_in_order(tmp_path, capsys):
    data = write_acdc(tmp_path / "acdc")
    out = tmp_path / "out"
    assert three_stage.main(arguments(data, out, "--stage", "2")) == 2
    assert "seed0/stage1/last.ckpt: no such checkpoint" in capsys.readouterr().err
    for stage in "123":
        assert three_stage.main(arguments(data, out, "--stage", stage)) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results["runs"][0]["arms"]) == {"ours"}
    assert results["runs"][0]["arms"]["ours"]["iterations"] == 6
    assert {name.split("_")[0] for name in results["splits"]["test"]} == {"patient005", "patient006"}


# ------------------------------------------------------------------------------------------------ what it refuses


def test_a_damaged_checkpoint_is_named(msd, tmp_path, capsys):
    out = tmp_path / "out"
    assert three_stage.main(arguments(msd, out, "--stage", "1")) == 0
    (out / "seed0/stage1/last.ckpt").write_bytes(b"half a checkpoint")
    assert three_stage.main(arguments(msd, out, "--stage", "2")) == 2
    assert "stage1/last.ckpt: not a readable checkpoint" in capsys.readouterr().err


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(file):
        file.write(b"ne")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("name", ["run.json", "seed0/split.json", "seed0/stage1/done.json"])
def test_a_damaged_file_of_a_run_is_named(msd, tmp_path, capsys, name):
    out = tmp_path / "out"
    assert three_stage.main(arguments(msd, out, "--stage", "1")) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path != out / name}
    (out / name).write_text('{"half')
    assert three_stage.main(arguments(msd, out, "--stage", "1", "--resume")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out / name}: is no JSON (") and error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in before}


def test_other_folders_beside_those_of_the_seeds(msd, tmp_path):
    out = tmp_path / "out"
    for name in ("seed_old", "seed7"):
        (out / name).mkdir(parents=True)
    assert three_stage.main(arguments(msd, out, "--stage", "1")) == 0
    assert [run["seed"] for run in json.loads((out / "results.json").read_text())["runs"]] == [0]


def test_validation_without_a_class_ends_in_a_report(tmp_path, capsys):
    data = write_pictures(tmp_path / "data")
    Image.new("L", (40, 30)).save(data / "masks/p4.png")
    for part, names in {"train": "p0 p1 p2 p3", "val": "p4", "test": "p5"}.items():
        (data / f"{part}.list").write_text(names.replace(" ", "\n"))
    assert three_stage.main(arguments(data, tmp_path / "out")) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["checks"] == []


def test_bad_input_ends_in_one_line_and_code_2(msd, tmp_path):
    command = [sys.executable, "-m", "examples.three_stage", *arguments(tmp_path / "nowhere", tmp_path / "out")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "LOCAL_RANK": "0"})
    assert ended.returncode == 2
    assert ended.stderr.strip() == f"error: {tmp_path / 'nowhere'}: no such folder"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--labelled", "99"], "error: --labelled 99 is more than the"),
        (["--labelled", "0"], "error: no labelled case"),
    ],
)
def test_impossible_requests(msd, tmp_path, capsys, more, message):
    assert three_stage.main(arguments(msd, tmp_path / "out", *more)) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_out_folder(msd, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert three_stage.main(arguments(msd, tmp_path / "out")) == 2
    assert capsys.readouterr().err.count("\n") == 1 and (tmp_path / "out").read_text() == "mine"


LAYOUTS = {
    "h5 slices": (partial(write_h5, by_slice=True), "36 slices of 6 subjects; classes: background, class 1, class 2,"),
    "h5 volumes": (write_h5, "36 slices of 6 subjects; classes: background, class 1, class 2, class 3"),
    "nnU-Net": (write_nnunet, "18 slices of 6 subjects; classes: background, Anterior, Posterior"),
    "h5 case by case": (write_la, "18 slices of 6 subjects; classes: background, class 1"),
    "images and instances": (write_instances, "6 slices of 6 subjects; classes: background, foreground"),
    "images and masks": (write_pictures, "6 slices of 6 subjects; classes: background, class 255 (label values 0,"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_told_and_trained_on(tmp_path, capsys, name):
    write, told = LAYOUTS[name]
    data, out = write(tmp_path / "data"), tmp_path / "out"
    assert three_stage.main(arguments(data, out, "--stage", "1", "--labelled-slices", "2")) == 0
    assert f"data: {name}, {told}" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["layout"] == name and len(results["runs"][0]["labelled"]) == 2
    assert results["settings"]["labelled_slices"] == 2 and results["settings"]["labelled"] is None


def test_a_split_file_fixes_the_split_of_every_seed(msd, tmp_path, capsys):
    lists = {"train": ["case_000", "case_001"], "val": ["case_002"], "test": ["case_003"], "labelled": ["case_001/001"]}
    path = tmp_path / "split.json"
    path.write_text(json.dumps(lists))
    out = tmp_path / "out"
    assert three_stage.main(arguments(msd, out, "--stage", "1", "--split", str(path), "--seeds", "0", "1")) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["splits"]["val"] == [f"case_002/{z:03d}" for z in range(3)]
    assert [run["labelled"] for run in results["runs"]] == [["case_001/001"]] * 2
    path.write_text(json.dumps(lists | {"val": ["case_099"]}))
    assert three_stage.main(arguments(msd, out, "--split", str(path))) == 2
    assert capsys.readouterr().err == f"error: {path}: val: 'case_099' is no id, case or subject of the data\n"


def test_a_damaged_h5_file_ends_in_one_line_and_code_2(tmp_path, capsys):
    damaged = write_h5(tmp_path) / "data" / "patient002_frame01.h5"
    damaged.write_bytes(damaged.read_bytes()[:700])
    assert three_stage.main(arguments(tmp_path, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {damaged}: cannot be read (") and error.count("\n") == 1


BAD_NUMBERS = [["--spacing", "0"], ["--spacing", "-1"], ["--spacing", "nan"], ["--slices-per-subject", "0"]]
BOTH = ["--labelled-slices", "2", "--slices-per-subject", "1"]


@pytest.mark.parametrize(
    "more",
    [
        ["--crop", "20", "32"],
        ["--seeds", "1", "1"],
        ["--size", "40", "32"],
        ["--patch", "48", "48", "48"],
        ["--subject", "("],
        *BAD_NUMBERS,
        BOTH,
    ],
)
def test_impossible_options(tmp_path, capsys, more):
    with pytest.raises(SystemExit) as ended:
        three_stage.main([*arguments("builtin", tmp_path), *more])
    assert ended.value.code == 2 and more[0] in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- small parts


def test_batches_are_a_function_of_seed_and_step(slices):
    crops = Crops(slices, (32, 32))

    def draw(rng):
        return {"images": crops.draw(rng, rng.choice(len(slices), 3), 1)[2][0]}

    whole, later = Steps(draw, (0, 1), 0, 6), Steps(draw, (0, 1), 4, 2)
    assert torch.equal(whole[5]["images"], later[1]["images"])
    assert not torch.equal(whole[4]["images"], whole[5]["images"])
    assert not torch.equal(whole[0]["images"], Steps(draw, (1, 1), 0, 1)[0]["images"])
    with pytest.raises(IndexError):
        later[2]


def test_views_share_their_geometry(slices):
    plain, labels, views = Crops(slices, (32, 32)).draw(np.random.RandomState(0), np.array([0, 4, 7]), 2)
    assert plain.shape == (3, 1, 32, 32) and labels.shape == (3, 32, 32) and len(views) == 2
    assert set(labels.unique().tolist()) <= {0, 1, 2}
    assert not torch.equal(views[0], views[1])
    for view in views:  # bright boxes stay bright: the correlation with the unchanged crop is high
        assert torch.corrcoef(torch.stack([view.flatten(), plain.flatten()]))[0, 1] > 0.5


def test_swapped_halves():
    features = torch.stack([torch.zeros(1, 4, 2), torch.ones(1, 4, 2)])
    swapped = swap_halves(features)
    assert swapped[0, 0, :, 0].tolist() == [0, 0, 1, 1] and swapped[1, 0, :, 0].tolist() == [1, 1, 0, 0]


def test_feature_swap_ends_with_its_block_and_leaves_equal_flows_alone():
    network = build_network(1, 3, Settings.features).eval()
    image = torch.randn(1, 1, 32, 32)
    plain = network(torch.cat([image, image]))
    with feature_swap(network):
        assert torch.allclose(network(torch.cat([image, image])), plain)
        changed = network(torch.cat([image, -image]))
    assert not torch.allclose(changed[:1], network(image), atol=1e-3)
    assert torch.equal(network(torch.cat([image, image])), plain)
    assert all(not network.get_submodule(name)._forward_hooks for name in DECODER)


def test_load_body_takes_all_but_the_head_and_is_strict():
    first, second = build_network(1, 3, Settings.features), build_network(1, 3, Settings.features)
    load_body(second, first.state_dict())
    for (name, ours), theirs in zip(second.state_dict().items(), first.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) != (name.startswith(HEAD)), name
    with pytest.raises(RuntimeError):
        load_body(second, {f"module.{name}": value for name, value in first.state_dict().items()})


def test_dice_is_per_subject_and_ignores_absent_classes():
    truth = torch.zeros(3, 4, 4, dtype=torch.uint8)
    truth[0, :2], truth[2, :1] = 1, 1
    prediction = truth.clone()
    prediction[1, 0] = 1  # four wrong pixels in the first subject's other slice: 2 * 8 / (8 + 12)
    dice = subject_dice(prediction, truth, ["a", "a", "b"], 3)
    assert torch.allclose(dice[:, 0], torch.tensor([0.8, 1.0])) and dice[:, 1].isnan().all()


def test_dice_table_has_zones_and_no_nan(slices):
    network = build_network(1, 3, Settings.features).train()
    table = dice_table(network, slices, slices.of_part("val"))
    assert set(table) == {"all"} and set(table["all"]) == {"Anterior", "Posterior", "mean"}
    assert network.training and predict(network, slices.images[:2]).dtype == torch.uint8


class ShowsItsInput(torch.nn.Module):
    """Its class of every pixel is the number there."""

    def __init__(self, classes):
        super().__init__()
        self.numbers = torch.nn.Parameter(torch.arange(float(classes)))

    def forward(self, images):
        return -((images - self.numbers.view(1, -1, *[1] * (images.ndim - 2))) ** 2)


@pytest.mark.parametrize("shape", [(20, 28, 3), (21, 27, 3), (40, 27, 3)])
def test_a_perfect_prediction_has_dice_100_whatever_it_says_of_the_padding(tmp_path, shape):
    slices = read_folder(write_msd(tmp_path, cases=4, shape=shape))
    assert slices.size == (48 if shape[0] > 32 else 32, 32)
    left, low = ((side - own) // 2 for side, own in zip(slices.size, shape))
    inside = (slice(None), slice(left, left + shape[0]), slice(low, low + shape[1]))
    shown = torch.ones(slices.labels.shape)  # class 1 in the padding
    shown[inside] = torch.cat([torch.from_numpy(volume(n, shape)[1]) for n in range(4)], 2).permute(2, 0, 1).float()
    slices = dataclasses.replace(slices, images=shown[:, None])
    network, positions = ShowsItsInput(3), list(range(12))
    assert dice_table(network, slices, positions)["all"] == {"Anterior": 100, "Posterior": 100, "mean": 100}
    table = volume_table(segment(network, slices, positions), slices, positions)
    assert table["dice"]["all"]["mean"] == 100 and table["hd95"]["all"]["mean"] == 0
    for found, truth, label in zip(segment(network, slices, positions), slices.truth(positions), slices.labels[inside]):
        assert torch.equal(found, label) and torch.equal(truth, label)
    few = slices.select([7, 2], slices.parts)
    assert dice_table(network, few, [0, 1])["all"]["mean"] == 100


def test_the_diagonal_of_a_missed_class_is_that_of_the_stored_volume(tmp_path):
    slices = read_folder(write_msd(tmp_path, cases=3))
    slices.images[:] = 0
    table = volume_table(segment(ShowsItsInput(3), slices, [0, 1, 2]), slices, [0, 1, 2])
    assert table["hd95"]["all"]["Anterior"] == pytest.approx((20**2 + 28**2 + (3 * 3) ** 2) ** 0.5, abs=1e-3)


def test_what_is_cropped_away_is_told(tmp_path, capsys):
    data = write_msd(tmp_path / "data", shape=(60, 28, 3))
    assert three_stage.main(arguments(data, tmp_path / "out", "--stage", "1", "--size", "32", "32")) == 0
    slices = read_folder(data, size=(32, 32))
    lost = 1 - sum(int((t > 0).sum()) for t in slices.truth(list(range(18)))) / sum(
        int((volume(n, (60, 28, 3))[1] > 0).sum()) for n in range(6)
    )
    assert lost > 0.1 and f"; {100 * lost:.1f} % of the foreground lies outside of 32 x 32" in capsys.readouterr().out


def test_shuffled_labels_keep_their_shares_and_leave_the_padding(slices):
    mixed = shuffled(slices, 0)
    assert torch.equal(mixed.flatten(1).sort().values, slices.labels.flatten(1).sort().values)
    assert not torch.equal(mixed, slices.labels) and torch.equal(mixed, shuffled(slices, 0))
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[6:26, 2:30] = False
    assert (mixed[:, outside] == 0).all()


def test_hardness_map_by_hand():
    embeddings = torch.tensor([[[1.0, 1.0, 0.0, 1.0]], [[0.0, 0.0, 1.0, 0.0]]])  # three pixels along x, one along y
    labels = torch.tensor([[1, 1, 1, 2]])
    found = hardness_map(embeddings, labels, 4)
    assert torch.allclose(found[0, :3], torch.tensor([0.5, 0.5, 1.0])) and found[0, 3].isnan()


def test_ramp_up_ends_at_one():
    assert ramp_up(0) < 0.01 and ramp_up(1) == ramp_up(3) == 1 and ramp_up(0.5) < ramp_up(0.6)


def test_paired_differences():
    def run(seed, ours, baseline):
        table = lambda value: {"dice": {"validation": {"all": {"mean": value}}}}  # noqa: E731
        return {"seed": seed, "arms": {"ours": table(ours), "supervised_seconds": table(baseline)}}

    summary = summarise([run(0, 61.0, 60.0), run(1, 65.0, 62.0)], "val")
    assert summary["ours_minus"]["supervised_seconds"]["mean"] == {"mean": 2.0, "sd": 1.414, "values": [1.0, 3.0]}
    assert spread([5.0]) == {"mean": 5.0, "sd": None, "values": [5.0]}
