"""The comparison: its data, its measures and statistics, and a run of every arm on tiny data."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("monai", "lightning", "nibabel", "nilearn", "matplotlib", "tensorboard"):
    pytest.importorskip(package, reason="the examples need the `examples` extra")

from examples import compare, compare_report, recipes  # noqa: E402
from examples.data import scanners as data  # noqa: E402
from examples.data.slices import DataError, Slices  # noqa: E402
from examples.metrics import volume_scores, volume_table  # noqa: E402
from examples.paired import (  # noqa: E402
    bootstrap_interval,
    paired_difference,
    positive_control,
    summarise,
    summarise_probes,
)
from examples.recipes import Iterations, arms, studies  # noqa: E402
from examples.warps import Warps, strong_view, weak_view  # noqa: E402
from tests.tools.small_folders import write_msd  # noqa: E402

ROOT = Path(compare.__file__).parents[1]
TINY = Iterations(images=2, pixels=2, warm=6, second=2, supervised=3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from more, and tests that run beside lose much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------- the data


@pytest.fixture(scope="module")
def few_subjects():
    """The recipe with few subjects of each part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SCANNERS", {"train": [0.0, 0.0, 0.0, 0.5, 1.0], "val": [0.0, 1.0], "test": [0.0, 1.0]})
        yield data.scanners()


def test_the_recipe_has_its_subjects_and_planes():
    assert {part: len(r) for part, r in data.SCANNERS.items()} == {"train": 32, "val": 12, "test": 12}
    assert data.SCANNERS["train"].count(0.0) == 8 and data.SCANNERS["train"][-1] == 1.0
    assert len(data.TRAIN_PLANES) * 32 == 384
    assert [mm - 4 for mm in data.HELD_OUT_PLANES] == list(data.TRAIN_PLANES)
    # A subject is a function of (generator seed, number): none is in two parts.
    assert len(set(data.GENERATOR_SEEDS.values())) == 3


def test_slices_of_the_scanners(few_subjects):
    slices = few_subjects
    assert slices.images.shape == (9 * 12, 1, 64, 80) and slices.labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.allclose(slices.images.mean((1, 2, 3)), torch.zeros(108), atol=1e-4)
    assert torch.allclose(slices.images.std((1, 2, 3), correction=0), torch.ones(108), atol=1e-4)
    parts = [{name for name, own in slices.parts.items() if own == part} for part in ("train", "val", "test")]
    assert sum(map(len, parts)) == 9 == len(set.union(*parts))
    assert {slices.zones[i] for i in slices.of_part("val")} == {"r=0.00", "r=1.00"}
    assert {slices.zones[i] for i in slices.of_part("train")} == {""}
    assert slices.source["r"]["train-03"] == 0.5 and slices.source["spacing_mm"]["val-00"] == [2.5, 2.5, 8.0]
    for part in ("train", "val", "test"):
        assert set(slices.labels[slices.of_part(part)].unique().tolist()) == {0, 1, 2, 3, 4}


def test_a_subject_is_a_function_of_its_seed_number_and_scanner():
    maps = data.load_maps()
    planes = range(64, 73, 8)
    image, labels = data.make_subject(maps, 1, 2, planes, 0.5)
    again = data.make_subject(maps, 1, 2, planes, 0.5)
    assert np.array_equal(image, again[0]) and np.array_equal(labels, again[1])
    other_scanner = data.make_subject(maps, 1, 2, planes, 1.0)
    assert np.array_equal(labels, other_scanner[1]) and not np.allclose(image, other_scanner[0], atol=0.1)
    assert not np.array_equal(labels, data.make_subject(maps, 1, 3, planes, 0.5)[1])


def test_the_contrast_of_grey_and_white_matter_flips(few_subjects):
    def grey_minus_white(subject):
        rows = [i for i, name in enumerate(few_subjects.subjects) if name == subject]
        image, labels = few_subjects.images[rows, 0], few_subjects.labels[rows]
        return (image[labels == 1].mean() - image[labels == 2].mean()).item()

    assert grey_minus_white("train-00") < -0.2 and grey_minus_white("train-04") > 0.2


