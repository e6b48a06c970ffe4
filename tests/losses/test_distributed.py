"""`gather=True`: several ranks that hold shards of a batch compute the value and the gradient of the whole batch.

Ranks are processes with gloo. They live as long as the module's tests and are sent checks by name; each rank computes
the whole batch by itself too, and compares.
"""

import datetime
import functools
import itertools
import multiprocessing
import os
import traceback
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import hpcloss
from hpcloss import distributed
from hpcloss.compat import lightly, open_clip
from hpcloss.heads import FeatureTap
from tests.tools.cases import choice, rows
from tests.tools.losses import FAST, LOSSES
from tests.tools.numerics import assert_within_budget

SECONDS = 100  # what no check may take: a rank that waits for another one hangs
START = 200  # and what the first may, before which the processes start: on a busy machine, eight of them
CHANNELS, DIM = 5, 4
VALUE, GRADIENT = 1e-12, 1e-9  # of themselves
SHARDS = {2: [(3, 2), (0, 4)], 4: [(1, 2, 1, 2), (2, 0, 3, 0)]}


# ---- the ranks


class World:
    """Processes in one group that run functions of this file."""

    def __init__(self, size, folder):
        self.size, self.seconds, context = size, START, multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "hpcloss"])
        self.ends, theirs = zip(*(context.Pipe() for _ in range(size)))
        self.ranks = [
            context.Process(target=serve, args=(end, rank, size, str(folder / f"store{size}")), daemon=True)
            for rank, end in enumerate(theirs)
        ]
        for rank in self.ranks:
            rank.start()

    def run(self, check, *args, **options):
        for end in self.ends:
            end.send((check.__name__, args, options))
        failures = []
        for number, end in enumerate(self.ends):
            if not end.poll(self.seconds):
                self.stop()
                pytest.fail(f"rank {number} of {self.size} hangs in {check.__name__}{args}", pytrace=False)
            failures += [f"rank {number} of {self.size}:\n{text}" for text in end.recv()]
        self.seconds = SECONDS
        if failures:
            self.stop()  # the others may still be waiting for it
            pytest.fail("\n".join(failures), pytrace=False)

    def stop(self):
        for rank in self.ranks:
            rank.kill()
            rank.join()


def serve(end, rank, size, store):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # as in conftest.py
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = datetime.timedelta(seconds=START)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            check, args, options = end.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            globals()[check](*args, **options)
            end.send([])
        except Exception:
            end.send([traceback.format_exc()])


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    started, number = {}, itertools.count()

    def world(size):
        if size not in started or not all(rank.is_alive() for rank in started[size].ranks):
            started[size] = World(size, tmp_path_factory.mktemp(f"ranks{next(number)}"))
        return started[size]

    yield world
    for one in started.values():
        one.stop()


# ---- losses of embeddings that a network makes of x [n, ..., CHANNELS], one x and one (map of) labels for each image


class Case(NamedTuple):
    shape: tuple  # of x, of one image
    loss: object  # of embeddings [n, *shape, DIM], of labels and of options
    labels: tuple = (0, 1, 2, 255)
    per_image: tuple = ()  # shape of the labels of one image
    options: dict = {}


def of_map(name):
    return lambda z, labels, **options: FAST[name](z.movedim(-1, 1), labels, **options)


def of_views(name):
    return lambda z, groups, **options: FAST[name](z[:, 0], z[:, 1], **options)


def entropy_guided(z, labels, **options):
    # The probabilities of an image depend on its labels alone, so that each rank makes the same.
    probs = torch.softmax(torch.stack([labels * 0.37 % 1, labels * 0.61 % 1, labels * 0.13 % 1], 1).to(z), 1)
    noise = torch.softmax(3 * rows(1, 3, *labels.shape[1:], seed=5), 1).to(z)
    return FAST["entropy_guided_contrast"](z.movedim(-1, 1), (probs + noise) / 2, labels, **options)


def multiscale(z, labels, **options):
    return FAST["multiscale_contrast"](z[:, 0].movedim(-1, 1), z[:, 1].movedim(-1, 1), labels, **options)


def prototypes(z, labels, with_probs=True, **options):
    probs = torch.softmax(z[..., :3], -1) if with_probs else None  # differentiated as well
    return FAST["prototype_contrast"](z, labels, probs, **options)


