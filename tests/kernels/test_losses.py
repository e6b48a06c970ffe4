"""One loss of each shape on the kernels, compiled too, and what a process may be set to."""

import functools
from unittest import mock

import pytest
import torch

import hpcloss
from hpcloss.losses.image import UNFILLED
from tests.tools.cases import choice, integers, rows
from tests.tools.kernels import DEVICE, DTYPES, needs_kernels
from tests.tools.losses import FAST, ORACLE
from tests.tools.numerics import assert_within_budget
from tests.tools.problems import OPS, Problem

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:.*deterministic implementation"),
    # A GPU says nothing: what does not count may overflow before it is masked.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


# -------------------------------------------------------------------------------------------------------- whole losses


def _map(dtype):
    return [rows(2, 6, 8, 7, dtype=dtype)], [choice([0, 1, 1, 2, 255], 2, 8, 7)]


def _vectors(dtype, count=1, labelled=True):
    vectors = [rows(21 + 3 * i, 6, seed=i, dtype=dtype) for i in range(count)]
    labels = [choice([0, 1, 1, 2, -1], len(x), seed=i) for i, x in enumerate(vectors)]
    return vectors, labels if labelled else []


def _views(dtype, count=2):
    return [rows(19, 6, seed=i, dtype=dtype) for i in range(count)], []


def _keys(loss):
    return lambda x, k, labels, key_labels, **options: loss(x, labels, k, key_labels, **options)


def _bank(loss):
    def call(a, b, bank, **options):
        return loss(a, b, integers(4, 19).to(a.device), bank=bank.detach(),
                    bank_groups=choice([0, 1, 9, UNFILLED], len(bank)).to(a.device), **options)  # fmt: skip

    return call


def _plain(loss):
    return loss


# loss, inputs, how it takes them, options; "learnt" stands for a temperature with a gradient
LOSSES = {
    "phpc": ("region_phpc", _map, _plain, {"region_size": 4}),
    "phpc, hardness 0": ("region_phpc", _map, _plain, {"region_size": (4, 3), "hardness": 0.0, "reduction": "region"}),
    "phpc, weights": ("region_phpc", _map, _plain,
                      {"region_size": 4, "detach_weights": False, "discount": 0.4, "learnt": 0.2}),
    "phpc, all": ("region_phpc", _map, _plain, {"region_size": None, "denominator": "all", "background": None}),
    "phpc, negatives": ("region_phpc", _map, _plain,
                        {"region_size": 4, "denominator": "negatives", "hardness": -20.0, "per_image": True}),
    "phpc, local": ("region_phpc", _map, _plain, {"region_size": 4, "local_size": (2, 4), "temperature": 0.07}),
    "phpc, raw": ("region_phpc", _map, _plain, {"region_size": 4, "normalize": False, "temperature": 1.0}),
    "region supcon": ("region_supcon", _map, _plain, {"region_size": 4, "learnt": 0.1}),
    "supcon": ("supcon", _vectors, _plain, {"temperature": 0.07}),
    "supcon, in": ("supcon", _vectors, _plain, {"form": "in", "learnt": 0.1}),
    "supcon, keys": ("supcon", lambda dtype: _vectors(dtype, 2), _keys, {"learnt": 0.1}),
    "supcon, in, keys": ("supcon", lambda dtype: _vectors(dtype, 2), _keys, {"form": "in"}),
    "ntxent": ("ntxent", _views, _plain, {}),
    "hard negatives": ("hard_negative_nce", _views, _plain, {}),
    "infonce": ("infonce", _views, _plain, {"learnt": 0.1}),
    "infonce, symmetric": ("infonce", _views, _plain, {"symmetric": True, "learnt": 0.1}),
    "infonce, negatives": ("infonce", lambda dtype: _views(dtype, 3), _plain, {}),
    "ihpc": ("ihpc", _views, _plain, {"hardness": 2.0, "learnt": 0.3}),
    "ihpc, bank": ("ihpc", lambda dtype: _views(dtype, 3), _bank, {}),
}  # fmt: skip


def value_and_grads(call, inputs, dtype, device, options):
    """Loss and gradients of the features, and of a temperature that is learnt."""
    vectors, labels = inputs
    leaves = [x.to(device, dtype).requires_grad_() for x in vectors]
    options = dict(options)
    wanted = leaves[: -1 if "bank" in call.__qualname__ else None]
    if "learnt" in options:
        options["temperature"] = torch.tensor(options.pop("learnt"), device=device).to(dtype).requires_grad_()
        wanted = [*wanted, options["temperature"]]
    value = call(*leaves, *[x.to(device) for x in labels], **options)
    return value.detach(), torch.autograd.grad(value, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES, ids=[f"{name} ({case[0]})" for name, case in LOSSES.items()])
