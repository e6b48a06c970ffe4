"""Every loss of the list on its small inputs: value and gradients are those of the reference, in float64.

Inputs of this size run dense by themselves, so the tiles are asked for by name.
"""

import inspect
from functools import partial

import pytest

from tests.tools.cases import assert_same
from tests.tools.losses import FAST, LOSSES, ORACLE, Sizes


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name, backend):
    loss = LOSSES[name]
    inputs = loss.inputs(Sizes())
    leaves = {key: x for key, x in inputs.items() if x.is_floating_point() and key not in loss.constants}
    others = {key: x for key, x in inputs.items() if key not in leaves}
    known = inspect.signature(ORACLE[name]).parameters
    exact = partial(ORACLE[name], **{key: x for key, x in loss.required.items() if key in known})

    def by_name(call):
        return lambda *tensors: call(**dict(zip(leaves, tensors, strict=True)), **others)

    fast = partial(FAST[name], **loss.required, backend=backend)
    assert_same(by_name(fast), by_name(exact), *leaves.values())