def queue(**classes):
    held = hpcloss.EmbeddingQueue(num_classes=3, size=4, dim=DIM)
    held.enqueue(rows(9, DIM, seed=3).float(), choice([0, 1, 2], 9, seed=4))
    return held.double()


def lightly_bank(z, _, gather):
    return lightly.NTXentLoss(0.3, (7, DIM), gather).double()(z[:, 0], z[:, 1])


def clip(local_loss, gather_with_grad):
    def loss(z, _, gather):
        ranks = distributed.world_size() if gather else 1
        rank = torch.distributed.get_rank() if ranks > 1 else 0
        return open_clip.ClipLoss(local_loss, gather_with_grad, False, rank, ranks)(z[:, 0], z[:, 1], 3.0)

    return loss


COMPAT = {
    "compat lightly": Case((2,), lambda z, _, gather: lightly.NTXentLoss(0.3, 0, gather)(z[:, 0], z[:, 1])),
    "compat lightly bank": Case((2,), lightly_bank),
    **{
        f"compat open_clip {modes}": Case((2,), clip(*modes))
        for modes in ((False, False), (False, True), (True, False), (True, True))
    },
}
MAP = (6, 5)
SMALL = {"region_size": 4, "temperature": 0.3}
CASES = {
    "region_phpc": Case(MAP, of_map("region_phpc"), per_image=MAP, options=SMALL),
    "region_supcon": Case(MAP, of_map("region_supcon"), per_image=MAP, options=SMALL),
    "supcon": Case((), FAST["supcon"], labels=(0, 1, 2, -1)),
    "supcon keys": Case(
        (2,),
        lambda z, labels, **options: FAST["supcon"](
            z[:, 0], labels, z[:, 1], torch.where(labels < 0, labels, (labels + 1) % 3), **options
        ),
        labels=(0, 1, 2, -1),
    ),
    "ntxent": Case((2,), of_views("ntxent")),
    "infonce": Case((2,), of_views("infonce")),
    "infonce negatives": Case((3,), lambda z, _, **options: FAST["infonce"](z[:, 0], z[:, 1], z[:, 2], **options)),
    "hard_negative_nce": Case((2,), of_views("hard_negative_nce")),
    "ihpc": Case((2,), of_views("ihpc")),
    "ihpc groups": Case((2,), lambda z, groups, **options: FAST["ihpc"](z[:, 0], z[:, 1], groups, **options)),
    "pixel_contrast": Case(MAP, of_map("pixel_contrast"), per_image=MAP, options={"num_classes": 3}),
    "pixel_contrast queue": Case(
        MAP,
        lambda z, labels, **options: FAST["pixel_contrast"](z.movedim(-1, 1), labels, None, queue(), **options),
        per_image=MAP,
        options={"num_classes": 3},
    ),
    "local_contrast": Case(
        MAP, of_map("local_contrast"), per_image=MAP, options={"num_classes": 3, "samples_per_class": None}
    ),
    "entropy_guided_contrast": Case(MAP, entropy_guided, per_image=MAP),
    "multiscale_contrast": Case(
        (2, *MAP), multiscale, per_image=MAP, options={"num_classes": 3, "patch_size": 2, "samples_per_class": None}
    ),
    "prototype_contrast": Case((), prototypes, labels=(0, 1, 2, -1)),
    "prototype_assignment": Case(
        MAP,
        lambda z, labels, **options: FAST["prototype_assignment"](
            z.movedim(-1, 1), labels, rows(3, 1, DIM, seed=6).to(z), **options
        ),
        per_image=MAP,
    ),
    **COMPAT,
}  # fmt: skip
OF_A_KIND = {
    "map": lambda name: Case(MAP, of_map(name), per_image=MAP),
    "rows": lambda name: Case((), FAST[name]),
    "views": lambda name: Case((2,), of_views(name)),
}
# Losses without a case above.
CASES |= {
    name: OF_A_KIND[loss.kind](name)._replace(options=loss.required)
    for name, loss in LOSSES.items()
    if name not in CASES
}