def test_classes_by_place_and_tissue():
    """Hand-picked MNI points: class ids for no tissue, CSF, grey and white matter there."""
    points = {
        (0.0, -60.0, -40.0): [0, 0, 4, 4],  # cerebellum: -40 < -4 + 0.35 * -12 = -8.2
        (40.0, -60.0, -19.0): [0, 0, 1, 2],  # beside it: -19 > -4 - 12 - 4.2 = -20.2
        (0.0, -30.0, -30.0): [0, 0, 4, 4],  # brainstem
        (20.0, -30.0, -30.0): [0, 0, 1, 2],  # too far to the side
        (10.0, 0.0, 5.0): [0, 3, 3, 2],  # deep grey matter and ventricles, not the white matter between them
        (1.0, 0.0, 5.0): [0, 0, 1, 2],  # the middle plane is left out
        (-30.0, 23.0, 21.0): [0, 3, 3, 2],
        (-30.0, 25.0, 21.0): [0, 0, 1, 2],
        (50.0, 0.0, 40.0): [0, 0, 1, 2],
    }
    for point, expected in points.items():
        mm = np.broadcast_to(np.array(point)[:, None], (3, 4))
        assert data.classes_of(np.arange(4), mm).tolist() == expected, point


def test_labels_come_from_the_first_scanner(few_subjects):
    for seed in range(4):
        split = data.draw_scanner_split(few_subjects, 3, 1, seed)
        subjects = {few_subjects.subjects[i] for i in split.labelled}
        assert len(split.labelled) == len(subjects) == 3 and len(split.train) == 60
        assert {few_subjects.source["r"][name] for name in subjects} == {0}
        assert split == data.draw_scanner_split(few_subjects, 3, 1, seed)
    assert len(data.draw_scanner_split(few_subjects, 2, None, 0).labelled) == 24
    with pytest.raises(DataError, match="more than the 3 training subjects"):
        data.draw_scanner_split(few_subjects, 4, 1, 0)


