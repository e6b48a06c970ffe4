"""hpcloss.compat against the libraries themselves, where a package of them exists (`make parity`, its own environment).

pytest does not collect this file by itself: the libraries are no part of what the tests need.
"""

import functools
import inspect
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peers import Stubs
from hpcloss.compat import infonce, lightly, monai, named_pairs, pml
from tests.compat.test_compat import INDICES, SET, SETTABLE, settable
from tests.tools.cases import assert_same, integers, rows
from tests.tools.numerics import assert_exact
from tests.tools.peer_formulas import draw_infonce, draw_pml, draw_two_views, unit

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = 200


sys.meta_path.append(Stubs())
from info_nce import InfoNCE, info_nce  # noqa: E402
from lightly.loss import NTXentLoss  # noqa: E402
from monai.losses import ContrastiveLoss  # noqa: E402
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers  # noqa: E402
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices  # noqa: E402


def with_reference(loss):
    """(embeddings, ref_emb) as the tensors whose gradients are compared; the library's 0 does not know ref_emb."""
    return lambda x, ref=None, **rest: loss(x, ref_emb=ref, **rest) + (0 if ref is None else 0 * ref.sum())


def as_it_is(loss):
    return loss


# drawing, ours, theirs, how both are called
PEERS = {
    "pml SupConLoss": (draw_pml, pml.SupConLoss, losses.SupConLoss, with_reference),
    "pml NTXentLoss": (draw_pml, pml.NTXentLoss, losses.NTXentLoss, with_reference),
    "lightly": (draw_two_views, lightly.NTXentLoss, NTXentLoss, as_it_is),
    "monai": (draw_two_views, monai.ContrastiveLoss, ContrastiveLoss, as_it_is),
    "infonce": (draw_infonce, infonce.InfoNCE, InfoNCE, as_it_is),
}


@pytest.mark.parametrize("peer", PEERS)
def test_value_and_gradient(peer):
    draw, ours, theirs, calling = PEERS[peer]
    for seed in range(CASES):
        case = draw(seed)
        both = [calling(build(**case.options)) for build in (ours, theirs)]
        try:
            assert_same(*[functools.partial(loss, **case.rest) for loss in both], *case.inputs)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case.options}, {sorted(case.rest)}") from error