# Every loss, every reduction, and what takes another way with keys of other ranks.
OPTIONS = [
    *((name, {}) for name in CASES),
    *(
        (name, {"reduction": "sum"})
        for name in CASES
        if name not in COMPAT and "reduction" in LOSSES[name.split()[0]].changed
    ),
    *(
        (name, {"reduction": "class"})
        for name in ("region_phpc", "supcon", "supcon keys", "pixel_contrast", "local_contrast",
                     "entropy_guided_contrast", "prototype_assignment")
    ),
    *(
        ("region_phpc", options)
        for options in (
            {"reduction": "region"},
            {"reduction": "region", "per_image": True},
            {"per_image": True},
            {"region_size": None, "background": None, "hardness": 0.0},
            {"denominator": "negatives", "detach_weights": False},
            {"discount": 0.5},
            {"normalize": False, "num_classes": 3},
            {"num_classes": 3, "samples_per_class": 1000},
            {"local_size": 2},
            {"local_size": 2, "num_classes": 3, "samples_per_class": 1000, "reduction": "region"},
            {"ignore_index": (), "background": 1},
        )
    ),
    ("supcon", {"form": "in"}),
    ("supcon keys", {"form": "in", "ignore_index": ()}),
    ("infonce", {"symmetric": True}),
    ("infonce", {"symmetric": True, "reduction": "sum", "normalize": False}),
    ("hard_negative_nce", {"tau_plus": 0.0, "beta": 0.0}),
    ("ihpc", {"hardness": 0.0}),
    ("ihpc", {"beta": 0.2}),
    ("pixel_contrast", {"samples_per_class": None, "background": 0}),
    ("entropy_guided_contrast", {"entropy_classes": True}),
    ("entropy_guided_contrast", {"entropy_classes": True, "detach_keys": False, "denominator": "all"}),
    ("entropy_guided_contrast", {"symmetric": True, "detach_keys": False, "threshold": 0.9}),
    ("entropy_guided_contrast", {"samples_per_class": 1000, "symmetric": True}),
    ("multiscale_contrast", {"patch_positives": "majority", "patch_size": (2, 3), "samples_per_class": 1000}),
    ("prototype_contrast", {"with_probs": False, "hardness": 1.0}),
    *((name, {"normalize": False}) for name in ("local_contrast", "entropy_guided_contrast", "multiscale_contrast",
                                                "prototype_contrast")),
]  # fmt: skip


def sizes_of(name, images):
    return tuple(count if CASES[name].per_image else 3 * count for count in images)


def batch(name, images, dtype=torch.float64):
    case = CASES[name]
    return rows(images, *case.shape, CHANNELS, dtype=dtype), choice(case.labels, images, *case.per_image, seed=1)


def network(dtype=torch.float64):
    net = nn.Linear(CHANNELS, DIM).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.copy_(rows(*parameter.shape, seed=10 + number, dtype=dtype))
    return net


def whole_and_shards(name, options, sizes, dtype=torch.float64, labels=None, factor=1.0):
    """The value and the parameters' gradients of the whole batch in one process, and those of this rank's shard under
    DistributedDataParallel. sizes: images of each rank, of vectors three times as many."""
    sizes = sizes_of(name, sizes)
    x, drawn = batch(name, sum(sizes), dtype)
    labels = drawn if labels is None else labels
    start = sum(sizes[: dist.get_rank()])
    mine = slice(start, start + sizes[dist.get_rank()])
    results = []
    for wrap, gather, part in ((lambda net: net, False, slice(None)), (DistributedDataParallel, True, mine)):
        net = wrap(network(dtype))
        torch.manual_seed(0)
        value = CASES[name].loss(net(x[part]), labels[part], **{**CASES[name].options, **options}, gather=gather)
        (factor * value).backward()
        results.append((value.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])))
    return results


def assert_equal(actual, expected):
    (value, gradient), (whole, whole_gradient) = actual, expected
    assert (value - whole).abs() <= VALUE * whole.abs(), f"{value} is not {whole}"
    largest = whole_gradient.abs().max()
    assert (gradient - whole_gradient).abs().max() <= GRADIENT * largest
    if largest > 0:
        assert abs(gradient.norm() / whole_gradient.norm() - 1) <= GRADIENT


# ---- checks


