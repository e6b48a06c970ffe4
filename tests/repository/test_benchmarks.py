"""The benchmarks: every loss has a row, cases are what they say, counts count, pages show the results."""

import json
import os
import subprocess
import sys

import pytest

import hpcloss
from benchmarks import plot
from tests.tools.cases import ROOT

# In a process of its own: modules in benchmarks/ import each other by name, and both folders have a `cases`.
CASES = """
import inspect, json, sys
sys.path.insert(0, "benchmarks")
import cases, fresh, peers, torch
from measure import assert_same_as

def asking(x):
    values = x.detach()
    values[values > 0], values.masked_select(values > 0), values.nonzero(), torch.unique(values)
    values.tolist(), values.sum().item(), bool(values.sum() > 0), values.numpy(), values.cpu()
    torch.equal(values, values), torch.where(values > 0), values[0], values.sum(), values[torch.tensor([1])]
    return x.sum()

found = {"losses": sorted(cases.LOSSES), "syncs": {}}
found["asked"] = fresh.host_syncs(cases.Case(asking, (torch.ones(3, requires_grad=True),), None), "cpu")
for name in sys.argv[1:]:
    make = cases.CASES[name]
    case = make(**{key: value for key, value in fresh.SMALL.items() if key in inspect.signature(make).parameters})
    assert_same_as(case)
    found["syncs"][name] = len(fresh.host_syncs(case, "meta" if name in cases.OURS else "cpu"))
found["step"] = fresh.main('{"case": "supcon", "count": 4096, "thorough": true}')
found["too much"] = fresh.main('{"case": "eager_supcon", "count": 8192, "max_gigabytes": 0.05}')
print(json.dumps(found))
"""
OURS = sorted(name.removesuffix("_loss") for name in hpcloss.__all__ if name.endswith("_loss"))
# Of the small problems: a comparison, one whose competitor takes too long for turns, and one that is wrong.
SMALL = """
import json, sys
sys.path.insert(0, "benchmarks")
import cases, small, torch

names = {name for others in small.VECTORS.values() for name in others} | {*small.VECTORS, "eager_phpc", "block_loop"}
found = {"unknown": sorted(names.difference(cases.CASES))}
for loss, size in (("ntxent", 16), ("region_phpc", 8), ("regions", 64)):
    case, others, shape = small.problem(loss, size)
    found[loss] = small.compare(case, others[:1], shape, seconds=0.05)
small.LONGEST_STEP = 0.0
found["once"] = small.compare("supcon", ["eager_supcon"], {"count": 16}, seconds=0.05)
cases.CASES["wrong"] = lambda count: cases.supcon(count)._replace(loss=lambda x, y: x.norm(dim=1).mean())
try:
    small.compare("supcon", ["wrong"], {"count": 16})
except AssertionError as error:
    found["said"] = str(error)
print(json.dumps(found))
"""
EAGER = ["supcon", "infonce", "clip", "ntxent", "hard_negative_nce", "ihpc", "pccs"]
PEERS = [*(f"eager_{name}" for name in EAGER), "contrastiveseg", "block_loop"]
FURTHER = ["clip", "pccs"]  # losses of ours with other options


