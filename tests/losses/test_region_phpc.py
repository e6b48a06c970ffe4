"""The region losses: every option against the reference, in float64, and what holds for all of them."""

import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from hpcloss.losses import region as region_losses
from hpcloss.plan import partition
from tests.tools.cases import (
    LABELS,
    MAPS,
    NOISE,
    assert_same,
    choice,
    draw_region_options,
    integers,
    rows,
    runs,
    value_and_grads,
)
from tests.tools.losses import FAST, ORACLE, both
from tests.tools.numerics import assert_exact

phpc, ref_phpc = FAST["region_phpc"], ORACLE["region_phpc"]
IGNORED = (-100, -1, 255)


# ------------------------------------------------------------------------------------------ region losses: oracle


@pytest.mark.parametrize("seed", range(150))
def test_region_loss_on_random_options(seed):
    shape = list(MAPS.values())[seed % 3]
    options = draw_region_options(seed, shape)
    if options["background"] in ((3,) if options["ignore_index"] == 3 else options["ignore_index"]):
        options["background"] = None
    labels = LABELS[("mixed", "ignored", "any ids")[seed // 3 % 3]]((shape[0], *shape[2:]), seed)
    assert_same(*both("region_phpc", labels, **options), rows(*shape, seed=seed))


@pytest.mark.parametrize("denominator", ["own", "all", "negatives"])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("shape", MAPS)
def test_region_loss_on_degenerate_maps(shape, labels, denominator):
    shape = MAPS[shape]
    labels = LABELS[labels]((shape[0], *shape[2:]), 0)
    for index, reduction in enumerate(("mean", "class", "region", "sum", "none")):
        options = {"region_size": (None, 1, 3, 4, 2)[index], "local_size": (None, 1, None, 2, 2)[index]}
        loss = both("region_phpc", labels, denominator=denominator, reduction=reduction, **options)
        assert_same(*loss, rows(*shape))


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6), (0, 3, 2, 2, 2)])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 3}, {"local_size": 2}, {"max_regions": 1}, {"region_size": None}]
)
def test_region_loss_on_an_empty_map(shape, per_image, options):
    features = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    for reduction in ("mean", "class", "region", "sum", "none"):
        loss = phpc(features, labels, **{"region_size": 4, **options}, per_image=per_image, reduction=reduction)
        assert loss.shape == (labels.shape if reduction == "none" else ()) and loss.sum() == 0
        loss.sum().backward()
    loss, stats = phpc(features, labels, per_image=per_image, return_stats=True)
    assert all(value == 0 for value in stats.values())


@pytest.mark.parametrize("labels", ["no positives", "no negatives", "background only", "all ignored"])
@pytest.mark.parametrize("reduction", ["mean", "class", "region", "sum", "none"])
def test_nothing_counted_is_zero_joined_to_the_graph(labels, reduction):
    features = rows(2, 5, 7, 6).requires_grad_()
    loss = phpc(features, LABELS[labels]((2, 7, 6), 0), 4, local_size=2, reduction=reduction)
    assert loss.requires_grad and (loss == 0).all()
    loss.sum().backward()
    assert (features.grad == 0).all()


def test_empty_map_with_samples():
    features = torch.zeros((0, 4, 5, 6), dtype=torch.float64, requires_grad=True)
    loss = phpc(features, torch.zeros((0, 5, 6), dtype=torch.int64), 4, num_classes=3, samples_per_class=2)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("reduction", ["mean", "class", "region", "sum", "none"])
@pytest.mark.parametrize("per_image", [False, True])
def test_region_supcon_loss(reduction, per_image):
    labels = LABELS["ignored"]((2, 7, 6), 3)
    for size in (None, 3, (2, 5)):
        loss = both("region_supcon", labels, size, 0.2, reduction=reduction, per_image=per_image, background=1)
        assert_same(*loss, rows(2, 5, 7, 6))