def check_loss(name, options, sizes):
    expected, actual = whole_and_shards(name, options, sizes)
    assert expected[0] != 0 and expected[1].abs().max() > 1e-6, "a case that says something"
    assert_equal(actual, expected)


@pytest.mark.parametrize("size", SHARDS)
@pytest.mark.parametrize("name,options", OPTIONS, ids=lambda value: str(value) if isinstance(value, dict) else value)
def test_value_and_gradient_of_the_whole_batch(worlds, name, options, size):
    for sizes in SHARDS[size]:
        worlds(size).run(check_loss, name, options, sizes)


def check_ignored(name, sizes, hidden):
    """Ranks in `hidden` have ignored labels alone."""
    ranks, sizes = sizes, sizes_of(name, sizes)
    labels = batch(name, sum(sizes))[1]
    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    for rank in hidden:
        labels[starts[rank] : starts[rank] + sizes[rank]] = CASES[name].labels[-1]
    expected, actual = whole_and_shards(name, {}, ranks, labels=labels)
    if len(hidden) == len(sizes):
        assert actual[0] == 0 and not actual[1].any()
    assert_equal(actual, expected)


@pytest.mark.parametrize("name", ["region_phpc", "supcon", "supcon keys", "pixel_contrast", "local_contrast",
                                  "entropy_guided_contrast", "prototype_contrast", "prototype_assignment"])  # fmt: skip
def test_a_rank_without_anchors(worlds, name):
    worlds(2).run(check_ignored, name, (3, 2), [0])
    worlds(2).run(check_ignored, name, (3, 2), [0, 1])
    worlds(4).run(check_ignored, name, (2, 0, 3, 1), [0, 2])


def check_unknown_probability(options):
    """NaN in the probabilities of one rank, whose pixels are keys of the others', shows in the value of all of them."""
    x, _ = batch("entropy_guided_contrast", 2)
    probs = torch.softmax(2 * x, -1).movedim(-1, 1)
    if dist.get_rank() == 0:
        probs[0, 0, 0, 0] = torch.nan
    z = network()(x).movedim(-1, 1)
    assert hpcloss.entropy_guided_contrast_loss(z, probs, gather=True, **options).isnan()


@pytest.mark.parametrize("options", [{}, {"reduction": "class"}, {"entropy_classes": True, "samples_per_class": 2}])
def test_a_probability_that_is_nan_shows_on_all_ranks(worlds, options):
    worlds(2).run(check_unknown_probability, options)


def check_empty_batch(name):
    expected, actual = whole_and_shards(name, {}, (0,) * dist.get_world_size())
    assert actual[0] == expected[0] == 0 and not actual[1].any()


@pytest.mark.parametrize("name", CASES)
def test_no_image_anywhere(worlds, name):
    worlds(2).run(check_empty_batch, name)


def check_float32(name, sizes):
    (exact_value, exact_gradient), _ = whole_and_shards(name, {}, sizes)
    (plain_value, plain_gradient), (value, gradient) = whole_and_shards(name, {}, sizes, torch.float32)
    assert value.dtype == torch.float32
    assert_within_budget(value, plain_value, exact_value, "loss")
    assert_within_budget(gradient, plain_gradient, exact_gradient, "grad")


@pytest.mark.parametrize("name", ["region_phpc", "supcon", "ntxent", "infonce", "pixel_contrast"])
def test_float32(worlds, name):
    worlds(2).run(check_float32, name, (3, 2))


def check_gradient_of_half_rows():
    """fp16 embeddings: what the ranks add up is fp32; rounded once, where it enters the embeddings."""
    z, labels = rows(600, DIM, dtype=torch.float16), choice([0, 1, 2], 600, seed=1)
    whole, mine = z.clone().requires_grad_(), slice(300 * dist.get_rank(), 300 * (dist.get_rank() + 1))
    hpcloss.supcon_loss(whole.float(), labels).backward()
    part = z[mine].clone().requires_grad_()
    hpcloss.supcon_loss(part, labels[mine], gather=True).backward()
    exact = dist.get_world_size() * whole.grad[mine].double()
    torch.testing.assert_close(part.grad.double(), exact, rtol=2**-10, atol=2**-23)