def run(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return run(CASES, *OURS, *FURTHER, *PEERS)


def test_every_loss_has_a_row(found):
    """And equals its dense form on a small input, as the peers written here do."""
    assert found["losses"] == OURS
    assert set(found["syncs"]) == {*OURS, *FURTHER, *PEERS}


def test_host_syncs(found):
    asked = (
        "index masked_select nonzero _unique2 tolist _local_scalar_dense _local_scalar_dense numpy cpu equal nonzero"
    )
    assert found["asked"] == asked.split()
    assert all(found["syncs"][name] == 0 for name in [*OURS, *FURTHER, *PEERS[: len(EAGER)]])
    # In each image once which classes there are; of each of 4 whether it is one, its size, hard and easy pixels.
    assert found["syncs"]["contrastiveseg"] == 2 * (1 + 4 * 4)


def test_a_step_in_a_process(found):
    names = {"extra_mb", "seconds", "loss", "gradient", "forward_seconds", "backward_seconds", "syncs"}
    assert set(found["step"]) == names and all(found["step"][name] > 0 for name in names - {"syncs"})
    if sys.platform == "linux":
        assert found["too much"] == {"out_of_memory": True}


def test_small_problems():
    found = run(SMALL)
    assert found["unknown"] == []
    methods = {
        "ntxent": ("ntxent", "eager_ntxent"), "region_phpc": ("region_phpc", "eager_phpc"),
        "regions": ("published_phpc", "block_loop"), "once": ("supcon", "eager_supcon"),
    }  # fmt: skip
    for problem, (ours, other) in methods.items():
        seconds, ratios = found[problem]["seconds"], found[problem]["ratios"]
        assert set(seconds) == {ours, other} and set(ratios) == {other}
        assert 0 < seconds[ours] < 60 and 0 < seconds[other] < 60
        # A median of quotients lies near the quotient of the medians. Other processes may disturb a few turns.
        assert 1 / 3 < ratios[other] * seconds[other] / seconds[ours] < 3
    assert found["regions"]["ratios"]["block_loop"] < 0.8, "ours over theirs, which takes three times as long"
    assert "loss of wrong" in found["said"]


@pytest.fixture(scope="module")
def document():
    return json.loads(plot.RESULTS.read_text())


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_pages_show_the_results(document, page):
    text = (ROOT / page).read_text()
    assert plot.with_figures(text, document) == text, "python -m benchmarks.plot"
    marks = [name for _, name, _ in plot.BLOCK.findall(text)]
    assert marks == ([""] if page == "README.md" else ["time", "memory", "source", "missed"])


def test_the_tables_are_those_of_the_results(document):
    assert plot.RESULTS.with_suffix(".md").read_text() == "\n".join(plot.tables(document)), "python -m benchmarks.plot"


def rows(method, group, **figures):
    return {"name": f"{method} {group}", "method": method, "group": group, **figures}


PASSES = {"seconds": 0.5, "forward_seconds": 0.2, "backward_seconds": 0.3, "peak_mb": 12.4, "syncs": 0}
FEW = {"seconds": 0.00021, "forward_seconds": 0.000098, "backward_seconds": 0.000112, "peak_mb": 0.0, "syncs": 0}
MADE_UP = [
    rows("ntxent", "NT-Xent against N", n=16, **FEW),
    rows("ntxent", "NT-Xent against N", n=1024, **PASSES),
    rows("ntxent", "NT-Xent against N", n=2048, **PASSES),
    rows("pml_ntxent", "NT-Xent against N", n=1024, **{**PASSES, "syncs": 4, "peak_mb": 0.2}),
    rows("pml_ntxent", "NT-Xent against N", n=2048, seconds=None, note="more than 5 GB"),
    rows("contrastiveseg", "sampled pixels", images=4, side=64, classes=3, **{**PASSES, "syncs": 68}),
    rows("ihpc", "every loss", **PASSES),
]


def test_made_up_tables(document):
    lines = "\n".join(plot.tables({**document, "rows": MADE_UP}))
    assert "| seconds, forward + backward (peak MB) | host syncs | N = 16 | N = 1024 | N = 2048 |" in lines
    assert "| hpcloss NT-Xent | 0 | 0.000098 + 0.000112 (<1) | 0.2 + 0.3 (12) | 0.2 + 0.3 (12) |" in lines
    assert "| pytorch-metric-learning NTXentLoss | 4 |  | 0.2 + 0.3 (<1) | more than 5 GB |" in lines
    assert "by images, side, classes | host syncs | 4 x 64 x 3 |" in lines and "| 68 | 0.2 + 0.3 (12) |" in lines
    assert "| `ihpc_loss` | 0.2 + 0.3 (12) | 0 |" in lines


def test_lines_of_the_figures(document):
    """From 16 rows on, in their order; a logarithm leaves out a peak of 0 and what was not finished."""
    document = {**document, "rows": [*reversed(MADE_UP)]}
    assert plot.points(document, "NT-Xent", "ntxent", "seconds") == [(16, 0.00021), (1024, 0.5), (2048, 0.5)]
    assert plot.points(document, "NT-Xent", "ntxent", "peak_mb") == [(1024, 12.4), (2048, 12.4)]
    assert plot.points(document, "NT-Xent", "pml_ntxent", "seconds") == [(1024, 0.5)]
    assert plot.points(document, "SupCon", "ntxent", "seconds") == []


def test_figures(document, tmp_path):
    """1,600 pixels wide: half as many on a page."""
    pytest.importorskip("matplotlib")
    written = plot.draw({**document, "rows": document["rows"] + MADE_UP}, tmp_path)
    assert [path.name for path in written] == ["front.png", "time.png", "memory.png"]
    for path in written:
        data = path.read_bytes()
        assert data[:4] == b"\x89PNG" and int.from_bytes(data[16:20], "big") == 1600  # the width in its header


def test_made_up_tables_of_a_page(document):
    document = {**document, "rows": MADE_UP}
    time, memory = ("\n".join(plot.page_table(document, what)) for what in ("time", "memory"))
    assert "| a step | N = 64 | N = 1,024 | N = 4,096 | N = 8,192 | N = 16,384 |" in time
    assert "| hpcloss NT-Xent | not measured | 0.50 s |" in time
    assert "| peak | N = 1,024 | N = 4,096 | N = 8,192 | N = 16,384 | host syncs |" in memory
    assert "| pytorch-metric-learning NTXentLoss | < 1 MB | not measured |" in memory and memory.endswith("| 4 |")
    later = [{**row, "n": 2 * row["n"]} for row in MADE_UP if row.get("n") == 2048]
    assert "> 5 GB" in "\n".join(plot.page_table({**document, "rows": later}, "time"))


def test_times_have_two_digits():
    seconds = [0.000387, 0.0094, 0.00999, 0.0112, 0.0951, 0.47, 0.997, 1.47, 14.4]
    expected = ["0.39 ms", "9.4 ms", "10 ms", "11 ms", "0.10 s", "0.47 s", "1.0 s", "1.5 s", "14 s"]
    assert [plot.time_of(x) for x in seconds] == expected


def test_missed_bars_are_counted(document):
    """One line for all numbers of rows of a loss: how many are missed, and the worst quotient."""
    made = [
        {"name": "bench_few[infonce-16]", "bars": [{"bar": "microseconds at most 100", "ratio": 180, "met": False}]},
        {
            "name": "bench_few[infonce-64]",
            "bars": [
                {"bar": "time over a at most 1", "ratio": 1.5, "met": False},
                {"bar": "time over b at most 1", "ratio": 0.5, "met": True},
            ],
        },
        {"name": "bench_few[supcon-64]", "bars": [{"bar": "time over a at most 1", "ratio": 0.9, "met": True}]},
    ]
    lines = plot.missed({**document, "rows": made})
    assert lines[0] == "2 of 4 bars are met."
    assert lines[-1] == "| `bench_few[infonce]` | 2 of 3 | 16, 64 | 1.5 (time over a at most 1) |" and len(lines) == 5


def test_the_sentences_of_the_readme(document):
    """The costs of the largest size that all finish, and the worst quotient of each size where there is one above 1."""
    costs = {"supcon": (0.5, 20), "compiled_supcon": (1, 200), "eager_supcon": (3, 1500), "pml_supcon": (5, 3000)}
    made = [rows(name, "SupCon against N", n=8192, seconds=s, peak_mb=mb) for name, (s, mb) in costs.items()]
    for n, eager, compiled in ((16, 1.7, 2.1), (64, 1.4, 0.9), (256, 0.9, 0.8)):
        figures = {"n": n, "over_eager_supcon": eager, "over_compiled_supcon": compiled, "over_pml_supcon": 9.0}
        made.append({"name": f"few {n}", "group": "small problems", "seconds": 0.1, **figures})
    first, second, _ = plot.summary({**document, "rows": made})
    assert "hpcloss 0.50 s and 20 MB; torch.compile 1.0 s and 200 MB; eager PyTorch 3.0 s and 1,500 MB;" in first
    assert "2.1 times as long at N = 16, 1.4 times as long at N = 64; from N = 256 on none does" in second
