"""The supervisor of the acceptance run, and its stages of tests and of the sanitizer: time limits, hangs, skips."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__, library, limits, processes, report, sanitizer, share, supervisor
from benchmarks.gpu import tests as stage

# ----------------------------------------------------------------------------------------------------------- supervisor

WORKER = """
import json, os, signal, subprocess, sys, time
answers = os.fdopen(int(sys.argv[1]), "w")
request = json.loads(sys.stdin.readline())
def say(**answer):
    print(json.dumps(answer), file=answers, flush=True)
def grandchild():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], process_group=0)
    open(os.environ["PIDS"], "a").write(f"{process.pid}\\n")
if os.environ.get("NEVER"):
    sys.exit(3)
for name in request["names"]:
    say(begin=name)
    if "hangs" in name:
        grandchild()
        time.sleep(1000)
    if "breaks" in name:
        grandchild()
        os.kill(os.getpid(), signal.SIGSEGV)
    if "loses its context" in name:
        say(row={"name": name, "status": "error", "message": "CUDA error: an illegal memory access"})
        say(restart=True)
        sys.exit(0)
    say(row={"name": name, "status": "ok", "pid": os.getpid()})
say(done={"compiled": 1, "loaded": 0})
"""


def supervised(tmp_path, *options, **environment):
    """A supervisor whose children run WORKER."""
    (tmp_path / "worker.py").write_text(WORKER)
    one = supervisor.Supervisor(__main__.parsed(["--out", str(tmp_path / "out"), *options]), "gpu")
    one.worker = [sys.executable, str(tmp_path / "worker.py")]
    one.environment |= {"PIDS": str(tmp_path / "pids"), **environment}
    return one


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def none_runs(pids):
    """They are killed, which may take a moment."""
    until = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(is_running, pids))


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
group_of_a_process = pytest.mark.skipif(sys.version_info < (3, 11), reason="subprocess has process_group since 3.11")


@linux
@group_of_a_process
def test_rows_that_hang_or_break_are_given_up_and_the_next_goes_on(tmp_path):
    one = supervised(tmp_path, "--row-limit", "3")
    names = ["first", "hangs", "second", "breaks", "third", "loses its context", "fourth", "fifth"]
    one.group("bars", names, until=100.0)
    rows = {row["name"]: row for row in one.document["rows"]}
    assert list(rows) == names
    assert {name for name, row in rows.items() if row["status"] == "error"} == {"hangs", "breaks", "loses its context"}
    assert rows["hangs"]["message"] == "no result within 3 s"
    assert rows["breaks"]["message"] == "its process ended: signal SIGSEGV"
    fine = [rows[name]["pid"] for name in ("first", "second", "third", "fourth", "fifth")]
    assert len(set(fine)) == 4 and fine[3] == fine[4]  # a fresh process after each, and no more than that
    started = (tmp_path / "pids").read_text().split()
    assert len(started) == 2 and none_runs(started)  # what they started, in a process group of its own
    assert not report.correct(one.document)


def test_rows_without_time_are_left_out_and_no_failure(tmp_path):
    one = supervised(tmp_path)
    one.group("bars", ["first", "second"], until=one.seconds() + limits.FEWEST - 0.01)
    assert [row["status"] for row in one.document["rows"]] == ["left out", "left out"]
    assert report.correct(one.document) and "LEFT OUT, no time: 2 rows: first, second" in report.table(one.document)
    one.document["rows"].append({"name": "third", "status": "error", "message": "wrong"})
    assert not report.correct(one.document)


@linux
@group_of_a_process
def test_a_row_at_the_end_of_the_time_is_left_out(tmp_path):
    """It is stopped because the rows' time is over, not because it takes long."""
    one = supervised(tmp_path)
    one.group("bars", ["hangs", "second"], until=one.seconds() + limits.FEWEST + 1.5)
    assert [row["status"] for row in one.document["rows"]] == ["left out", "left out"]
    assert none_runs((tmp_path / "pids").read_text().split())


def test_processes_that_never_start_are_not_started_for_each_row(tmp_path):
    one = supervised(tmp_path, NEVER="1")
    one.group("bars", ["first", "second", "third"], until=100.0)
    assert {row["status"] for row in one.document["rows"]} == {"error"} and len(one.document["rows"]) == 3