def test_gradients_are_added_in_float32(worlds):
    worlds(2).run(check_gradient_of_half_rows)


def check_scaled(factor):
    expected, actual = whole_and_shards("region_phpc", {}, (3, 2), factor=factor)
    assert_equal(actual, expected)


def test_a_scaled_loss(worlds):
    """A weight of the loss and GradScaler's factor."""
    worlds(2).run(check_scaled, 1024.0)


def check_none(name, sizes):
    x, labels = batch(name, sum(sizes))
    start = sum(sizes[: dist.get_rank()])
    mine = slice(start, start + sizes[dist.get_rank()])
    options = {**CASES[name].options, "reduction": "none"}
    net, parallel = network(), DistributedDataParallel(network())
    whole = CASES[name].loss(net(x), labels, **options)
    part = CASES[name].loss(parallel(x[mine]), labels[mine], **options, gather=True)
    per_image = len(whole) // sum(sizes)  # two views: of view1 first
    own = whole.view(per_image, -1)[:, mine].reshape(-1) if CASES[name].shape == (2,) else whole[mine]
    weights = rows(*whole.shape, seed=8)
    own_weights = weights.view(per_image, -1)[:, mine].reshape(-1) if CASES[name].shape == (2,) else weights[mine]
    torch.testing.assert_close(part, own, rtol=VALUE, atol=VALUE)
    (weights * whole).sum().backward()
    (dist.get_world_size() * (own_weights * part).sum()).backward()
    for actual, expected in zip(parallel.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=GRADIENT, atol=GRADIENT)


@pytest.mark.parametrize("name", ["region_phpc", "supcon", "ntxent", "ihpc", "prototype_assignment", "local_contrast",
                                  "hard_negative_nce", "pixel_contrast"])  # fmt: skip
def test_reduction_none_is_local(worlds, name):
    for sizes in SHARDS[2]:
        worlds(2).run(check_none, name, sizes)


class Trained(nn.Module):
    """A network and its loss as what is wrapped, with a temperature that is learnt."""

    def __init__(self, name, gather):
        super().__init__()
        self.net = network()
        if name == "infonce":
            self.loss = hpcloss.InfoNCELoss(learnable=True, symmetric=True, gather=gather).double()
        else:
            temperature = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
            self.loss = hpcloss.RegionPHPCLoss(4, temperature, gather=gather)
        self.name = name

    def forward(self, x, labels):
        z = self.net(x)
        return self.loss(z[:, 0], z[:, 1]) if self.name == "infonce" else self.loss(z.movedim(-1, 1), labels)


def check_learnt_temperature(name):
    x, labels = batch(name, 5)
    mine = [slice(0, 3), slice(3, 5)][dist.get_rank()]
    whole, parallel = Trained(name, False), DistributedDataParallel(Trained(name, True))
    for step in range(3):
        losses = whole(x, labels), parallel(x[mine], labels[mine])
        for model, loss in zip((whole, parallel), losses, strict=True):
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        assert abs(losses[1] / losses[0] - 1) < VALUE * 10 ** (step + 1)
    for actual, expected in zip(parallel.parameters(), whole.parameters(), strict=True):
        assert (actual.grad - expected.grad).abs().max() <= GRADIENT * expected.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["infonce", "region_phpc"])
def test_three_steps_with_a_learnt_temperature(worlds, name):
    worlds(2).run(check_learnt_temperature, name)


def check_sampling():
    """A rank draws its own pixels: the loss is that of the whole batch with the pixels that no rank drew left out."""
    x, labels = batch("pixel_contrast", 5)
    shards = [slice(0, 3), slice(3, 5)]
    kept = torch.full_like(labels, 255)
    for rank, shard in enumerate(shards):
        torch.manual_seed(rank)
        order, ends = hpcloss.sample_anchors(labels[shard], 2, num_classes=3)
        drawn = order[: ends[-1]].long()
        kept[shard].view(-1)[drawn] = labels[shard].reshape(-1)[drawn]
    assert (kept != 255).sum() < (labels != 255).sum()
    mine, z = shards[dist.get_rank()], network()(x).movedim(-1, 1)
    torch.manual_seed(dist.get_rank())
    value = hpcloss.pixel_contrast_loss(z[mine], labels[mine], num_classes=3, samples_per_class=2, gather=True)
    whole = hpcloss.pixel_contrast_loss(z, kept, num_classes=3, samples_per_class=None)
    assert abs(value / whole - 1) < VALUE


