"""What `info()` says has been done on an architecture is what the tests do, and what was measured on one."""

import json
from pathlib import Path

import pytest
import torch

from tests.tools.kernels import compile_or_skip

compile_or_skip()
import hpcloss  # noqa: E402
from hpcloss import backends  # noqa: E402
from hpcloss.backends import evidence  # noqa: E402
from hpcloss.backends.triton import configs, trial  # noqa: E402
from tests.compiled import (  # noqa: E402
    test_budgets_hopper,
    test_budgets_hopper_backward,
    test_budgets_newer,
    test_budgets_older,
    test_launch_path,
    test_ptx,
)

BUDGETS = (test_budgets_older, test_budgets_newer, test_budgets_hopper, test_budgets_hopper_backward)
RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def capabilities(*tests):
    """Those tests are given, the slow ones among them."""
    cases = [
        case.values[0]
        for test in tests
        for mark in test.pytestmark
        if mark.name == "parametrize" and mark.args[0][0] == "capability"
        for case in mark.args[1]
    ]
    assert cases
    return sorted(set(cases))


@pytest.mark.parametrize(
    ("what", "tests"),
    [
        ("compiled", [part.test_budget for part in BUDGETS]),
        ("executed (PTX interpreter)", (test_ptx.test_losses,)),
        ("launched (stand-in driver)", (test_launch_path.test_step,)),
    ],
)
def test_tests(what, tests):
    assert list(evidence.SEEN[what]) == capabilities(*tests)


def measured(found):
    """The capabilities of the GPUs in a result, however deep."""
    if isinstance(found, dict):
        both = found.get("capability")
        own = {10 * both[0] + both[1]} if isinstance(both, list) else set()
        return own.union(*map(measured, found.values()))
    return set().union(*map(measured, found)) if isinstance(found, list) else set()


def test_measurements():
    assert measured([{"machine": {"capability": [9, 0]}}, {"capability": None}]) == {90}
    results = [json.loads(path.read_text()) for path in RESULTS.rglob("*.json")]
    assert results
    assert set(evidence.SEEN["measured on a GPU"]) == measured(results)


SAID = {
    75: "kernels on sm_75: compiled; not executed (PTX interpreter), not launched (stand-in driver),"
        " not measured on a GPU",
    87: "kernels on sm_87: tile shapes of 'ampere', compiled for none",
    90: "kernels on sm_90: compiled, executed (PTX interpreter), launched (stand-in driver); not measured on a GPU",
    130: "kernels on sm_130: smallest tile shapes, compiled for none",
}  # fmt: skip


@pytest.mark.parametrize("capability", SAID)
@pytest.mark.parametrize("reason", ["", "a kernel cannot be built here"])
def test_info(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(trial, "failure", lambda *_: (reason, True))
    backends.forget()
    try:
        lines = hpcloss.info().splitlines()
    finally:
        backends.forget()
    assert SAID[capability] in lines
    assert f"backend triton: {'not available, ' + reason if reason else 'available'}" in lines


def test_every_part_that_is_compiled_has_shapes():
    assert {configs.part(capability) for capability in evidence.SEEN["compiled"]} == set(configs.CONFIGS) - {"amd"}


def test_amd():
    from tests.tools import offline

    assert evidence.AMD == f"kernels on AMD devices: compiled for {' and '.join(offline.AMD)}; never run"