@pytest.mark.parametrize("n", [511, 512, 513, 1100])
@pytest.mark.parametrize("kind", ["long", "mixed", "short"])
def test_region_loss_beyond_one_tile(n, kind):
    """Long runs of a class make tiles without masks, short ones share masked tiles; background before the anchors."""
    labels = {
        "long": runs(n // 4, n // 2, n - n // 4 - n // 2),
        "mixed": runs(n // 3, 130, 127, 5, 1, 40, 128, n - n // 3 - 431 if n > 1000 else n - n // 3 - 301)[:n],
        "short": integers(60, n),
    }[kind]
    labels = F.pad(labels, (0, n - labels.numel()), value=1)[torch.randperm(n)].view(1, 1, n)
    features = rows(1, 3, 1, n)
    for denominator in ("own", "all", "negatives"):
        options = {"denominator": denominator, "detach_weights": denominator == "all", "hardness": 2.0}
        assert_same(*both("region_phpc", labels, None, 0.2, **options), features)
    assert_same(*both("region_phpc", labels, None, 0.3, 0.0, discount=0.4), features)


def test_regions_beyond_one_tile():
    labels = choice([0, 1, 1, 1, 2, 3, 255], 2, 36, 40)
    for options in ({"region_size": (36, 20)}, {"region_size": (18, 40), "local_size": (18, 20)}):
        assert_same(*both("region_phpc", labels, **options), rows(2, 3, 36, 40))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.float32, torch.float64])
def test_label_dtypes_and_shapes(dtype):
    values = [0, 1, 2, 255] if dtype == torch.uint8 else [0, 1, 2, -1]
    labels = choice(values, 2, 7, 6)
    features = rows(2, 5, 7, 6)
    expected = partial(ref_phpc, labels=labels, region_size=3)
    assert_same(lambda x: phpc(x, labels.to(dtype), 3), expected, features)
    assert_same(lambda x: phpc(x, labels.to(dtype)[:, None], 3, num_classes=3), expected, features)


def test_bool_labels():
    labels = integers(2, 2, 7, 6).bool()
    assert_same(lambda x: phpc(x, labels, 3), lambda x: ref_phpc(x, labels.long(), 3), rows(2, 5, 7, 6))


@pytest.mark.parametrize("size", [(14, 12), (3, 2), (7, 13), (1, 1), (29, 6)])
def test_labels_of_another_resolution(size):
    labels, features = choice([0, 1, 2, 255], 2, *size), rows(2, 5, 7, 6)
    assert_same(*both("region_phpc", labels, 3), features)
    resized = F.interpolate(labels[:, None].double(), (7, 6), mode="nearest")
    assert_same(lambda x: phpc(x, labels, 3), lambda x: phpc(x, resized, 3), features)


@pytest.mark.parametrize("depth,channel", [(16, False), (16, True), (8, False), (4, True)])
def test_labels_of_a_volume_as_deep_as_it_has_channels(depth, channel):
    """Labels of the same, of finer or of coarser resolution along the depth; coarser ones need their channel axis."""
    features = rows(1, depth, 8, 3, 2)
    labels = choice([0, 1, 2, 255], 1, depth, 3, 2)
    given = labels[:, None] if channel else labels
    resized = F.interpolate(labels[:, None].double(), (8, 3, 2), mode="nearest")
    assert_same(lambda x: phpc(x, given, 4), lambda x: phpc(x, resized, 4), features)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e308])
@pytest.mark.parametrize(
    "options", [{}, {"local_size": 1}, {"denominator": "all", "normalize": False}, {"num_classes": 3}]
)
def test_what_an_ignored_pixel_holds_reaches_nothing(poison, options):
    labels = choice([0, 1, 2, 255], 2, 7, 6)
    features = rows(2, 5, 7, 6)
    poisoned = torch.where((labels == 255)[:, None], poison, features)
    expected_value, (expected_grad,) = value_and_grads(lambda x: phpc(x, labels, 3, **options), features)
    value, (grad,) = value_and_grads(lambda x: phpc(x, labels, 3, **options), poisoned)
    assert torch.equal(value, expected_value) and torch.equal(grad, expected_grad)
    assert (grad.movedim(1, -1)[labels == 255] == 0).all()


