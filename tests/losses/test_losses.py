"""Every loss of the package against the same loss as its paper prints it, value and gradient, in float64.

Then what must hold of any contrastive loss of labels, and the results in lower precision against float64.
"""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
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
from tests.tools.losses import FAST, ORACLE
from tests.tools.numerics import assert_exact, assert_within_budget
from torch.nn import functional as F

import hpcloss
from hpcloss.losses import region as region_losses
from hpcloss.losses.image import UNFILLED
from hpcloss.memory import NO_GROUP
from hpcloss.plan import partition

phpc, ref_phpc = FAST["region_phpc"], ORACLE["region_phpc"]
IGNORED = (-100, -1, 255)


def both(name, *args, **options):
    """The fast loss and the oracle with everything but the features bound."""
    return (lambda *x: FAST[name](*x, *args, **options)), (lambda *x: ORACLE[name](*x, *args, **options))


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


# --------------------------------------------------------------------------------------------- vector losses: oracle


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 100.0])
@pytest.mark.parametrize("reduction", ["mean", "class", "sum", "none"])
@pytest.mark.parametrize("form", ["out", "in"])
def test_supcon_loss(form, reduction, temperature, normalize):
    options = {"form": form, "reduction": reduction, "temperature": temperature, "normalize": normalize}
    for index, make in enumerate(LABELS.values()):
        labels, key_labels = make((17,), index), choice([0, 1, 5, -100], 23, seed=index)
        assert_same(*both("supcon", labels, **options), rows(17, 4, seed=index))
        fast = lambda x, k: FAST["supcon"](x, labels, k, key_labels, **options)  # noqa: E731, B023
        oracle = lambda x, k: ORACLE["supcon"](x, labels, k, key_labels, **options)  # noqa: E731, B023
        assert_same(fast, oracle, rows(17, 4), rows(23, 4, seed=1))


@pytest.mark.parametrize("form", ["out", "in"])
def test_supcon_loss_at_odd_sizes(form):
    for n in (0, 1, 2, 31, 257):
        assert_same(*both("supcon", integers(3, n), form=form), rows(n, 1 if n == 31 else 7))
        assert_same(
            *both("supcon", integers(3, n)[:, None].float().squeeze(1), form=form, reduction="class"), rows(n, 7)
        )
    for n, m in ((0, 5), (5, 0), (1, 1), (600, 5), (5, 700)):
        key_labels = choice([0, 1, -100], m, seed=1)
        fast = lambda x, k: FAST["supcon"](x, integers(3, len(x)), k, key_labels, form=form)  # noqa: E731, B023
        oracle = lambda x, k: ORACLE["supcon"](x, integers(3, len(x)), k, key_labels, form=form)  # noqa: E731, B023
        assert_same(fast, oracle, rows(n, 3), rows(m, 3, seed=1))


@pytest.mark.parametrize("form", ["out", "in"])
def test_supcon_loss_beyond_one_tile(form):
    labels = choice([0, 0, 0, 0, 1, 2, 3, 4, 5, -100], 1100)
    assert_same(*both("supcon", labels, form=form), rows(1100, 3))
    key_labels = choice([0, 0, 0, 1, 2, 7, -100], 1300)
    fast = lambda x, k, t: FAST["supcon"](x, labels, k, key_labels, t, form=form)  # noqa: E731
    oracle = lambda x, k, t: ORACLE["supcon"](x, labels, k, key_labels, t, form=form)  # noqa: E731
    assert_same(fast, oracle, rows(1100, 3), rows(1300, 3, seed=1), torch.tensor(0.2).double())


def test_255_is_a_class_of_vectors():
    labels = torch.tensor([3, 255, 255, 3, 3, 0])
    renamed = torch.where(labels == 255, 7, labels)
    assert_same(lambda x: FAST["supcon"](x, labels), lambda x: FAST["supcon"](x, renamed), rows(6, 4))


