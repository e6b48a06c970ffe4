"""hpcloss.compat: value, gradient and refusals of the libraries whose signatures it takes."""

import copy
import functools
import inspect
import operator
import re

import pytest
import torch

import hpcloss
import hpcloss.compat
from hpcloss.compat import contrastiveseg, infonce, lightly, monai, open_clip, pml
from hpcloss.compat import supcontrast as supcontrast_compat
from tests.tools.cases import NOISE, ROOT, assert_same, choice, integers, rows, value_and_grads
from tests.tools.numerics import assert_exact
from tests.tools.peer_formulas import (
    clip,
    draw_clip,
    draw_infonce,
    draw_pixels,
    draw_pml,
    draw_supcontrast,
    draw_two_views,
    info_nce,
    ntxent,
    pixel_contrast,
    pml_ntxent,
    pml_supcon,
    supcontrast,
)

CASES = 200


def with_reference(loss):
    """(embeddings, ref_emb) as the tensors whose gradients are compared."""
    return lambda x, ref=None, **rest: loss(x, ref_emb=ref, **rest)


def drawn_pixels(feats, labels, queue=None, **options):
    """The formula for a map of which every pixel with a label from 0 is taken."""
    x, y = feats.movedim(1, -1).reshape(-1, feats.shape[1])[labels.reshape(-1) >= 0], labels[labels >= 0]
    if queue is None:
        return pixel_contrast(x, y, **options)
    keys, classes = queue.flatten(0, 1), torch.arange(len(queue)).repeat_interleave(queue.shape[1])
    return pixel_contrast(x, y, keys, classes, **options)


def every_pixel(**options):
    return contrastiveseg.PixelContrastLoss(max_samples=10**6, max_views=10**4, num_classes=7, **options)


# drawing, the class of hpcloss.compat, the formula, and how both are called
PEERS = {
    "supcontrast": (draw_supcontrast, supcontrast_compat.SupConLoss, supcontrast, lambda loss: loss),
    "pml SupConLoss": (draw_pml, pml.SupConLoss, pml_supcon, with_reference),
    "pml NTXentLoss": (draw_pml, pml.NTXentLoss, pml_ntxent, with_reference),
    "lightly": (draw_two_views, lightly.NTXentLoss, ntxent, lambda loss: loss),
    "monai": (draw_two_views, monai.ContrastiveLoss, ntxent, lambda loss: loss),
    "infonce": (draw_infonce, infonce.InfoNCE, info_nce, lambda loss: loss),
    "open_clip": (draw_clip, open_clip.ClipLoss, clip, lambda loss: loss),
    "contrastiveseg": (draw_pixels, every_pixel, drawn_pixels, lambda loss: loss),
}


@pytest.mark.parametrize("peer", PEERS)
def test_formula(peer):
    draw, build, formula, calling = PEERS[peer]
    contrasted = 0
    for seed in range(CASES):
        case = draw(seed)
        loss = functools.partial(calling(build(**case.options)), **case.rest)
        plain = functools.partial(calling(formula), **case.rest, **case.options)
        try:
            assert_same(loss, plain, *case.inputs)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case.options}, {sorted(case.rest)}") from error
        contrasted += bool((loss(*case.inputs).abs() > 1e-6).any())
    assert contrasted > CASES // 2  # not all of them are degenerate


# ---------------------------------------------------------------------------------------------------------- signatures

X, Y, LABELS = rows(6, 4), rows(6, 4, seed=1), torch.tensor([0, 0, 1, 1, 2, 2])
MAP, CLASSES = rows(2, 4, 3, 3), integers(3, 2, 3, 3)

# What a caller may pass by position, as the libraries document it.
SIGNATURES = {
    supcontrast_compat.SupConLoss: (
        {"temperature": 0.07, "contrast_mode": "all", "base_temperature": 0.07},
        ["features", "labels", "mask"],
    ),
    pml.SupConLoss: ({"temperature": 0.1}, ["embeddings", "labels", "indices_tuple", "ref_emb", "ref_labels"]),
    pml.NTXentLoss: ({"temperature": 0.07}, ["embeddings", "labels", "indices_tuple", "ref_emb", "ref_labels"]),
    lightly.NTXentLoss: (
        {"temperature": 0.5, "memory_bank_size": 0, "gather_distributed": False},
        ["out0", "out1"],
    ),
    monai.ContrastiveLoss: ({"temperature": 0.5, "batch_size": -1}, ["input", "target"]),
    contrastiveseg.PixelContrastLoss: ({"configer": None}, ["feats", "labels", "predict", "queue"]),
    infonce.InfoNCE: (
        {"temperature": 0.1, "reduction": "mean", "negative_mode": "unpaired"},
        ["query", "positive_key", "negative_keys"],
    ),
    open_clip.ClipLoss: (
        {"local_loss": False, "gather_with_grad": False, "cache_labels": False, "rank": 0, "world_size": 1},
        ["image_features", "text_features", "logit_scale", "logit_bias", "output_dict"],
    ),
}  # fmt: skip


def by_position(function):
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.kind == p.POSITIONAL_OR_KEYWORD and p.name != "self"}


@pytest.mark.parametrize("loss", SIGNATURES)
def test_signature(loss):
    constructor, call = SIGNATURES[loss]
    assert list(by_position(loss.__init__).items()) == list(constructor.items())
    assert list(by_position(loss.forward)) == call


