"""The embedding queue against a list per class, and what a buffer must do."""

import copy
import io
import pickle
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import hpcloss
from hpcloss.arithmetic import merge
from hpcloss.operators import statistics_dtype
from hpcloss.plan.partition import partition
from hpcloss.primitives.pair_lse import pair_lse
from hpcloss.primitives.rows import pack
from hpcloss.primitives.scale import Scale
from tests.tools.cases import choice, integers, rows


def contents(queue):
    """What each class holds, oldest first."""
    held = []
    for slots, filled, start in zip(queue.embeddings, queue.filled.tolist(), queue.next.tolist(), strict=True):
        assert start == filled if filled < queue.size else 0 <= start < queue.size
        assert (slots[filled:] == 0).all()
        held.append(slots[:filled].roll(-start if filled == queue.size else 0, 0))
    return held


def assert_holds(queue, expected):
    """expected: for each class the rows it must hold, oldest first."""
    for held, wanted in zip(contents(queue), expected, strict=True):
        wanted = torch.stack(list(wanted)) if len(wanted) else held[:0]
        torch.testing.assert_close(held, F.normalize(wanted, dim=1).to(held.dtype), rtol=1e-6, atol=1e-7)


steps = st.lists(st.lists(st.sampled_from([0, 1, 2, 3, -1, 255, -100]), max_size=9), max_size=6)


@settings(max_examples=200, deadline=None)
@given(steps, st.integers(1, 4))
def test_the_newest_of_each_class_remain(steps, size):
    queue = hpcloss.EmbeddingQueue(3, size, 4)
    lists = [deque(maxlen=size) for _ in range(3)]
    for step, labels in enumerate(steps):
        vectors = rows(len(labels), 4, seed=step)
        queue.enqueue(vectors, torch.tensor(labels, dtype=torch.int64))
        for vector, label in zip(vectors, labels, strict=True):
            if 0 <= label < 3:
                lists[label].append(vector)
    assert_holds(queue, lists)