def test_zero_rows_have_no_gradient():
    features, labels = rows(2, 5, 7, 6), integers(3, 2, 7, 6)
    features[:, :, 2:4] = 0
    features[0, :, 4] *= 1e-14
    assert_same(*both("region_phpc", labels, None), features)
    _, (grad,) = value_and_grads(lambda x: phpc(x, labels, None), features)
    assert (grad[:, :, 2:4] == 0).all() and (grad[0, :, 4] == 0).all() and (grad[:, :, :2] != 0).any()


@pytest.mark.parametrize("options", [{}, {"hardness": 0.0, "discount": 0.2}, {"detach_weights": False, "local_size": 2},
                                     {"denominator": "all"}, {"denominator": "negatives", "hardness": -3.0},
                                     {"normalize": False, "hardness": 0.1}])  # fmt: skip
def test_gradient_of_the_temperature(options):
    labels = LABELS["ignored"]((2, 7, 6), 0)
    fast = lambda x, t: phpc(x, labels, 4, t, **options)  # noqa: E731
    oracle = lambda x, t: ref_phpc(x, labels, 4, t, **options)  # noqa: E731
    for t in (torch.tensor(0.2), torch.tensor(0.01), torch.tensor(3.0)):
        assert_same(fast, oracle, rows(2, 5, 7, 6), t.double())
    _, grads = value_and_grads(fast, rows(2, 5, 7, 6), torch.tensor([0.2]).double())
    assert grads[1].shape == (1,) and grads[1].abs() > 0


# ------------------------------------------------------------------------------------------------------- properties

VARIANTS = [
    {},
    {"region_size": 3, "reduction": "region", "detach_weights": False},
    {"region_size": (4, 6), "local_size": (2, 3), "reduction": "class"},
    {"region_size": None, "denominator": "all", "reduction": "class"},
    {"region_size": 2, "denominator": "negatives", "per_image": True, "reduction": "sum"},
    {"region_size": None, "hardness": 0.0, "discount": 0.1},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_class_ids_are_only_names(options):
    labels, features = choice([0, 1, 2, 3, 255], 2, 7, 6), rows(2, 5, 7, 6)
    names = {0: 17, 1: -3, 2: 0, 3: 2**40, 255: -100}
    renamed = labels.clone()
    for old, new in names.items():
        renamed[labels == old] = new
    assert_same(lambda x: phpc(x, renamed, background=17, **options), lambda x: phpc(x, labels, **options), features)
    swapped = torch.tensor([3, 0, 1, 2])[labels.clamp(max=3)].where(labels < 255, labels)
    assert_same(
        lambda x: phpc(x, swapped, background=3, num_classes=4, **options),
        lambda x: phpc(x, labels, **options), features,
    )  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS)
def test_order_of_images_and_pixels_does_not_matter(options):
    labels, features = choice([0, 1, 2, 255], 3, 7, 6), rows(3, 5, 7, 6)
    assert_same(lambda x: phpc(x.flip(0), labels.flip(0), **options), lambda x: phpc(x, labels, **options), features)
    if options.get("region_size", 16) in (None, 16) and not options.get("local_size"):
        order = torch.randperm(3 * 7 * 6)

        def shuffled(x):
            x = x.movedim(1, -1).reshape(-1, 5)[order].view(3, 7, 6, 5).movedim(-1, 1)
            return phpc(x, labels.reshape(-1)[order].view(3, 7, 6), **options)

        assert_same(shuffled, lambda x: phpc(x, labels, **options), features)


@pytest.mark.parametrize("options", [{}, {"hardness": 0.0}, {"denominator": "all"}, {"detach_weights": False}])
@pytest.mark.parametrize("per_image", [False, True])
def test_regions_are_a_loop_over_crops(options, per_image):
    labels, features = choice([0, 1, 2, 255], 2, 7, 6), rows(2, 5, 7, 6)

    def loop(x):
        crops = [(slice(i, i + 3), slice(j, j + 4)) for i in (0, 3, 6) for j in (0, 4)]
        images = [slice(0, 1), slice(1, 2)] if per_image else [slice(0, 2)]
        return sum(
            phpc(x[b][:, :, r, c], labels[b][:, r, c], None, reduction="sum", **options)
            for b in images for r, c in crops
        )  # fmt: skip

    assert_same(lambda x: phpc(x, labels, (3, 4), per_image=per_image, reduction="sum", **options), loop, features)