REFUSED = {
    "supcontrast, 2-D": (lambda: supcontrast_compat.SupConLoss()(X, LABELS), "features must have shape"),
    "supcontrast, both": (
        lambda: supcontrast_compat.SupConLoss()(X[:, None], LABELS, torch.eye(6)),
        "Cannot define both `labels` and `mask`",
    ),
    "supcontrast, number": (
        lambda: supcontrast_compat.SupConLoss()(X[:, None], LABELS[:5]),
        "Num of labels does not match num of features",
    ),
    "supcontrast, mask": (lambda: supcontrast_compat.SupConLoss()(X[:, None], None, torch.eye(5)), "mask must have"),
    "supcontrast, mode": (
        lambda: supcontrast_compat.SupConLoss(contrast_mode="two")(X[:, None]), "Unknown mode: two"
    ),
    "supcontrast, temperature": (lambda: supcontrast_compat.SupConLoss(0.0), "temperature must be positive, got 0.0"),
    "pml, nothing": (lambda: pml.SupConLoss()(X), "labels and indices_tuple cannot both be None"),
    "pml, labels": (lambda: pml.NTXentLoss()(X, LABELS[:5]), "labels must have shape"),
    "pml, tuple": (lambda: pml.NTXentLoss()(X, LABELS, (LABELS,) * 2), "3 tensors .triplets. or 4 .pairs., got 2"),
    "pml, ref_emb": (lambda: pml.SupConLoss()(X, LABELS, ref_emb=Y[:5]), "ref_emb must have shape .6, 4., got"),
    "lightly, temperature": (lambda: lightly.NTXentLoss(1e-9), "Illegal temperature"),
    "lightly, bank": (lambda: lightly.NTXentLoss(0.5, (12,)), "memory_bank_size must be .rows, dim., .*got .12,."),
    "lightly, negative": (lambda: lightly.NTXentLoss(0.5, (-1, 3)), "memory_bank_size must be"),
    "monai, 3-D": (lambda: monai.ContrastiveLoss()(X[None], Y[None]), "at most 2 dimensions, got .1, 6, 4."),
    "monai, shapes": (lambda: monai.ContrastiveLoss()(X, Y[:5]), "target must have the shape of input"),
    "infonce, 3-D": (lambda: infonce.InfoNCE()(X[None], Y), "query must have shape"),
    "infonce, paired": (lambda: infonce.InfoNCE(negative_mode="paired")(X, Y, Y), "paired negative_keys must have"),
    "infonce, unpaired": (lambda: infonce.InfoNCE()(X, Y, Y[None]), "negatives must have shape"),
    "infonce, mode": (lambda: infonce.InfoNCE(negative_mode="both"), "negative_mode must be .*got 'both'"),
    "infonce, reduction": (lambda: infonce.InfoNCE(reduction="all"), "reduction must be one of .*got 'all'"),
    "contrastiveseg, samples": (lambda: contrastiveseg.PixelContrastLoss(max_views=0), "max_views must be at least 1"),
    "contrastiveseg, labels": (lambda: contrastiveseg.PixelContrastLoss()(MAP, CLASSES[:1]), "labels must have shape"),
    "contrastiveseg, queue": (
        lambda: contrastiveseg.PixelContrastLoss()(MAP, CLASSES, None, Y), "queue must have shape .C, K, 4., got"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


class Distance(torch.nn.Module):
    """A distance as pytorch-metric-learning describes its own."""

    collect_stats, is_inverted = False, False

    def __init__(self, p=2, power=1, normalize_embeddings=True):
        super().__init__()
        self.p, self.power, self.normalize_embeddings = p, power, normalize_embeddings


class DotProductSimilarity(Distance):
    is_inverted = True


def test_what_is_not_there_says_so():
    for call, message in [
        (lambda: pml.SupConLoss(distance=Distance()), "distance must be CosineSimilarity or DotProductSimilarity"),
        (lambda: pml.NTXentLoss(distance=DotProductSimilarity(p=1)), "distance must be"),
        (lambda: pml.NTXentLoss(reducer=Distance())(X, LABELS), "reducer must be MeanReducer .*, got Distance"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            call()


ELSEWHERE = {
    "views": (lambda: hpcloss.SupConLoss()(X[:, None], LABELS), "supcontrast.SupConLoss"),
    "mask": (lambda: hpcloss.SupConLoss()(X, torch.eye(6, dtype=torch.bool)), "supcontrast.SupConLoss"),
    "miner": (lambda: hpcloss.SupConLoss()(X, LABELS, (LABELS,) * 3), "pml.SupConLoss"),
    "labels": (lambda: hpcloss.NTXentLoss()(X, LABELS), "pml.NTXentLoss"),
    "paired": (lambda: hpcloss.InfoNCELoss()(X, Y, rows(6, 3, 4)), "infonce.InfoNCE"),
    "logit_scale": (lambda: hpcloss.InfoNCELoss()(X, Y, torch.tensor(10.0)), "open_clip.ClipLoss"),
    "queue": (
        lambda: hpcloss.PixelContrastLoss(num_classes=3)(MAP, CLASSES, None, rows(3, 5, 4)),
        "contrastiveseg.PixelContrastLoss",
    ),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_native_loss_names_the_class_for_another_librarys_call(case):
    call, name = ELSEWHERE[case]
    with pytest.raises((TypeError, ValueError), match=f"hpcloss.compat.{name}"):
        call()
    module, loss = name.split(".")
    assert inspect.isclass(getattr(getattr(hpcloss.compat, module), loss))


# ------------------------------------------------------------------------------------------------------ options, banks


def test_pml_parts():
    """Rows as they are; a reducer and a regularizer of the library's kind."""
    plain = DotProductSimilarity(normalize_embeddings=False)
    logits = X @ X.T / 2.0
    losses = [
        torch.logsumexp(logits[i, [j for j in range(6) if j != i]], 0) - logits[i, i ^ 1] for i in range(6)
    ]  # fmt: skip
    loss = pml.SupConLoss(2.0, distance=plain)
    assert_exact(loss(X, LABELS), torch.stack(losses).mean())

    def reducer(losses, embeddings, labels):
        (found,) = losses.values()
        assert found["reduction_type"] == "element" and torch.equal(found["indices"], torch.arange(6))
        assert embeddings is X and labels is LABELS
        return (found["losses"] * torch.arange(6)).sum()

    options = {"distance": plain, "reducer": reducer, "embedding_regularizer": torch.sum, "embedding_reg_weight": 0.5}
    expected = sum(i * value for i, value in enumerate(losses)) + 0.5 * X.sum()
    assert_exact(pml.SupConLoss(2.0, **options)(X, LABELS), expected)


class DoNothingReducer:
    """A reducer of pytorch-metric-learning's."""

    def __call__(self, losses, embeddings, labels):
        return losses


def test_pml_reducer_that_does_nothing():
    """The losses come out as they are, that of the regularizer among them."""
    found = pml.SupConLoss(reducer=DoNothingReducer(), embedding_regularizer=torch.sum)(X, LABELS)
    assert found["embedding_reg_loss"] == {"losses": X.sum(), "indices": None, "reduction_type": "already_reduced"}
    assert_exact(found["loss"]["losses"].mean(), pml_supcon(X, LABELS))


def test_pml_a_reducer_belongs_to_one_loss():
    """It is copied, as the library does: what two losses count does not mix."""

    class Reducer:
        def __call__(self, losses, embeddings, labels):
            self.labels = labels
            return losses["loss"]["losses"].sum()

    reducer = Reducer()
    loss = pml.SupConLoss(reducer=reducer)
    assert loss(X, LABELS.numpy()) > 0
    assert torch.equal(loss.reducer.labels, LABELS) and not hasattr(reducer, "labels")


def test_pml_labels_of_named_pairs_are_looked_at():
    with pytest.raises(ValueError, match="labels must have shape .6., got .5."):
        pml.SupConLoss()(X, LABELS[:5], INDICES)
    with pytest.raises(ValueError, match="ref_labels must have shape .6., got .5."):
        pml.SupConLoss()(X, LABELS, INDICES, Y, LABELS[:5])


def test_pml_labels_of_any_kind():
    expected = pml.SupConLoss()(X, LABELS)
    assert torch.equal(pml.SupConLoss()(X, LABELS.numpy()), expected)
    assert torch.equal(pml.SupConLoss()(X, LABELS.double()), expected)


class Configer:
    """ContrastiveSeg's settings, as far as the loss asks for them."""

    def __init__(self, **sections):
        self.sections = sections

    def exists(self, section, name):
        return name in self.sections.get(section, {})

    def get(self, section, name):
        return self.sections[section][name]


def test_configer_wins():
    contrast = {"temperature": 0.1, "base_temperature": 0.5, "max_samples": 20, "max_views": 3}
    loss = contrastiveseg.PixelContrastLoss(Configer(contrast=contrast), temperature=7.0, max_samples=5)
    assert {name: getattr(loss, name) for name in contrast} == contrast
    assert loss.ignore_label == -1 and loss.num_classes is None
    more = {"loss": {"params": {"ce_ignore_index": 255}}, "data": {"num_classes": 19}}
    loss = contrastiveseg.PixelContrastLoss(Configer(contrast=contrast, **more))
    assert loss.ignore_label == 255 and loss.num_classes == 19


def counts_of_peer(hard, easy, max_samples, max_views):
    """How many hard and easy pixels ContrastiveSeg draws of each class of each image (lists of numbers of pixels)."""
    classes = [(h, e) for h, e in zip(hard, easy) if h + e > max_views]
    views = min(max_samples // max(len(classes), 1), max_views)
    drawn = []
    for h, e in zip(hard, easy):
        if h + e <= max_views:
            drawn.append((0, 0))
        elif h >= views / 2 and e >= views / 2:
            drawn.append((views // 2, views - views // 2))
        elif h >= views / 2:
            drawn.append((views - e, e))
        else:
            drawn.append((h, views - h))
    return drawn


@pytest.mark.parametrize("max_views", [1, 2, 5, 8])
@pytest.mark.parametrize("max_samples", [20, 31, 1000])
def test_legacy_sampling(max_samples, max_views):
    """Pixels of one image, class and side are equal, so that the draw has no part in the value."""
    labels = choice([0, 1, 1, 2, -1], 3, 12, 4)
    predict = torch.where(integers(3, 3, 12, 4, seed=2) == 0, 3, labels)
    pieces = 6 * torch.arange(3).view(3, 1, 1) + 2 * labels + (predict == labels)  # image, class, wrong before right
    pieces = torch.where(labels < 0, 0, pieces)
    holds = torch.stack([((pieces == piece) & (labels >= 0)).sum() for piece in range(18)]).view(9, 2)
    drawn = counts_of_peer(*holds.T.tolist(), max_samples, max_views)
    assert sum(map(sum, drawn)) > 4
    index = [piece for piece, number in enumerate(sum(drawn, ())) for _ in range(number)]
    options = {"max_samples": max_samples, "max_views": max_views, "num_classes": 3, "legacy_sampling": True}
    loss = contrastiveseg.PixelContrastLoss(**options)
    assert_same(
        lambda piece: loss(piece[pieces].movedim(-1, 1), labels, predict),
        lambda piece: pixel_contrast(piece[index], torch.tensor(index) % 6 // 2),
        rows(18, 5) / 5,
    )


def test_small_classes_are_taken_whole():
    labels = torch.tensor([[0] * 9 + [1] * 3 + [2]])
    loss = contrastiveseg.PixelContrastLoss(max_samples=100, max_views=4)
    for legacy, expected in ((False, [4, 3, 1]), (True, [4, 0, 0])):
        loss.legacy_sampling = legacy
        pixels, classes = loss._draw(labels, labels < 0, 3)
        chosen = pixels[classes >= 0]
        assert torch.bincount(labels[0, chosen], minlength=3).tolist() == expected
        assert len(chosen.unique()) == len(chosen) and torch.equal(labels[0, chosen], classes[classes >= 0])


def test_every_pixel_is_drawn_as_often():
    """2 of 8 pixels, of which up to 4 are drawn first, 2 000 times: 500 each; five deviations are 97."""
    loss = contrastiveseg.PixelContrastLoss(max_samples=2, max_views=4, num_classes=1)
    times = torch.zeros(8)
    labels = torch.zeros(1, 8, dtype=torch.int64)
    for _ in range(2000):
        pixels, classes = loss._draw(labels, labels < 0, 1)
        times[pixels[classes >= 0]] += 1
    assert times.sum() == 4000 and (times - 500).abs().max() < 97


def test_more_classes_than_samples():
    """One pixel of each class of each image, where the library has none left for any."""
    labels = integers(3, 2, 6, 6)
    loss = contrastiveseg.PixelContrastLoss(max_samples=4, max_views=3)
    _, classes = loss._draw(labels, labels < 0, 3)
    assert torch.bincount(classes[classes >= 0]).tolist() == [2, 2, 2]
    assert loss(rows(2, 4, 6, 6), labels) > 0


def test_labels_and_predictions_of_any_resolution():
    labels = integers(3, 2, 12, 12)
    loss = contrastiveseg.PixelContrastLoss(max_samples=10**4, max_views=10**4)
    features = rows(2, 4, 6, 6)
    coarse = labels[:, ::2, ::2]
    assert_exact(loss(features, labels, labels), loss(features, coarse, coarse))
    assert_exact(loss(features, labels[:, None].double()), loss(features, coarse))


def test_bank():
    """Queries against their key and the bank, which is read first, then written in a ring."""
    loss = lightly.NTXentLoss(0.2, memory_bank_size=(5, 4)).double()
    bank = loss.memory_bank.embeddings[0].clone()
    assert (bank.norm(dim=1) - 1).abs().max() < 1e-6 and bank.unique().numel() == 20
    for step in range(4):
        x, y = rows(3, 4, seed=step), rows(3, 4, seed=10 + step)
        assert_exact(loss(x, y), info_nce(x, y, bank, 0.2))  # nothing to train: the bank stays
        assert_exact(loss.memory_bank.embeddings[0], bank)
        value = loss(x.requires_grad_(), y)
        value.backward()  # after the bank was written
        assert_exact(value.detach(), info_nce(x.detach(), y, bank, 0.2))
        bank[torch.arange(3 * step, 3 * step + 3) % 5] = y / y.norm(dim=1, keepdim=True)
        assert_exact(loss.memory_bank.embeddings[0], bank)
    other = lightly.NTXentLoss(0.2, memory_bank_size=(5, 4)).double()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(X, Y), loss(X, Y))


def integer_bank(temperature, rows):
    with pytest.warns(UserWarning, match=f"memory_bank_size={rows} leaves the dimension to the first batch"):
        return lightly.NTXentLoss(temperature, rows)


def test_bank_of_a_number_of_rows():
    """The first batch says the dimension; from then on it is the bank that `(rows, dim)` gives."""
    loss, same = integer_bank(0.2, 5), None
    with pytest.raises(ValueError, match="out1 must have shape .6, 4., got .6, 3."):
        loss(X, Y[:, :3])
    assert loss.memory_bank == 5  # a batch that was refused decides nothing
    for step in range(4):
        x, y = rows(3, 4, seed=step).requires_grad_(), rows(3, 4, seed=10 + step)
        torch.manual_seed(1)
        value = loss(x, y)
        if same is None:
            torch.manual_seed(1)
            same = lightly.NTXentLoss(0.2, (5, 4)).double()
        assert torch.equal(value, same(x, y))
        assert torch.equal(loss.memory_bank.embeddings, same.memory_bank.embeddings)
    with pytest.raises(ValueError, match="negatives must have shape"):
        loss(rows(3, 7), rows(3, 7))
    float32 = integer_bank(0.2, 5)
    float32(X.half(), Y.half())
    assert float32.memory_bank.embeddings.dtype == torch.float32
    assert lightly.NTXentLoss(0.2, (0, 4)).memory_bank is lightly.NTXentLoss(0.2, (0,)).memory_bank is None


def test_state_of_a_bank_of_a_number_of_rows():
    """Before the first batch it has none; what is loaded then says the dimension."""
    saved, fresh = (torch.nn.ModuleDict({"loss": integer_bank(0.2, 5)}) for _ in range(2))
    assert saved.state_dict() == {}
    assert fresh.load_state_dict(saved.state_dict()) == ([], [])
    saved["loss"](X.clone().requires_grad_(), Y)
    state = saved.state_dict()
    for resumed in (fresh, torch.nn.ModuleDict({"loss": lightly.NTXentLoss(0.2, (5, 4)).double()})):
        resumed.load_state_dict(state)
        assert all(torch.equal(entry, state[name]) for name, entry in resumed.state_dict().items())
        assert torch.equal(resumed["loss"](X, Y), saved["loss"](X, Y))
    other = torch.nn.ModuleDict({"loss": integer_bank(0.2, 6)})
    with pytest.raises(RuntimeError, match="size mismatch for loss.memory_bank.embeddings"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match='Missing key.* "loss.memory_bank.embeddings"'):
        saved.load_state_dict({})
    saved.load_state_dict({}, strict=False)
    assert torch.equal(saved["loss"](X, Y), fresh["loss"](X, Y))
    copied = copy.deepcopy(torch.nn.ModuleDict({"loss": integer_bank(0.2, 5)}))
    copied.load_state_dict(state)
    assert torch.equal(copied["loss"](X, Y), fresh["loss"](X, Y))


@pytest.mark.parametrize("build", [lambda: lightly.NTXentLoss(0.2, (5, 4)), lambda: integer_bank(0.2, 5)])
def test_bank_in_evaluation(build):
    """Written where `out0` requires a gradient and nowhere else, whatever the mode."""
    loss = build().eval()
    loss(X, Y)
    bank = loss.memory_bank.embeddings.clone()
    with torch.no_grad():
        loss(X, Y)
    assert torch.equal(loss.memory_bank.embeddings, bank)
    loss.train()(X, Y)
    assert torch.equal(loss.memory_bank.embeddings, bank)
    loss.eval()(X.clone().requires_grad_(), Y)
    assert (loss.memory_bank.embeddings != bank).all()


@pytest.mark.parametrize("build", [lambda: lightly.NTXentLoss(0.2, (5, 4)), lambda: integer_bank(0.2, 5)])
def test_bank_moves_to_the_embeddings(build):
    """lightly's examples never move the loss."""
    loss = build()
    assert loss(X.float().to("meta").requires_grad_(), Y.float().to("meta")).device.type == "meta"
    assert {buffer.device.type for buffer in loss.buffers()} == {"meta"}


def test_gather_distributed_needs_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert lightly.NTXentLoss()(X, Y) > 0
    with pytest.raises(ValueError, match="gather_distributed must be False without torch.distributed, got True"):
        lightly.NTXentLoss(gather_distributed=True)


def test_monai_says_that_the_batch_size_has_no_effect():
    with pytest.warns(UserWarning, match="batch_size=4 has no effect"):
        loss = monai.ContrastiveLoss(0.5, 4)
    assert isinstance(loss, torch.nn.modules.loss._Loss)


def test_clip_and_the_number_of_processes():
    with pytest.raises(ValueError, match="world_size=2, but the default process group has 1 processes"):
        open_clip.ClipLoss(world_size=2)(X, Y, 10.0)


def test_clip_and_the_rank_of_the_process(monkeypatch):
    monkeypatch.setattr(open_clip, "ranks", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(ValueError, match="rank must be that of this process, 1 of 2, got 0"):
        open_clip.ClipLoss(world_size=2)(X, Y, 10.0)


def test_clip_bias_and_dict():
    scale, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = open_clip.ClipLoss()
    expected = loss(X, Y, scale)
    found = loss(X, Y, scale, bias, output_dict=True)
    assert list(found) == ["contrastive_loss"] and torch.equal(found["contrastive_loss"], expected)
    assert torch.autograd.grad(found["contrastive_loss"], bias) == (torch.zeros_like(bias),)
    assert torch.equal(loss(X, Y, 10.0, 3.0), expected)


# ------------------------------------------------------------------------------------------------ what scripts may set

INDICES = (torch.tensor([0, 2, 4, 1]), torch.tensor([1, 3, 5, 0]), torch.tensor([0, 2]), torch.tensor([4, 5]))
VIEWS, MASK, OWN = torch.stack([X, Y], 1), (LABELS[:, None] >= LABELS), torch.stack([X, Y], 1)
# Pixels of a class are equal, so that the draw has no part in the value.
OF_CLASS, DRAWN = rows(3, 4), torch.tensor([0] * 4 + [1] * 4 + [2])
PARTS = {"embedding_regularizer": torch.sum}
# How a loss is built, and how it is called once something was set.
SETTABLE = {
    "supcontrast": (supcontrast_compat.SupConLoss, lambda loss: loss(VIEWS, LABELS)),
    "supcontrast mask": (supcontrast_compat.SupConLoss, lambda loss: loss(VIEWS, None, MASK)),
    "pml SupConLoss": (lambda: pml.SupConLoss(distance=DotProductSimilarity(), **PARTS), lambda loss: loss(X, LABELS)),
    "pml SupConLoss pairs": (
        lambda: pml.SupConLoss(distance=DotProductSimilarity(), **PARTS), lambda loss: loss(X, None, INDICES, Y)
    ),
    "pml NTXentLoss": (lambda: pml.NTXentLoss(distance=DotProductSimilarity(), **PARTS), lambda loss: loss(X, LABELS)),
    "pml NTXentLoss pairs": (
        lambda: pml.NTXentLoss(distance=DotProductSimilarity(), **PARTS), lambda loss: loss(X, None, INDICES, Y)
    ),
    "lightly": (lightly.NTXentLoss, lambda loss: loss(X, Y)),
    "monai": (monai.ContrastiveLoss, lambda loss: loss(X, Y)),
    "infonce": (infonce.InfoNCE, lambda loss: loss(X, Y, X)),
    "infonce paired": (infonce.InfoNCE, lambda loss: loss(X, Y, OWN)),
    "open_clip": (open_clip.ClipLoss, lambda loss: loss(X, Y, 10.0)),
    "contrastiveseg": (every_pixel, lambda loss: loss(OF_CLASS[DRAWN].T[None], DRAWN[None])),
}  # fmt: skip


def drawn(*classes, **options):
    return pixel_contrast(OF_CLASS[list(classes)], torch.tensor(classes), **options)


def full_queue():
    queue = hpcloss.EmbeddingQueue(1, 3, 4).double()
    queue.enqueue(rows(3, 4, seed=5), torch.zeros(3))
    return queue


def summed(losses, embeddings, labels):
    return losses["loss"]["losses"].sum()


def pml_settings(name, formula, *call):
    """What both losses share; `call` are the arguments after the embeddings."""

    def expected(regular=torch.sum, **options):
        return lambda: formula(X, *call, **options) + regular(X)

    return [
        (name, "temperature", 0.5, expected(temperature=0.5)),
        (name, "temperature", 0.0, ValueError),
        (name, "distance", DotProductSimilarity(normalize_embeddings=False), expected(normalize=False)),
        (name, "distance", None, expected()),
        (name, "distance", Distance(), NotImplementedError),
        (name, "distance.normalize_embeddings", False, expected(normalize=False)),
        (name, "distance.p", 1, NotImplementedError),
        (name, "distance.power", 2, NotImplementedError),
        (name, "distance.is_inverted", False, NotImplementedError),
        (name, "normalize", False, AttributeError),
        (name, "embedding_regularizer", torch.mean, expected(torch.mean)),
        (name, "embedding_regularizer", None, expected(lambda x: 0.0)),
        (name, "embedding_reg_weight", 0.5, expected(lambda x: x.sum() / 2)),
        (name, "collect_stats", True, expected()),  # these losses have no statistics there
        (name, "loss_method", summed, AttributeError),
    ]


# The loss, an attribute that is set once it is built, to what, and the library's formula or the error that names it.
SET = [
    ("supcontrast", "temperature", 0.5, lambda: supcontrast(VIEWS, LABELS, temperature=0.5)),
    ("supcontrast", "temperature", -1.0, ValueError),
    ("supcontrast", "base_temperature", 1.0, lambda: supcontrast(VIEWS, LABELS, base_temperature=1.0)),
    ("supcontrast", "contrast_mode", "one", lambda: supcontrast(VIEWS, LABELS, contrast_mode="one")),
    ("supcontrast", "contrast_mode", "mode", ValueError),
    ("supcontrast mask", "temperature", 0.5, lambda: supcontrast(VIEWS, None, MASK, temperature=0.5)),
    ("supcontrast mask", "temperature", -1.0, ValueError),
    ("supcontrast mask", "base_temperature", 1.0, lambda: supcontrast(VIEWS, None, MASK, base_temperature=1.0)),
    ("supcontrast mask", "contrast_mode", "one", lambda: supcontrast(VIEWS, None, MASK, contrast_mode="one")),
    *pml_settings("pml SupConLoss", pml_supcon, LABELS),
    ("pml SupConLoss", "reducer", summed, lambda: 6 * pml_supcon(X, LABELS) + X.sum()),
    *pml_settings("pml SupConLoss pairs", pml_supcon, None, INDICES, Y),
    ("pml SupConLoss pairs", "reducer", summed, lambda: 2 * pml_supcon(X, None, INDICES, Y) + X.sum()),
    *pml_settings("pml NTXentLoss", pml_ntxent, LABELS),
    ("pml NTXentLoss", "reducer", summed, NotImplementedError),
    *pml_settings("pml NTXentLoss pairs", pml_ntxent, None, INDICES, Y),
    ("pml NTXentLoss pairs", "reducer", summed, lambda: 4 * pml_ntxent(X, None, INDICES, Y) + X.sum()),
    ("lightly", "temperature", 0.2, lambda: ntxent(X, Y, 0.2)),
    ("lightly", "temperature", -1.0, ValueError),
    ("lightly", "gather_distributed", True, lambda: ntxent(X, Y)),  # of one process
    ("lightly", "memory_bank", full_queue(), lambda: info_nce(X, Y, rows(3, 4, seed=5), 0.5)),
    ("lightly", "memory_bank", hpcloss.EmbeddingQueue(1, 3, 4), ValueError),
    ("lightly", "memory_bank", torch.nn.Identity(), TypeError),
    ("lightly", "memory_bank", None, lambda: ntxent(X, Y)),
    ("lightly", "cross_entropy", torch.nn.CrossEntropyLoss(label_smoothing=0.1), AttributeError),
    ("lightly", "eps", 1e-4, AttributeError),
    ("monai", "temperature", 0.25, lambda: ntxent(X, Y, 0.25)),
    ("monai", "temperature", -1.0, ValueError),
    ("monai", "reduction", "sum", lambda: ntxent(X, Y)),  # there, too, it is read nowhere
    ("infonce", "temperature", 0.5, lambda: info_nce(X, Y, X, 0.5)),
    ("infonce", "temperature", -1.0, ValueError),
    ("infonce", "reduction", "none", lambda: info_nce(X, Y, X, reduction="none")),
    ("infonce", "reduction", "all", ValueError),
    ("infonce", "negative_mode", "both", ValueError),
    ("infonce paired", "temperature", -1.0, ValueError),
    ("infonce paired", "reduction", "all", ValueError),
    ("infonce paired", "negative_mode", "paired", lambda: info_nce(X, Y, OWN, negative_mode="paired")),
    ("open_clip", "local_loss", True, lambda: clip(X, Y, 10.0)),  # of one process, as the next three
    ("open_clip", "gather_with_grad", True, lambda: clip(X, Y, 10.0)),
    ("open_clip", "cache_labels", True, lambda: clip(X, Y, 10.0)),
    ("open_clip", "rank", 1, lambda: clip(X, Y, 10.0)),
    ("open_clip", "world_size", 2, ValueError),
    ("open_clip", "labels", {}, AttributeError),
    ("open_clip", "prev_num_logits", 6, AttributeError),
    ("contrastiveseg", "configer", Configer(), lambda: drawn(*DRAWN.tolist())),  # asked at first alone, as there
    ("contrastiveseg", "temperature", 0.5, lambda: drawn(*DRAWN.tolist(), temperature=0.5)),
    ("contrastiveseg", "temperature", -1.0, ValueError),
    ("contrastiveseg", "base_temperature", 1.0, lambda: drawn(*DRAWN.tolist(), base_temperature=1.0)),
    ("contrastiveseg", "max_samples", 9, lambda: drawn(0, 0, 0, 1, 1, 1, 2)),
    ("contrastiveseg", "max_samples", 0, ValueError),
    ("contrastiveseg", "max_views", 2, lambda: drawn(0, 0, 1, 1, 2)),
    ("contrastiveseg", "max_views", 0, ValueError),
    ("contrastiveseg", "ignore_label", 1, lambda: drawn(0, 0, 0, 0, 2)),
    ("contrastiveseg", "num_classes", 2, lambda: drawn(0, 0, 0, 0, 1, 1, 1, 1)),
    ("contrastiveseg", "num_classes", 0, ValueError),
    ("contrastiveseg", "legacy_sampling", True, lambda: 0 * X.sum()),  # no class has more than max_views pixels
]


@pytest.mark.parametrize(("name", "attribute", "value", "expected"), SET)
def test_what_is_set_later_holds(name, attribute, value, expected):
    build, call = SETTABLE[name]
    loss = build()
    *path, last = attribute.split(".")
    owner = operator.attrgetter(".".join(path))(loss) if path else loss

    def after(value):
        setattr(owner, last, value)
        return call(loss)

    if isinstance(expected, type):
        with pytest.raises(expected, match=last):
            after(value)
        return
    assert_exact(after(value), expected(), floor=NOISE)
    if attribute == "temperature":
        learnt = after(torch.nn.Parameter(torch.tensor(value, dtype=torch.float64)))
        assert_exact(learnt.detach(), expected(), floor=NOISE)
        assert torch.autograd.grad(learnt.sum(), loss.temperature)[0] != 0


def settable(module):
    """Names of the public attributes of a module, with those that its class computes."""
    held = {*vars(module), *module._parameters, *module._buffers, *module._modules, *getattr(module, "lacks", ())}
    computed = {name for name, value in inspect.getmembers(type(module)) if isinstance(value, property)}
    return {name for name in held | computed if not name.startswith("_")} - {"training"}


@pytest.mark.parametrize("name", SETTABLE)
def test_every_attribute_is_tried(name):
    loss = SETTABLE[name][0]()
    tried = {attribute.split(".")[0] for of, attribute, *_ in SET if of == name}
    assert tried == settable(loss)


# ------------------------------------------------------------------------------------------------- what all must bear

QUEUE = rows(3, 5, 4, seed=9)
# The loss of a temperature, and how it is called on X and Y.
CALLS = {
    "supcontrast": (supcontrast_compat.SupConLoss, lambda loss, x, y: loss(torch.stack([x, y], 1), LABELS)),
    "supcontrast one": (
        lambda t: supcontrast_compat.SupConLoss(t, "one"), lambda loss, x, y: loss(torch.stack([x, y], 1))
    ),
    "supcontrast mask": (
        supcontrast_compat.SupConLoss,
        lambda loss, x, y: loss(torch.stack([x, y], 1), None, (LABELS[:, None] >= LABELS)),
    ),
    "pml SupConLoss": (pml.SupConLoss, lambda loss, x, y: loss(x, LABELS, None, y, LABELS.clone())),
    "pml SupConLoss pairs": (pml.SupConLoss, lambda loss, x, y: loss(x, None, INDICES, y)),
    "pml NTXentLoss": (pml.NTXentLoss, lambda loss, x, y: loss(x, LABELS, None, y, LABELS.clone())),
    "pml NTXentLoss pairs": (pml.NTXentLoss, lambda loss, x, y: loss(x, None, INDICES, y)),
    "lightly": (lightly.NTXentLoss, lambda loss, x, y: loss(x, y)),
    "lightly bank": (
        lambda t: lightly.NTXentLoss(t, memory_bank_size=(8, 4)), lambda loss, x, y: loss(x, y)
    ),
    "monai": (monai.ContrastiveLoss, lambda loss, x, y: loss(x, y)),
    "infonce": (infonce.InfoNCE, lambda loss, x, y: loss(x, y)),
    "infonce unpaired": (infonce.InfoNCE, lambda loss, x, y: loss(x, y, y)),
    "infonce paired": (
        lambda t: infonce.InfoNCE(t, negative_mode="paired"), lambda loss, x, y: loss(x, y, torch.stack([y, x], 1))
    ),
    "open_clip": (lambda t: lambda x, y: open_clip.ClipLoss()(x, y, 1 / t), lambda loss, x, y: loss(x, y)),
    "contrastiveseg": (
        lambda t: contrastiveseg.PixelContrastLoss(temperature=t, num_classes=3),
        lambda loss, x, y: loss(torch.stack([x.T, y.T]), torch.stack([LABELS, LABELS])),
    ),
    "contrastiveseg queue": (
        lambda t: contrastiveseg.PixelContrastLoss(temperature=t, num_classes=3),
        lambda loss, x, y: loss(torch.stack([x.T, y.T]), torch.stack([LABELS, LABELS]), None, QUEUE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_learnable_temperature(name):
    """Its gradient is the slope of the loss."""
    build, call = CALLS[name]

    def value(temperature):
        torch.manual_seed(0)  # of a bank
        return call(build(temperature), X, Y)

    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(value(temperature), temperature)
    with torch.no_grad():
        slope = (value(temperature + 1e-5) - value(temperature - 1e-5)) / 2e-5
    assert abs(grad - slope) < 1e-7 * max(1.0, abs(slope)) and abs(slope) > 1e-3


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name):
    build, call = CALLS[name]
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        loss, x, y = build(0.5), X.float().requires_grad_(), Y.float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = call(loss, x, y)
            grads = torch.autograd.grad(value, (x, y), allow_unused=True)  # where trainers call it, too
        found.append((value, *grads))
    for plain, cast in zip(*found, strict=True):
        assert plain is cast is None or (plain.dtype == torch.float32 and torch.equal(plain, cast))


class Subclass(torch.Tensor):
    """As MONAI's MetaTensor: what is computed from it is one, too."""


@pytest.mark.parametrize("name", CALLS)
def test_a_plain_number_comes_out(name):
    """Whatever subclass the features are of, and whatever the shape and dtype of a temperature."""
    build, call = CALLS[name]
    torch.manual_seed(0)
    expected = call(build(0.5), X.float(), Y.float())
    torch.manual_seed(0)
    temperature = torch.tensor([0.5], dtype=torch.float64)
    found = call(build(temperature), X.float().as_subclass(Subclass), Y.float().as_subclass(Subclass))
    assert type(found) is torch.Tensor and found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_contrastiveseg_labels_that_are_no_classes():
    labels = torch.where(CLASSES == 1, 2**40, CLASSES)
    with pytest.raises(ValueError, match=f"labels must be below 65536 .*, got {2**40}; pass num_classes"):
        contrastiveseg.PixelContrastLoss()(MAP, labels)
    assert contrastiveseg.PixelContrastLoss(num_classes=7)(MAP, labels).isfinite()


@pytest.mark.parametrize("name", CALLS)
def test_half_precision_is_computed_in_float32(name):
    build, call = CALLS[name]
    torch.manual_seed(0)
    loss = build(0.01)
    value = call(loss, X.half(), Y.half())
    torch.manual_seed(0)
    exact = call(
        build(0.01).double() if isinstance(loss, torch.nn.Module) else loss, X.half().double(), Y.half().double()
    )
    assert value.dtype == torch.float32 and abs(value - exact) < 2e-6 * exact


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_compile(name):
    """One graph, the same numbers."""
    build, call = CALLS[name]
    torch._dynamo.reset()
    found = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        loss, x, y = build(0.5), X.clone().requires_grad_(), Y.clone().requires_grad_()
        value = wrap(lambda x, y, loss=loss: call(loss, x, y))(x, y)
        found.append((value.detach(), torch.autograd.grad(value, x)[0]))
    for eager, compiled in zip(*found, strict=True):
        assert_exact(compiled, eager)


NOTHING = {
    "supcontrast, empty": (supcontrast_compat.SupConLoss(), (0, 2, 4), ()),
    "supcontrast, one row": (supcontrast_compat.SupConLoss(), (1, 1, 4), ()),
    "supcontrast, one row and mask": (supcontrast_compat.SupConLoss(), (1, 1, 4), (None, torch.ones(1, 1))),
    "supcontrast, empty mask": (supcontrast_compat.SupConLoss(), (3, 2, 4), (None, torch.zeros(3, 3))),
    "supcontrast, no positives": (supcontrast_compat.SupConLoss(), (3, 1, 4), (torch.arange(3),)),
    "pml SupConLoss, empty": (pml.SupConLoss(), (0, 4), (LABELS[:0],)),
    "pml SupConLoss, one class": (pml.SupConLoss(), (6, 4), (LABELS * 0,)),
    "pml SupConLoss, no positives": (pml.SupConLoss(), (6, 4), (torch.arange(6),)),
    "pml SupConLoss, no pairs": (pml.SupConLoss(), (6, 4), (None, (LABELS[:0],) * 4)),
    "pml SupConLoss, no negative pairs": (pml.SupConLoss(), (6, 4), (None, (*INDICES[:2], *[LABELS[:0]] * 2))),
    "pml SupConLoss, one pair each": (pml.SupConLoss(), (6, 4), (None, [index[:1] for index in INDICES])),
    "pml NTXentLoss, empty": (pml.NTXentLoss(), (0, 4), (LABELS[:0],)),
    "pml NTXentLoss, one class": (pml.NTXentLoss(), (6, 4), (LABELS * 0,)),
    "pml NTXentLoss, no positives": (pml.NTXentLoss(), (6, 4), (torch.arange(6),)),
    "pml NTXentLoss, no pairs": (pml.NTXentLoss(), (6, 4), (None, (LABELS[:0],) * 4)),
    "pml NTXentLoss, no positive pairs": (pml.NTXentLoss(), (6, 4), (None, (*[LABELS[:0]] * 2, *INDICES[2:]))),
    "contrastiveseg, no labels": (contrastiveseg.PixelContrastLoss(), (2, 4, 3, 3), ()),
    "contrastiveseg, empty": (contrastiveseg.PixelContrastLoss(), (0, 4, 3, 3), (CLASSES[:0],)),
    "contrastiveseg, ignored": (contrastiveseg.PixelContrastLoss(), (2, 4, 3, 3), (CLASSES * 0 - 1,)),
    "contrastiveseg, one class": (contrastiveseg.PixelContrastLoss(), (2, 4, 3, 3), (CLASSES * 0,)),
    "contrastiveseg, single pixels": (contrastiveseg.PixelContrastLoss(), (1, 4, 3), (torch.arange(3)[None],)),
}
TWO_VIEWS = {"lightly": lightly.NTXentLoss(), "monai": monai.ContrastiveLoss(), "infonce": infonce.InfoNCE()}
for _name, _loss in TWO_VIEWS.items():
    for _count in (0, 1):
        NOTHING[f"{_name}, {_count} rows"] = (_loss, (_count, 4), (rows(_count, 4, seed=2),))
NOTHING["open_clip, 0 rows"] = (open_clip.ClipLoss(), (0, 4), (rows(0, 4), 10.0))
NOTHING["open_clip, 1 row"] = (open_clip.ClipLoss(), (1, 4), (rows(1, 4), 10.0))


@pytest.mark.parametrize("case", NOTHING)
def test_where_nothing_counts(case):
    """0, joined to the graph, with zero gradients and no NaN on the way to them."""
    loss, shape, rest = NOTHING[case]
    with torch.autograd.set_detect_anomaly(True):
        value, (grad,) = value_and_grads(lambda x: loss(x, *rest), rows(*shape))
    assert value.abs() <= 1e-15 and value.shape == ()
    assert grad.abs().max() <= 1e-14 if grad.numel() else grad.shape == shape


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operator returns; the package's own are counted as one."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return found


@pytest.mark.parametrize("name", ["supcontrast", "pml SupConLoss", "pml NTXentLoss", "lightly", "monai", "infonce",
                                  "open_clip", "contrastiveseg"])  # fmt: skip
def test_no_matrix_of_pairs(name):
    """2 000 rows of 2 channels: no tensor holds more than a few numbers a row."""
    n = 2000
    x, y, labels = rows(n, 2).requires_grad_(), rows(n, 2, seed=1).requires_grad_(), integers(5, n)
    calls = {
        "supcontrast": lambda: supcontrast_compat.SupConLoss(1.0)(torch.stack([x, y], 1), labels),
        "pml SupConLoss": lambda: pml.SupConLoss()(x, labels, None, y, labels.clone()),
        "pml NTXentLoss": lambda: pml.NTXentLoss()(x, labels),
        "lightly": lambda: lightly.NTXentLoss()(x, y),
        "monai": lambda: monai.ContrastiveLoss()(x, y),
        "infonce": lambda: infonce.InfoNCE()(x, y),
        "open_clip": lambda: open_clip.ClipLoss()(x, y, 10.0),
        "contrastiveseg": lambda: contrastiveseg.PixelContrastLoss(max_samples=n, max_views=n)(x.T[None], labels[None]),
    }
    with Largest() as largest:
        calls[name]().backward()
    assert 2 * n <= largest.numel <= 20 * n


# -------------------------------------------------------------------------------------------------------- differences

BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/differences.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_differences(number):
    """Each example of docs/differences.md says by itself what the library gives and what is given here."""
    names: dict = {}
    assert len(BLOCKS) == 26 and "assert " in BLOCKS[number]
    for block in (BLOCKS[0], BLOCKS[number]):
        exec(compile(block, f"docs/differences.md, block {number}", "exec"), names)