def test_each_rank_draws_its_own_samples(worlds):
    worlds(2).run(check_sampling)


def check_max_regions(options):
    """The ranks draw the same regions, those the first one draws for the whole batch."""
    x, labels = batch("region_phpc", 5)
    labels[:3, :4, :4] = 1  # a region with two labels in the whole batch alone, and on the second rank
    mine = [slice(0, 3), slice(3, 5)][dist.get_rank()]
    z = network()(x).movedim(-1, 1)
    options = {"region_size": 2, "max_regions": 4, **options}
    values = set()
    for seed in range(4):
        torch.manual_seed(seed)
        whole = hpcloss.region_phpc_loss(z, labels, **options)
        torch.manual_seed(seed if dist.get_rank() == 0 else 100)
        value = hpcloss.region_phpc_loss(z[mine], labels[mine], gather=True, **options)
        assert abs(value / whole - 1) < VALUE
        values.add(round(float(value), 9))
    assert len(values) > 1


@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 3, "samples_per_class": 100, "reduction": "region"}, {"local_size": 1}]
)
def test_the_ranks_draw_the_same_regions(worlds, options):
    worlds(2).run(check_max_regions, options)


def check_stats(options, sizes):
    x, labels = batch("region_phpc", sum(sizes))
    labels[0, 0, 0] = 77
    start = sum(sizes[: dist.get_rank()])
    mine = slice(start, start + sizes[dist.get_rank()])
    z = network()(x).movedim(-1, 1)
    _, expected = hpcloss.region_phpc_loss(z, labels, 4, return_stats=True, **options)
    _, actual = hpcloss.region_phpc_loss(z[mine], labels[mine], 4, return_stats=True, gather=True, **options)
    assert list(actual) == list(expected)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=VALUE, atol=VALUE)


@pytest.mark.parametrize("options", [{}, {"num_classes": 3}, {"per_image": True, "hardness": 0.0}])
def test_stats_of_the_whole_batch(worlds, options):
    worlds(2).run(check_stats, options, (3, 2))
    worlds(4).run(check_stats, options, (2, 0, 3, 1))


def check_bank():
    """The memory bank of a rank: the same on all of them, it is that of the whole batch."""
    bank, groups = rows(6, DIM, seed=3), choice([0, 1, 7], 6, seed=4)
    x, labels = batch("ihpc", 5)
    mine = [slice(0, 3), slice(3, 5)][dist.get_rank()]
    for options in ({"groups": labels}, {}):
        z = network()(x)
        whole = hpcloss.ihpc_loss(z[:, 0], z[:, 1], bank=bank, bank_groups=groups, **options)
        own = {name: value[mine] for name, value in options.items()}
        value = hpcloss.ihpc_loss(z[mine, 0], z[mine, 1], bank=bank, bank_groups=groups, gather=True, **own)
        assert abs(value / whole - 1) < VALUE


def test_memory_bank(worlds):
    worlds(2).run(check_bank)


def check_lightly_bank():
    """What is written into the banks of all ranks is what one process writes into that of the whole batch."""
    bank, gathering = (lightly.NTXentLoss(0.3, (7, DIM), gather).double() for gather in (False, True))
    gathering.load_state_dict(bank.state_dict())
    mine = [slice(0, 3), slice(3, 5)][dist.get_rank()]
    for step in range(3):
        x, y = rows(5, DIM, seed=step).requires_grad_(), rows(5, DIM, seed=10 + step)
        assert abs(gathering(x[mine], y[mine]) / bank(x, y) - 1) < VALUE
        for name, buffer in gathering.state_dict().items():
            assert torch.equal(buffer, bank.state_dict()[name]), name


def test_bank_of_lightly(worlds):
    worlds(2).run(check_lightly_bank)