def test_losses(name, dtype):
    """Against blockwise in float64, which other tests prove."""
    loss, make, how, options = LOSSES[name]
    if dtype != torch.float32 and not options.get("normalize", True):
        pytest.skip("raw rows may be packed in a dtype coarser than theirs")
    inputs = make(dtype)
    value, grads = value_and_grads(how(FAST[loss]), inputs, dtype, DEVICE, options | {"backend": "triton"})
    exact, exact_grads = value_and_grads(
        how(FAST[loss]), inputs, torch.float64, "cpu", options | {"backend": "blockwise"}
    )
    plain, plain_grads = value_and_grads(how(ORACLE[loss]), inputs, dtype, "cpu", options)
    assert value.dtype == torch.float32 and exact.abs() > 0
    assert_within_budget(value, plain, exact, "loss")
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        assert_within_budget(grad, plain_grad, exact_grad, "grad")


def modules():
    (x,), (labels,) = _map(torch.float32)
    a, b = _views(torch.float32)[0]
    return {
        "phpc": (hpcloss.RegionPHPCLoss(4, backend="triton"), (x, labels)),
        "phpc, classes": (
            hpcloss.RegionPHPCLoss(4, num_classes=3, detach_weights=False, backend="triton"), (x.half(), labels)
        ),
        "infonce": (hpcloss.InfoNCELoss(learnable=True, backend="triton"), (a, b)),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", modules())
def test_compile_without_a_graph_break(name):
    module, inputs = modules()[name]
    module, inputs = module.to(DEVICE), [x.to(DEVICE) for x in inputs]
    results = []
    torch._dynamo.reset()
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        loss = call(*leaves)
        wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
        results.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- what a process may be set to


def unit_rows(*shape, seed=0, dtype=torch.float32):
    return torch.nn.functional.normalize(rows(*shape, seed=seed), dim=1).to(DEVICE, dtype)


def gradient(function, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def test_the_default_dtype_changes_nothing():
    """Half precision as default would hold no lift beyond 65504."""
    labels = choice([0, 1, 2], 64).to(DEVICE)
    function = functools.partial(FAST["supcon"], labels=labels, backend="triton")
    x = unit_rows(64, 7, dtype=torch.float16)
    expected = gradient(lambda x: function(x) / 1024, x)
    torch.set_default_dtype(torch.float16)
    try:
        actual = gradient(lambda x: function(x) / 1024, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, expected)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has one setting alone"
)
def test_either_setting_of_fp32_products():
    from hpcloss.backends.triton import configs

    x = torch.zeros(1, 4)
    with (
        mock.patch.object(configs, "capability", lambda device: 90),
        mock.patch.object(configs, "interpreted", lambda: False),
    ):
        assert configs.precision(x) == "ieee" and configs.precision(x.half()) == "half"
        before = torch.backends.cuda.matmul.fp32_precision
        try:
            torch.backends.cuda.matmul.fp32_precision = "tf32"  # now `torch.get_float32_matmul_precision` raises
            assert configs.precision(x) == "tf32" and configs.precision(x.half()) == "half"
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_two_dtypes(dtypes):
    """Both sides are multiplied in the dtype of the queries."""
    x, y = unit_rows(20, 7, dtype=dtypes[0]), unit_rows(20, 7, seed=1, dtype=dtypes[1])
    for options in ({}, {"symmetric": True}):
        value = functools.partial(FAST["infonce"], temperature=0.5, **options)
        for of_x in (True, False):
            pair = (lambda z, cast: (z, cast(y))) if of_x else (lambda z, cast: (cast(x), z))
            side = x if of_x else y
            actual = gradient(lambda z: value(*pair(z, lambda other: other), backend="triton"), side)  # noqa: B023
            exact = gradient(lambda z: value(*pair(z, torch.Tensor.double)), side.double())  # noqa: B023
            torch.testing.assert_close(actual.double(), exact, rtol=0, atol=3e-3 * exact.abs().max().item())
    with pytest.raises(NotImplementedError, match="float64 needs backend 'blockwise'"):
        FAST["infonce"](x, y.double(), backend="triton")


def test_vectors_of_any_stride_and_dtype():
    problem = Problem("self", torch.float32)
    x, at = problem.anchors.to(DEVICE), list(problem.pairs.intervals)
    scale, n = torch.tensor(2.0, device=DEVICE), problem.count
    for vector in (rows(n, 2, dtype=torch.float32)[:, 0], rows(1, dtype=torch.float32).expand(n), rows(n)):
        vector = vector.to(DEVICE)
        plain = vector.float().contiguous()
        for some in (vector, plain):
            lse = OPS.pair_lse(x, None, some, scale.to(some.dtype), None, at, "others", "triton")
            mean = OPS.pair_mean(x, None, some, some, scale.to(some.dtype), None, 1.0, 0.0, at, "triton")
            if some is vector:
                first = (lse, *mean)
        assert all(torch.equal(a, b) for a, b in zip(first, (lse, *mean)))


@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")  # a GPU says nothing
@pytest.mark.parametrize("hardness", [0.0, 1.0])
def test_nan_among_positives(hardness):
    """It shows in the loss of every anchor that meets it."""
    features = rows(1, 16, 6, 6, dtype=torch.float32).to(DEVICE)
    features[0, :, 2, 3] = torch.nan
    labels = torch.ones(1, 6, 6, dtype=torch.int64, device=DEVICE)
    options = {"denominator": "all", "hardness": hardness, "reduction": "none", "backend": "triton"}
    assert hpcloss.region_phpc_loss(features, labels, **options).isnan().all()
