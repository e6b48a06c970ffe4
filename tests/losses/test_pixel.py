"""The contrast of sampled pixels: against the reference and by hand; its samples, its memory, compilers, precision."""

import math
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import hpcloss
from hpcloss.losses import pixel as pixel_losses
from tests.tools.cases import LABELS, MAPS, NOISE, assert_same, choice, integers, rows, value_and_grads
from tests.tools.documents import blocks
from tests.tools.losses import FAST, ORACLE
from tests.tools.numerics import assert_exact, assert_within_budget

fast, oracle = FAST["pixel_contrast"], ORACLE["pixel_contrast"]
EVERY = {"samples_per_class": None}


def filled_queue(counts, dim, size=None, seed=3):
    """A float64 queue whose class c holds counts[c] embeddings, and what it holds: (queue, bank, labels)."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    bank = F.normalize(rows(len(labels), dim, seed=seed), dim=1)
    queue = hpcloss.EmbeddingQueue(len(counts), size or max(max(counts), 1), dim).double()
    queue.enqueue(bank, labels)
    return queue, bank, labels


# ------------------------------------------------------------------------------------------------------------ oracle

OPTIONS = [
    {},
    {"background": 0, "reduction": "class"},
    {"background": 2, "reduction": "none", "temperature": 0.5},
    {"background": 77, "reduction": "sum", "normalize": False, "temperature": 1.0},
    {"ignore_index": (1, -1), "temperature": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("shape", MAPS)
def test_every_pixel(shape, labels, options):
    shape = MAPS[shape]
    labels = LABELS[labels]((shape[0], *shape[2:]), 0)
    options = {"num_classes": 4, **options}
    assert_same(lambda x: fast(x, labels, **EVERY, **options), lambda x: oracle(x, labels, **options), rows(*shape))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (2, 0, 5, 1), (5, 5, 5, 5), (0, 9, 0, 0)], ids=str)
def test_every_pixel_and_a_queue(counts, labels, options):
    for shape in (MAPS["2-D"], MAPS["3-D"], MAPS["one pixel"]):
        y = LABELS[labels]((shape[0], *shape[2:]), 0)
        some = {"num_classes": 4, **options}
        queue, bank, bank_labels = filled_queue(counts, shape[1], size=5)
        bank, bank_labels = bank[-5:] if counts[1] == 9 else bank, bank_labels[-5:] if counts[1] == 9 else bank_labels
        assert_same(
            lambda x: fast(x, y, None, queue, **EVERY, **some),  # noqa: B023
            lambda x: oracle(x, y, bank, bank_labels, **some),  # noqa: B023
            rows(*shape),
        )  # fmt: skip


def test_beyond_one_tile():
    labels = choice([0, 0, 0, 1, 2, 2, 255], 2, 30, 31)
    queue, bank, bank_labels = filled_queue((700, 3, 900), 3, size=1000)
    assert_same(
        lambda x, t: fast(x, labels, None, queue, t, num_classes=3, **EVERY),
        lambda x, t: oracle(x, labels, bank, bank_labels, t, num_classes=3),
        rows(2, 3, 30, 31), torch.tensor(0.2).double(),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6)])
@pytest.mark.parametrize("options", [EVERY, {}])
def test_an_empty_map(shape, options):
    features = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    for queue in (None, filled_queue((2, 2, 2), 4)[0]):
        for reduction in ("mean", "class", "sum", "none"):
            loss = fast(features, labels, labels, queue, num_classes=3, reduction=reduction, **options)
            assert loss.shape == (labels.shape if reduction == "none" else ()) and loss.sum() == 0
            loss.sum().backward()


@pytest.mark.parametrize("labels", ["no positives", "no negatives", "all ignored"])
def test_nothing_counted_is_zero_joined_to_the_graph(labels):
    for queue in (None, hpcloss.EmbeddingQueue(400, 2, 5)):
        features = rows(2, 5, 7, 6).requires_grad_()
        loss = fast(
            features, LABELS[labels]((2, 7, 6), 0), None, queue, num_classes=400, ignore_index=255, samples_per_class=3
        )
        loss.backward()
        assert loss == 0 and (features.grad == 0).all()


def test_it_is_the_region_loss_of_one_region_without_hardness():
    labels, features = choice([0, 1, 2, 255], 2, 7, 6), rows(2, 5, 7, 6)
    phpc = partial(ORACLE["region_phpc"], region_size=None, temperature=0.07, hardness=0.0)
    for background in (None, 0):
        for loss in (partial(fast, **EVERY), oracle):
            assert_same(
                lambda x: loss(x, labels, num_classes=3, background=background),  # noqa: B023
                lambda x: phpc(x, labels, background=background),  # noqa: B023
                features,
            )


def test_a_queue_is_more_pixels_that_are_no_anchors():
    """The batch in two halves: one as pixels, the other as the bank, against the whole map with the other ignored."""
    labels, features = choice([0, 1, 2, 2], 2, 1, 12), rows(2, 4, 1, 12)
    queue = hpcloss.EmbeddingQueue(3, 12, 4).double()
    queue.enqueue(features[1:], labels[1:])
    whole = fast(features, labels, num_classes=3, reduction="none", **EVERY)
    half = fast(features[:1], labels[:1], None, queue, num_classes=3, reduction="none", **EVERY)
    assert_exact(half, whole[:1])


def test_class_ids_are_only_names():
    labels, features = choice([0, 1, 2], 2, 7, 6), rows(2, 5, 7, 6)
    new = torch.tensor([2, 0, 1])
    queue, bank, bank_labels = filled_queue((4, 1, 2), 5)
    renamed = hpcloss.EmbeddingQueue(3, 4, 5).double()
    renamed.enqueue(bank, new[bank_labels])
    for background in (None, 0):
        assert_same(
            lambda x: fast(x, labels, None, queue, num_classes=3, background=background, **EVERY),  # noqa: B023
            lambda x: fast(x, new[labels], None, renamed, num_classes=3,
                           background=None if background is None else int(new[background]), **EVERY),  # noqa: B023
            features,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ by hand


class TestByHand:
    """Pixels x0 = (1, 0), x1 = (0, 1), x2 = (.6, .8), x3 = (-1, 0) of classes 1, 1, 1, 2 at temperature 1/2: l = 2 s.

    s:      x1     x2     x3        bank (0, -1), class 1     bank (-1, 0), class 0
      x0    0      0.6    -1        0                         -1
      x1           0.8    0         -1                        0
      x2                  -0.6      -0.8                      -0.6
      x3                            0                         1
    """

    X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]], dtype=torch.float64).T.reshape(1, 2, 1, 4)
    LABELS = torch.tensor([[[1, 1, 1, 2]]])

    def check(self, expected, bank=None, bank_labels=None, queue=None):
        expected = torch.tensor(expected, dtype=torch.float64).view(1, 1, 4)
        options = {"temperature": 0.5, "num_classes": 3}
        for reduction, value in (("none", expected), ("mean", expected.sum() / (expected > 0).sum())):
            assert_exact(
                fast(self.X, self.LABELS, None, queue, reduction=reduction, **options, **EVERY), value
            )  # fmt: skip
            assert_exact(oracle(self.X, self.LABELS, bank, bank_labels, reduction=reduction, **options), value)

    def test_batch(self):
        e, log = math.exp, math.log
        loss0 = (log(e(0) + e(-2)) - 0 + log(e(1.2) + e(-2)) - 1.2) / 2
        loss1 = (log(e(0) + e(0)) - 0 + log(e(1.6) + e(0)) - 1.6) / 2
        loss2 = (log(e(1.2) + e(-1.2)) - 1.2 + log(e(1.6) + e(-1.2)) - 1.6) / 2
        self.check([loss0, loss1, loss2, 0.0])  # x3 has no positive

    def test_queue(self):
        e, log = math.exp, math.log
        bank, labels = torch.tensor([[0.0, -1.0], [-1.0, 0.0]], dtype=torch.float64), torch.tensor([1, 0])
        queue = hpcloss.EmbeddingQueue(3, 4, 2).double()
        queue.enqueue(bank, labels)
        neg0, neg1, neg2 = e(-2) + e(-2), e(0) + e(0), e(-1.2) + e(-1.2)  # x3 and the bank's (-1, 0)
        loss0 = (log(e(0) + neg0) - 0 + log(e(1.2) + neg0) - 1.2 + log(e(0) + neg0) - 0) / 3
        loss1 = (log(e(0) + neg1) - 0 + log(e(1.6) + neg1) - 1.6 + log(e(-2) + neg1) + 2) / 3
        loss2 = (log(e(1.2) + neg2) - 1.2 + log(e(1.6) + neg2) - 1.6 + log(e(-1.6) + neg2) + 1.6) / 3
        self.check([loss0, loss1, loss2, 0.0], bank, labels, queue)

    def test_positives_of_the_queue_alone(self):
        bank, labels = torch.tensor([[0.0, -1.0]], dtype=torch.float64), torch.tensor([2])
        queue = hpcloss.EmbeddingQueue(3, 4, 2).double()
        queue.enqueue(bank, labels)
        loss = fast(self.X, self.LABELS, None, queue, 0.5, num_classes=3, reduction="none", **EVERY)
        # x3 against the bank's (0, -1), s = 0, and x0, x1, x2 as negatives
        expected = math.log(1 + math.exp(-2) + math.exp(0) + math.exp(-1.2))
        assert_exact(loss[0, 0, 3], torch.tensor(expected, dtype=torch.float64))
        assert_exact(fast(self.X, self.LABELS, None, queue, 0.5, num_classes=3, **EVERY), loss.sum() / 4)  # x3 counts


# -------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("options", [{}, {"background": 0, "reduction": "class"}, {"normalize": False}])
def test_gradcheck(options):
    labels = choice([0, 1, 1, 2, 255], 1, 4, 3)
    queue, _, _ = filled_queue((2, 0, 3), 3)
    inputs = (0.7 * rows(1, 3, 4, 3)).requires_grad_(), torch.tensor(0.4).double().requires_grad_()
    for memory in (None, queue):
        call = lambda x, t: fast(x, labels, None, memory, t, num_classes=3, **EVERY, **options)  # noqa: E731, B023
        assert torch.autograd.gradcheck(call, inputs)


def test_the_queue_gets_no_gradient_and_its_keys_are_constants():
    labels, features = choice([0, 1, 2], 1, 4, 4), rows(1, 4, 4, 4)
    queue = hpcloss.EmbeddingQueue(3, 16, 4).double()
    queue.enqueue(features, labels)
    call = partial(fast, labels=labels, queue=queue, num_classes=3, **EVERY)
    _, (grad,) = value_and_grads(lambda x: call(x), features)
    x = F.normalize(features.movedim(1, -1).reshape(-1, 4), dim=1)
    detached = value_and_grads(lambda f: oracle(f, labels, x, labels.reshape(-1), num_classes=3), features)[1][0]

    def joined(f):
        return oracle(torch.cat([f, f]), labels.repeat(2, 1, 1), num_classes=3)

    assert_exact(grad, detached)
    assert not torch.allclose(grad, value_and_grads(joined, features)[1][0], rtol=1e-3)
    assert not queue.embeddings.requires_grad and not list(queue.parameters())


def test_differentiating_twice_raises():
    labels, queue = choice([0, 1, 2], 1, 4, 4), filled_queue((2, 2, 2), 4)[0]
    for memory in (None, queue):
        x = rows(1, 4, 4, 4).requires_grad_()
        (grad,) = torch.autograd.grad(fast(x, labels, None, memory, num_classes=3), x, create_graph=True)
        with pytest.raises(RuntimeError, match="only once"):
            grad.sum().backward()


# ----------------------------------------------------------------------------------------------------------- sampling


def drawn(monkeypatch):
    """The samples that the loss draws from now on."""
    samples, original = [], pixel_losses.sample_anchors

    def call(*args, **kwargs):
        samples.append(original(*args, **kwargs))
        return samples[-1]

    monkeypatch.setattr(pixel_losses, "sample_anchors", call)
    return samples


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("k", [1, 2, 5, 1000])
@pytest.mark.parametrize("predicted", [False, True])
def test_sampling_is_ignoring_the_other_pixels(monkeypatch, predicted, k, options):
    labels, features = choice([0, 1, 2, 2, 255, -1], 2, 7, 6), rows(2, 5, 7, 6)
    predictions = choice([0, 1, 2], 2, 7, 6, seed=1) if predicted else None
    samples = drawn(monkeypatch)
    queue, bank, bank_labels = filled_queue((2, 0, 3), 5)
    for memory in ((), (bank, bank_labels)):
        samples.clear()
        call = partial(
            fast, labels=labels, predictions=predictions, queue=queue if memory else None, num_classes=3,
            samples_per_class=k, **options,
        )  # fmt: skip
        value, (grad,) = value_and_grads(lambda x: call(x), features)  # noqa: B023
        ((order, offsets),) = samples
        taken = order[: offsets[-1]].long()
        kept = torch.full_like(labels, -100).view(-1).index_copy(0, taken, labels.view(-1)[taken]).view_as(labels)
        ignored = options.get("ignore_index", (-1, 255))
        some = options | {"ignore_index": (*ignored, -100), "num_classes": 3}
        expected, (expected_grad,) = value_and_grads(lambda x: oracle(x, kept, *memory, **some), features)  # noqa: B023
        assert_exact(value, expected, floor=NOISE)
        assert_exact(grad, expected_grad, floor=NOISE)


@pytest.mark.parametrize("k", [6, 7])  # of an odd number it shows which half is which
def test_samples_of_each_class_of_each_image_half_of_them_hard(monkeypatch, k):
    labels = choice([0, 1, 2, 255], 3, 16, 16)
    predictions = torch.where(torch.rand(3, 16, 16) < 0.3, (labels + 1) % 3, labels)
    samples = drawn(monkeypatch)
    torch.manual_seed(5)
    fast(rows(3, 4, 16, 16), labels, predictions, num_classes=3, samples_per_class=k)
    torch.manual_seed(5)
    expected = hpcloss.sample_anchors(labels, k, num_classes=3, wrong=predictions != labels)
    order, offsets = samples[0]
    assert torch.equal(order, expected.order) and torch.equal(offsets, expected.offsets)
    for image in range(3):
        for label in range(3):
            segment = order[offsets[3 * image + label] : offsets[3 * image + label + 1]].long()
            assert len(segment) == k and (segment // 256 == image).all()
            assert (labels.view(-1)[segment] == label).all()
            assert (predictions.view(-1)[segment] != label).sum() == k // 2


def test_sampling_follows_the_seed_of_torch():
    labels, features = choice([0, 1, 2], 2, 8, 8), rows(2, 5, 8, 8)

    def draw():
        return fast(features, labels, num_classes=3, samples_per_class=2)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(first, draw()) and not torch.equal(first, second)


def test_labels_and_predictions_of_another_resolution(monkeypatch):
    labels, predictions, features = integers(3, 2, 14, 12), integers(3, 2, 21, 6, seed=1), rows(2, 5, 7, 6)
    resized = [F.interpolate(y[:, None].double(), (7, 6), mode="nearest") for y in (labels, predictions)]
    samples = drawn(monkeypatch)
    values = []
    for y, p in ((labels, predictions[:, None]), (resized[0], resized[1])):
        torch.manual_seed(0)
        values.append(fast(features, y, p, num_classes=3, samples_per_class=4))
    assert torch.equal(*values) and torch.equal(samples[0].order, samples[1].order)


# ---------------------------------------------------------------------------------------------------------- memory


def test_an_ignored_class_has_no_keys_in_the_queue():
    labels, features = choice([0, 1, 2, 3], 2, 7, 6), rows(2, 5, 7, 6)
    queue, bank, bank_labels = filled_queue((3, 4, 2, 3), 5)
    assert_same(
        lambda x: fast(x, labels, None, queue, num_classes=4, ignore_index=1, **EVERY),
        lambda x: oracle(x, labels, bank[bank_labels != 1], bank_labels[bank_labels != 1], num_classes=4,
                         ignore_index=1),
        features,
    )  # fmt: skip


def test_enqueue_before_backward_raises_and_says_what_to_do():
    labels = choice([0, 1, 2], 2, 7, 6)
    queue = filled_queue((3, 4, 2), 5)[0].float()
    for dtype in (torch.float32, torch.float64):  # whether the keys were read in place or converted
        x = rows(2, 5, 7, 6, dtype=dtype).requires_grad_()
        loss = fast(x, labels, None, queue, num_classes=3)
        queue.enqueue(x, labels, samples_per_class=2)
        with pytest.raises(RuntimeError, match="EmbeddingQueue has changed.*enqueue after backward"):
            loss.backward()
        assert x.grad is None
    loss = fast(x, labels, None, queue, num_classes=3)
    loss.backward()
    queue.enqueue(x, labels, samples_per_class=2)
    assert x.grad.abs().sum() > 0


def test_the_queue_is_read_without_a_copy(monkeypatch):
    queue = hpcloss.EmbeddingQueue(3, 4, 5)
    labels, x = choice([0, 1, 2], 2, 7, 6), rows(2, 5, 7, 6, dtype=torch.float32)
    queue.enqueue(x, labels)
    seen, original = [], pixel_losses.pair_lse
    monkeypatch.setattr(pixel_losses, "pair_lse", lambda *args, **kwargs: (
        seen.append(kwargs.get("keys")), original(*args, **kwargs))[1])  # fmt: skip
    fast(x, labels, None, queue, num_classes=3)
    assert seen[1].data.data_ptr() == queue.embeddings.data_ptr() and seen[1].companion.untyped_storage().nbytes() <= 8


def test_training_with_a_queue():
    """The lines of the page as they stand there, on images that show their labels."""
    (lines,) = [block for block in blocks("docs/how_to/memory.md") if "optimiser.step()" in block]

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.classes = torch.nn.Conv2d(4, 64, 1), torch.nn.Conv2d(64, 4, 1)

        def forward(self, images):
            features = self.head(images)
            return self.classes(features), features

    network = Network()
    labels = choice([0, 1, 2, 255], 2, 12, 12)
    images = torch.randn(2, 4, 12, 12) + F.one_hot(labels.clamp(max=3), 4).movedim(-1, 1)
    before = hpcloss.PixelContrastLoss(num_classes=4)(network(images)[1], labels)
    names = {
        "hpcloss": hpcloss, "network": network, "batches": [(images, labels)] * 20,
        "optimiser": torch.optim.SGD(network.parameters(), 0.1),
    }  # fmt: skip
    exec(lines, names)
    after = names["contrast"](network(images)[1], labels)
    assert after < 0.8 * before and names["queue"].filled.tolist() == [200, 200, 200, 0]


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_lower_precision_is_within_budget(dtype, queued, temperature):
    labels, x = choice([0, 1, 2, 255], 2, 16, 12), rows(2, 16, 16, 12, dtype=dtype)
    queue, bank, bank_labels = filled_queue((20, 7, 0), 16)
    queue, bank = (queue.float(), bank.float()) if queued else (None, None)
    call = lambda x: fast(x, labels, None, queue, temperature, num_classes=3, **EVERY)  # noqa: E731
    dense = lambda x: oracle(x, labels, bank, bank_labels, temperature, num_classes=3)  # noqa: E731
    exact, (exact_grad,) = value_and_grads(dense, x.double())
    eager, (eager_grad,) = value_and_grads(dense, x.float())
    value, (grad,) = value_and_grads(call, x)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert_within_budget(value, eager, exact, "loss", torch.float32)
    assert_within_budget(grad, eager_grad.to(dtype), exact_grad, "grad", dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(x), value)


@pytest.mark.parametrize("view", [
    lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.transpose(2, 3), lambda x: x[:, :, ::2],
])  # fmt: skip
def test_strides_of_the_features(view):
    base = rows(2, 5, 6, 6)
    labels, queue = integers(3, 2, *view(base).shape[2:]), filled_queue((2, 1, 3), 5)[0]
    for some in (EVERY, {"samples_per_class": 3}):

        def loss(x, some=some):
            torch.manual_seed(0)
            return fast(x, labels, None, queue, num_classes=3, **some)

        assert_same(lambda x: loss(view(x)), lambda x: loss(view(x).contiguous()), base)  # noqa: B023


# ----------------------------------------------------------------------------------------------------------- compilers


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile_with_a_queue():
    torch._dynamo.reset()
    loss, labels = hpcloss.PixelContrastLoss(num_classes=3, **EVERY), choice([0, 1, 2, 255], 2, 8, 6)
    plain, compiled = filled_queue((2, 0, 3), 4, size=7)[0].float(), filled_queue((2, 0, 3), 4, size=7)[0].float()
    call = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in range(3):
        leaves = [rows(2, 4, 8, 6, seed=step, dtype=torch.float32).requires_grad_() for _ in range(2)]
        expected, actual = loss(leaves[0], labels, labels, plain), call(leaves[1], labels, labels, compiled)
        expected.backward()
        actual.backward()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-5, atol=1e-6)
        for queue in (plain, compiled):
            queue.enqueue(leaves[0], labels)


def test_nothing_above_the_operators_reads_device_data():
    """Fake tensors have shapes and no values: what asks for a value raises."""
    with FakeTensorMode() as mode:
        x = mode.from_tensor(rows(2, 4, 8, 6, dtype=torch.float32)).requires_grad_()
        labels = mode.from_tensor(integers(3, 2, 8, 6))
        queue = hpcloss.EmbeddingQueue(3, 5, 4)
        loss = fast(x, labels, labels, queue, num_classes=3, samples_per_class=4)
        assert torch.autograd.grad(loss, x)[0].shape == x.shape


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("options,error,message", [
    ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
    ({"num_classes": None}, TypeError, "num_classes must be an integer, got None"),
    ({"samples_per_class": 0}, ValueError, "samples_per_class must be at least 1, got 0"),
    ({"temperature": -1.0}, ValueError, "temperature must be positive, got -1.0"),
    ({"reduction": "region"}, ValueError, "reduction must be one of 'mean', 'class', 'sum', 'none', got 'region'"),
    ({"background": 255}, ValueError, r"background must not be in ignore_index \(.*255\), got 255"),
    ({"num_classes": 300}, ValueError, "num_classes must be at most 255 .*, got 300"),
])  # fmt: skip
def test_bad_hyper_parameters(options, error, message):
    options = {"num_classes": 3, **options}
    with pytest.raises(error, match=message):
        hpcloss.PixelContrastLoss(**options)
    with pytest.raises(error, match=message):
        fast(rows(1, 4, 4, 4), integers(3, 1, 4, 4), **options)


def test_bad_inputs():
    x, y = rows(2, 4, 6, 6), integers(3, 2, 6, 6)
    call = partial(fast, num_classes=3)
    for predictions, message in (
        (
            torch.rand(2, 3, 6, 6),
            r"predictions must be .*got shape \(2, 3, 6, 6\), which looks one-hot; pass predictions.argmax\(1\)",
        ),
        (y[:1], r"predictions must have shape \[B, \*S\].*got \(1, 6, 6\)"),
        (torch.full((2, 6, 6), 0.5), "predictions must be whole numbers, got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            call(x, y, predictions)
    with pytest.raises(TypeError, match="predictions must be a tensor, got EmbeddingQueue"):
        call(x, y, hpcloss.EmbeddingQueue(3, 2, 4))
    with pytest.raises(TypeError, match="queue must be an EmbeddingQueue, got Tensor"):
        call(x, y, None, x)
    for queue in (hpcloss.EmbeddingQueue(4, 2, 4), hpcloss.EmbeddingQueue(3, 2, 5)):
        got = (queue.num_classes, queue.dim)
        with pytest.raises(
            ValueError, match=rf"queue must have \(num_classes, dim\) = \(3, 4\), got \({got[0]}, {got[1]}\)"
        ):
            call(x, y, None, queue)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\).*got 2"):
        fast(x, y, num_classes=2, check_labels=True)
    with pytest.raises(NotImplementedError, match="triton"):
        call(x, y, backend="triton")