def test_supcon_labels_of_shape_n_1():
    labels = integers(3, 9)
    assert_same(lambda x: FAST["supcon"](x, labels[:, None]), lambda x: FAST["supcon"](x, labels), rows(9, 4))


@pytest.mark.parametrize("form", ["out", "in"])
def test_supcon_rows_of_ignored_labels_reach_nothing(form):
    labels, key_labels = choice([1, 2, -100], 20), choice([1, 2, -1], 30)
    x, k = rows(20, 4), rows(30, 4, seed=1)
    for rest in ((), (k, key_labels)):
        keep = labels != -100
        short = (rest[0][key_labels != -1], key_labels[key_labels != -1]) if rest else ()
        clean = FAST["supcon"](x[keep], labels[keep], *short, form=form)
        poisoned = [torch.where((labels == -100)[:, None], float("nan"), x)]
        if rest:
            poisoned.append(torch.where((key_labels == -1)[:, None], float("inf"), k))
        fast = lambda x, k=None: FAST["supcon"](x, labels, k, key_labels if k is not None else None, form=form)  # noqa: E731, B023
        value, grads = value_and_grads(fast, *poisoned)
        assert_exact(value, clean)
        assert all(grad.isfinite().all() for grad in grads) and (grads[0][~keep] == 0).all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.01, 0.5, 100.0])
def test_two_view_losses(temperature, reduction, normalize):
    options = {"temperature": temperature, "reduction": reduction, "normalize": normalize}
    for n in (0, 1, 2, 5, 31):
        views = rows(n, 3), rows(n, 3, seed=1)
        assert_same(*both("ntxent", **options), *views)
        groups = integers(max(n // 3, 1), n)
        for hardness in (0.0, 1.0, -20.0, 50.0):
            assert_same(*both("ihpc", **options, hardness=hardness), *views)
        assert_same(*both("ihpc", groups, **options), *views)
        assert_same(*both("ihpc", torch.zeros(n), **options), *views)
        for beta in (0.0, 0.1, 0.99):
            assert_same(*both("ihpc", groups, **options, beta=beta), *views)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 100.0])
def test_hard_negative_nce_loss(temperature, reduction, normalize):
    options = {"temperature": temperature, "reduction": reduction, "normalize": normalize}
    for n in (0, 1, 2, 5, 31):
        views = rows(n, 3), rows(n, 3, seed=1)
        for beta, tau_plus in ((0.0, 0.0), (0.0, 0.1), (1.0, 0.1), (0.5, 0.7), (2.0, 0.0)):
            assert_same(*both("hard_negative_nce", **options, beta=beta, tau_plus=tau_plus), *views)
        plain = partial(FAST["hard_negative_nce"], **options, beta=0.0, tau_plus=0.0)
        assert_same(plain, partial(FAST["ntxent"], **options), *views)


def test_hard_negative_nce_at_its_edges():
    """Finite at any temperature; where the discount leaves nothing, the lowest value holds."""
    a, b = rows(6, 4), rows(6, 4, seed=1)
    for temperature in (0.005, 0.05, 10.0):
        for x, y in ((a, b), (a, a), (a[:1].expand(6, 4), a[:1].expand(6, 4))):
            value, grads = value_and_grads(partial(FAST["hard_negative_nce"], temperature=temperature), x, y)
            assert value.isfinite() and all(grad.isfinite().all() for grad in grads)
    corners = torch.eye(6).double()  # l+ = 2, l- = 0: 10 - 0.9 * 10 e^2 < 0, so 10 e^-2 stands for the negatives
    lowest = math.log1p(10 * math.exp(-2) / math.exp(2))
    assert float(FAST["hard_negative_nce"](corners, corners, 0.5, tau_plus=0.9)) == pytest.approx(lowest)