@pytest.mark.parametrize("options", VARIANTS[:1] + VARIANTS[3:])
def test_ignoring_is_dropping(options):
    labels, features = choice([0, 1, 2, 255], 1, 1, 40), rows(1, 5, 1, 40)
    keep = (labels[0, 0] != 255).nonzero().view(-1)
    options = {**options, "region_size": None}
    assert_same(
        lambda x: phpc(x, labels, **options), lambda x: phpc(x[..., keep], labels[..., keep], **options), features
    )


@pytest.mark.parametrize("options", [o for o in VARIANTS if o.get("denominator") != "all"])
@pytest.mark.parametrize("label", [0, 1, 255])
def test_appending_a_pure_region_changes_nothing(options, label):
    labels, features = choice([0, 1, 2, 255], 2, 12, 12), rows(2, 5, 12, 12)
    options = {**options, "region_size": options.get("region_size") or 12}
    longer = F.pad(labels, (0, 12), value=label)
    more = rows(2, 5, 12, 12, seed=9)
    assert_same(lambda x, y: phpc(torch.cat([x, y], 3), longer, **options) + 0 * y.sum(),
                lambda x, y: phpc(x, labels, **options) + 0 * y.sum(), features, more)  # fmt: skip


def test_hardness_is_continuous_at_zero():
    labels, features = choice([0, 1, 2, 255], 2, 7, 6), rows(2, 5, 7, 6)
    for denominator in ("own", "all", "negatives"):
        zero, tiny = (phpc(features, labels, 4, hardness=h, denominator=denominator) for h in (0.0, 1e-9))
        torch.testing.assert_close(tiny, zero, rtol=1e-7, atol=0)


def test_without_hardness_own_is_all_for_a_single_positive():
    labels, features = torch.tensor([[[1, 1, 2, 0, 3, 0]]]), rows(1, 4, 1, 6)
    assert_same(lambda x: phpc(x, labels, None), lambda x: phpc(x, labels, None, denominator="all"), features)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("background", [0, 2, None, 9])
def test_num_classes_changes_nothing(options, background):
    labels, features = choice([0, 1, 2, 3, 255], 2, 7, 6), rows(2, 5, 7, 6)
    options = {**options, "background": background}
    assert_same(lambda x: phpc(x, labels, num_classes=4, **options), lambda x: phpc(x, labels, **options), features)


@pytest.mark.parametrize("options", VARIANTS)
def test_labels_beyond_num_classes_are_ignored(options):
    labels, features = choice([0, 1, 2, 3, 4, -5], 2, 7, 6), rows(2, 5, 7, 6)
    ignored = labels.where((labels >= 0) & (labels < 3), 255)
    assert_same(lambda x: phpc(x, labels, num_classes=3, **options), lambda x: phpc(x, ignored, **options), features)


# ---------------------------------------------------------------------------------------------------------- sampling