def parameters(function):
    """Names and defaults of what a caller may pass by position."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in found if p.kind == p.POSITIONAL_OR_KEYWORD and p.name != "self"]


@pytest.mark.parametrize("peer", PEERS)
def test_signatures(peer):
    _, ours, theirs, _ = PEERS[peer]
    assert parameters(ours.__init__) == parameters(theirs.__init__)
    assert parameters(ours.forward) == parameters(theirs.forward)
    assert parameters(infonce.info_nce) == parameters(info_nce)


def test_lightly_bank():
    """Value, gradient and bank over two rounds of it; the same seed starts the same bank."""
    both = []
    for build in (lightly.NTXentLoss, NTXentLoss):
        torch.manual_seed(0)
        both.append(build(0.1, memory_bank_size=(12, 5)).double())
    ours, theirs = both[0].memory_bank.embeddings[0], both[1].memory_bank.bank
    assert (ours - theirs).abs().max() < 4 * torch.finfo(torch.float32).eps  # made in float32
    theirs.copy_(unit(theirs))
    ours.copy_(theirs)
    for step in range(8):
        x, y = rows(4, 5, seed=step), rows(4, 5, seed=100 + step)
        if step == 5:  # nothing to train: the bank stays
            assert_exact(both[0](x, y), both[1](x, y))
        else:
            values = [loss(x.requires_grad_(), y.requires_grad_()) for loss in both]
            assert_exact(*[value.detach() for value in values])
            for ours, theirs in zip(*[torch.autograd.grad(value, (x, y)) for value in values], strict=True):
                assert_exact(ours, theirs)
        assert_exact(both[0].memory_bank.embeddings[0], both[1].memory_bank.bank)


def test_lightly_bank_of_a_number_of_rows():
    """lightly 1.6 refuses what it took before; here it gives what the library gives for both numbers."""
    with pytest.raises(ValueError, match="does not specify the feature dimension"):
        NTXentLoss(0.1, memory_bank_size=12)
    ours = lightly.NTXentLoss(0.1, memory_bank_size=12)
    x, y = [view.float() for view in (rows(4, 5), rows(4, 5, seed=1))]
    torch.manual_seed(0)
    theirs = NTXentLoss(0.1, memory_bank_size=(12, 5))
    torch.manual_seed(0)
    torch.testing.assert_close(ours(x, y), theirs(x, y))


PML = [(pml.SupConLoss, losses.SupConLoss), (pml.NTXentLoss, losses.NTXentLoss)]
# Pairs computed one by one, as a matrix, and as a matrix by two or three anchors.
FORMS = {"few": (0, 1 << 20), "whole": (10**9, 1 << 20), "pieces": (10**9, 100)}
MINERS = {
    "all pairs": lambda x, y, *others: get_all_pairs_indices(y, *others[1:]),
    "multi-similarity": miners.MultiSimilarityMiner(),
    "triplets": miners.TripletMarginMiner(),
    "semihard": miners.TripletMarginMiner(type_of_triplets="semihard"),
    "batch hard": miners.BatchHardMiner(),
}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    for name, value in zip(("FEW", "CHUNK"), FORMS[request.param]):
        monkeypatch.setattr(named_pairs, name, value)


@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize(("ours", "theirs"), PML)
def test_pml_miners(form, ours, theirs, miner):
    labels = integers(4, 40)
    x = rows(40, 8) + 2 * torch.nn.functional.one_hot(labels, 8)
    indices = MINERS[miner](x, labels)
    assert len(indices[0]) > 10
    assert_same(lambda x: ours()(x, labels, indices), lambda x: theirs()(x, labels, indices), x)
    twice = [index.repeat(2) for index in indices]
    assert_same(lambda x: ours()(x, labels, twice), lambda x: theirs()(x, labels, twice), x)


@pytest.mark.parametrize("miner", [None, *MINERS])
@pytest.mark.parametrize(("ours", "theirs"), PML)
def test_pml_cross_batch_memory(form, ours, theirs, miner):
    """Batches of 16 through a memory of 40 rows, which is filled and overwritten."""
    both = [
        losses.CrossBatchMemory(build(), embedding_size=8, memory_size=40, miner=MINERS.get(miner))
        for build in (ours, theirs)
    ]
    for step in range(5):
        labels = integers(4, 16, seed=step)
        x = (rows(16, 8, seed=step) + 2 * torch.nn.functional.one_hot(labels, 8)).requires_grad_()
        values = [loss(x, labels) for loss in both]
        assert values[1] > 1e-3
        assert_exact(*[value.detach() for value in values])
        assert_exact(*[torch.autograd.grad(value, x)[0] for value in values])
    assert both[0].has_been_filled and torch.equal(both[0].embedding_memory, both[1].embedding_memory)


PARTS = [
    {"distance": distances.DotProductSimilarity(normalize_embeddings=False), "temperature": 3.0},
    {"distance": distances.CosineSimilarity()},
    {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3},
    {"reducer": reducers.MeanReducer()},
    {"reducer": reducers.SumReducer()},
    {"reducer": reducers.ThresholdReducer(low=1.0)},
]
WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("options", [*PARTS, {"reducer": reducers.ClassWeightedReducer(WEIGHTS)}])
def test_pml_parts_by_labels(options):
    labels = integers(4, 40)
    ours, theirs = pml.SupConLoss(**options), losses.SupConLoss(**options)
    assert_same(lambda x: ours(x, labels), lambda x: theirs(x, labels), rows(40, 8))


@pytest.mark.parametrize("options", PARTS)
def test_pml_parts_by_pairs(form, options):
    labels = integers(4, 40)
    indices = (*torch.where(labels[:, None] == labels), *torch.where(labels[:, None] != labels))
    ours, theirs = pml.NTXentLoss(**options), losses.NTXentLoss(**options)
    assert_same(lambda x: ours(x, None, indices), lambda x: theirs(x, None, indices), rows(40, 8))


# ---- what scripts set after a loss was built

THEIRS = {
    "pml SupConLoss": lambda: losses.SupConLoss(distance=distances.DotProductSimilarity()),
    "pml NTXentLoss": lambda: losses.NTXentLoss(distance=distances.DotProductSimilarity()),
    "lightly": NTXentLoss,
    "monai": ContrastiveLoss,
    "infonce": InfoNCE,
    "infonce paired": InfoNCE,
}


@pytest.mark.parametrize("peer", THEIRS)
def test_what_can_be_set_there_is_tried_here(peer):
    assert settable(THEIRS[peer]()) <= {attribute.split(".")[0] for name, attribute, *_ in SET if name == peer}
    if peer.startswith("pml"):
        tried = {attribute.split(".")[1] for name, attribute, *_ in SET if name == peer and "." in attribute}
        assert settable(THEIRS[peer]().distance) == tried | {"collect_stats"}  # which has a test below


# The rows with a value, and not an error or an object of ours.
VALUES = [
    (peer, attribute, value)
    for peer, attribute, value, expected in SET
    if peer in THEIRS and not peer.startswith("pml") and not isinstance(expected, type) and attribute != "memory_bank"
]


@pytest.mark.parametrize(("peer", "attribute", "value"), VALUES)
def test_what_is_set_later_holds_there_too(peer, attribute, value):
    (ours, call), theirs = SETTABLE[peer], THEIRS[peer]()
    values = []
    for loss in (ours(), theirs):
        setattr(loss, attribute, value)
        values.append(call(loss))
    assert_exact(*values)


OF_DISTANCE = [{"normalize_embeddings": False}, {"p": 1}, {"power": 2}, {"is_inverted": False}]


@pytest.mark.parametrize("settings", OF_DISTANCE)
@pytest.mark.parametrize("distance", [distances.DotProductSimilarity, distances.CosineSimilarity])
@pytest.mark.parametrize(("ours", "theirs"), PML)
def test_pml_distance_that_is_changed_later(ours, theirs, distance, settings):
    """The same value, or an error that says what there is none of."""
    x, labels = rows(20, 8), integers(4, 20)
    both = [build(1.0, distance=distance()) for build in (ours, theirs)]
    before = both[1](x, labels)
    for loss in both:
        for name, value in settings.items():
            setattr(loss.distance, name, value)
    assert abs(both[1](x, labels) - before) > 1e-3
    if "normalize_embeddings" in settings:
        assert_same(*[functools.partial(loss, labels=labels) for loss in both], x)
        assert_same(*[functools.partial(loss, labels=labels, indices_tuple=INDICES) for loss in both], x)
    else:
        (name, value), *_ = settings.items()
        with pytest.raises(NotImplementedError, match=f"{name}={value}"):
            both[0](x, labels)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), PML)
def test_pml_statistics_of_the_distance(ours, theirs, normalize):
    x, other, labels = rows(20, 8), rows(20, 8, seed=1), integers(4, 20)
    for arguments in ((labels,), (labels, None, other, labels.clone()), (None, INDICES)):
        found = []
        for build in (ours, theirs):
            distance = distances.DotProductSimilarity(normalize_embeddings=normalize, collect_stats=True)
            build(distance=distance)(x, *arguments)
            found.append([getattr(distance, name) for name in distance._record_these_stats])
        assert found[0] == pytest.approx(found[1]) and len(found[0]) == 4 and min(found[0]) > 0


def test_pml_reducers_of_every_kind():
    """One that does nothing, several at once, one that counts; one reducer for two losses."""
    x, labels, regular = rows(20, 8), integers(4, 20), regularizers.LpRegularizer()
    nothing = [
        build(reducer=reducers.DoNothingReducer(), embedding_regularizer=regular)(x, labels)
        for build in (pml.SupConLoss, losses.SupConLoss)
    ]
    assert nothing[0].keys() == nothing[1].keys()
    for part in nothing[1]:
        assert nothing[0][part]["reduction_type"] == nothing[1][part]["reduction_type"]
        assert_exact(nothing[0][part]["losses"], nothing[1][part]["losses"])
    several = reducers.MultipleReducers({"loss": reducers.ThresholdReducer(low=1.0)})
    assert_same(
        *[
            functools.partial(build(reducer=several, embedding_regularizer=regular), labels=labels)
            for build in (pml.SupConLoss, losses.SupConLoss)
        ],
        x,
    )
    counting = reducers.ThresholdReducer(low=1.0, collect_stats=True)
    ours, theirs = [build(reducer=counting) for build in (pml.SupConLoss, losses.SupConLoss)]
    ours(x, labels), theirs(x, labels)
    assert ours.reducer.num_past_filter == theirs.reducer.num_past_filter > 0 == counting.num_past_filter
    with pytest.raises(NotImplementedError, match="without collect_stats"):
        pml.NTXentLoss(reducer=reducers.MeanReducer(collect_stats=True))(x, labels)


def curve(loss, by_labels):
    """200 steps of a small network in float32."""
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    values = []
    for step in range(200):
        labels = integers(5, 32, seed=step)
        x = rows(32, 16, seed=step, dtype=torch.float32) + 2 * torch.nn.functional.one_hot(labels, 16)
        x, y = network(x), network(x + 0.1 * rows(32, 16, seed=1000 + step, dtype=torch.float32))
        value = loss(x, labels) if by_labels else loss(x, y)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        values.append(value.item())
    return values


def assert_same_curve(ours, theirs):
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    assert len(ours) == 200 and (ours - theirs).abs().max() < 1e-5
    assert theirs[-20:].mean() < 0.9 * theirs[:20].mean()  # it has learnt


TRAINED = {**{name: (ours, theirs, {}) for name, (_, ours, theirs, _) in PEERS.items()}}
TRAINED["lightly bank"] = (lightly.NTXentLoss, NTXentLoss, {"memory_bank_size": (128, 8)})


@pytest.mark.parametrize("peer", TRAINED)
def test_training(peer):
    *both, options = TRAINED[peer]
    curves = []
    for build in both:
        torch.manual_seed(0)
        curves.append(curve(build(**options), peer.startswith("pml")))
    assert_same_curve(*curves)


SCRIPTS = {
    "metric_learning": ("from pytorch_metric_learning import losses", "from hpcloss.compat import pml as losses"),
    "simclr": ("from lightly.loss import NTXentLoss", "from hpcloss.compat.lightly import NTXentLoss"),
    "reconstruction": ("from monai.losses import ContrastiveLoss", "from hpcloss.compat.monai import ContrastiveLoss"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_with_one_import_changed(script):
    """Training scripts on real images, written for the library, give the same loss curve with ours."""
    text, (theirs, ours) = (Path(__file__).parent / "peer_scripts" / f"{script}.py").read_text(), SCRIPTS[script]
    assert text.count(f"\n{theirs}\n") == 1
    curves = []
    for source in (text.replace(theirs, ours), text):
        names: dict = {}
        exec(compile(source, script, "exec"), names)
        curves.append(names["curve"])
    assert_same_curve(*curves)


X, Y, LABELS = rows(4, 3), rows(4, 3, seed=1), torch.tensor([0, 0, 1, 1])
REFUSED = {
    "pml, neither labels nor pairs": (pml.SupConLoss(), losses.SupConLoss(), (X,)),
    "pml, too few labels": (pml.NTXentLoss(), losses.NTXentLoss(), (X, LABELS[:3])),
    "pml, 3-D": (pml.SupConLoss(), losses.SupConLoss(), (X[:, None], LABELS)),
    "monai, 3-D": (monai.ContrastiveLoss(), ContrastiveLoss(), (X[None], Y[None])),
    "monai, shapes": (monai.ContrastiveLoss(), ContrastiveLoss(), (X, Y[:3])),
    "infonce, 3-D": (infonce.InfoNCE(), InfoNCE(), (X[None], Y)),
    "infonce, numbers": (infonce.InfoNCE(), InfoNCE(), (X, Y[:3])),
    "infonce, channels": (infonce.InfoNCE(), InfoNCE(), (X, Y[:, :2])),
    "infonce, unpaired": (infonce.InfoNCE(), InfoNCE(), (X, Y, Y[None])),
    "infonce, paired": (infonce.InfoNCE(negative_mode="paired"), InfoNCE(negative_mode="paired"), (X, Y, Y)),
    "infonce, reduction": (lambda *x: infonce.InfoNCE(reduction="all")(*x), InfoNCE(reduction="all"), (X, Y)),
    "lightly, temperature": (lambda: lightly.NTXentLoss(1e-9), lambda: NTXentLoss(1e-9), ()),
    "lightly, bank": (lambda: lightly.NTXentLoss(0.5, (5,)), lambda: NTXentLoss(0.5, (5,)), ()),
    "lightly, negative": (lambda: lightly.NTXentLoss(0.5, (-1, 2)), lambda: NTXentLoss(0.5, (-1, 2)), ()),
    "lightly, three": (lambda: lightly.NTXentLoss(0.5, (1, 2, 3)), lambda: NTXentLoss(0.5, (1, 2, 3)), ()),
}


@pytest.mark.parametrize("case", REFUSED)
def test_both_refuse(case):
    *both, arguments = REFUSED[case]
    for loss in both:
        with pytest.raises(ValueError):
            loss(*arguments)
