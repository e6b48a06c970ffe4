"""`python -m hpcloss`: every primitive takes part, wrong numbers and errors are rows, the exit code tells of both.

tests/repository/test_imports.py runs the command itself.
"""

import pytest
import torch

import hpcloss
from hpcloss import __main__ as self_check
from hpcloss import backends, functional
from hpcloss.backends import blockwise

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(self_check, "ROUNDS", 1)
    monkeypatch.setattr(self_check, "SECONDS", 0)


@pytest.fixture
def run(capsys):
    """Exit code and rows of the command, by loss and backend."""

    def command():
        code = self_check.main(["--device", "cpu"])
        output = capsys.readouterr().out
        assert output.startswith(f"hpcloss {hpcloss.__version__}, Python ") and hpcloss.info() in output
        _, table, end = output.rsplit("\n\n", 2)
        rows = {tuple(line.split()[:2]): line for line in table.splitlines()[1:]}
        assert all(" float32 " in row for row in rows.values())
        assert ("bug report" in end) == (code == 1)
        return code, rows

    return command


def failed(rows):
    return {key for key, row in rows.items() if " FAILED " in row}


def test_every_loss_passes_on_every_backend(run):
    code, rows = run()
    assert code == 0 and all(" ok " in row for row in rows.values())
    losses = {problem.name for problem in self_check.problems(CPU)}
    assert set(rows) == {(loss, backend) for loss in losses for backend in ("dense", "blockwise")}


def test_every_primitive_takes_part(monkeypatch):
    called = set()

    def recorded(name, function):
        return lambda *args: called.add(name) or function(*args)

    for name in blockwise.__all__:
        monkeypatch.setattr(blockwise, name, recorded(name, getattr(blockwise, name)))
    for problem in self_check.problems(CPU):
        self_check.step(problem.loss("blockwise"), problem.leaves, torch.float32)
    # The tiles call `pair_lse_both` inside `one_positive`. `rows_dtype` computes nothing.
    assert set(blockwise.__all__) - called == {"pair_lse_both", "pair_lse_both_backward", "rows_dtype"}


def test_a_wrong_gradient_fails(run, monkeypatch):
    """By a thousandth, in one primitive of one backend."""
    right = blockwise.pair_cross_entropy_backward

    def wrong(*args):
        d_anchors, *others = right(*args)
        return 1.001 * d_anchors, *others

    monkeypatch.setattr(blockwise, "pair_cross_entropy_backward", wrong)
    code, rows = run()
    assert code == 1 and failed(rows) == {("supcon", "blockwise"), ("local_contrast", "blockwise")}
    assert "1.0e-03" in rows["supcon", "blockwise"]


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_value_fails(run, monkeypatch, factor):
    right = functional.infonce_loss

    def wrong(*args, **options):
        loss = right(*args, **options)
        return loss + (factor - 1) * loss.detach()  # the gradient is right

    monkeypatch.setattr(functional, "infonce_loss", wrong)
    code, rows = run()
    assert code == 1 and failed(rows) == {("infonce", "dense"), ("infonce", "blockwise")}


def test_a_backend_that_raises_is_a_row(run, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel\nand much more about it")

    monkeypatch.setattr(blockwise, "pair_lse", broken)
    code, rows = run()
    assert code == 1 and failed(rows) == {("region_phpc", "blockwise"), ("pixel_contrast", "blockwise")}
    assert rows["region_phpc", "blockwise"].endswith("FAILED   RuntimeError: no such kernel")


def test_a_backend_that_refuses_the_call_is_a_row(run, monkeypatch):
    """As Triton where the trial of its kernels fails."""
    monkeypatch.setattr(self_check, "available", lambda tensor: ["blockwise", "triton"])
    monkeypatch.setattr(backends, "_triton_refusal", lambda *place: "")
    monkeypatch.setattr(backends, "_triton_failing", lambda *args: ("a kernel cannot be built here",))
    code, rows = run()
    assert code == 1 and {backend for _, backend in failed(rows)} == {"triton"}
    assert rows["supcon", "triton"].endswith("backend 'triton' cannot run this call: a kernel cannot be built here")


def test_backends_of_a_device(monkeypatch):
    cpu, elsewhere = torch.empty(0, 1), torch.empty(0, 1, device="meta")
    monkeypatch.setattr(backends, "_triton_refusal", lambda *place: "no")
    assert backends.available(cpu) == ["dense", "blockwise"]
    monkeypatch.setattr(backends, "_triton_refusal", lambda *place: "")
    assert backends.available(elsewhere) == ["dense", "blockwise", "triton"]


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(capsys, device):
    with pytest.raises(SystemExit) as stop:
        self_check.main(["--device", device])
    assert stop.value.code == 2
    assert f"--device must be a device of this machine, got '{device}': " in capsys.readouterr().err


def test_a_device_without_a_backend(capsys, monkeypatch):
    monkeypatch.setattr(self_check, "available", lambda tensor: [])
    with pytest.raises(SystemExit):
        self_check.main(["--device", "cpu"])
    assert "--device must be a device that a backend supports, got 'cpu'" in capsys.readouterr().err