@pytest.mark.parametrize("name", ["ntxent", "ihpc", "infonce", "hard_negative_nce"])
@pytest.mark.parametrize("n", [257, 513, 700])
def test_two_view_losses_beyond_one_tile(name, n):
    fast = lambda a, b, t: FAST[name](a, b, temperature=t)  # noqa: E731
    oracle = lambda a, b, t: ORACLE[name](a, b, temperature=t)  # noqa: E731
    assert_same(fast, oracle, rows(n, 3), rows(n, 3, seed=1), torch.tensor(0.3).double())


def test_ihpc_loss_with_large_groups():
    """All first views of a group come before its second views, so a row and its positive lie in different tiles."""
    groups = choice([0, 0, 0, 1, 2], 900)
    assert_same(*both("ihpc", groups), rows(900, 3), rows(900, 3, seed=1))


@pytest.mark.parametrize("options", [{}, {"beta": 0.3}, {"hardness": 0.0, "reduction": "none"}, {"normalize": False}])
def test_ihpc_loss_with_a_bank(options):
    for n, m in ((4, 9), (1, 3), (1, 1), (3, 600)):
        a, b = rows(n, 5), rows(n, 5, seed=1)
        bank = F.normalize(rows(m, 5, seed=2), dim=1)
        groups, bank_groups = integers(3, n), integers(3, m, seed=1)
        assert_same(*both("ihpc", bank=bank, **options), a, b)
        assert_same(*both("ihpc", groups, bank=bank, bank_groups=bank_groups, **options), a, b)
        # Without groups the groups of the bank mean nothing.
        with_groups = partial(FAST["ihpc"], bank=bank, bank_groups=bank_groups, **options)
        assert_same(with_groups, partial(ORACLE["ihpc"], bank=bank, **options), a, b)


def test_ihpc_unfilled_rows_of_the_bank_do_not_exist():
    a, b, bank = rows(4, 5), rows(4, 5, seed=1), F.normalize(rows(9, 5, seed=2), dim=1)
    groups, bank_groups = integers(3, 4), integers(3, 9, seed=1)
    filled = torch.arange(9) % 3 != 1
    empty = torch.where(filled, bank_groups, UNFILLED)
    torn = torch.where(filled[:, None], bank, float("nan"))
    rest = {"bank": bank[filled], "bank_groups": bank_groups[filled]}
    for some in ({"groups": groups}, {}):
        assert_same(
            partial(FAST["ihpc"], bank=torn, bank_groups=empty, **some), partial(ORACLE["ihpc"], **rest, **some), a, b
        )
    nothing = torch.full((9,), UNFILLED)
    assert_same(lambda a, b: FAST["ihpc"](a, b, bank=bank, bank_groups=nothing), ORACLE["ihpc"], a, b)
    assert_same(lambda a, b: FAST["ihpc"](a, b, bank=bank, bank_groups=nothing), ORACLE["ihpc"], a[:1], b[:1])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 100.0])
def test_infonce_loss(temperature, reduction, normalize):
    options = {"temperature": temperature, "reduction": reduction, "normalize": normalize}
    for n, m in ((0, 3), (1, 1), (3, 0), (1, 40), (31, 7), (520, 530)):
        query, positive, negatives = rows(n, 3), rows(n, 3, seed=1), rows(m, 3, seed=2)
        assert_same(*both("infonce", **options), query, positive)
        assert_same(*both("infonce", symmetric=True, **options), query, positive)
        assert_same(*both("infonce", **options), query, positive, negatives)