@pytest.fixture
def no_nvcc(monkeypatch):
    monkeypatch.setattr(library, "find_nvcc", lambda: None)


def test_a_smoke_test_whose_process_breaks_has_failed(tmp_path, no_nvcc):
    one = supervised(tmp_path, NEVER="1")
    assert not one.smoke(until=50.0, scratch=tmp_path)
    assert one.document["smoke"][-1]["message"] == "its process ended: exit status 3"


def test_stages_without_time_say_so(tmp_path):
    one = supervised(tmp_path)
    one.stage("tests", stage.run, until=one.seconds() + 1)
    assert one.document["tests"]["status"] == "left out" and "no time" in one.document["tests"]["message"]
    assert report.correct(one.document)


@pytest.mark.parametrize("limit", [30.0, 100.0, limits.LIMIT, 3600.0])
@pytest.mark.parametrize("with_tests", [True, False])
@pytest.mark.parametrize("with_sanitizer", [True, False])
def test_the_stages_end_within_the_limit(limit, with_tests, with_sanitizer):
    ends = limits.ends(limit, with_tests, with_sanitizer)
    assert 0 < ends.smoke <= ends.bars <= ends.tests <= ends.sanitizer < limit
    assert (ends.tests > ends.bars) == with_tests and (ends.sanitizer > ends.tests) == with_sanitizer
    assert ends.bars >= limit / 2  # the rows come first


def test_the_whole_run_fits_a_command_of_ten_minutes():
    ends = limits.ends(limits.LIMIT)
    assert ends.sanitizer + limits.CLOSING <= limits.LIMIT <= 580
    assert ends.tests - ends.bars == limits.TESTS and ends.sanitizer - ends.tests == limits.SANITIZER
    assert __main__.parsed([]).limit == limits.LIMIT


# ------------------------------------------------------------------------------------------------ tests and sanitizer


def told(*tests, chosen=None, begun=(), at=0.0):
    """What the plugin writes: (name, outcome, reason) of each test, and tests that have only begun."""
    lines = [{"chosen": len(tests) + len(begun) if chosen is None else chosen}]
    for name, outcome, *reason in tests:
        lines += [
            {"begin": name, "at": at},
            {"test": name, "outcome": outcome, "kernels": {"compiled": 2, "loaded": 1}},
        ]
        lines[-1] |= {"reason": reason[0]} if reason else {}
    return lines + [{"begin": name, "at": at} for name in begun]


def test_skips_are_counted_by_their_reason():
    some = told(("a", "passed"), ("b", "skipped", "Skipped: no CUDA half"), ("c", "skipped", "Skipped: no CUDA half"))
    found = stage.summary([some, told(("d", "skipped", "Skipped: one CUDA device"))], ["exit status 0"] * 2, 0.0)
    assert found["skips"] == {"no CUDA half": 2, "one CUDA device": 1}
    assert (found["status"], found["passed"], found["skipped"], found["failed"]) == ("ok", 1, 3, 0)
    assert found["kernels"] == {"compiled": 4, "loaded": 2}
    assert "skipped: 2 x no CUDA half" in report.table(report.new("") | {"tests": found})


def test_a_run_of_skips_alone_is_no_success():
    found = stage.summary([told(("a", "skipped", "Skipped: no CUDA device"))], ["exit status 0"], 0.0)
    assert found["status"] == "failed" and found["failures"] == ["not one test passed"]
    assert not report.correct(report.new("") | {"tests": found})


def test_tests_without_time_are_counted_and_one_that_hangs_has_failed():
    some = told(("a", "passed"), chosen=10, begun=["b"], at=100.0)
    found = stage.summary([some], ["no time"], 100.0 + limits.ONE_TEST - 1)
    assert (found["status"], found["not_run"], found["failures"]) == ("left out", 9, [])
    found = stage.summary([some], ["no time"], 100.0 + limits.ONE_TEST + 1)
    assert (found["status"], found["not_run"], len(found["failures"])) == ("failed", 8, 1)


def test_a_process_of_tests_that_breaks_has_failed():
    found = stage.summary([told(("a", "passed"), begun=["b"])], ["signal SIGSEGV"], 0.0)
    assert found["status"] == "failed" and found["failures"] == ["b: signal SIGSEGV"]
    assert not report.correct(report.new("") | {"tests": found})


