"""What only a GPU can show: full-size tiles and bf16, large N, streams, graphs, memory, launches.

Most bodies take a device, so that they also run once in Triton's interpreter, in tiny sizes, to be right themselves:
`python -m pytest tests/kernels/test_gpu.py`. On a GPU: `python -m pytest -m gpu tests/kernels/test_gpu.py`.
"""

import functools
import math
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import hpcloss
from hpcloss import reference, sample_anchors
from hpcloss.backends import resolve
from hpcloss.plan import native
from hpcloss.plan.partition import Intervals, Pairs, class_sort, partition, partition_against
from hpcloss.plan.regions import Grid
from hpcloss.primitives.pair_lse import RULES, pair_lse
from hpcloss.primitives.pair_mean import pair_mean
from hpcloss.primitives.rows import Rows, pack
from hpcloss.primitives.scale import Scale
from tests.tools.kernels import INTERPRETED
from tests.tools.numerics import assert_within_budget

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the dense forms are asked to be deterministic

CUDA = torch.cuda.is_available()
ROOT = Path(hpcloss.__file__).parents[1]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]
GPU = pytest.param("cuda", marks=on_gpu)
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"))
anywhere = pytest.mark.parametrize("device", [GPU, CPU])
alone = pytest.mark.parametrize("device", [GPU])
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # What torch's own compiler does and torch itself warns of.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]
HALF = torch.float16
MEASURED = ("memory", "graph", "sync", "launches", "compile", "large")  # tests that no poison may disturb


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """As everywhere, but not where memory, launches or host syncs are looked at."""
    poison = not any(word in request.node.name for word in MEASURED)
    torch.use_deterministic_algorithms(poison, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = poison
    yield
    torch.use_deterministic_algorithms(False)
    if CUDA:
        torch.cuda.empty_cache()


def size(device, on_a_gpu, interpreted):
    """The size that a device is up to."""
    return on_a_gpu if device == "cuda" else interpreted


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def random(device, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def choice(device, values, *shape, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.tensor(values, device=device)[torch.randint(len(values), shape, generator=generator, device=device)]


def unit_rows(device, n, dim, dtype, seed=0):
    return torch.nn.functional.normalize(random(device, n, dim, seed=seed), dim=1).to(dtype)


def feature_map(device, *shape, dtype=HALF, seed=0):
    """A map [B, D, H, W] and labels 0 to 3, of which 0 is background, with some ignored."""
    features = random(device, *shape, seed=seed).to(dtype)
    return features, choice(device, [0, 1, 2, 3, 1, 2, 3, 255], shape[0], *shape[2:], seed=seed)


def value_and_gradient(loss, features, *arguments, scale=1.0):
    leaf = features.detach().requires_grad_()
    value = loss(leaf, *arguments)
    return value.detach(), torch.autograd.grad(value * scale, leaf)[0]


def distance(actual, exact):
    """||actual - exact|| / ||exact||, which is NaN as soon as one entry is."""
    actual, exact = actual.detach().double(), exact.detach().double()
    return float((actual - exact).norm() / exact.norm())


# ----------------------------------------------------------------------------------- primitives, tiles of full size


def mask_of(pairs, rule, num_keys):
    """The pairs of a rule as a boolean matrix."""
    region, key = pairs.intervals.region(), torch.arange(num_keys, device=pairs.order.device)
    inside = (
        (key >= pairs.intervals.key_start[region, None])
        & (key < pairs.intervals.key_end[region, None])
        & pairs.intervals.is_anchor()[:, None]
    )
    positive = (key >= pairs.intervals.pos_start[:, None]) & (key < pairs.intervals.pos_end[:, None])
    other = key != pairs.intervals.self_pos[:, None]
    return {
        "positives": inside & positive & other, "negatives": inside & ~positive & other, "others": inside & other,
        "every": inside,
    }[rule]  # fmt: skip


def plan(device, n, cross):
    """Runs of uneven length in uneven regions with background and a dead tail; or labelled keys elsewhere."""
    labels, region = choice(device, [0, 1, 1, 1, 1, 2, 3, 255], n), choice(device, [0, 0, 0, 1, 2], n, seed=1)
    if not cross:
        return partition(labels, region, 3, background=0, ignore_index=(255,)), n
    num_keys = n + n // 3 + 1
    return partition_against(labels, choice(device, [0, 1, 2, 255], num_keys, seed=2), ignore_index=(255,))[0], num_keys


def finite(values):
    """-inf is the defined value of an empty set and has no gradient."""
    return torch.where(values == -math.inf, 0.0, values)


def check_primitive(device, dtype, cross, kind, run, dense, bound, dim):
    """`run(rows, keys, scale, pairs)` of the kernels against `dense(x, y, scale, pairs)` in float64 and the dtype."""
    pairs, num_keys = plan(device, size(device, 3001, 41), cross)
    x = unit_rows(device, pairs.order.numel(), dim, dtype)
    y = unit_rows(device, num_keys, dim, dtype, seed=1) if cross else x
    upstream = random(device, len(x), seed=3).to(dtype)
    companions = [torch.zeros(z.shape, device=device, requires_grad=True) for z in ((x, y) if cross else (x,))]
    # A fixed temperature has a bound; a learnable one has none and wants its gradient.
    scale = torch.tensor(8.0, device=device, requires_grad=bound is None)
    actual = run(Rows(x, companions[0], "triton"), Rows(y, companions[1], "triton") if cross else None, scale, pairs)
    leaves = [*companions, *([scale] if scale.requires_grad else [])]
    gradients = torch.autograd.grad(finite(actual), leaves, upstream.float())
    results = []
    for cast in (dtype, torch.float64):
        rows = [z.to(cast).requires_grad_() for z in ((x, y) if cross else (x,))]
        expected = dense(rows[0], rows[-1], 8.0, pairs)
        results.append((expected.detach(), torch.autograd.grad(finite(expected), rows, upstream.to(cast))))
    (plain, plain_gradients), (exact, exact_gradients) = results
    assert_within_budget(actual, plain, exact, kind)
    for found, plain_gradient, right in zip(gradients, plain_gradients, exact_gradients):
        assert found.dtype == torch.float32
        assert_within_budget(found, plain_gradient, right, "grad")
    if scale.requires_grad:  # the sum of <x, dx> over the rows of one side, by hand
        along = (exact_gradients[0] * x.double()).sum() / 8.0
        if kind == "lse":
            along = along if cross else along / 2
            spread = (exact_gradients[0] * x.double()).abs().sum() / 8.0
            assert abs(gradients[-1].double() - along) <= 2e-2 * spread
        assert gradients[-1].isfinite()


DTYPES = {"float32": (torch.float32, 64), "float16": (HALF, 128), "bfloat16": (torch.bfloat16, 72)}
# What losses run: unit rows at a fixed temperature, at a learnable one, raw rows, separate keys. (dtype, bound, cross)
VARIANTS = [
    ("float16", 8.0, False), ("float16", None, False), ("bfloat16", None, False), ("float32", 8.0, False),
    ("float16", 8.0, True),
]  # fmt: skip


def skip_bf16(device, dtype):
    if device == "cpu" and dtype == "bfloat16":
        pytest.skip("Triton's interpreter computes bf16 wrongly")


def dims(device, dtype):
    return DTYPES[dtype][0], size(device, DTYPES[dtype][1], 7)


@anywhere
@pytest.mark.parametrize("dtype,bound,cross", VARIANTS)
@pytest.mark.parametrize("rule", RULES)
def test_pair_lse(device, rule, dtype, bound, cross):
    skip_bf16(device, dtype)
    dtype, dim = dims(device, dtype)

    def run(rows, keys, scale, pairs):
        return pair_lse(rows, pairs, rule, Scale(scale, bound), keys=keys)

    def dense(x, y, scale, pairs):
        return reference.pair_lse(x, y, mask_of(pairs, rule, len(y)), scale)

    check_primitive(device, dtype, cross, "lse", run, dense, bound, dim)


@anywhere
@pytest.mark.parametrize("dtype,bound,cross", VARIANTS)
@pytest.mark.parametrize("hardness", [0.0, 1.0])
@pytest.mark.parametrize("term", ["logit", "own"])
def test_pair_mean(device, term, dtype, hardness, bound, cross):
    skip_bf16(device, dtype)
    dtype, dim = dims(device, dtype)
    options = {"hardness": hardness, "term": term}

    def stat_of(pairs):
        return 9 * random(device, pairs.order.numel(), seed=4) if term == "own" else None

    def run(rows, keys, scale, pairs):
        return pair_mean(rows, pairs, scale=Scale(scale, bound), keys=keys, stat=stat_of(pairs), **options)[0]

    def dense(x, y, scale, pairs):
        stat = stat_of(pairs)
        stat = None if stat is None else stat.to(x.dtype)
        return reference.pair_mean(x, y, mask_of(pairs, "positives", len(y)), scale, stat=stat, **options)[0]

    check_primitive(device, dtype, cross, "loss", run, dense, bound, dim)


# ------------------------------------------------------------------------------------------------- half precision


@anywhere
@pytest.mark.parametrize("denominator", ["own", "all", "negatives"])
def test_gradients_at_the_weights_of_a_mean_over_half_a_million(device, denominator):
    """A mean weighs each of 524 288 anchors by 2e-6, which fp16 does not hold: nothing may be lost between."""
    features, labels = feature_map(device, *size(device, (8, 64, 256, 256), (2, 7, 6, 5)))
    count = int((labels < 255).logical_and(labels > 0).sum())

    def loss(x, reduction):
        return hpcloss.region_phpc_loss(x, labels, 16, denominator=denominator, reduction=reduction, backend="triton")

    mean, gradient = value_and_gradient(loss, features, "mean", scale=2.0**16)
    total, whole = value_and_gradient(loss, features, "sum")
    assert float(total / count) == pytest.approx(float(mean), rel=1e-2)
    # The upstream gradient of the mean is divided out again: what remains is the rounding of the map's fp16.
    factor = whole.double().norm() / gradient.double().norm()
    assert distance(gradient.double() * factor, whole) < 2e-3
    assert int((gradient == 0).sum()) <= int((whole == 0).sum()) + 1e-3 * whole.numel()


@anywhere
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of pairs that are masked
@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_easy_positives_at_a_small_temperature(device, temperature, dtype):
    """PCCS weighs positives by e^{s / temperature}: exponents up to 100, also of equal rows and of zero rows."""
    features, labels = feature_map(device, *size(device, (2, 64, 24, 24), (1, 7, 6, 5)), dtype=DTYPES[dtype][0])
    features[:, :, 0] = features[:, :, 1]
    features[:, :, 2, 0] = 0
    labels[:, :2] = 1
    options = {"temperature": temperature, "hardness": -1 / temperature, "denominator": "negatives"}
    for bounded in (True, False):
        tau = temperature if bounded else torch.tensor(temperature, device=device)
        found = value_and_gradient(
            lambda x: hpcloss.region_phpc_loss(x, labels, None, backend="triton", **{**options, "temperature": tau}),  # noqa: B023
            features, scale=256.0,
        )  # fmt: skip
        assert all(bool(x.isfinite().all()) for x in found)
        exact = value_and_gradient(
            lambda x: reference.region_phpc_loss(x, labels.cpu(), None, **options), features.double().cpu(), scale=256.0
        )
        for actual, right in zip(found, exact):
            assert distance(actual.cpu(), right) < (1e-4 if dtype == "float32" else 0.05)


# ----------------------------------------------------------------------------------------------- repeatable, graphs


@anywhere
@pytest.mark.parametrize("backend", ["triton", "blockwise"])
def test_deterministic_to_the_bit(device, backend):
    features, labels = feature_map(device, *size(device, (2, 64, 96, 96), (1, 5, 6, 6)))
    rows, groups = (
        random(device, size(device, 8000, 40), 16).to(HALF),
        choice(device, [0, 1, 2], size(device, 8000, 40)),
    )

    def results():
        for detach in (True, False):
            yield from value_and_gradient(
                lambda x, d=detach: hpcloss.region_phpc_loss(x, labels, 16, detach_weights=d, backend=backend), features
            )
        yield from value_and_gradient(lambda x: hpcloss.supcon_loss(x, groups, backend=backend), rows)
        yield from value_and_gradient(lambda x: hpcloss.infonce_loss(x, rows, backend=backend), rows.flip(0))

    for first, second in zip(results(), results()):
        assert torch.equal(first, second)


def region_step(features, labels, loss):
    """A whole training step as it is captured: forward, backward, gradient in place."""
    features.grad = None
    value = loss(features, labels)
    (value * 1024.0).backward()
    return value


@alone
@pytest.mark.parametrize("backend", ["triton", "blockwise"])
def test_graph_of_a_step_replayed_on_new_data(device, backend):
    features, labels = feature_map(device, 2, 64, 32, 32)
    features.requires_grad_()
    loss = hpcloss.RegionPHPCLoss(16, backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            region_step(features, labels, loss)
    torch.cuda.current_stream().wait_stream(side)
    features.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = region_step(features, labels, loss)
    gradient = features.grad
    for seed in (5, 6):
        new_features, new_labels = feature_map(device, 2, 64, 32, 32, seed=seed)
        with torch.no_grad():
            features.copy_(new_features)
            labels.copy_(new_labels)
        graph.replay()
        replayed = value.clone(), gradient.clone()
        eager = region_step(new_features.requires_grad_(), new_labels, loss), new_features.grad
        for actual, right in zip(replayed, eager):
            assert torch.equal(actual, right)


def run_once(device, backend, n):
    """One step of a loss of each kind, at about n rows; what was built before is warm."""
    features, labels = feature_map(device, 1, 16, n // 8, 8)
    rows, groups = random(device, n, 16).to(HALF), choice(device, [0, 1, 2], n)

    def losses():
        value_and_gradient(hpcloss.RegionPHPCLoss(16, backend=backend), features, labels)
        value_and_gradient(hpcloss.RegionPHPCLoss(None, num_classes=4, backend=backend), features, labels)
        value_and_gradient(hpcloss.SupConLoss(backend=backend), rows, groups)
        value_and_gradient(hpcloss.InfoNCELoss(backend=backend), rows, rows.flip(0))

    return losses


@anywhere
@pytest.mark.parametrize("n", [64, 1024, 65536])
@pytest.mark.parametrize("backend", ["triton", "blockwise"])
def test_no_host_sync(device, backend, n):
    if device == "cpu" and n > 64:
        pytest.skip("one size shows that the body runs")
    losses = run_once(device, backend, n)
    losses()
    wait(device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        losses()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    wait(device)


# ------------------------------------------------------------------------------------------------- memory, large N


@alone
@pytest.mark.parametrize("kind", ["supcon", "phpc"])
@pytest.mark.parametrize("n", [65536, 262144])
def test_memory_grows_with_the_elements(device, n, kind):
    """At most 14 bytes of every feature element: rows, their fp32 gradients, the map's gradient; nothing of N x N."""
    side, dim = math.isqrt(n), 128
    if kind == "supcon":
        features, labels = random(device, n, dim).to(HALF), choice(device, [0, 1, 2, 3], n)
        loss = hpcloss.SupConLoss(backend="triton")
    else:
        features, labels = feature_map(device, 1, dim, side, side)
        loss = hpcloss.RegionPHPCLoss(None, backend="triton")
    small = features[:256] if kind == "supcon" else features[..., :16, :16]
    value_and_gradient(loss, small, labels[:256] if kind == "supcon" else labels[..., :16, :16])  # builds the kernels
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value, gradient = value_and_gradient(loss, features, labels, scale=1024.0)
    wait(device)
    peak = torch.cuda.max_memory_allocated() - before
    assert bool(value.isfinite()) and bool(gradient.isfinite().all()) and bool((gradient != 0).any())
    assert peak <= 14 * n * dim, f"{peak / n / dim:.2f} bytes for each feature element"


@anywhere
def test_large_rows_beyond_two_to_the_31_elements(device):
    """The first and the last rows meet; all others are dead. Offsets that overflow 32 bits read and write elsewhere."""
    n, few = size(device, 2**24 + 4096, 200), size(device, 64, 20)
    dim = size(device, 128, 16)
    data = torch.zeros(n, dim, dtype=HALF, device=device)
    ends = torch.cat([torch.arange(few, device=device), torch.arange(n - few, n, device=device)])
    data[ends] = unit_rows(device, 2 * few, dim, HALF)
    rows = torch.arange(n, dtype=torch.int32, device=device)
    bounds = torch.tensor([[0, n - few], [few, n], [n - few, 0], [n, few]], dtype=torch.int32, device=device)
    first = rows < few
    # Anchors at the start meet the keys at the end, and the other way round; half of those keys are positives.
    start = torch.where(first, n - few, 0).int()
    at = Pairs(rows, Intervals(start, start + few // 2, torch.full_like(rows, -1), *bounds.unbind()))
    scale = Scale(torch.tensor(8.0, device=device), 8.0)
    anchors, keys = (
        Rows(data, torch.zeros((), device=device).expand(n, dim).requires_grad_(), "triton") for _ in range(2)
    )
    exact = data[ends].double()
    x, y = exact[:few].clone().requires_grad_(), exact[few:].clone().requires_grad_()
    half = torch.arange(few, device=device).expand(few, few) < few // 2

    def check(actual, dense):
        expected = torch.cat([dense(x, y), dense(y, x)])
        assert distance(actual[ends], expected.detach()) < 1e-3
        gradients = torch.autograd.grad(actual[ends].sum(), (anchors.companion, keys.companion))
        (dx, dy) = torch.autograd.grad(expected.sum(), (x, y))
        total = gradients[0][ends] + gradients[1][ends]
        assert distance(total, torch.cat([dx, dy])) < 5e-3
        for gradient in gradients:
            middle = gradient[few : n - few]
            assert not bool(middle[:: max(len(middle) // 4096, 1)].any()) and not bool(middle[-64:].any())

    check(pair_lse(anchors, at, "negatives", scale, keys=keys), lambda a, b: reference.pair_lse(a, b, ~half, 8.0))
    stat = torch.ones(n, device=device)
    for hardness in (0.0, 1.0):
        check(
            pair_mean(anchors, at, "own", scale, stat=stat, hardness=hardness, keys=keys)[0],
            lambda a, b, h=hardness: reference.pair_mean(a, b, half, 8.0, h, torch.ones_like(a[:, 0]), "own")[0],
        )
        check(
            pair_mean(anchors, at, "logit", scale, hardness=hardness, keys=keys)[0],
            lambda a, b, h=hardness: reference.pair_mean(a, b, half, 8.0, h, None, "logit")[0],
        )


@anywhere
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("permutation", [True, False])
def test_large_map_beyond_two_to_the_31_elements(device, channels_last, permutation):
    shape = size(device, (1, 128, 4097, 4096), (1, 8, 5, 6))
    features = torch.empty(shape, dtype=HALF, device=device)
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    features.normal_().requires_grad_()
    count = shape[2] * shape[3]
    order = torch.arange(count, dtype=torch.int32, device=device).flip(0)
    rows = pack(features, order, normalize=True, permutation=permutation, backend="triton")
    grad = torch.zeros(rows.data.shape, device=device)
    chosen = torch.cat([torch.arange(8, device=device), torch.randint(count, (50,), device=device)])
    chosen = torch.cat([chosen, count - 1 - torch.arange(8, device=device)]).unique()
    grad[chosen] = random(device, len(chosen), shape[1])
    pixels = count - 1 - chosen
    flat = features.detach().movedim(1, -1).reshape(count, -1) if channels_last else None
    some = flat[pixels] if channels_last else features.detach().view(shape[1], count)[:, pixels].T
    leaf = some.double().requires_grad_()
    unit = torch.nn.functional.normalize(leaf, dim=1)
    assert distance(rows.data[chosen], unit.detach()) < 1e-3
    (right,) = torch.autograd.grad(unit, leaf, grad[chosen].double())
    (found,) = torch.autograd.grad(rows.companion, features, grad)
    assert found.stride() == features.stride() and found.dtype == HALF
    taken = found.movedim(1, -1).reshape(count, -1) if channels_last else found.view(shape[1], count).T
    assert distance(taken[pixels], right) < 1e-3
    assert int(taken[:, 0].count_nonzero()) <= len(chosen)


# ------------------------------------------------------------------------------------------------ torch around it


def assert_compiled(device, module, inputs):
    """A compiled module gives what the module gives, without a graph break."""
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for actual, right in zip(value_and_gradient(compiled, *inputs), value_and_gradient(module, *inputs)):
        torch.testing.assert_close(actual, right, rtol=2e-3, atol=1e-5)


@anywhere
@pytest.mark.parametrize("name", ["region", "classes", "supcon", "infonce"])
def test_compile_module(device, name):
    features, labels = feature_map(device, 2, 16, 8, 8, dtype=torch.float32)
    rows, groups = random(device, 40, 16), choice(device, [0, 1, 2], 40)
    module, inputs = {
        "region": (hpcloss.RegionPHPCLoss(4, backend="triton"), (features, labels)),
        "classes": (
            hpcloss.RegionPHPCLoss(4, num_classes=4, reduction="class", detach_weights=False, backend="triton"),
            (features, labels),
        ),
        "supcon": (hpcloss.SupConLoss(backend="triton"), (rows, groups)),
        "infonce": (hpcloss.InfoNCELoss(backend="triton"), (rows, rows.flip(0))),
    }[name]
    assert_compiled(device, module, inputs)


@anywhere
def test_compile_a_training_step(device):
    torch._dynamo.reset()
    labels = choice(device, [0, 1, 2, 255], 2, 8, 8)
    image = torch.ones(2, 1, 8, 8, device=device).cumsum(2) * torch.ones(2, 1, 8, 8, device=device).cumsum(3) / 30
    values = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 1)
        ).to(device)
        loss = hpcloss.RegionPHPCLoss(4, backend="triton")
        optimiser = torch.optim.SGD(network.parameters(), 0.1)

        def step(x, network=network, loss=loss):
            with torch.autocast(x.device.type, HALF, enabled=x.device.type == "cuda"):
                return loss(network(x), labels)

        backend = "inductor" if device == "cuda" else "aot_eager"
        call = torch.compile(step, fullgraph=True, backend=backend) if compiled else step
        for _ in range(3):
            optimiser.zero_grad()
            value = call(image)
            value.backward()
            optimiser.step()
        values.append(value.item())
    assert values[0] == pytest.approx(values[1], rel=1e-2 if device == "cuda" else 1e-4)


def launches(function):
    """Names of what a function makes the device do."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    function()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=activities) as profile:
            function()
            torch.cuda.synchronize()
        events = profile.events()
    return [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]


def kernel_names():
    """Every kernel of the Triton backend."""
    modules = [module for name, module in sys.modules.items() if name.startswith("hpcloss.backends.triton")]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@alone
def test_launches_of_a_step(device):
    """Pack, both primitives, their backward passes, unpack: at most 12 kernels of our own, whatever torch adds."""
    features, labels = feature_map(device, 2, 64, 64, 64)
    loss = hpcloss.RegionPHPCLoss(16, num_classes=4, backend="triton")
    names = launches(lambda: value_and_gradient(loss, features, labels))
    if not native.why_not("cuda"):
        assert len(names) <= 30, names  # 27 (tests/compiled/test_launches.py), and what value_and_gradient adds
    own = [name for name in names if name in kernel_names()]
    print(f"{len(names)} launches a step, of them {len(own)} of this package: {own}")
    assert 6 <= len(own) <= 12, own


@alone
@pytest.mark.parametrize("backend", ["triton", "blockwise"])
def test_other_device(device, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    features, labels = feature_map("cuda:1", 2, 16, 16, 16)
    loss = hpcloss.RegionPHPCLoss(8, backend=backend)
    there = value_and_gradient(loss, features, labels)
    here = value_and_gradient(loss, features.to("cuda:0"), labels.to("cuda:0"))
    assert torch.cuda.current_device() == 0
    for actual, right in zip(there, here):
        assert actual.device == features.device and torch.equal(actual.cpu(), right.cpu())


@alone
def test_other_stream(device):
    """Work goes to the current stream, also that of the backward pass."""
    features, labels = feature_map(device, 2, 64, 64, 64)
    loss = hpcloss.RegionPHPCLoss(16, backend="triton")
    right = value_and_gradient(loss, features, labels, scale=1024.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = features.clone()
        found = value_and_gradient(loss, late, labels, scale=1024.0)
    stream.synchronize()
    for actual, expected in zip(found, right):
        assert torch.equal(actual, expected)


@alone
def test_auto_takes_the_kernels(device):
    for dtype in (torch.float32, HALF, torch.bfloat16):
        assert resolve("auto", torch.zeros(2, 8, device=device, dtype=dtype)) == "triton"
    assert resolve("auto", torch.zeros(2, 8, device=device, dtype=torch.float64)) == "blockwise"
    assert "backend triton: available" in hpcloss.info()


@alone
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("normalize", [True, False])
def test_backends_agree(device, dtype, normalize):
    """The kernels against the PyTorch tiles, which on a GPU run a fixed masked schedule of their own."""
    features, labels = feature_map(device, 2, 72, 40, 24, dtype=DTYPES[dtype][0])
    features = features * (1.0 if normalize else 0.1)
    found, right = (
        value_and_gradient(
            lambda x, b=backend: hpcloss.region_phpc_loss(x, labels, 16, 0.2, normalize=normalize, backend=b),
            features.to(cast), scale=1024.0,
        )
        for backend, cast in (("triton", features.dtype), ("blockwise", torch.float64))
    )  # fmt: skip
    for actual, expected in zip(found, right):
        # Raw half-precision rows are kept in bf16.
        assert distance(actual, expected) < (
            1e-5 if dtype == "float32" else 5e-3 if dtype == "float16" and normalize else 2e-2
        )


@alone
def test_says_nothing_and_warns_of_nothing(device):
    script = textwrap.dedent(f"""
        import sys, warnings
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
        sys.path.insert(0, {str(ROOT)!r})
        import torch, hpcloss
        x = torch.randn(2, 32, 64, 64, device="cuda", requires_grad=True)
        y = torch.randint(0, 4, (2, 64, 64), device="cuda")
        for loss in (hpcloss.RegionPHPCLoss(), hpcloss.RegionSupConLoss(), hpcloss.RegionPHPCLoss.published()):
            loss(x, y).backward()
        torch.cuda.synchronize()
        assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    """)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


# ----------------------------------------------------------------------------------------------- the native library

on_native = pytest.mark.skipif(bool(native.why_not("cuda")), reason=f"no CUDA half: {native.why_not('cuda')}")
KINDS = ("uniform", "weighted", "hardest", "hard_easy")


def drawn(device, labels, values, k, kind, seed=7, **grid):
    """Partition and sample of a label map, on a device."""
    labels = labels.to(device)
    cells = Grid(len(labels), tuple(labels.shape[1:]), grid.get("size", tuple(labels.shape[1:])), True)
    rows = class_sort(labels, cells, background=0, ignore_index=(255,), num_classes=5)
    values = {"uniform": None, "hard_easy": values < 0.3}.get(kind, values)
    seed = torch.tensor(seed, device=device)
    on_device = None if values is None else values.to(device)
    sample = torch.ops.hpcloss.sample(rows.order, rows.offsets, k, kind, on_device, labels.numel(), seed)
    pairs = rows.pairs()
    sort = [rows.order, rows.offsets, rows.outside]
    return [*sort, *sample, pairs.order, *pairs.intervals, *pairs.intervals.counts()]


@alone
@on_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 256, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2047), (2, 2049), (3, 130, 70), (12, 256, 256), (2, 40, 33, 50)])
def test_native_is_the_same_on_the_gpu(device, shape, k, kind):
    labels, values = choice("cpu", [0, 1, 1, 2, 3, 4, 9, 255], *shape), torch.rand(shape)
    for size in (tuple(shape[1:]), tuple(7 for _ in shape[1:])):
        if k * math.prod(-(-extent // cell) for extent, cell in zip(shape[1:], size)) * shape[0] > 1 << 21:
            continue  # the sample of all cells is larger than the map
        here, there = (drawn(where, labels, values, k, kind, size=size) for where in ("cpu", device))
        for expected, found in zip(here, there):
            assert found.is_cuda and found.dtype == expected.dtype and torch.equal(found.cpu(), expected)


@alone
@on_native
@pytest.mark.parametrize("labels", ["few", "far apart", "all different"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2047), (2, 2049), (3, 130, 70), (8, 256, 256), (12, 512, 512)])
def test_native_sorts_any_labels_on_the_gpu(device, shape, labels):
    """Without `num_classes`, and captured in a graph, which no wait for the device survives."""
    labels = {
        "few": lambda: choice("cpu", [0, 1, 2, 255], *shape),
        "far apart": lambda: choice("cpu", [0, -(2**63), 2**63 - 1, 10**12, 255], *shape),
        "all different": lambda: torch.randperm(math.prod(shape)).view(shape),
    }[labels]()
    grid = Grid(len(labels), tuple(labels.shape[1:]), tuple(16 for _ in shape[1:]))
    plan = functools.partial(partition, regions=grid, background=0, ignore_index=(255, -1))
    expected, on_device = plan(labels), labels.to(device)
    plan(on_device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plan(on_device)
    graph.replay()
    for found in (plan(on_device), captured):
        assert all(a.is_cuda and torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@alone
@on_native
@pytest.mark.parametrize("scores", ["equal", "rising", "falling"])
def test_native_giant_interval(device, scores):
    """One class of a million pixels, and scores for which the buffer of the sampler is never or always cut."""
    labels = torch.ones(1, 1 << 20, dtype=torch.int64)
    values = {"equal": torch.ones(1 << 20), "rising": torch.arange(1 << 20).float()}.get(
        scores, -torch.arange(1 << 20).float()
    )
    here, there = (drawn(where, labels, values, 300, "hardest") for where in ("cpu", device))
    assert all(torch.equal(found.cpu(), expected) for expected, found in zip(here, there))


@alone
@on_native
def test_native_reads_any_layout_and_type(device):
    labels = choice("cpu", [0, 1, 2, 255], 6, 40, 30)
    right = drawn(device, labels, torch.rand(6, 40, 30), 9, "uniform")
    for other in (labels.to(device).permute(2, 1, 0).contiguous().permute(2, 1, 0), labels.byte(), labels.int()):
        found = drawn(device, other, torch.rand(6, 40, 30), 9, "uniform")
        assert all(torch.equal(a, b) for a, b in zip(found, right))
    with pytest.raises(ValueError, match="seed must be on cuda"):
        sample_anchors(labels.to(device), 3, num_classes=4, seed=torch.tensor(1))


@alone
@on_native
def test_native_uses_the_current_stream_and_no_sync(device):
    labels = choice("cpu", [0, 1, 2, 255], 8, 128, 128).to(device)
    right = sample_anchors(labels, 64, num_classes=4, seed=torch.tensor(3, device=device))
    late, seed = torch.zeros_like(labels), torch.tensor(3, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.copy_(labels)
            found = sample_anchors(late, 64, num_classes=4, seed=seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, right))


@alone
@on_native
def test_native_graph_replays_draw_fresh_samples(device):
    labels, seed = choice("cpu", [0, 1, 2, 255], 2, 64, 64).to(device), torch.tensor(1, device=device)
    for _ in range(3):
        sample_anchors(labels, 16, num_classes=4, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sample_anchors(labels, 16, num_classes=4, seed=seed)
    orders = []
    for step in range(3):
        seed.fill_(10 + step)
        labels.copy_(choice("cpu", [0, 1, 2, 255], 2, 64, 64, seed=step))
        graph.replay()
        right = sample_anchors(labels, 16, num_classes=4, seed=10 + step)
        assert all(torch.equal(a, b) for a, b in zip(found, right))
        orders.append(found.order.clone())
    assert not torch.equal(orders[0], orders[1])