@pytest.mark.parametrize("name", ["supcon", "ntxent", "ihpc", "infonce"])
@pytest.mark.parametrize("temperature", [0.01, 0.3, 5.0])
def test_gradient_of_the_temperature_of_vector_losses(name, temperature):
    x, y, t = rows(12, 4), rows(12, 4, seed=1), torch.tensor(temperature).double()
    if name == "supcon":
        labels = choice([0, 1, 2, 255], 12)
        for form in ("out", "in"):
            for normalize in (True, False):
                options = {"form": form, "normalize": normalize}
                assert_same(lambda x, t: FAST[name](x, labels, temperature=t, **options),  # noqa: B023
                            lambda x, t: ORACLE[name](x, labels, temperature=t, **options), x, t)  # noqa: B023 # fmt: skip
        return
    fast = lambda *x: FAST[name](*x[:-1], temperature=x[-1])  # noqa: E731
    oracle = lambda *x: ORACLE[name](*x[:-1], temperature=x[-1])  # noqa: E731
    assert_same(fast, oracle, x, y, t)
    _, grads = value_and_grads(fast, x, y, t.reshape(1))
    assert grads[2].shape == (1,)
    if name == "infonce":
        assert_same(lambda q, k, n, t: FAST[name](q, k, n, t), lambda q, k, n, t: ORACLE[name](q, k, n, t),
                    x, y, rows(9, 4, seed=2), t)  # fmt: skip
    if name == "ihpc":
        for options in ({"beta": 0.2}, {"groups": integers(3, 12)}, {"bank": F.normalize(rows(9, 4, seed=2), dim=1)}):
            assert_same(lambda a, b, t: FAST[name](a, b, temperature=t, **options),  # noqa: B023
                        lambda a, b, t: ORACLE[name](a, b, temperature=t, **options), x, y, t)  # noqa: B023 # fmt: skip


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


# ----------------------------------------------------------------------------------------------------- queue of IHPC


def ihpc_queue(size, **options):
    return hpcloss.EmbeddingQueue(1, size, 4, **options)


def oldest_first(queue):
    """The slots of a full queue of one class, the oldest first."""
    return queue.embeddings[0][(torch.arange(queue.size) + int(queue.next)) % queue.size]


def test_queue_of_ihpc_wraps_around_and_holds_the_newest():
    loss, queue, seen = hpcloss.IHPCLoss(0.5), ihpc_queue(7), []
    for step in range(5):
        a, b = rows(3, 4, seed=2 * step), rows(3, 4, seed=2 * step + 1)
        value, grads = value_and_grads(partial(loss, queue=queue), a, b)
        bank = torch.cat(seen).float().double()[-7:] if seen else None
        expected, expected_grads = value_and_grads(partial(ORACLE["ihpc"], bank=bank), a, b)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-8)
        queue.enqueue(b)
        seen.append(F.normalize(b, dim=1))
    torch.testing.assert_close(oldest_first(queue), torch.cat(seen)[-7:].float())
    assert int(queue.next) == 15 % 7 and not queue.embeddings.requires_grad


def test_queue_of_ihpc_smaller_than_the_batch():
    queue = ihpc_queue(2)
    for step in range(2):
        b = rows(5, 4, seed=step)
        queue.enqueue(b)
        torch.testing.assert_close(oldest_first(queue), F.normalize(b, dim=1)[-2:].float())


def test_queue_of_ihpc_with_groups():
    loss, queue = hpcloss.IHPCLoss(0.5), ihpc_queue(8, groups=True)
    a, b, groups = rows(3, 4), rows(3, 4, seed=1), torch.tensor([5, 6, 5])
    queue.enqueue(b, groups=groups)
    assert queue.groups[0, :3].tolist() == [5, 6, 5] and (queue.groups[0, 3:] == NO_GROUP).all()
    bank = F.normalize(b, dim=1).float().double()
    for later in (torch.tensor([5, 7, 6]), torch.tensor([5, 5, 5])):
        expected = ORACLE["ihpc"](a.flip(0), b, later, bank=bank, bank_groups=groups)
        torch.testing.assert_close(loss(a.flip(0), b, later, queue), expected, rtol=1e-6, atol=0)


