"""What losses do with values that are not finite or hardly are, `check_finite`, and a slice of the stress test."""

import math
import re

import pytest
import torch

import hpcloss
from tests.tools.cases import integers, rows
from tests.tools.losses import FAST, NAMES
from tests.tools.stress import equal, every_call, failure

# Probabilities, which are used as they are.
WEIGHTS = ("probs",)
EVERYWHERE = [(name, tensor) for name, call in every_call().items() for tensor in call.tensors]
SOMEWHERE = [(name, tensor) for name, call in every_call().items() for tensor in call.used]


@pytest.mark.parametrize("first", range(0, 104, 26))
def test_random_configurations(first):
    failures = [found for found in map(failure, range(first, first + 26)) if found]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name,tensor", SOMEWHERE)
def test_what_takes_no_part_may_hold_anything(name, tensor, poison):
    call = every_call()[name]
    x, used = call.tensors[tensor], call.used[tensor][:, None]
    expected = call.gradients(**{tensor: torch.where(used, x, 0.0)})
    poisoned = torch.where(used, x, poison)
    found = call.gradients(**{tensor: poisoned})
    assert found["value"] > 0 and equal(found, expected)
    if tensor in found:
        assert (torch.where(used, 0.0, found[tensor]) == 0).all() and found[tensor].any()
    assert torch.equal(call(check_finite=True, **{tensor: poisoned}), found["value"])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name,tensor", EVERYWHERE)
def test_check_finite_says_where(name, tensor, poison):
    call = every_call()[name]
    x = call.tensors[tensor].clone()
    used = call.used.get(tensor, torch.ones(x[:, 0].shape, dtype=torch.bool))
    first, last = used.nonzero()[0].tolist(), used.nonzero()[-1].tolist()
    place = (first[0], 1, *first[1:])
    x[place] = poison
    x[(last[0], slice(2), *last[1:])] = poison
    assert not call(**{tensor: x}).isfinite()
    message = f"{tensor} must be finite where it is used, got 3 values that are not; the first is {poison} at {place}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(check_finite=True, **{tensor: x})
    assert call(check_finite=True).isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_check_finite_of_a_temperature(name):
    call, options = every_call()[name], {"hardness": 1.0} if name == "prototype_contrast" else {}
    with pytest.raises(ValueError, match=r"^temperature must be finite where it is used, got 1 .* nan at \(\)$"):
        call(temperature=torch.tensor(math.nan), check_finite=True, **options)


def test_check_finite_of_a_queue_and_of_a_module():
    queue, x, labels = hpcloss.EmbeddingQueue(3, 4, 8), rows(2, 8, 6, 5).float(), integers(3, 2, 6, 5)
    queue.enqueue(rows(2, 8).float(), torch.tensor([0, 1]))
    loss = hpcloss.PixelContrastLoss(num_classes=3, samples_per_class=None, check_finite=True)
    assert loss(x, labels, None, queue).isfinite()
    queue.embeddings[1, 0, 3] = math.nan
    with pytest.raises(ValueError, match=r"^queue must be finite where it is used, got 1 .* at \(4, 3\)$"):
        loss(x, labels, None, queue)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
def test_check_finite_interrupts_what_is_compiled():
    call = every_call()["region_phpc"]
    x = call.tensors["features"]
    compiled = torch.compile(FAST["region_phpc"], backend="eager")
    assert torch.equal(compiled(x, check_finite=True, **call.options), call())
    with pytest.raises(ValueError, match="features must be finite"):
        compiled(x / 0, check_finite=True, **call.options)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_size_of_features(name, dtype):
    """Rows of 1e30 mean what rows of 1 do; rows of 1e-30 and denormals have no direction; none is an error."""
    call = every_call(dtype)[name]
    features = {key: x for key, x in call.tensors.items() if key not in WEIGHTS}
    expected = call.gradients()
    power = 2.0**100  # exact: every digit stays
    large = call.gradients(**{key: x * power for key, x in features.items()})
    for key, right in expected.items():
        found = large[key] * power if key in features else large[key]
        assert torch.allclose(found, right, rtol=1e-4, atol=1e-5 * right.abs().max().item()), key
    zero = call.gradients(**{key: 0 * x for key, x in features.items()})
    assert zero["value"].isfinite() and not any(zero[key].any() for key in zero.keys() & features.keys())
    for small in (1e-30, torch.finfo(dtype).tiny / 16):
        assert equal(call.gradients(**{key: x * small for key, x in features.items()}), zero)
