"""The contrast of sampled pixels through the kernels, with and without a queue, against the reference in float64."""

import pytest
import torch

import hpcloss
from tests.losses.test_memory import filled
from tests.tools.cases import choice, rows
from tests.tools.kernels import DEVICE, DTYPES, needs_kernels
from tests.tools.losses import FAST, ORACLE
from tests.tools.numerics import assert_within_budget

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]
fast, oracle = FAST["pixel_contrast"], ORACLE["pixel_contrast"]


def value_and_grads(loss, x, temperature):
    leaves = [x.detach().requires_grad_(), torch.tensor(temperature, device=x.device).to(x.dtype).requires_grad_()]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("background", [None, 0])
@pytest.mark.parametrize("counts", [None, (5, 0, 19), (0, 0, 0), (40, 40, 40)], ids=str)
def test_every_pixel(counts, background, dtype):
    x, labels = rows(2, 6, 8, 7, dtype=dtype), choice([0, 1, 1, 2, 255], 2, 8, 7)
    bank = bank_labels = queue = None
    if counts is not None:
        bank_labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
        queue = hpcloss.EmbeddingQueue(3, 40, 6)
        queue.enqueue(rows(len(bank_labels), 6, seed=3), bank_labels)
        queue = queue.to(DEVICE, torch.float16 if dtype == torch.float16 else torch.float32)
        bank = torch.cat([slots[:held] for slots, held in zip(queue.embeddings, counts, strict=True)]).cpu()
    options = {"num_classes": 3, "background": background}

    def kernels(x, t):
        y = labels.to(DEVICE)
        return fast(x, y, None, queue, t, samples_per_class=None, backend="triton", **options)

    def dense(x, t):
        return oracle(x, labels, bank, bank_labels, t, **options)

    value, grads = value_and_grads(kernels, x.to(DEVICE), 0.2)
    exact, exact_grads = value_and_grads(dense, x.double(), 0.2)
    plain, plain_grads = value_and_grads(dense, x, 0.2)
    assert value.dtype == torch.float32 and exact > 0
    assert_within_budget(value, plain, exact, "loss")
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        assert_within_budget(grad, plain_grad, exact_grad, "grad")


def test_a_number_as_temperature_and_samples():
    """The variants with shared exponentials; what is drawn does not depend on the backend."""
    x, labels = rows(2, 6, 8, 7, dtype=torch.float32).to(DEVICE), choice([0, 1, 1, 2, 255], 2, 8, 7).to(DEVICE)
    queue = hpcloss.EmbeddingQueue(3, 9, 6).to(DEVICE)
    queue.enqueue(x, labels)
    results = []
    for backend in ("triton", "blockwise"):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        loss = fast(leaf, labels, labels.flip(1), queue, num_classes=3, samples_per_class=5, backend=backend)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_enqueue_on_the_device():
    expected, queue = filled(), hpcloss.EmbeddingQueue(3, 4, 5).to(DEVICE)
    queue.load_state_dict(expected.state_dict())
    x, labels = rows(2, 5, 6, 7, dtype=torch.float32), choice([0, 1, 2, 255], 2, 6, 7)
    for some, device in ((expected, "cpu"), (queue, DEVICE)):
        some.enqueue_means(x.to(device), labels.to(device))
        some.enqueue(x.to(device), labels.to(device))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(queue.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-6)