def test_groups_in_a_queue_go_with_their_embeddings():
    """Over a wrap, rows that are skipped and rows that are too many."""
    queue = ihpc_queue(4, groups=True)
    broken = rows(3, 4)
    broken[1] = math.nan
    queue.enqueue(broken, groups=torch.tensor([1, 2, 3]))
    queue.enqueue(rows(3, 4, seed=1), groups=torch.tensor([4, 5, 6]))
    assert queue.groups[0].tolist() == [6, 3, 4, 5] and int(queue.filled) == 4
    queue.enqueue(rows(1, 4, seed=2))
    assert queue.groups[0].tolist() == [6, NO_GROUP, 4, 5]
    queue.enqueue(rows(6, 4, seed=3), groups=torch.arange(6))
    assert sorted(queue.groups[0].tolist()) == [2, 3, 4, 5]


def test_queue_without_groups_never_matches_a_group():
    """Rows enqueued without groups belong to no group, whatever numbers are given later."""
    loss, queue = hpcloss.IHPCLoss(0.5), ihpc_queue(8, groups=True)
    a, b = rows(3, 4), rows(3, 4, seed=1)
    queue.enqueue(b)
    bank = F.normalize(b, dim=1).float().double()
    groups = torch.tensor([0, 1, 1])
    expected = ORACLE["ihpc"](a, b, groups, bank=bank)
    torch.testing.assert_close(loss(a, b, groups, queue), expected, rtol=1e-6, atol=0)


def test_queue_keeps_groups_of_any_number():
    """A group id, also a negative one, that stands in the queue is a group like any other."""
    loss, queue = hpcloss.IHPCLoss(0.5), ihpc_queue(8, groups=True)
    a, b, groups = rows(3, 4), rows(3, 4, seed=1), torch.tensor([-100, -2, 255])
    queue.enqueue(b, groups=groups)
    bank = F.normalize(b, dim=1).float().double()
    expected = ORACLE["ihpc"](b, a, groups, bank=bank, bank_groups=groups)
    torch.testing.assert_close(loss(b, a, groups, queue), expected, rtol=1e-6, atol=0)


def test_queue_of_ihpc_is_read_and_never_written():
    loss, queue = hpcloss.IHPCLoss(), ihpc_queue(6, groups=True)
    a, b = rows(4, 4, dtype=torch.float32), rows(4, 4, seed=1, dtype=torch.float32)
    queue.enqueue(a, groups=torch.arange(4))
    frozen = copy.deepcopy(queue.state_dict())
    assert set(frozen) == {"embeddings", "filled", "next", "groups"} and not loss.state_dict()
    value = loss(a, b, torch.arange(4), queue)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in queue.state_dict().items())
    other = ihpc_queue(6, groups=True)
    other.load_state_dict(frozen)
    assert torch.equal(loss(a, b, torch.arange(4), other), value)
    assert not torch.equal(loss(a, b, torch.arange(4), ihpc_queue(6, groups=True)), value)


def test_backward_of_ihpc_after_the_queue_has_moved_on():
    loss, queue = hpcloss.IHPCLoss(), ihpc_queue(6)
    a, b = rows(4, 4).requires_grad_(), rows(4, 4, seed=1).requires_grad_()
    queue.enqueue(rows(6, 4, seed=2))
    expected = torch.autograd.grad(loss(a, b, queue=queue), (a, b))
    value = loss(a, b, queue=queue)
    queue.enqueue(b)
    for grad, right in zip(torch.autograd.grad(value, (a, b)), expected, strict=True):
        assert torch.equal(grad, right)


def test_queues_that_do_not_suit_ihpc():
    loss, a, groups = hpcloss.IHPCLoss(), rows(3, 4), torch.arange(3)
    with pytest.raises(TypeError, match="queue must be an EmbeddingQueue, got Tensor"):
        loss(a, a, None, a)
    with pytest.raises(ValueError, match="queue must have one class, got num_classes=3"):
        loss(a, a, queue=hpcloss.EmbeddingQueue(3, 5, 4))
    with pytest.raises(ValueError, match=r"queue must keep groups, .*EmbeddingQueue\(..., groups=True\)"):
        loss(a, a, groups, ihpc_queue(5))
    with pytest.raises(ValueError, match="bank must have shape .*4.*got .*5, 6"):
        loss(a, a, queue=hpcloss.EmbeddingQueue(1, 5, 6))
    with pytest.raises(ValueError, match=r"groups are not kept by this queue; EmbeddingQueue\(..., groups=True\)"):
        ihpc_queue(5).enqueue(a, groups=groups)
    with pytest.raises(ValueError, match="labels are needed by a queue of 3 classes, got None"):
        hpcloss.EmbeddingQueue(3, 5, 4).enqueue(a)
    with pytest.raises(TypeError, match="groups must be True or False, got 1"):
        hpcloss.EmbeddingQueue(3, 5, 4, groups=1)