def test_what_is_no_embedding_is_skipped():
    vectors, labels = rows(10, 4), torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 1, 0])
    vectors[1, 2], vectors[4, 0], vectors[5] = float("nan"), float("inf"), 0.0
    vectors[6, 1], vectors[7] = -float("inf"), vectors[7] * 1e-14
    vectors[9] *= 1e100
    for size in (1, 2, 5):
        queue = hpcloss.EmbeddingQueue(2, size, 4)
        queue.enqueue(vectors, labels)
        assert_holds(queue, [vectors[[0, 2, 9]][-size:] / vectors[[0, 2, 9]][-size:].abs().amax(1, True),
                             vectors[[3, 8]][-size:]])  # fmt: skip
    before = copy.deepcopy(queue.state_dict())
    queue.enqueue(torch.full((6, 4), float("nan")), labels[:6])
    queue.enqueue(rows(6, 4), torch.full((6,), 7))
    queue.enqueue(rows(0, 4), labels[:0])
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_queue", [torch.float32, torch.float16, torch.float64])
def test_dtypes(dtype, of_queue):
    queue = hpcloss.EmbeddingQueue(2, 3, 4).to(of_queue)
    vectors, labels = rows(5, 4, dtype=dtype), torch.tensor([0, 1, 0, 0, 0], dtype=torch.uint8)
    queue.enqueue(vectors.requires_grad_(), labels)
    assert queue.embeddings.dtype == of_queue and not queue.embeddings.requires_grad
    held = contents(queue)
    unit = F.normalize(vectors.detach().double(), dim=1)
    tolerance = 2 * torch.finfo(of_queue).eps if of_queue == torch.float16 else 1e-6
    torch.testing.assert_close(held[0].double(), unit[2:], rtol=0, atol=tolerance)
    torch.testing.assert_close(held[1].double(), unit[1:2], rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
def test_maps(shape):
    features, labels = rows(*shape), choice([0, 1, 2, 255], shape[0], *shape[2:])
    maps, vectors = hpcloss.EmbeddingQueue(3, 9, 3), hpcloss.EmbeddingQueue(3, 9, 3)
    vectors.enqueue(features.movedim(1, -1).reshape(-1, 3), labels.reshape(-1))
    maps.enqueue(features, labels[:, None])
    assert torch.equal(maps.embeddings, vectors.embeddings) and torch.equal(maps.next, vectors.next)
    strided = hpcloss.EmbeddingQueue(3, 9, 3)
    strided.enqueue(features.transpose(0, 1).contiguous().transpose(0, 1), labels)
    assert torch.equal(maps.embeddings, strided.embeddings)
    coarse = hpcloss.EmbeddingQueue(3, 9, 3)
    finer = labels
    for axis in range(1, labels.dim()):
        finer = finer.repeat_interleave(2, axis)
    coarse.enqueue(features, finer)
    assert torch.equal(maps.embeddings, coarse.embeddings)


def test_samples_of_each_class():
    labels, features = choice([0, 0, 0, 1, 2, 255], 3, 12, 12), rows(3, 4, 12, 12)
    unit = F.normalize(features.movedim(1, -1).reshape(-1, 4), dim=1)
    queue = hpcloss.EmbeddingQueue(4, 8, 4).double()
    for step in (1, 2, 3):
        queue.enqueue(features, labels, samples_per_class=3)
        assert queue.filled.tolist() == [min(3 * step, 8)] * 3 + [0]
    pixels = []
    for label, held in enumerate(contents(queue)):
        near = (held @ unit.T).argmax(1) if len(held) else torch.tensor([], dtype=torch.int64)
        torch.testing.assert_close(held, unit[near])
        assert (labels.view(-1)[near] == label).all()
        pixels += near.tolist()
    assert len(set(pixels)) > 12  # drawn anew each time, and not the first pixels of the map
    torch.manual_seed(3)
    queue.enqueue(features, labels, samples_per_class=3)
    other = copy.deepcopy(queue)
    torch.manual_seed(3)
    other.enqueue(features, labels, samples_per_class=3)
    torch.manual_seed(3)
    queue.enqueue(features, labels, samples_per_class=3)
    assert torch.equal(queue.embeddings, other.embeddings)
    queue.enqueue(features, labels, samples_per_class=10**6)
    assert queue.filled.tolist() == [8, 8, 8, 0]


def test_means_of_each_class_of_each_image():
    labels, features = choice([0, 1, 2, 2, 255, -1], 3, 4, 5), rows(3, 4, 4, 5)
    labels[1] = 2
    labels[2][labels[2] == 1] = 0
    queue = hpcloss.EmbeddingQueue(4, 5, 4).double()
    queue.enqueue_means(features, labels)
    expected = [[], [], [], []]
    for image, y in zip(F.normalize(features, dim=1).movedim(1, -1), labels, strict=True):
        for label in range(3):
            if (y == label).any():
                expected[label].append(image[y == label].mean(0))
    assert [len(rows) for rows in expected] == [2, 1, 3, 0]
    assert_holds(queue, expected)
    features[0, :, labels[0] == 0] = float("nan")  # the whole segment goes, and no other
    torn = hpcloss.EmbeddingQueue(4, 5, 4).double()
    torn.enqueue_means(features, labels)
    assert_holds(torn, [expected[0][1:], *expected[1:]])
    before = copy.deepcopy(torn.state_dict())
    torn.enqueue_means(features[:0], labels[:0])
    assert all(torch.equal(value, before[name]) for name, value in torn.state_dict().items())


def test_opposite_means_cancel_and_are_skipped():
    features = torch.tensor([[1.0, -1.0], [0.0, 0.0]])[None]
    queue = hpcloss.EmbeddingQueue(1, 2, 2)
    queue.enqueue_means(features, torch.zeros(1, 2, dtype=torch.int64))
    assert queue.filled.tolist() == [0]


# --------------------------------------------------------------------------------------------------- as keys of anchors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_the_slots(dtype):
    queue = hpcloss.EmbeddingQueue(3, 4, 5).to(dtype)
    queue.enqueue(rows(20, 5), integers(3, 20))

    def keys(kind):
        return queue.keys(pack(rows(1, 5, dtype=kind), torch.zeros(1).int(), normalize=True, backend="blockwise"))

    packed = keys(dtype)
    assert packed.data.data_ptr() == queue.embeddings.data_ptr() and packed.data.shape == (12, 5)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    torch.testing.assert_close(keys(other).data, queue.embeddings.view(-1, 5).to(other))
    for kind in (dtype, other, torch.float16):
        companion = keys(kind).companion
        assert companion.dtype == statistics_dtype(kind) and companion.untyped_storage().nbytes() <= 8
        assert companion.shape == (12, 5) and not companion.requires_grad


@pytest.mark.parametrize("ignored", [(), (1,), (0, 1, 2), (-1, 255)])
@pytest.mark.parametrize("background", [None, 0, 2])
def test_bank_counts_filled_slots_alone(ignored, background):
    queue = hpcloss.EmbeddingQueue(3, 4, 5).double()
    queue.enqueue(rows(8, 5), torch.tensor([0, 2, 2, 2, 2, 2, 1, 1]))
    labels = choice([0, 1, 2, 255, -1], 14)
    dead = tuple({255, -1, *ignored})
    pairs = partition(labels, background=background, ignore_index=dead)
    x = pack(rows(14, 5, seed=1), pairs.order, normalize=True, backend="blockwise")
    bank = queue.bank(x, pairs, labels[pairs.order], ignored)
    held = [0 if label in ignored else filled for label, filled in enumerate([1, 2, 4])]
    anchors = pairs.intervals.is_anchor().tolist()
    live = bank.log_bias.view(3, 4) == 0
    assert live.sum(1).tolist() == held and (bank.log_bias[~live.view(-1)] == -torch.inf).all()
    scale = Scale(torch.tensor(3.0).double())
    negative = pair_lse(x, bank.pairs, "negatives", scale, keys=bank.keys, bias=bank.log_bias)
    positive = pair_lse(x, bank.pairs, "positives", scale, keys=bank.keys)
    for row, label in enumerate(labels[pairs.order].tolist()):
        own = held[label] if anchors[row] else 0
        others = sum(held) - own if anchors[row] else 0
        assert (int(bank.positives[row]), int(bank.negatives[row])) == (own, others)
        if not anchors[row]:
            assert negative[row] == positive[row] == -torch.inf
            continue
        logits = scale.value * (queue.embeddings @ x.data[row])
        other = torch.cat([logits[c, : held[c]] for c in range(3) if c != label])
        torch.testing.assert_close(negative[row], torch.logsumexp(other, 0))
        torch.testing.assert_close(positive[row], torch.logsumexp(logits[label, : held[label]], 0))
    merged = merge(negative, positive)
    torch.testing.assert_close(merged, pair_lse(x, bank.pairs, "every", scale, keys=bank.keys, bias=bank.log_bias))


# ------------------------------------------------------------------------------------------------ what a buffer does


def filled(size=4):
    queue = hpcloss.EmbeddingQueue(3, size, 5)
    queue.enqueue(rows(17, 5), integers(3, 17))
    return queue


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_state_dict_copies_and_text():
    queue = filled()
    assert set(queue.state_dict()) == {"embeddings", "filled", "next"} and not list(queue.parameters())
    buffer = io.BytesIO()
    torch.save(queue.state_dict(), buffer)
    buffer.seek(0)
    loaded = hpcloss.EmbeddingQueue(3, 4, 5)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (loaded, copy.deepcopy(queue), pickle.loads(pickle.dumps(queue))):
        assert same(queue, other)
        reference = copy.deepcopy(queue)
        for some in (other, reference):
            some.enqueue(rows(7, 5, seed=1), integers(3, 7, seed=1))
        assert same(other, reference) and not same(other, queue)
    with pytest.raises(RuntimeError, match="size mismatch"):
        hpcloss.EmbeddingQueue(3, 5, 5).load_state_dict(queue.state_dict())
    assert repr(queue) == "EmbeddingQueue(num_classes=3, size=4, dim=5)"
    half = copy.deepcopy(queue).half()
    assert half.embeddings.dtype == torch.float16 and half.filled.dtype == half.next.dtype == torch.int64


def test_results_repeat_bit_for_bit_and_in_place():
    queues = [filled(), filled()]
    address = queues[0].embeddings.data_ptr()
    for step in range(3):
        for queue in queues:
            queue.enqueue(rows(30, 5, seed=step), choice([0, 1, 7], 30, seed=step))
    assert same(*queues) and queues[0].embeddings.data_ptr() == address


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()
    plain, compiled = filled(), filled()
    vectors, means = (torch.compile(call, fullgraph=True, backend=backend)
                      for call in (compiled.enqueue, compiled.enqueue_means))  # fmt: skip
    for step in range(3):
        x, y = rows(2, 5, 4, 3, seed=step, dtype=torch.float32), choice([0, 1, 2, 255], 2, 4, 3, seed=step)
        vectors(x, y)
        means(x, y)
        plain.enqueue(x, y)
        plain.enqueue_means(x, y)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_nothing_reads_device_data():
    """Fake tensors have shapes and no values: what asks for a value raises."""
    with FakeTensorMode() as mode:
        queue = hpcloss.EmbeddingQueue(3, 4, 5)
        x, y = mode.from_tensor(rows(2, 5, 4, 3, dtype=torch.float32)), mode.from_tensor(integers(3, 2, 4, 3))
        queue.enqueue(x, y)
        queue.enqueue(x, y, samples_per_class=2)
        queue.enqueue(x[..., 0, 0], y[:, 0, 0])
        queue.enqueue_means(x, y)
    assert queue.embeddings.shape == (3, 4, 5)


def test_inference():
    """Tensors made there know no version, and without a backward pass nothing has to be guarded."""
    x, y = rows(2, 5, 4, 3, dtype=torch.float32), choice([0, 1, 2, 255], 2, 4, 3)
    expected = hpcloss.pixel_contrast_loss(x, y, queue=filled(), num_classes=3, samples_per_class=None)
    with torch.inference_mode():
        value = hpcloss.pixel_contrast_loss(x, y, queue=filled(), num_classes=3, samples_per_class=None)
    assert torch.equal(value, expected)


def test_errors():
    for options, message in (
        ((0, 4, 5), "num_classes must be at least 1, got 0"),
        ((3, 0, 5), "size must be at least 1, got 0"),
        ((3, 4, 0), "dim must be at least 1, got 0"),
        ((2**16, 2**16, 1), r"num_classes \* size must be at least 1 and below 2\^31"),
    ):
        with pytest.raises(ValueError, match=message):
            hpcloss.EmbeddingQueue(*options)
    queue, x, y = filled(), rows(6, 5), integers(3, 6)
    with pytest.raises(ValueError, match="embeddings must have 5 channels, as the queue, got 4"):
        queue.enqueue(x[:, :4], y)
    with pytest.raises(ValueError, match=r"labels must have shape \[6\], got \(5,\)"):
        queue.enqueue(x, y[:5])
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        queue.enqueue(x, y.tolist())
    with pytest.raises(TypeError, match="embeddings must be floating point, got torch.int64"):
        queue.enqueue(x.long(), y)
    with pytest.raises(ValueError, match="samples_per_class must be at least 1, got 0"):
        queue.enqueue(x, y, samples_per_class=0)
    with pytest.raises(ValueError, match="features must have 5 channels, as the queue, got 4"):
        queue.enqueue_means(rows(2, 4, 3, 3), integers(3, 2, 3, 3))
    with pytest.raises(ValueError, match=r"labels must have shape \[B, \*S\]"):
        queue.enqueue_means(rows(2, 5, 3, 3), integers(3, 3, 3))
    with pytest.raises(ValueError, match="embeddings must be on meta|must be on cpu, as the queue, got meta"):
        queue.enqueue(x.to("meta"), y)
