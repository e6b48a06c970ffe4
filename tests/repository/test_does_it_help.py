"""docs/does_it_help.md says what the kept results say."""

import json
import re

import pytest

from benchmarks import real
from examples.paired import RESAMPLES, bootstrap_interval, positive_control
from examples.recipes import SETTINGS

TEXT = real.PAGE.read_text(encoding="utf-8")
SETS = sorted(path.parent.name for path in real.REAL.glob("*/results.json"))
RESULTS = {name: json.loads((real.REAL / name / "results.json").read_text()) for name in SETS}
LABELS = [(name, label) for name in SETS for label in RESULTS[name]["labels"]]


def test_the_tables_are_those_of_the_results():
    assert real.with_tables(TEXT) == TEXT, "python -m benchmarks.real"
    shown = {(match[2], match[3]) for match in real.BLOCK.finditer(TEXT) if match[4] == "arms"}
    assert shown == set(LABELS), "each set and number of labels has its table"


def test_no_number_of_ours_stands_outside_of_the_tables():
    """Dice with a decimal is in a table, or in the section of published figures."""
    prose = real.BLOCK.sub("", TEXT)
    ours = prose.split("## Published figures")[0] + prose.split("## Published figures")[1].partition("\n## ")[2]
    assert not re.findall(r"\d+\.\d+ Dice|Dice of \d+\.\d", ours)


@pytest.mark.parametrize("name, label", LABELS)
def test_each_difference_is_that_of_its_seeds(name, label):
    """Recomputed from the scores of single seeds: means, differences, bootstrap intervals, the control."""
    found = RESULTS[name]["labels"][label]
    assert len(found["runs"]) >= 5
    for part, summary in found["summary"].items():
        scores = {
            arm: {run["seed"]: run["arms"][arm][part]["dice"]["all"]["mean"] for run in found["runs"]}
            for arm in found["runs"][0]["arms"]
        }
        for arm, row in summary["dice"].items():
            values = list(scores[arm].values())
            assert row["mean"]["mean"] == pytest.approx(sum(values) / len(values), abs=1e-3)
            for key in [key for key in row["mean"] if key.startswith("minus ")]:
                theirs = scores[key.removeprefix("minus ")]
                differences = [scores[arm][seed] - theirs[seed] for seed in sorted(theirs)]
                low, high = bootstrap_interval(differences)
                assert row["mean"][key]["interval"] == [pytest.approx(low, abs=2e-3), pytest.approx(high, abs=2e-3)]
                assert row["mean"][key]["sign"] == (low > 0) - (high < 0)
    assert RESAMPLES >= 10_000
    assert found["positive_control"] == positive_control(found["runs"], 0.0)


@pytest.mark.parametrize("name", SETS)
def test_arms_were_trained_and_tuned_alike(name):
    """Every arm has as many steps as its kind, from a last checkpoint, and a choice of its own."""
    results = RESULTS[name]
    assert results["settings"]["augmentation"] == SETTINGS.augmentation
    for found in results["labels"].values():
        arms = found["runs"][0]["arms"]
        assert set(arms) <= set(results["choices"]) and len(arms) >= 6
        totals = {arms[arm]["iterations"] for arm in arms}
        assert len(totals) == 1, "the same number of steps in all"
        assert len({tuple(run["labelled"]) for run in found["runs"]}) > 1, "seeds draw other labelled images"


@pytest.mark.parametrize("name", SETS)
def test_only_free_pictures_are_kept(name):
    pictures = [path.name for path in (real.REAL / name).rglob("*.png")]
    assert pictures and (name in real.FREE or not [path for path in pictures if real.PICTURES in path])