def test_a_checkpoint_with_a_memory_bank_loads_and_says_what_became_of_it():
    old = {"bank": torch.zeros(6, 4), "bank_groups": torch.zeros(6).long(), "bank_next": torch.tensor(2)}
    model = torch.nn.ModuleDict({"loss": hpcloss.IHPCLoss()})
    with pytest.warns(UserWarning, match="loss.bank, loss.bank_groups, loss.bank_next of the checkpoint"):
        model.load_state_dict({f"loss.{name}": value for name, value in old.items()})
    with pytest.raises(RuntimeError, match="Unexpected key.*bank_of_another"):
        hpcloss.IHPCLoss().load_state_dict({"bank_of_another": torch.zeros(1)})


# --------------------------------------------------------------------------------------------------------- precision


def calls(dtype):
    """One call of each loss with inputs in `dtype`: (fast, oracle, inputs)."""
    labels = choice([0, 1, 2, 255], 2, 16, 12)
    vector_labels = integers(4, 40)
    x = rows(2, 16, 16, 12, dtype=dtype)
    a, b, c = rows(40, 16, dtype=dtype), rows(40, 16, seed=1, dtype=dtype), rows(30, 16, seed=2, dtype=dtype)
    return [
        (*both("region_phpc", labels, 8), (x,)),
        (*both("region_phpc", labels, 8, 0.07, local_size=4, detach_weights=False, reduction="class"), (x,)),
        (*both("region_phpc", labels, None, 0.1, 0.0, discount=0.1), (x,)),
        (*both("region_phpc", labels, None, 0.01), (x,)),
        (*both("region_phpc", labels, None, 1.0, 0.1, normalize=False, denominator="negatives"), (x,)),
        (*both("region_supcon", labels), (x,)),
        (*both("supcon", vector_labels), (a,)),
        (*both("supcon", vector_labels, form="in", temperature=0.01), (a,)),
        (*both("ntxent"), (a, b)),
        (*both("ihpc", integers(9, 40)), (a, b)),
        (*both("infonce"), (a, b)),
        (*both("infonce"), (a, b, c)),
        (*both("entropy_guided_contrast", torch.softmax(2 * rows(2, 4, 16, 12, seed=5), 1), labels), (x,)),
        (*both("multiscale_contrast", None, (2, 5)), (x, x.flip(0).roll(1, 3))),
        (
            lambda x: FAST["local_contrast"](x, labels, torch.tensor([1, 0]), num_classes=3, samples_per_class=None),
            lambda x: ORACLE["local_contrast"](x, labels, torch.tensor([1, 0]), num_classes=3),
            (x,),
        ),
        (*both("prototype_contrast", vector_labels, torch.softmax(2 * b[:, :3].float(), 1)), (a,)),
        (*both("prototype_assignment", labels, rows(3, 2, 16, seed=3)), (x,)),
    ]