def test_the_cache_is_read_and_a_stale_one_is_not(few_subjects, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SCANNERS", {"train": [0.0], "val": [0.0], "test": [0.0]})
    first = data.scanners(tmp_path / "cache.npz")
    monkeypatch.setattr(data, "make_subject", None)
    assert torch.equal(data.scanners(tmp_path / "cache.npz").images, first.images)
    monkeypatch.setattr(data, "SCANNERS", {"train": [0.0], "val": [0.0], "test": [0.5]})
    with pytest.raises(TypeError):
        data.scanners(tmp_path / "cache.npz")


# --------------------------------------------------------------------------------------------------- augmentation


def test_warps_move_images_and_labels_together(few_subjects):
    """A label map drawn as an image lands where the labels do."""
    shapes = dataclasses.replace(few_subjects, images=few_subjects.labels[:, None].float())
    plain, labels, views = Warps(shapes, (64, 80)).draw(np.random.RandomState(0), np.arange(40, 48), 2)
    assert plain.shape == (8, 1, 64, 80) and labels.shape == (8, 64, 80) and labels.dtype == torch.int64
    inside = plain[:, 0] == plain[:, 0].round()  # away from borders, where the bilinear image lies between classes
    assert inside.float().mean() > 0.5
    # Bilinear can meet a whole number between two others (0 and 2); such pixels are few.
    assert (plain[:, 0][inside] == labels[inside]).float().mean() > 0.97
    assert len(views) == 2 and not torch.equal(views[0], views[1])


def test_warps_are_a_function_of_the_generator_and_crop(few_subjects):
    def draw(seed, crop):
        return Warps(few_subjects, crop).draw(np.random.RandomState(seed), np.arange(3), 1)[2][0]

    assert torch.equal(draw(0, (64, 80)), draw(0, (64, 80))) and not torch.equal(draw(0, (64, 80)), draw(1, (64, 80)))
    assert draw(0, (32, 48)).shape == (3, 1, 32, 48) and draw(0, (100, 100)).shape == (3, 1, 64, 80)


def test_views_differ_in_intensity_only():
    images = torch.zeros(2, 1, 32, 32)
    images[:, :, 8:24, 8:24] = 1.0
    generator = torch.Generator().manual_seed(0)
    weak, strong = weak_view(images, generator), strong_view(images, generator)
    for view, least in ((weak, 0.98), (strong, 0.7)):
        for own, image in zip(view, images):
            assert torch.corrcoef(torch.stack([own.flatten(), image.flatten()]))[0, 1].abs() > least
    assert (weak - images).abs().mean() < (strong - images).abs().mean()


# ------------------------------------------------------------------------------------------------------- measures


def cubes(*spans):
    """A volume [8, 8, 8] whose class number k + 1 fills the cube of span k."""
    volume = torch.zeros(8, 8, 8, dtype=torch.uint8)
    for number, span in enumerate(spans, 1):
        if span:
            volume[span[0] : span[1], 2:6, 2:6] = number
    return volume


def test_hausdorff_distance_in_mm():
    """The cube moved by one voxel along an axis of 3 mm: its far faces are 3 mm apart, all else nearer."""
    scores = volume_scores(cubes((3, 7)), cubes((2, 6)), 2, (3.0, 1.0, 1.0))
    assert scores[1, 0] == 3.0 and scores[0, 0] == pytest.approx(100 * 2 * 48 / 128)
    assert volume_scores(cubes((3, 7)), cubes((2, 6)), 2, (0.5, 1.0, 1.0))[1, 0] == 0.5
    assert volume_scores(cubes((2, 6)), cubes((2, 6)), 2, (3.0, 1.0, 1.0))[:, 0].tolist() == [100.0, 0.0]


def test_empty_classes():
    diagonal = (24**2 + 8**2 + 16**2) ** 0.5
    for ours, theirs in (((2, 6), None), (None, (2, 6))):
        scores = volume_scores(cubes(ours), cubes(theirs), 2, (3.0, 1.0, 2.0))
        assert scores[0, 0] == 0 and scores[1, 0] == pytest.approx(diagonal)
    assert volume_scores(cubes(None), cubes(None), 2, (3.0, 1.0, 2.0)).isnan().all()
    unknown = volume_scores(cubes((2, 6)), cubes((2, 6)), 2, None)
    assert unknown[0, 0] == 100 and unknown[1, 0].isnan()


def test_volume_table_means_over_volumes_then_classes():
    """Two volumes of two slices: class 1 at Dice 100 and 0, class 2 in the first alone."""
    truth = torch.zeros(4, 4, 4, dtype=torch.uint8)
    truth[:, 0] = 1
    truth[:2, 3] = 2
    slices = Slices(
        torch.zeros(4, 1, 4, 4), truth, ["a", "a", "b", "b"], ["a/0", "a/1", "b/0", "b/1"], torch.arange(4),
        ["near", "near", "far", "far"], {"a": "val", "b": "val"}, ("none", "one", "two"),
        {"spacing_mm": {"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0, 1.0]}},
    )  # fmt: skip
    prediction = truth.clone()
    prediction[2:] = 0
    table = volume_table(prediction, slices, [0, 1, 2, 3])
    assert table["dice"]["all"] == {"one": 50.0, "two": 100.0, "mean": 75.0}
    assert table["dice"]["far"] == {"one": 0.0, "two": None, "mean": 0.0}
    assert table["hd95"]["all"]["one"] == pytest.approx((16 + 16 + 4) ** 0.5 / 2)
    assert table["hd95"]["near"] == {"one": 0.0, "two": 0.0, "mean": 0.0}


# ----------------------------------------------------------------------------------------------------- statistics


def test_bootstrap_interval():
    """Two values: a resampled mean is 0, 1 or 2 with probabilities 1/4, 1/2, 1/4, so the interval is all of it."""
    assert bootstrap_interval([0.0, 2.0]) == (0.0, 2.0)
    assert bootstrap_interval([1.5] * 4) == (1.5, 1.5) and bootstrap_interval([1.0]) is None
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 2.0, 400)
    low, high = bootstrap_interval(values.tolist())
    error = values.std() / 20  # of the mean: for many values the interval is the normal one
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert bootstrap_interval(values.tolist()) == (low, high)


def test_paired_differences_use_common_seeds():
    found = paired_difference({0: 3.0, 1: 5.0, 2: 9.0}, {1: 4.0, 2: 6.0, 3: 0.0})
    assert found == {"mean": 2.0, "interval": [1.0, 3.0], "sign": 1, "seeds": [1, 2], "values": [1.0, 3.0]}
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert paired_difference({0: 1.0, 1: 0.0}, {0: 0.0, 1: 1.0})["sign"] == 0
    assert paired_difference({0: 0.0, 1: 0.0}, {0: 1.0, 1: 2.0})["sign"] == -1


def run_of(seed, **dice):
    table = lambda value: {"validation": {"dice": {"all": {"one": value, "mean": value}}}}  # noqa: E731
    return {"seed": seed, "arms": {name.replace("_", "-"): table(value) for name, value in dice.items()}}


def test_positive_control():
    good = [run_of(0, supervised=50.0, mean_teacher=53.0, all_labels=70.0)]
    good += [run_of(1, supervised=51.0, mean_teacher=52.0, all_labels=69.0)]
    control = positive_control(good, 10)
    assert control["passed"] and control["mean-teacher minus supervised"]["values"] == [3.0, 1.0]
    assert not positive_control(good, 20)["passed"], "all labels gain 19"
    assert not positive_control([*good, run_of(2, supervised=60.0, mean_teacher=50.0, all_labels=80.0)], 10)["passed"]
    assert not positive_control([run_of(0, supervised=50.0, mean_teacher=53.0)], 10)["passed"]
    better = [run_of(0, supervised=50.0, mean_teacher=53.0, unimatch=54.0, all_labels=70.0)]
    better += [run_of(1, supervised=51.0, mean_teacher=52.0, unimatch=53.0, all_labels=69.0)]
    assert list(positive_control(better, 10)) == ["unimatch minus supervised", "all-labels minus supervised", "passed"]
    assert set(summarise(better, "validation")["dice"]["mean-teacher"]["mean"]) >= {
        "minus unimatch",
        "minus supervised",
    }
    assert positive_control([*better, good[0] | {"seed": 2}], 10).keys() >= {"mean-teacher minus supervised"}
    # Where test was read the control is asked there; the best is still that of validation.
    for run, (few, best) in zip(better, ((60.0, 59.0), (61.0, 59.0)), strict=True):
        for name, value in (("supervised", few), ("unimatch", best), ("mean-teacher", 70.0), ("all-labels", 80.0)):
            run["arms"][name]["test"] = {"dice": {"all": {"one": value, "mean": value}}}
    control = positive_control(better, 10)
    assert control["unimatch minus supervised"]["values"] == [-1.0, -2.0] and not control["passed"]
    summary = summarise(good, "validation")["dice"]
    assert summary["mean-teacher"]["mean"]["minus supervised"]["mean"] == 2.0
    assert "minus mean-teacher" not in summary["mean-teacher"]["mean"]


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_msd(tmp_path_factory.mktemp("msd"), cases=8)


def arguments(folder, out, *more, seeds=1, iterations=TINY):
    counts = [str(count) for count in dataclasses.astuple(iterations)]
    fixed = ["--data", str(folder), "--out", str(out), "--labelled-cases", "2", "--seeds", str(seeds)]
    return [*fixed, "--crop", "32", "32", "--checkpoint-every", "2", "--iterations", *counts, *more]


def test_every_arm_runs_and_the_test_part_is_read_once(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert compare.main(arguments(folder, out)) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.startswith("data: MSD, 24 slices of 8 subjects; classes: background, Anterior,")
    results = json.loads((out / "results.json").read_text())
    run = results["labels"]["cases2"]["runs"][0]
    assert list(run["arms"]) == list(arms(TINY, 3))
    assert set(results["labels"]["cases2"]["summary"]) == {"validation"} and not (out / "test.json").exists()
    for name, entry in run["arms"].items():
        chain = arms(TINY, 3)[name].chain
        assert len(entry["steps"]) == len(chain) and entry["seconds"] > 0
        assert entry["validation"]["dice"]["all"]["mean"] is not None
    assert run["arms"]["stages12-default+mt"]["iterations"] == TINY.warm + TINY.second
    assert run["arms"]["supervised"]["iterations"] == TINY.warm + TINY.supervised
    seconds = [run["arms"][name]["steps"][name]["seconds"] for name in ("mean-teacher", "supervised-seconds")]
    assert 0 < seconds[0] <= seconds[1], "by the clock"
    pixels = [f"pixels-{name}" for name in ("alone", "default", "hardness0", "published", "two-granularities")]
    assert set(run["probes"]) == {"random", "images", "pixels-whole-region", *pixels}
    assert len(set(run["probes"].values())) > 1 and all(0 <= dice <= 100 for dice in run["probes"].values())
    assert list(results["labels"]["cases2"]["probes"]["images"]["minus random"]["seeds"]) == [0]
    assert (out / "figures/cases2_frozen_bodies.png").is_file()
    shared = [path.name for path in (out / "cases2" / "seed0").iterdir() if path.name == "images"]
    assert shared == ["images"], "arms that share a pre-training train it once"
    report = (out / "report.md").read_text()
    assert report.index("## Positive control") < report.index("Dice, %")
    assert "no claim about a method can be made" in report, "one seed has no interval"
    assert compare.main(arguments(folder, out)) == 2
    assert "already holds a run; go on with --resume" in capsys.readouterr().err
    before = (out / "cases2/seed0/mean-teacher/last.ckpt").stat().st_mtime_ns
    assert compare.main(arguments(folder, out, "--resume", "--final")) == 0
    assert (out / "cases2/seed0/mean-teacher/last.ckpt").stat().st_mtime_ns == before, "trained again"
    read = (out / "test.json").read_bytes()
    assert set(json.loads((out / "results.json").read_text())["labels"]["cases2"]["summary"]) == {"validation", "test"}
    assert compare.main(arguments(folder, out, "--resume", "--final")) == 2
    assert "the test volumes have been read" in capsys.readouterr().err and (out / "test.json").read_bytes() == read


METHODS = ("--methods", "supervised", "mean-teacher")


WORKER = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from examples.compare import one_thread

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=one_thread) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(300)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_workers_do_not_outlive_a_killed_run(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment)
    worker = int(run.stdout.readline())
    os.kill(worker, 0)  # is there
    run.kill()
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the worker is still there")


def test_a_killed_comparison_resumes_and_ends_with_the_same_weights(folder, tmp_path):
    steps = dataclasses.replace(TINY, warm=6, second=6)
    assert compare.main(arguments(folder, tmp_path / "whole", *METHODS, iterations=steps)) == 0
    out = tmp_path / "killed"
    options = arguments(folder, out, *METHODS, "--resume", iterations=steps)
    moment = out / "cases2" / "seed0" / "mean-teacher" / "last.ckpt"
    command = [sys.executable, "-m", "examples.compare", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not moment.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert moment.exists(), errors
    assert process.returncode == -signal.SIGKILL, "it was to be killed, not to end"
    assert not (moment.parent / "done.json").exists()
    assert compare.main(options) == 0
    for step in ("warm", "supervised", "mean-teacher"):
        paths = [base / "cases2" / "seed0" / step / "last.ckpt" for base in (tmp_path / "whole", out)]
        expected, found = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), step


def test_choices_are_tuned_then_used(folder, tmp_path, monkeypatch, capsys):
    tried = [{"lr": 1e-5, "consistency_weight": 3}, {"lr": 2e-2, "consistency_weight": 10}]
    monkeypatch.setattr(recipes.Step, "choices", property(lambda step: tried))
    out = tmp_path / "out"
    assert compare.main(arguments(folder, out, *METHODS, "--tune")) == 0
    tuned = json.loads((out / "choices.json").read_text())
    for name, entry in tuned["arms"].items():
        assert [{key: one[key] for key in tried[0]} for one in entry["tried"]] == tried
        assert entry["chosen"] == tried[max(range(2), key=lambda number: entry["tried"][number]["validation_dice"])]
        assert len(list(out.glob(f"tuning/seed*/{name}@*"))) == 2 * len(compare.TUNING_SEEDS)
    assert len(list(out.glob("tuning/seed*/warm"))) == len(compare.TUNING_SEEDS), "one warm start for all choices"
    assert not set(compare.TUNING_SEEDS) & set(range(100)), "no seeds of a comparison"
    monkeypatch.setattr(compare, "DEFAULT", {"lr": 1.0})
    assert compare.main(arguments(folder, out, *METHODS)) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["choices"] == {name: entry["chosen"] for name, entry in tuned["arms"].items()}
    assert "| mean-teacher | " in (out / "report.md").read_text().partition("was trained with")[2]

    def refused(said, *more):
        assert compare.main(arguments(folder, out, *more)) == 2
        assert said in capsys.readouterr().err

    refused("supervised has been tuned", *METHODS, "--tune")
    refused("fixmatch has not been tuned and other arms have", "--methods", "fixmatch", "--resume")
    refused("contrast adds to fixmatch, which has not been tuned", "--methods", "contrast", "--tune")
    tuned["settings"]["embedding_dim"] = 1
    (out / "choices.json").write_text(json.dumps(tuned))
    refused("was tuned with embedding_dim = 1, now 64", "--methods", "fixmatch", "--tune")


def test_an_arm_takes_over_what_was_chosen_for_the_one_it_adds_to(folder, tmp_path, monkeypatch):
    def choices(step):
        return [{"lr": 1e-2, "confidence": 0.8}] if step.name == "fixmatch" else [{"lr": 1e-3, "weight": 0.3}]

    monkeypatch.setattr(recipes.Step, "choices", property(choices))
    out = tmp_path / "out"
    assert compare.main(arguments(folder, out, "--methods", "fixmatch", "contrast", "--tune")) == 0
    found = json.loads((out / "choices.json").read_text())["arms"]
    assert found["contrast"]["chosen"] == {"lr": 1e-3, "weight": 0.3, "confidence": 0.8}
    assert compare.main(arguments(folder, out, "--methods", "fixmatch")) == 0
    assert compare.main(arguments(folder, out, "--methods", "contrast", "contrast-memory", "--resume", "--final")) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["choices"]) == ["fixmatch", "contrast", "contrast-memory"], "those of earlier calls too"
    assert results["choices"]["contrast-memory"] == found["contrast"]["chosen"]
    # After the final look further arms are measured on validation alone.
    assert compare.main(arguments(folder, out, "--methods", "contrast-hard-pixels", "--resume")) == 0
    run = json.loads((out / "results.json").read_text())["labels"]["cases2"]["runs"][0]["arms"]
    assert "test" in run["contrast"] and "test" not in run["contrast-hard-pixels"]


def test_every_arm_is_tuned_with_as_many_choices():
    found = arms(TINY, 3)
    assert {len(step.choices) for step in found.values()} == {6}
    for name, step in found.items():
        assert len({tuple(choice.items()) for choice in step.choices}) == 6, name
        assert step.base in (None, "mean-teacher", "fixmatch")
    for name, step in studies(TINY, 3).items():
        assert step.chosen_as == "contrast" and name not in found


def test_what_was_chosen_reaches_the_settings_and_the_method(folder, tmp_path):
    options = compare.parse(arguments(folder, tmp_path, "--methods", "contrast"))
    seen = {}

    def kind(slices, split, settings, iterations, seed, **given):
        seen.update(lr=settings.scratch_lr, confidence=settings.confidence, **given)
        raise RuntimeError("seen")

    trial = compare.open_trial(options, compare.read_slices(options), "cases2", 0)
    step = recipes.Step("one", kind, 1)
    with pytest.raises(RuntimeError, match="seen"):
        trial.fit_alone(step, {"lr": 0.5, "confidence": 0.7, "weight": 0.2})
    assert seen == {"lr": 0.5, "confidence": 0.7, "weight": 0.2}


def test_studies_run_when_they_are_named(folder, tmp_path):
    names = list(studies(TINY, 3))
    out = tmp_path / "out"
    assert compare.main(arguments(folder, out, "--methods", "contrast", *names)) == 0
    run = json.loads((out / "results.json").read_text())["labels"]["cases2"]["runs"][0]
    assert list(run["arms"]) == ["contrast", *names]
    scores = [run["arms"][name]["validation"]["dice"]["all"]["mean"] for name in run["arms"]]
    assert None not in scores
    assert all(run["arms"][name]["iterations"] == TINY.warm + TINY.second for name in run["arms"])


def test_the_first_labelled_are_the_same_for_every_seed(folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--data", str(folder), "--out", str(out), "--labelled-first", "2", "--methods", "supervised"]
    parsed = compare.parse([*options, "--crop", "32", "32"])
    slices = compare.read_slices(parsed)
    splits = [compare.split_of(parsed, slices, "first2", seed) for seed in (0, 1)]
    assert splits[0] == splits[1] and len({slices.subjects[i] for i in splits[0].labelled}) == 2
    with pytest.raises(SystemExit):
        compare.parse(["--data", "builtin", "--out", str(out), "--labelled-first", "2"])
    assert "--labelled-first: the built-in subjects have no order" in capsys.readouterr().err


def test_other_settings_do_not_go_on_in_one_folder(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert compare.main(arguments(folder, out, "--methods", "supervised")) == 0
    changed = dataclasses.replace(TINY, warm=8)
    assert compare.main(arguments(folder, out, "--methods", "supervised", "--resume", iterations=changed)) == 2
    assert "was started with iterations of warm = 6, now 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", [["--seeds", "0"], ["--methods", "none"], ["--methods", "supervised-seconds"], ["--subject", "("]]
)
def test_impossible_options(tmp_path, more):
    with pytest.raises(SystemExit) as ended:
        compare.main(["--out", str(tmp_path), *more])
    assert ended.value.code == 2


COMPARED = ROOT / "benchmarks/results/comparison"


def test_the_committed_report_says_what_was_measured():
    """Summary, positive control and report follow from the runs; the tables of the page stand in the report."""
    results, report = json.loads((COMPARED / "results.json").read_text()), (COMPARED / "report.md").read_text()
    for found in results["labels"].values():
        assert [run["seed"] for run in found["runs"]] == list(range(8))
        again = {part: summarise(found["runs"], part) for part in ("validation", "test")}
        assert found["summary"] == json.loads(json.dumps(again))
        assert found["probes"] == json.loads(json.dumps(summarise_probes(found["runs"])))
        assert found["positive_control"] == positive_control(found["runs"], compare_report.ASKED)
    figures = [COMPARED / path for path in re.findall(r"\]\((figures/.+?)\)", report)]
    assert figures and all(path.is_file() for path in figures)
    assert compare_report.markdown(results, figures) == report
    page = (ROOT / "examples/README.md").read_text().partition("\n# The comparison\n")[2]
    tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert tables and all(table in report for table in tables)
    # What the page says of two arms that the report does not set side by side, and of the bodies.
    dice, probes = found["summary"]["test"]["dice"], found["probes"]
    hardness = [dice[f"stages12-{name}+mt"]["mean"]["by_seed"] for name in ("default", "hardness0")]
    of_bodies = [probes[f"pixels-{name}"]["by_seed"] for name in ("default", "hardness0")]
    said = [paired_difference(*hardness), paired_difference(*of_bodies), probes["images"]["minus random"]]
    said += [entry for name, entry in found["positive_control"].items() if name != "passed"]
    assert all(compare_report.cell(difference) in page for difference in said)


@pytest.mark.slow
def test_no_method_ruins_a_quick_training(tmp_path):
    """--quick is too short for a gain; a method whose term is wrong loses more than it can by chance."""
    methods = ["mean-teacher", "region-contrast", "local-contrast", "pccs", "entropy-guided", "multiscale"]
    out = tmp_path / "out"
    assert compare.main(["--quick", "--out", str(out), "--jobs", "2", "--methods", "supervised", *methods]) == 0
    table = json.loads((out / "results.json").read_text())["labels"]["slices3"]["summary"]["validation"]["dice"]
    lost = {name: -table[name]["mean"]["minus supervised"]["mean"] for name in methods}
    assert max(lost.values()) <= 3, lost


@pytest.mark.slow
def test_two_processes_on_the_built_in_data_and_every_figure(tmp_path):
    out = tmp_path / "out"
    command = ["--quick", "--out", str(out), "--jobs", "2", "--labelled-slices", "2", "3", "--methods"]
    assert compare.main([*command, "supervised", "all-labels", "mean-teacher"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["labels"]) == ["slices2", "slices3"] and len(results["labels"]["slices3"]["runs"]) == 2
    table = results["labels"]["slices3"]["summary"]["validation"]
    assert table["hd95"]["supervised"]["mean"]["mean"] > 0 and "mean, r=0.33" in table["dice"]["mean-teacher"]
    control = results["labels"]["slices3"]["positive_control"]["mean-teacher minus supervised"]
    runs = [run["arms"] for run in results["labels"]["slices3"]["runs"]]
    dice = [[run[arm]["validation"]["dice"]["all"]["mean"] for arm in ("mean-teacher", "supervised")] for run in runs]
    assert control["seeds"] == [0, 1] and control["values"] == pytest.approx([ours - theirs for ours, theirs in dice])
    assert min(map(min, dice)) > 20, "some steps teach all arms something; an untrained network is near 10"
    names = {path.stem for path in (out / "figures").iterdir()}
    kinds = {f"{label}_{kind}" for label in results["labels"] for kind in ("paired_with_supervised", "zones")}
    assert kinds | {"labels", "segmentations"} <= names
    assert all(f"figures/{name}.png" in (out / "report.md").read_text() for name in names)
