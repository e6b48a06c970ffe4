"""The operators as PyTorch sees them: derivatives, schemas and fakes, compilers, autocast."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

import hpcloss
import hpcloss.primitives.segment_mean  # its operators have tests of their own
from hpcloss.backends import blockwise, pytorch
from hpcloss.backends.dense.batches import Region, regions_of
from hpcloss.plan import native
from hpcloss.plan.partition import one_to_one, partition, partition_against, two_by_two
from hpcloss.primitives.one_positive import one_positive
from hpcloss.primitives.pair_lse import RULES, pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows, pack
from hpcloss.primitives.scale import Scale
from tests.primitives.test_backends import as_rows
from tests.tools.cases import choice, integers, rows
from tests.tools.losses import FAST, LOSSES, Sizes

# What torch's own compiler does and torch itself warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
]

OPS = torch.ops.hpcloss
SCALE = torch.tensor(1.7).double()


def self_pairs(n=12):
    return partition(choice([0, 1, 1, 2, 255], n), integers(2, n), 2, background=0, ignore_index=(255,))


def cross_pairs(n=9, m=14):
    return partition_against(choice([0, 1, 2, 255], n), choice([0, 1, 1, 3, 255], m), ignore_index=(255,))[0]


def leaf(*shape, seed=0):
    return (0.7 * rows(*shape, seed=seed)).requires_grad_()


# --------------------------------------------------------------------------------------------------------- gradcheck


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cross", [False, True])
def test_gradcheck_pair_lse(rule, cross):
    pairs, bias = (cross_pairs(), rows(14, seed=4)) if cross else (self_pairs(), rows(12, seed=4))

    def function(x, scale, *k):
        # Rows with `grad` the leaf itself: finite differences move the data as well.
        keys = as_rows(k[0]) if k else None
        lse = pair_lse(as_rows(x), pairs, rule, Scale(scale), keys=keys, bias=bias)
        return torch.where(lse.isinf(), 0.0, lse)

    leaves = (leaf(9, 3), SCALE.clone().requires_grad_(), leaf(14, 3, seed=1)) if cross else (
        leaf(12, 3), SCALE.clone().requires_grad_())  # fmt: skip
    assert gradcheck(function, leaves)


@pytest.mark.parametrize("term", ["logit", "own", "discount"])
@pytest.mark.parametrize("hardness", [0.0, 1.3])
@pytest.mark.parametrize("cross", [False, True])
def test_gradcheck_pair_mean(term, hardness, cross):
    pairs = cross_pairs() if cross else self_pairs()
    count = 9 if cross else 12
    options = {"term": "logit" if term == "logit" else "own", "hardness": hardness, "detach_weights": False}
    options["discount"] = 0.4 if term == "discount" else 0.0

    def function(x, scale, stat, *k):
        keys = as_rows(k[0]) if k else None
        stat = None if term == "logit" else stat
        return pair_mean(as_rows(x), pairs, scale=Scale(scale), keys=keys, stat=stat, **options)[0]

    leaves = [leaf(count, 3), SCALE.clone().requires_grad_(), leaf(count, seed=2)]
    if cross:
        leaves.append(leaf(14, 3, seed=1))
    if term == "logit":
        function_of_stat = function
        leaves.pop(2)
        function = lambda x, scale, *k: function_of_stat(x, scale, None, *k)  # noqa: E731
    assert gradcheck(function, leaves)


class _DataOfCompanion(torch.autograd.Function):
    """The rows' values with the companion's gradient: for finite differences, as a companion has no value."""

    @staticmethod
    def forward(ctx, companion, data):
        return data.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_pack(normalize):
    order = torch.tensor([4, 0, 3, 2, 5, 1])

    def function(x):
        packed = pack(x, order, torch.tensor([5]), normalize=normalize, backend="blockwise")
        return _DataOfCompanion.apply(packed.companion, packed.data)

    assert gradcheck(function, (leaf(2, 3, 3),))


@pytest.mark.parametrize("options", [
    {"detach_weights": False}, {"hardness": 0.0, "discount": 0.2}, {"hardness": 0.0, "denominator": "all"},
    {"denominator": "negatives", "detach_weights": False, "local_size": 2, "reduction": "class"},
    {"detach_weights": False, "local_size": (2, 1), "reduction": "none"},
    {"detach_weights": False, "normalize": False, "reduction": "region"},
])  # fmt: skip
def test_gradcheck_region_loss(options):
    labels = choice([0, 1, 1, 2, 255], 1, 4, 3)
    temperature = torch.tensor(0.4).double().requires_grad_()
    assert gradcheck(lambda x, t: FAST["region_phpc"](x, labels, (4, 2), t, **options), (leaf(1, 3, 4, 3), temperature))


def test_gradcheck_vector_losses():
    labels, key_labels = choice([0, 1, 255], 6), choice([0, 1, 255], 5)
    t = torch.tensor(0.4).double().requires_grad_()
    x, y, z = leaf(6, 3), leaf(6, 3, seed=1), leaf(5, 3, seed=2)
    for form in ("out", "in"):
        assert gradcheck(lambda x, t: FAST["supcon"](x, labels, temperature=t, form=form), (x, t))  # noqa: B023
        assert gradcheck(lambda x, k, t: FAST["supcon"](x, labels, k, key_labels, t, form=form), (x, z, t))  # noqa: B023
    assert gradcheck(lambda a, b, t: FAST["ntxent"](a, b, t), (x, y, t))
    assert gradcheck(lambda a, b, t: FAST["hard_negative_nce"](a, b, t, 0.7, 0.1), (x, y, t))
    assert gradcheck(lambda a, b, t: FAST["infonce"](a, b, None, t), (x, y, t))
    assert gradcheck(lambda a, b, t: FAST["infonce"](a, b, None, t, symmetric=True), (x, y, t))
    assert gradcheck(lambda a, b, c, t: FAST["infonce"](a, b, c, t), (x, y, z, t))
    assert gradcheck(lambda a, b, t: FAST["ihpc"](a, b, integers(3, 6), t, beta=0.2), (x, y, t))
    assert gradcheck(lambda a, b, t: FAST["ihpc"](a, b, None, t, 0.0, bank=z.detach()), (x, y, t))


# ----------------------------------------------------------------------------------------------------------- opcheck


def check(op, *args, trace=True):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.default, args, test_utils=tests if trace else tests[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_pack(dtype):
    features = rows(2, 3, 4, 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
    order, live = torch.randperm(16, dtype=torch.int32), torch.tensor([13], dtype=torch.int32)
    for normalize in (True, False):
        check(OPS.pack, features, order, live, normalize, "blockwise")
        data, inverse_norm = OPS.pack(features, order, live, normalize, "blockwise")
        grad, layout = rows(16, 3, dtype=dtype), ([2, 3, 4, 2], list(features.stride()), torch.float16)
        check(OPS.pack_backward, grad, data, inverse_norm, order, normalize, *layout, True, "blockwise")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("cross", [False, True])
def test_opcheck_pair_ops(cross, dtype):
    pairs = cross_pairs() if cross else self_pairs()
    at, count, num_keys = list(pairs.intervals), len(pairs.order), 14 if cross else 12
    x, keys = rows(count, 3, dtype=dtype), rows(14, 3, seed=1, dtype=dtype) if cross else None
    bias, scale = rows(num_keys, seed=2, dtype=torch.float32), torch.tensor(2.0)
    grad, stat = rows(count, seed=3, dtype=torch.float32), rows(count, seed=4, dtype=torch.float32)
    for rule, some_bias, bound in (("others", None, 9.0), ("negatives", bias, None)):
        check(OPS.pair_lse, x, keys, some_bias, scale, bound, at, rule, "blockwise")
        lse = OPS.pair_lse(x, keys, some_bias, scale, bound, at, rule, "blockwise")
        for needs in itertools.product((False, True), repeat=3):
            check(
                OPS.pair_lse_backward,
                grad,
                lse,
                x,
                keys,
                some_bias,
                scale,
                bound,
                at,
                rule,
                *needs,
                "blockwise",
                trace=all(needs),
            )
    for some_stat, weight, hardness in ((None, None, 0.0), (None, bias, 1.0), (stat, None, 0.0), (stat, bias, 1.0)):
        options = (some_stat, weight, scale, 2.0 if weight is None else None, hardness, 0.0)
        check(OPS.pair_mean, x, keys, *options, at, "blockwise", trace=hardness > 0)
        out, mass, _ = OPS.pair_mean(x, keys, *options, at, "blockwise")
        for needs in itertools.product((False, True), repeat=3):
            check(
                OPS.pair_mean_backward, grad, out, mass, x, keys, *options, False, at, *needs, "blockwise", trace=False
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_pair_lse_both(dtype):
    at, x, keys = list(cross_pairs().intervals), rows(9, 3, dtype=dtype), rows(14, 3, seed=1, dtype=dtype)
    scale, grads = torch.tensor(2.0), [rows(n, seed=2, dtype=dtype) for n in (9, 14)]
    for bound in (9.0, None):
        arguments = x, keys, scale, bound, at, "every"
        check(OPS.pair_lse_both, *arguments, "blockwise")
        lse = OPS.pair_lse_both(*arguments, "blockwise")
        for needs in itertools.product((False, True), repeat=3):
            check(OPS.pair_lse_both_backward, *grads, *lse, *arguments, *needs, "blockwise", trace=False)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
@pytest.mark.parametrize("factors, both", [((1.0,), False), ((2.0, 1.0), False), ((1.0,), True)])
def test_opcheck_one_positive(factors, both, backend):
    pairs = one_to_one(9, torch.device("cpu")) if both else two_by_two(5, torch.device("cpu"))
    at, count = list(pairs.intervals), pairs.order.numel()
    x, keys = rows(count, 3), rows(9, 3, seed=1) if both else None
    for bound in (9.0, None):
        arguments = x, keys, torch.tensor(2.0), bound, factors, both, at
        check(OPS.one_positive, *arguments, backend)
        own, lse, kept = OPS.one_positive(*arguments, backend)
        for needs in itertools.product((False, True), repeat=3):
            grads = torch.ones_like(own), torch.ones_like(lse)
            check(OPS.one_positive_backward, *grads, own, lse, kept, *arguments, *needs, backend, trace=False)


@pytest.mark.parametrize("factors, both", [((1.0,), False), ((2.0, 1.0), False), ((1.0,), True)])
@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_gradcheck_one_positive(factors, both, backend):
    make, count = (one_to_one, 5) if both else (two_by_two, 3)
    pairs = make(count, torch.device("cpu"))
    leaves = [rows(pairs.order.numel(), 3, seed=seed).requires_grad_() for seed in range(2 if both else 1)]

    def run(scale, *sides):
        packed = [Rows(side.detach(), side, backend) for side in sides]
        own, lse = one_positive(
            packed[0], pairs, Scale(scale), keys=packed[1] if both else None, factors=factors, both=both
        )
        return own, *(lse if len(factors) > 1 else (lse,))

    assert gradcheck(run, (torch.tensor(2.0).double().requires_grad_(), *leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cross", [False, True])
def test_opcheck_pair_cross_entropy(dtype, cross):
    pairs = cross_pairs() if cross else partition(choice([0, 1, 2], 9))
    at, x = list(pairs.intervals), rows(9, 3, dtype=dtype)
    keys, scale, grad = rows(14, 3, seed=1, dtype=dtype) if cross else None, torch.tensor(2.0), rows(9, dtype=dtype)
    for hardness, bound, grad_lse in ((0.0, 9.0, None), (1.5, None, grad.flip(0))):
        arguments = x, keys, scale, bound, hardness, at
        check(OPS.pair_cross_entropy, *arguments, "blockwise")
        _, _, *statistics = OPS.pair_cross_entropy(*arguments, "blockwise")
        for needs in itertools.product((False, True), repeat=3):
            given = grad, grad_lse, *statistics, *arguments
            check(OPS.pair_cross_entropy_backward, *given, *needs, "blockwise", trace=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["dense", "pieces"])
@pytest.mark.parametrize("cross", [False, True])
def test_opcheck_pair_contrast(cross, backend, dtype):
    """Pieces serve other keys in fp32 alone."""
    if backend == "pieces" and (not cross or dtype != torch.float32 or native.why_not("cpu")):
        return
    pairs = cross_pairs() if cross else self_pairs()
    at, count = list(pairs.intervals), len(pairs.order)
    x, keys = rows(count, 3, dtype=dtype), rows(14, 3, seed=1, dtype=dtype) if cross else None
    of_losses = torch.float64 if dtype == torch.float64 else torch.float32
    scale, grad = torch.tensor(2.0, dtype=of_losses), rows(count, seed=3, dtype=of_losses)
    (size,) = [n * m for n, m in map(Region.shape, regions_of(pairs.intervals))] if cross else (0,)
    for form in (("own", 0.0, 0.3, True, 1), ("all", 1.5, 0.0, False, 3), ("negatives", 0.0, 0.0, True, 2)):
        for needs in itertools.product((False, True), repeat=3):
            kept = size if any(needs) else 0  # what is kept beyond the region is not written, and not read
            if backend == "pieces":
                kept = x.numel() * needs[0] + keys.numel() * needs[1]
            arguments = x, keys, scale, *form, at
            check(OPS.pair_contrast, *arguments, *needs, kept, backend, trace=all(needs))
            _, _, slopes, by_scale = OPS.pair_contrast(*arguments, *needs, kept, backend)
            given = grad, slopes, by_scale, *arguments, *needs, backend
            check(OPS.pair_contrast_backward, *given, trace=all(needs))


@pytest.mark.parametrize("served", [False, True], ids=["torch", "native"])
def test_opcheck_partition(served, monkeypatch):
    if not served:
        monkeypatch.setattr(native, "serves", lambda tensor: False)
    elif reason := native.why_not("cpu"):
        pytest.skip(reason)
    labels, ids = choice([0, 1, 2, 255], 2, 6, 4), integers(4, 48)
    for regions in ((ids, [], [], False, 3), (None, [6, 4], [4, 4], True, 4)):
        for background in (None, 1):
            check(OPS.class_sort, labels, *regions, 3, background, [255])
            check(OPS.label_sort, labels, *regions, background, [255])
    order, offsets, _ = OPS.class_sort(labels, *regions, 3, 1, [255])
    check(OPS.class_intervals, offsets, 48, 3, True)
    check(OPS.pair_counts, *OPS.class_intervals(offsets, 48, 3, True))
    for need_negatives in (False, True):
        check(OPS.pair_counted, *OPS.class_intervals(offsets, 48, 3, True), need_negatives)
    weights, seed = torch.rand(48), torch.tensor(5)
    for kind, values in (("uniform", None), ("weighted", weights), ("hardest", weights), ("hard_easy", weights > 0.5)):
        check(OPS.sample, order, offsets, 2, kind, values, 48, seed)
    starts, ends, rows = OPS.class_intervals(offsets, 48, 3, True)[:3]
    check(OPS.sample_positives, starts, ends, rows, 3, seed)


def test_every_operator_is_known():
    """A new operator needs its line in the tests above."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("hpcloss::")}
    assert names == {
        "pack", "pack_backward", "pair_lse", "pair_lse_backward", "pair_lse_both", "pair_lse_both_backward",
        "pair_cross_entropy", "pair_cross_entropy_backward", "one_positive", "one_positive_backward",
        "pair_mean", "pair_mean_backward", "segment_mean", "segment_mean_backward",
        "pair_contrast", "pair_contrast_backward",
        "class_sort", "label_sort", "class_intervals", "pair_counts", "pair_counted", "sample", "sample_positives",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- compilers


class WithConstants(torch.nn.Module):
    """A loss some of whose inputs have no gradient by design."""

    def __init__(self, loss, *constants):
        super().__init__()
        self.loss = loss
        for index, constant in enumerate(constants):
            self.register_buffer(f"constant{index}", constant)
        self.names = [f"constant{index}" for index in range(len(constants))]

    def forward(self, *inputs):
        return self.loss(*inputs, *[getattr(self, name) for name in self.names])


class Named(torch.nn.Module):
    """The same, with inputs and constants by name."""

    def __init__(self, loss, names, constants):
        super().__init__()
        self.loss, self.names, self.constants = loss, names, list(constants)
        for name, constant in constants.items():
            self.register_buffer(name, constant)

    def forward(self, *inputs):
        return self.loss(**dict(zip(self.names, inputs)), **{name: getattr(self, name) for name in self.constants})


class WithQueue(torch.nn.Module):
    """A loss whose last input is a queue."""

    def __init__(self, loss, queue):
        super().__init__()
        self.loss, self.queue = loss, queue

    def forward(self, *inputs):
        return self.loss(*inputs, self.queue)


def call_of(loss, inputs):
    constants = {name: inputs.pop(name) for name in loss.constants}
    module = Named(loss.build(), list(inputs), constants) if constants else loss.build()
    return module, tuple(inputs.values())


def modules():
    """Each module with its options that change the graph, and inputs for it: (module, inputs)."""
    labels, x = choice([0, 1, 2, 255], 2, 8, 6), rows(2, 4, 8, 6, dtype=torch.float32)
    a, b, c = (rows(10, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    vector_labels = choice([0, 1, 2, 255], 10)
    sampled = {"num_classes": 3, "samples_per_class": 4}
    queue = hpcloss.EmbeddingQueue(1, 16, 4, groups=True)
    queue.enqueue(c, groups=vector_labels)
    sizes = Sizes(2, rows=10, dtype=torch.float32)
    return {name: call_of(loss, loss.inputs(sizes)) for name, loss in LOSSES.items()} | {
        "phpc": (hpcloss.RegionPHPCLoss(4), (x, labels)),
        "phpc, classes": (
            hpcloss.RegionPHPCLoss(4, num_classes=3, reduction="class", detach_weights=False),
            (x, labels),
        ),
        "phpc, sampled": (hpcloss.RegionPHPCLoss(4, **sampled), (x, labels)),
        "phpc, sampled regions": (hpcloss.RegionPHPCLoss(4, max_regions=2, local_size=2, **sampled), (x, labels)),
        "phpc, local": (hpcloss.RegionPHPCLoss(4, local_size=2, reduction="region"), (x, labels[:, None])),
        "phpc, map": (hpcloss.RegionPHPCLoss(None, reduction="none", denominator="negatives"), (x, labels[:, ::2])),
        "phpc, published": (hpcloss.RegionPHPCLoss.published(region_size=4), (x, labels)),
        "region supcon": (hpcloss.RegionSupConLoss(4), (x, labels)),
        "pixels": (hpcloss.PixelContrastLoss(num_classes=3, samples_per_class=None), (x, labels)),
        "pixels, sampled": (hpcloss.PixelContrastLoss(num_classes=3, samples_per_class=4), (x, labels, labels.flip(0))),
        "local": (hpcloss.LocalContrastLoss(num_classes=3, samples_per_class=None), (x, labels, labels[:, 0, 0] % 2)),
        "local, sampled": (hpcloss.LocalContrastLoss(num_classes=3), (x, labels)),
        "prototypes": (hpcloss.PrototypeContrastLoss(), (a, vector_labels, torch.softmax(b, 1))),
        "assignment": (WithConstants(hpcloss.PrototypeAssignmentLoss(), a[:6].view(3, 2, 4), x.flip(0)), (x, labels)),
        "multiscale": (
            hpcloss.MultiscaleContrastLoss((2, 3), num_classes=3, samples_per_class=None),
            (x, x.flip(0), labels),
        ),
        "multiscale, majority": (
            hpcloss.MultiscaleContrastLoss(2, patch_positives="majority", num_classes=3, samples_per_class=None),
            (x, x.flip(0), labels),
        ),
        "multiscale, no labels": (hpcloss.MultiscaleContrastLoss(3), (x, x.flip(0))),
        "supcon": (hpcloss.SupConLoss(), (a, vector_labels)),
        "supcon, in, keys": (hpcloss.SupConLoss(form="in"), (a, vector_labels, b, vector_labels)),
        "ntxent": (hpcloss.NTXentLoss(), (a, b)),
        "hard negatives": (hpcloss.HardNegativeNCELoss(), (a, b)),
        "infonce": (hpcloss.InfoNCELoss(learnable=True), (a, b)),
        "infonce, symmetric": (hpcloss.InfoNCELoss(symmetric=True), (a, b)),
        "infonce, negatives": (hpcloss.InfoNCELoss(), (a, b, c)),
        "ihpc": (hpcloss.IHPCLoss(), (a, b)),
        "ihpc, groups": (hpcloss.IHPCLoss.published(), (a, b, vector_labels)),
        "ihpc, queue": (WithQueue(hpcloss.IHPCLoss(), queue), (a, b, vector_labels)),
    }


def run(function, inputs):
    torch.manual_seed(1)
    inputs = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    loss = function(*inputs)
    loss.sum().backward()
    return loss.detach(), *(x.grad for x in inputs if x.is_floating_point())


@pytest.mark.parametrize("name", modules())
def test_compile_without_a_graph_break(name, monkeypatch):
    """Compiled code of any size takes the tiles, and gives what they give without a compiler."""
    module, inputs = modules()[name]
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = run(compiled, inputs)
    if "sampled" not in name:  # random numbers of a compiled graph may differ
        monkeypatch.setattr(pytorch, "choose", lambda *_: "blockwise")
        for actual, expected in zip(results, run(module, inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    else:
        loss, grad = results
        assert loss > 0 and grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("loss", [hpcloss.SupConLoss(), hpcloss.InfoNCELoss(), hpcloss.RegionPHPCLoss(4)])
def test_compile_gives_the_numbers_of_small_problems(loss, dynamic):
    """Which run dense without a compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (64, 48):
        x, y = (rows(size, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
        inputs = (x, y) if isinstance(loss, hpcloss.InfoNCELoss) else (x, integers(5, size))
        if isinstance(loss, hpcloss.RegionPHPCLoss):
            inputs = x.view(1, size // 8, 8, 8).movedim(-1, 1), inputs[1].view(1, size // 8, 8)
        for actual, expected in zip(run(compiled, inputs), run(loss, inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_compile_with_statistics():
    module, inputs = modules()["phpc"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: module(x, y, return_stats=True), fullgraph=True, backend="aot_eager")
    (loss, stats), (expected, expected_stats) = compiled(*inputs), module(*inputs, return_stats=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats, expected_stats)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_a_training_step(backend):
    torch._dynamo.reset()
    labels = choice([0, 1, 2, 255], 2, 8, 6)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        loss = hpcloss.RegionPHPCLoss(4)
        optimiser = torch.optim.SGD(network.parameters(), 0.1)

        def step(image, network=network, loss=loss):
            return loss(network(image), labels)

        call = torch.compile(step, fullgraph=True, backend=backend) if compiled else step
        for _ in range(3):
            optimiser.zero_grad()
            value = call(torch.ones(2, 1, 8, 6).cumsum(2) * torch.ones(2, 1, 8, 6).cumsum(3) / 30)
            value.backward()
            optimiser.step()
        losses.append(value.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("name", ["phpc", "supcon", "ntxent"])
def test_compile_once_for_all_sizes(name):
    """With `dynamic=True`; that by default the second size makes the sizes symbols is in `test_trainers.py`."""
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    module, _ = modules()[name]
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counting)
    for size in (12, 17, 20, 31):
        if name == "phpc":
            inputs = rows(2, 4, size, size + 1, dtype=torch.float32), choice([0, 1, 2, 255], 2, size, size + 1)
        else:
            inputs = rows(size, 4, dtype=torch.float32), rows(size, 4, seed=1, dtype=torch.float32)
            if name == "supcon":
                inputs = inputs[0], integers(3, size)
        for actual, expected in zip(run(compiled, inputs), run(module, inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", modules())
def test_nothing_above_the_operators_reads_device_data(name):
    """Fake tensors have shapes and no values: what asks for a value raises. As on a GPU, labels are not looked at."""
    module, inputs = modules()[name]
    with FakeTensorMode() as mode:
        fake_inputs = [mode.from_tensor(x) for x in inputs]
        for part in module.modules():
            for tensor_name, tensor in [*part.named_buffers(recurse=False), *part.named_parameters(recurse=False)]:
                part._parameters.pop(tensor_name, None)
                part._buffers.pop(tensor_name, None)
                object.__setattr__(part, tensor_name, mode.from_tensor(tensor))
        fake_inputs = [x.requires_grad_() if x.is_floating_point() else x for x in fake_inputs]
        loss = module(*fake_inputs)
        grads = torch.autograd.grad(loss.sum(), [x for x in fake_inputs if x.requires_grad])
    assert loss.dtype == torch.float32 and all(grad is not None for grad in grads)


def test_compile_whole_number_float_labels():
    module, (x, labels) = modules()["phpc"]
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, labels.float()), module(x, labels))


# ----------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("name", modules())
def test_autocast_changes_nothing(name):
    if "sampled" in name:
        return
    module, inputs = modules()[name]
    plain = run(module, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(module, inputs)
    for actual, expected in zip(cast, plain, strict=True):
        assert actual.dtype == torch.float32 and torch.equal(actual, expected)


def test_operators_under_autocast_compute_in_their_own_precision():
    pairs = self_pairs()
    x, at = rows(12, 3, dtype=torch.float32), list(pairs.intervals)
    plain = OPS.pair_lse(x, None, None, torch.tensor(2.0), None, at, "others", "blockwise")
    with torch.autocast("cpu", torch.bfloat16):
        cast = OPS.pair_lse(x, None, None, torch.tensor(2.0), None, at, "others", "blockwise")
    assert torch.equal(plain, cast)


def test_autocast_is_off_inside_the_operators(monkeypatch):
    seen = []

    def watched(function):
        def call(*args):
            seen.append(torch.is_autocast_enabled("cpu"))
            return function(*args)

        return call

    for name in ("pair_lse", "pair_lse_backward", "pair_mean", "pair_mean_backward"):
        monkeypatch.setattr(blockwise, name, watched(getattr(blockwise, name)))
    x = rows(2, 4, 8, 6, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        FAST["region_phpc"](x, choice([0, 1, 2], 2, 8, 6), backend="blockwise").backward()
    assert len(seen) >= 4 and not any(seen)


def test_features_of_a_network_under_autocast():
    """Half-precision features come in, the loss is fp32 and the gradient reaches the fp32 weights."""
    network = torch.nn.Conv2d(1, 8, 1)
    with torch.autocast("cpu", torch.bfloat16):
        features = network(rows(2, 1, 8, 6, dtype=torch.float32))
        loss = hpcloss.RegionPHPCLoss(4)(features, choice([0, 1, 2, 255], 2, 8, 6))
    assert features.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert network.weight.grad.dtype == torch.float32 and network.weight.grad.abs().sum() > 0


def test_the_companion_carries_no_memory():
    packed = pack(rows(100, 8).requires_grad_(), torch.arange(100), normalize=True, backend="blockwise")
    assert packed.companion.untyped_storage().nbytes() <= 8
    assert packed.companion.shape == (100, 8) and packed.companion.requires_grad and not packed.data.requires_grad
