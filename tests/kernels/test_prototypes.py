"""Local contrast and the losses of prototypes through the Triton kernels, against blockwise in float64."""

import pytest
import torch

import hpcloss
from hpcloss import reference
from tests.tools.cases import choice, integers, rows, value_and_grads
from tests.tools.kernels import DEVICE, DTYPES, needs_kernels
from tests.tools.numerics import assert_within_budget

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

LABELS = choice([0, 1, 2, 255], 3, 7, 6)
LAYERS = integers(3, 3, 7, 6, seed=1)
PARTNER = torch.tensor([1, 1, -1])
BANK = rows(3, 2, 5, seed=3, dtype=torch.float32)
BANK[1, 1] = 0  # not filled
PROBS = torch.softmax(2 * rows(3, 3, 7, 6, seed=4, dtype=torch.float32), 1)
VECTOR_LABELS, VECTOR_PROBS = choice([0, 1, 2, -1], 40), PROBS.movedim(1, -1).reshape(-1, 3)[:40]


def local(x, losses, **options):
    only = {} if losses is reference else {"samples_per_class": None}
    partner = PARTNER.to(x.device)
    return losses.local_contrast_loss(x, LABELS.to(x.device), partner, 0.3, num_classes=3, **only, **options)


def contrast(x, losses, **options):
    vectors = x.flatten(2).transpose(1, 2).reshape(-1, 5)[:40]
    labels, probs = VECTOR_LABELS.to(x.device), VECTOR_PROBS.to(x.device)
    return losses.prototype_contrast_loss(vectors, labels, probs, 0.3, **options)


def assignment(x, losses, **options):
    labels, bank = LABELS.to(x.device), BANK.to(x.device)
    return losses.prototype_assignment_loss(x, labels, bank, x.detach().flip(0), 0.3, epsilon=0.5, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", [local, contrast, assignment], ids=lambda loss: loss.__name__)
def test_losses(loss, dtype):
    x = rows(3, 5, 7, 6, dtype=dtype)
    exact, (exact_grad,) = value_and_grads(lambda x: loss(x, hpcloss, backend="blockwise"), x.double())
    eager, (eager_grad,) = value_and_grads(lambda x: loss(x, reference), x)
    value, (grad,) = value_and_grads(lambda x: loss(x, hpcloss, backend="triton"), x.to(DEVICE))
    assert value.dtype == torch.float32 and grad.dtype == dtype and exact > 0
    assert_within_budget(value, eager, exact, "loss", dtype)
    assert_within_budget(grad, eager_grad, exact_grad, "grad")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prototypes_of_layers(dtype):
    """From the map through both means to the contrast of the prototypes."""
    x, probs = rows(3, 5, 7, 6, dtype=dtype), PROBS.to(dtype)

    def loss(x, probs, backend):
        layers, labels = LAYERS.to(x.device), LABELS.to(x.device)
        found = hpcloss.layer_prototypes(x, layers, labels, 3, 3, probs, backend=backend)
        return hpcloss.prototype_contrast_loss(*found, 0.3, backend=backend)

    exact, exact_grads = value_and_grads(lambda *maps: loss(*maps, "blockwise"), x.double(), probs.double())
    plain, plain_grads = value_and_grads(lambda *maps: loss(*maps, "blockwise"), x, probs)
    value, grads = value_and_grads(lambda *maps: loss(*maps, "triton"), x.to(DEVICE), probs.to(DEVICE))
    assert_within_budget(value, plain, exact, "loss", torch.float32 if dtype == torch.float32 else torch.bfloat16)
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        # Raw half-precision rows are packed as bfloat16.
        packed = torch.float32 if dtype == torch.float32 else torch.bfloat16
        assert_within_budget(grad, plain_grad, exact_grad, "grad", packed)