def recorded(monkeypatch, name, module=region_losses):
    """The results of every later call of `<name>` by a module, by default the region losses."""
    results, original = [], getattr(module, name)

    def call(*args, **kwargs):
        results.append(original(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(module, name, call)
    return results


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("k", [1, 2, 3, 1000])
def test_sampling_is_ignoring_the_other_pixels(monkeypatch, options, k):
    labels, features = choice([0, 1, 2, 2, 255], 2, 7, 6), rows(2, 5, 7, 6)
    samples = recorded(monkeypatch, "draw", partition)
    value, (grad,) = value_and_grads(lambda x: phpc(x, labels, num_classes=3, samples_per_class=k, **options), features)
    ((order, offsets),) = samples
    taken = order[: offsets[-1]].long()
    assert taken.unique().numel() == taken.numel()
    kept = torch.full_like(labels, 255).view(-1).index_copy(0, taken, labels.view(-1)[taken]).view_as(labels)
    expected_value, (expected_grad,) = value_and_grads(lambda x: ref_phpc(x, kept, **options), features)
    assert_exact(value, expected_value, floor=NOISE)
    assert_exact(grad, expected_grad, floor=NOISE)


def test_samples_per_region_and_class(monkeypatch):
    samples = recorded(monkeypatch, "draw", partition)
    labels = choice([0, 1, 2, 255], 2, 8, 8)
    phpc(rows(2, 5, 8, 8), labels, 4, num_classes=3, samples_per_class=3)
    order, offsets = samples[0]
    taken = order[: offsets[-1]].long()
    row, column = taken // 8 % 8, taken % 8
    for region in range(4):
        for label in range(3):
            here = (row // 4 * 2 + column // 4 == region) & (labels.view(-1)[taken] == label)
            cell = labels[:, region // 2 * 4 :][:, :4, region % 2 * 4 :][..., :4]
            assert here.sum() == min(3, int((cell == label).sum()))


def test_sampling_follows_the_seed_of_torch():
    labels, features = choice([0, 1, 2], 2, 8, 8), rows(2, 5, 8, 8)

    def draw():
        return phpc(features, labels, 4, num_classes=3, samples_per_class=2)

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(first, draw()) and not torch.equal(first, second)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("keep", [1, 2, 3, 50])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_max_regions_is_ignoring_the_others(monkeypatch, options, keep, num_classes):
    labels, features = choice([0, 1, 2, 255], 2, 7, 6), rows(2, 5, 7, 6)
    labels[:, :2, :3] = 0  # a region of size 2 or 3 without an anchor
    choices = recorded(monkeypatch, "choose_regions")
    value, (grad,) = value_and_grads(
        lambda x: phpc(x, labels, max_regions=keep, num_classes=num_classes, **options), features
    )
    kept = labels
    if choices:
        ids, regions = choices[0]
        kept = labels.where((ids < keep).view_as(labels), 255)
        assert 1 <= ids[ids < keep].unique().numel() <= keep and regions.numel() == keep
    expected_value, (expected_grad,) = value_and_grads(lambda x: ref_phpc(x, kept, **options), features)
    assert_exact(value, expected_value, floor=NOISE)
    assert_exact(grad, expected_grad, floor=NOISE)


def test_max_regions_together_with_samples(monkeypatch):
    labels, features = choice([0, 1, 2, 255], 2, 8, 8), rows(2, 5, 8, 8)
    samples, choices = recorded(monkeypatch, "draw", partition), recorded(monkeypatch, "choose_regions")
    options = {"region_size": 4, "local_size": 2, "reduction": "region"}
    value = phpc(features, labels, max_regions=2, num_classes=3, samples_per_class=3, **options)
    order, offsets = samples[0]
    taken = order[: offsets[-1]].long()
    assert (choices[0][0][taken] < 2).all()
    kept = torch.full_like(labels, 255).view(-1).index_copy(0, taken, labels.view(-1)[taken]).view_as(labels)
    assert_exact(value, ref_phpc(features, kept, **options))


# ------------------------------------------------------------------------------------------------------------- stats


@pytest.mark.parametrize("hardness", [0.0, 1.0, -4.0])
@pytest.mark.parametrize("denominator", ["own", "all"])
@pytest.mark.parametrize("labels", ["ignored", "one pair", "mixed"])
@pytest.mark.parametrize("num_classes", [None, 4])
def test_stats(hardness, denominator, labels, num_classes):
    features, labels = rows(2, 5, 7, 6), LABELS[labels]((2, 7, 6), 1)
    options = {"hardness": hardness, "denominator": denominator, "num_classes": num_classes}
    loss, stats = phpc(features, labels, 4, 0.3, return_stats=True, **options)
    assert_exact(loss, phpc(features, labels, 4, 0.3, **options))

    x = F.normalize(features.movedim(1, -1).reshape(-1, 5), dim=1)
    y, s = labels.reshape(-1), x @ x.T
    cell = (torch.arange(7)[:, None] // 4 * 2 + torch.arange(6) // 4).reshape(-1).repeat(2)
    valid = ~torch.isin(y, torch.tensor(IGNORED))
    together = (cell[:, None] == cell) & valid[:, None] & valid & ~torch.eye(len(y), dtype=torch.bool)
    positive, negative = together & (y[:, None] == y), together & (y[:, None] != y)
    anchor = valid & (y != 0)
    counted = anchor & positive.any(1)
    if denominator == "own":
        counted &= negative.any(1)
    p, n = positive[counted], negative[counted]
    weight = torch.softmax((-hardness * s[counted]).masked_fill(~p, -math.inf), 1)
    expected = {
        "counted_anchors": counted.sum().double() / anchor.sum(),
        "positives_per_anchor": p.sum(1).double().mean(),
        "positive_similarity": ((s[counted] * p).sum(1) / p.sum(1)).mean(),
        "negative_similarity": ((s[counted] * n).sum(1) / n.sum(1).clamp(min=1)).mean(),
        "effective_positives": (1 / weight.square().sum(1) / p.sum(1)).mean(),
    }
    if num_classes:
        expected["labels_outside"] = (valid & ((y < 0) | (y >= num_classes))).sum().double()
    assert stats.keys() == expected.keys()
    for name, value in stats.items():
        assert value.shape == () and not value.requires_grad
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-12, msg=name)
    assert (stats["effective_positives"] < 1 - 1e-6) == bool(hardness and p.sum(1).max() > 1)


@pytest.mark.parametrize("labels", ["all ignored", "background only", "no positives"])
def test_stats_without_any_counted_anchor(labels):
    _, stats = phpc(rows(2, 5, 7, 6), LABELS[labels]((2, 7, 6), 0), return_stats=True)
    assert all(value == 0 for value in stats.values())


@pytest.mark.parametrize("weight", [1.0, 1 / 65536, 1 / 524288])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_keep_their_digits_until_the_features(weight, dtype):
    """fp16 has no numbers below 6e-8; a mean over 524 288 rows asks for them at every step but the last."""
    labels = choice([0, 1, 2, 255], 2, 16, 12)
    features = rows(2, 16, 16, 12, dtype=dtype)
    _, (exact,) = value_and_grads(lambda x: weight * ref_phpc(x, labels, 8, reduction="sum"), features.double())
    _, (grad,) = value_and_grads(lambda x: weight * phpc(x, labels, 8, reduction="sum"), features)
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    one_rounding = torch.maximum(exact.abs() * torch.finfo(dtype).eps * 0.51, torch.tensor(spacing * 0.51))
    excess = (grad.double() - exact).abs() - one_rounding - 1e-5 * exact.abs().max()
    assert excess.max() <= 0


def test_repeated_keys_of_a_small_temperature():
    """log of the multiplicity comes to the denominators, which fp32 holds no more without a shift."""
    labels = torch.tensor([0, 1, 0, 1])[:, None].expand(4, 4)[None]
    x = torch.zeros(1, 2, 4, 4)
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    for size, local, temperature in ((16, 2, 0.0238), (32, 2, 0.024), (64, 2, 0.025)):

        def loss(x, size=size, local=local, temperature=temperature):
            return phpc(x, labels, size, temperature, 0.0, local_size=local, background=None)

        found, exact = value_and_grads(loss, x), value_and_grads(loss, x.double())
        assert abs(found[0] / exact[0] - 1) < 1e-5
        torch.testing.assert_close(found[1][0].double(), exact[1][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced", "transposed"])
def test_strides_of_the_features(layout):
    labels, base = choice([0, 1, 2, 255], 2, 6, 6), rows(2, 5, 6, 6)
    view = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "expanded": lambda x: x[:1, :, :1].expand(2, 5, 6, 6),
        "sliced": lambda x: F.pad(x, (1, 1, 0, 3))[:, :, :6, 1:-1],
        "transposed": lambda x: x.transpose(2, 3),
    }[layout]
    assert_same(lambda x: phpc(view(x), labels, 4), lambda x: ref_phpc(view(x), labels, 4), base)
    leaf = view(base).detach().requires_grad_()  # the strides are those of the leaf itself
    phpc(leaf, labels, 4).backward()
    _, (expected,) = value_and_grads(lambda x: ref_phpc(x, labels, 4, reduction="sum"), view(base))
    assert leaf.grad.isfinite().all()