def check_modules():
    x, labels = batch("region_phpc", 5)
    mine = [slice(0, 3), slice(3, 5)][dist.get_rank()]
    z = network()(x).movedim(-1, 1)
    whole = hpcloss.RegionPHPCLoss(4)(z, labels)
    assert abs(hpcloss.RegionPHPCLoss(4, gather=True)(z[mine], labels[mine]) / whole - 1) < VALUE
    assert abs(hpcloss.RegionPHPCLoss(4)(z[mine], labels[mine]) / whole - 1) > 1e-3  # without it: another loss


def test_module(worlds):
    worlds(2).run(check_modules)


def check_tapped():
    """hpcloss.heads.FeatureTap under DistributedDataParallel: gradients through the output and through the features."""
    mine, x = slice(dist.get_rank(), dist.get_rank() + 1), rows(2, 3, 4, 4, seed=7)
    gradients, world = [], dist.get_world_size()
    for wrap, part, factor in ((lambda net: net, slice(None), 1), (DistributedDataParallel, mine, world)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 1)).double()
        model = wrap(FeatureTap(net, "0"))
        for _ in range(2):
            output, features = model(x[part])
            (factor * (output.square().sum() + features.square().sum())).backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(name.startswith("module.model.") for name in model.state_dict())
    for got, expected in zip(*gradients):
        torch.testing.assert_close(got, expected, rtol=VALUE, atol=VALUE)


def test_tapped_network(worlds):
    worlds(2).run(check_tapped)


def check_no_grad():
    x, labels = batch("region_phpc", 5)
    mine = [slice(0, 3), slice(3, 5)][dist.get_rank()]
    with torch.no_grad():
        z = network()(x).movedim(-1, 1)
        whole = hpcloss.region_phpc_loss(z, labels)
        value = hpcloss.region_phpc_loss(z[mine], labels[mine], gather=True)
    assert not value.requires_grad and abs(value / whole - 1) < VALUE


def test_without_gradients(worlds):
    worlds(2).run(check_no_grad)


def check_repeats():
    first, second = (whole_and_shards("region_phpc", {}, (2, 0, 3, 1))[1] for _ in range(2))
    assert torch.equal(first[0], second[0])
    z, labels = batch("supcon", 8)
    grads = []
    for _ in range(2):
        own = z[2 * dist.get_rank() : 2 * dist.get_rank() + 2].clone().requires_grad_()
        hpcloss.supcon_loss(own, labels[2 * dist.get_rank() : 2 * dist.get_rank() + 2], gather=True).backward()
        grads.append(own.grad)
    assert torch.equal(*grads)


def test_bitwise_repeatable(worlds):
    worlds(4).run(check_repeats)


def check_different_maps():
    z, labels = rows(2, DIM, 4, 4 + 4 * dist.get_rank()), choice([0, 1, 2], 2, 4, 4 + 4 * dist.get_rank())
    with pytest.raises(ValueError, match=r"same number of regions on every rank .*got \[1, 2\]"):
        hpcloss.region_phpc_loss(z, labels, 4, gather=True)
    for most in (1, 7):  # drawn before rows are exchanged: by both ranks, by none
        with pytest.raises(ValueError, match=r"same number of regions on every rank .*got \[1, 2\]"):
            hpcloss.region_phpc_loss(z, labels, 4, max_regions=most, gather=True)
    hpcloss.region_phpc_loss(z, labels, 4, gather=True, per_image=True)  # nobody else's business


def test_maps_of_different_sizes_raise_everywhere(worlds):
    worlds(2).run(check_different_maps)


def check_compiled():
    x, labels = batch("region_phpc", 5)
    mine = [slice(0, 3), slice(3, 5)][dist.get_rank()]
    z = network()(x).movedim(-1, 1).detach()
    values = []
    for compiled in (lambda loss: loss, functools.partial(torch.compile, backend="eager")):
        own = z[mine].clone().requires_grad_()
        # Compiled code takes the tiles.
        value = compiled(hpcloss.region_phpc_loss)(own, labels[mine], 4, gather=True, backend="blockwise")
        value.backward()
        values.append((value.detach(), own.grad))
    for plain, compiled in zip(*values, strict=True):
        assert torch.equal(plain, compiled)


def test_compiled_code_is_interrupted_and_right(worlds):
    worlds(2).run(check_compiled)


# ---- costs