CASES = range(len(calls(torch.float64)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_within_budget(case, dtype):
    """Half-precision rows are computed in fp32: the result is as good as that of the promoted inputs."""
    fast, oracle, inputs = calls(dtype)[case]
    exact, exact_grads = value_and_grads(oracle, *(x.double() for x in inputs))
    eager, eager_grads = value_and_grads(oracle, *(x.float() for x in inputs))
    value, grads = value_and_grads(fast, *inputs)
    assert value.dtype == torch.float32
    assert_within_budget(value, eager, exact, "loss", torch.float32)
    for grad, eager_grad, exact_grad, x in zip(grads, eager_grads, exact_grads, inputs, strict=True):
        assert grad.dtype == dtype and grad.stride() == x.stride()
        assert_within_budget(grad, eager_grad.to(dtype), exact_grad, "grad", dtype)


@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing(case):
    fast, _, inputs = calls(torch.float32)[case]
    plain, plain_grads = value_and_grads(fast, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        value, grads = value_and_grads(fast, *inputs)
    assert value.dtype == torch.float32 and torch.equal(value, plain)
    assert all(torch.equal(grad, other) for grad, other in zip(grads, plain_grads, strict=True))


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


def test_result_dtype():
    labels = integers(3, 2, 7, 6)
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                            (torch.float32, torch.float32), (torch.float64, torch.float64)):  # fmt: skip
        features = rows(2, 5, 7, 6, dtype=dtype)
        for reduction in ("mean", "class", "region", "sum", "none"):
            assert phpc(features, labels, 4, reduction=reduction).dtype == expected
        assert FAST["ntxent"](features[:, 0, 0], features[:, 0, 1]).dtype == expected


@pytest.mark.parametrize("case", CASES)
def test_differentiating_twice_raises(case):
    fast, _, inputs = calls(torch.float64)[case]
    inputs = [x.requires_grad_() for x in inputs]
    grads = torch.autograd.grad(fast(*inputs), inputs, create_graph=True)
    assert all(grad.requires_grad for grad in grads)  # a gradient penalty must not pass for a constant
    penalty = sum(grad.square().sum() for grad in grads)
    for inputs_of_it in (None, inputs):  # also where only some inputs are asked for, and not what an operator made
        with pytest.raises(RuntimeError, match="only once"):
            torch.autograd.backward(penalty, retain_graph=True, inputs=inputs_of_it)


@pytest.mark.parametrize("case", CASES)
def test_results_are_deterministic_to_the_bit(case):
    fast, _, inputs = calls(torch.float32)[case]
    first, second = value_and_grads(fast, *inputs), value_and_grads(fast, *inputs)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_no_gradient_wanted():
    labels, features = integers(3, 2, 7, 6), rows(2, 5, 7, 6)
    loss = phpc(features, labels, 4)
    assert not loss.requires_grad
    with torch.no_grad():
        assert torch.equal(phpc(features.requires_grad_(), labels, 4), loss)
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    phpc(features.detach(), labels, 4, temperature).backward()
    assert temperature.grad.abs() > 0
    keys, key_labels = rows(9, 4, seed=1).requires_grad_(), integers(3, 9)
    FAST["supcon"](rows(8, 4), integers(3, 8), keys, key_labels).backward()
    assert keys.grad.abs().sum() > 0


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


# ------------------------------------------------------------------------------------------------------------ errors


def bad(message, error=ValueError):
    return pytest.raises(error, match=message)


def test_errors_of_the_region_loss():
    x, y = rows(2, 5, 7, 6), integers(3, 2, 7, 6)
    with bad(r"features must have shape \[B, D, \*S\], got \(2, 5\).*SupConLoss"):
        phpc(x[:, :, 0, 0], y)
    with bad("features must be floating point, got torch.int64", TypeError):
        phpc(x.long(), y)
    with bad(r"one-hot.*argmax"):
        phpc(x, F.one_hot(y, 3).movedim(-1, 1))
    with bad("features must be a tensor, got several; FeatureTap", TypeError):
        phpc((x, x), y)
    with bad("features must be a tensor, got ndarray", TypeError):
        phpc(x.numpy(), y)
    with bad(r"features must have at least one channel, got \(2, 0, 7, 6\)"):
        phpc(x[:, :0], y)
    with bad(r"features \(5, 7, 6\) and labels \(7, 6\) have no batch axis; pass features\[None\] and labels\[None\]"):
        phpc(x[0], y[0])
    with bad("temperature must be a number, got '0.1'", TypeError):
        phpc(x, y, 4, "0.1")
    with bad("hardness must be a number, got None", TypeError):
        phpc(x, y, 4, 0.1, None)
    for background in ([1], (1,)):
        with bad(r"background must be one label or None, got [\[(]1", TypeError):
            phpc(x, y, background=background)
    assert torch.equal(phpc(x, y, np.array([4, 3])), phpc(x, y, (4, 3)))
    assert torch.equal(phpc(x, y, np.int64(4)), phpc(x, y, 4))
    views, of_views = rows(2, 3, 8, 4, 4), integers(3, 2, 3, 4, 4)
    with bad(r"features \(2, 3, 8, 4, 4\) with labels \(2, 3, 4, 4\) look like views.*labels\[:, None\] of a volume"):
        phpc(views, of_views)
    assert phpc(views, of_views[:, None]) > 0 and phpc(views.flatten(0, 1), of_views.flatten(0, 1)) > 0
    with bad(r"labels must have shape \[B, \*S\]"):
        phpc(x, y[0])
    with bad(r"labels must have shape \[B, \*S\]"):
        phpc(x, y[:1])
    with bad("labels must be whole numbers, got 0.5"):
        phpc(x, torch.full((2, 7, 6), 0.5))
    with bad("labels must be integers", TypeError):
        phpc(x, y.to(torch.complex64))
    with bad("region_size must have one value per spatial axis"):
        phpc(x, y, (2, 2, 2))
    with bad(r"labels must be in \[0, 2\).*got 2"):
        phpc(x, y, num_classes=2, check_labels=True)
    with bad("check_labels=True needs num_classes"):
        phpc(x, y, check_labels=True)
    with bad("triton", NotImplementedError):
        phpc(x, y, backend="triton")
    with bad("backend must be one of.*'cuda'"):
        phpc(x, y, backend="cuda")
    assert phpc(x, choice([0, 1, 255], 2, 7, 6), num_classes=2, check_labels=True) > 0
    assert torch.equal(phpc(x, y, backend="blockwise"), phpc(x, y))


def test_errors_of_the_vector_losses():
    x, y = rows(6, 4), integers(3, 6)
    supcon, ntxent, infonce, ihpc = (FAST[name] for name in ("supcon", "ntxent", "infonce", "ihpc"))
    with bad(r"embeddings must have shape \[N, D\], got \(1, 6, 4\)"):
        supcon(x[None], y)
    with bad(r"embeddings must have shape \[N, D\], got \(6, 0\)"):
        supcon(x[:, :0], y)
    with bad("embeddings must be floating point", TypeError):
        supcon(x.long(), y)
    with bad(r"labels must have shape \[6\], got \(5,\)"):
        supcon(x, y[:5])
    with bad("keys and key_labels go together"):
        supcon(x, y, x)
    with bad(r"keys must have shape \[M, 4\], got \(6, 3\)"):
        supcon(x, y, x[:, :3], y)
    with bad(r"key_labels must have shape \[6\]"):
        supcon(x, y, x, y[:2])
    with bad(r"view2 must have shape \[6, 4\], got \(5, 4\)"):
        ntxent(x, x[:5])
    with bad(r"view1 must have shape \[N, D\]"):
        ihpc(x[0], x[0])
    with bad(r"groups must have shape \[6\]"):
        ihpc(x, x, y[:3])
    with bad(r"bank must have shape \[M, 4\]"):
        ihpc(x, x, bank=x[:, :2])
    with bad(r"positive must have shape \[6, 4\]"):
        infonce(x, x[:3])
    with bad("symmetric=True has no meaning with negatives"):
        infonce(x, x, x, symmetric=True)
    with bad(r"negatives must have shape \[M, 4\]"):
        infonce(x, x, x[:, :3])
    with bad("triton", NotImplementedError):
        ntxent(x, x, backend="triton")