TESTS = """
import time, pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.mark.skip(reason="of no use")
def test_is_skipped(): pass
@pytest.fixture
def broken(): raise ValueError
def test_is_broken(broken): pass
"""


def test_results_come_from_pytest(tmp_path):
    """Each outcome of a real run, and the tests that a killed process did not come to."""
    (tmp_path / "test_some.py").write_text(TESTS)
    options = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.share", "-c", os.devnull, "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_some.py")]
    results = [tmp_path / "results.jsonl"]
    ends = stage.processes(command, results, tmp_path / "log", lambda: 60.0, {})
    found = stage.summary([stage.lines(path) for path in results], ends, time.time())
    assert (found["status"], found["passed"], found["failed"], found["skipped"]) == ("failed", 1, 2, 1), ends
    assert found["skips"] == {"of no use": 1}
    (tmp_path / "test_some.py").write_text("import time\ndef test_first(): pass\ndef test_long(): time.sleep(100)\n")
    results = [tmp_path / "again.jsonl"]

    def left():  # until the second has begun
        until = time.monotonic() + 60
        while "test_long" not in results[0].read_text() and time.monotonic() < until:
            time.sleep(0.05)
        return 0.2

    ends = stage.processes(command, results, tmp_path / "log", left, {})
    found = stage.summary([stage.lines(path) for path in results], ends, time.time())
    assert (ends, found["status"], found["passed"], found["not_run"]) == (["no time"], "left out", 1, 1)


class Item:
    def __init__(self, name, file="test_kernels.py", gpu=False):
        self.name, self.path, self.gpu = name, Path(file), gpu

    def get_closest_marker(self, name):
        return self.gpu or None


def test_every_test_is_some_process_share():
    items = [Item(f"test_{i}") for i in range(30)] + [Item("test_beyond_two_to_the_31")]
    items += [Item("on a GPU", "test_gpu.py", True), Item("interpreted", "test_gpu.py")]
    for parts in (1, 2, 13):
        taken = [item.name for part in range(parts) for item in share.chosen(items, part, parts)]
        assert sorted(taken) == sorted(item.name for item in items if item.name != "interpreted")


TOOL = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}]); sys.exit({})"
SLEEPS = "import os, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(1000)"


@linux
def test_the_sanitizer_is_killed_with_its_children_at_its_limit(tmp_path):
    command = [sys.executable, "-c", TOOL.format(SLEEPS.format(str(tmp_path / "pid")), 0)]
    began = time.monotonic()
    found = sanitizer.watched(command, tmp_path, lambda: 2.0, {})
    assert found["status"] == "left out" and time.monotonic() - began < 10
    assert none_runs([(tmp_path / "pid").read_text()])


def test_what_the_sanitizer_finds_is_a_failure(tmp_path):
    found = sanitizer.watched([sys.executable, "-c", "print('Invalid read'); exit(9)"], tmp_path, lambda: 20.0, {})
    assert found["status"] == "failed" and "exit status 9" in found["message"] and "Invalid read" in found["message"]
    assert not report.correct(report.new("") | {"sanitizer": found})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_run_ends_and_says_so(tmp_path, capsys, no_nvcc):
    one = supervisor.Supervisor(__main__.parsed(["--out", str(tmp_path / "out")]), "gpu")
    assert one.run() == 1
    assert "there is no CUDA device: --dry runs on the CPU" in capsys.readouterr().out
    assert one.document["rows"] == []


def test_kernels_for_another_machine_are_no_secret():
    machine = {"capability": [9, 0], "versions": {"triton": "3.6.0"}}
    here = {"triton": "3.6.0", "capability": 90}
    for cache, fits in ((here, True), (here | {"triton": "3.5.1"}, False), (here | {"capability": 80}, False)):
        text = report.table(report.new("") | {"machine": machine, "cache": cache})
        assert ("THE CARRIED KERNELS ARE FOR ANOTHER MACHINE" in text) != fits


def test_how_a_process_ended():
    assert processes.how(-9) == "signal SIGKILL" and processes.how(3) == "exit status 3"