class Counted:
    """Numbers that this rank receives from others, by operation."""

    def __init__(self, patch):
        self.of, world = {}, dist.get_world_size()
        own = (world - 1) / world
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        for name, part in {gather: own, "all_to_all_single": own, "all_reduce": 1}.items():
            patch.setattr(dist, name, self.counting(name.replace("into_tensor", "single"), getattr(dist, name), part))

    def counting(self, name, operation, part):
        def counted(first, *args, **options):
            self.of.setdefault(name, []).append(round(first.numel() * part))
            return operation(first, *args, **options)

        return counted


def check_traffic(images):
    """rows: (W - 1) N D numbers each way; labels: 2 (W - 1) N; sizes and sums: a few numbers, whatever N and D."""
    world, pixels = dist.get_world_size(), images * 30
    z, labels = rows(images, DIM, 6, 5, seed=dist.get_rank()).requires_grad_(), choice([0, 1, 2], images, 6, 5)
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        hpcloss.region_phpc_loss(z, labels, 4, gather=True).backward()
    others = world - 1
    assert counted.of == {
        "all_gather_single": [2 * others, 2 * others * pixels, others * pixels * DIM],
        "all_to_all_single": [others * pixels * DIM],
        "all_reduce": [1, 1],
    }
    with pytest.MonkeyPatch.context() as patch:  # nothing but sums where no anchor meets another rank's pixels
        counted = Counted(patch)
        hpcloss.region_phpc_loss(z, labels, 4, gather=True, per_image=True).backward()
    assert counted.of == {"all_reduce": [1, 1]}


@pytest.mark.parametrize("size", [2, 4, 8])
def test_traffic_grows_with_the_number_of_other_ranks(worlds, size):
    worlds(size).run(check_traffic, 2)
    worlds(size).run(check_traffic, 4)


class Alive(TorchDispatchMode):
    """Bytes of the tensors that operators have returned and that something still holds. What an operator or the
    communication library takes and gives back inside is not seen; nor is what there was before."""

    def __init__(self, *before):
        super().__init__()
        self.before, self.storages, self.most = {x.untyped_storage()._cdata for x in before}, {}, 0

    def bytes(self):
        self.storages = {at: found for at, found in self.storages.items() if not found[0].expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.before:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.bytes())
        return found


def check_memory(images):
    """Of N rows of D numbers: rows and keys are kept, (W + 1) N D; in backward two terms' gradients of both come to
    them, 3 (W + 1) N D. What is more has a few numbers a row: plan, labels, statistics. The dense backend, for problems
    as small as this, keeps slopes as well.
    """
    world, pixels, dim = dist.get_world_size(), images * 64, 64
    z = rows(images, dim, 8, 8, seed=dist.get_rank(), dtype=torch.float32).requires_grad_()
    labels = choice([0, 1, 2], images, 8, 8)
    with Alive(z, labels) as alive:
        loss = hpcloss.region_phpc_loss(z, labels, 4, gather=True, backend="blockwise")
        kept = alive.bytes()
        loss.backward()
    rows_and_keys, rest = 4 * (world + 1) * pixels * dim, (8 * world + 40) * pixels + 2000
    assert rows_and_keys <= kept <= rows_and_keys + rest
    assert 3 * rows_and_keys <= alive.most <= 3 * rows_and_keys + rest


@pytest.mark.parametrize("size", [2, 4, 8])
def test_memory_grows_with_the_number_of_ranks(worlds, size):
    worlds(size).run(check_memory, 2)
    worlds(size).run(check_memory, 4)


# ---- alone


def check_alone():
    assert dist.get_world_size() == 1
    for name, case in CASES.items():
        same_alone(name, case)


def same_alone(name, case):
    results = []
    for gather in (False, True):
        net, (x, labels) = network(), batch(name, 4)
        torch.manual_seed(0)
        value = case.loss(net(x), labels, **case.options, gather=gather)
        value.backward()
        results.append((value.detach(), net.weight.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1]), name


@pytest.mark.parametrize("name", CASES)
def test_without_a_process_group_nothing_changes(name):
    assert not dist.is_initialized() and not distributed.has_peers(True)
    same_alone(name, CASES[name])


def test_alone_in_a_process_group_nothing_changes(worlds):
    worlds(1).run(check_alone)
