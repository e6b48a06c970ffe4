"""Modules hold hyper-parameters and nothing else: each must reach its function, be shown, and survive a copy."""

import copy
import inspect
import io
import math
import pickle
import re

import pytest
import torch
from torch import nn

import hpcloss
from hpcloss import functional
from hpcloss.backends import pytorch
from tests.tools.cases import ROOT, choice, rows
from tests.tools.losses import FAST, LOSSES, NAMES, ORACLE, Sizes

MODULES = {name: loss.module for name, loss in LOSSES.items()}
INPUTS = {name: tuple(loss.inputs(Sizes()).values()) for name, loss in LOSSES.items()}
CHANGED = {name: loss.changed for name, loss in LOSSES.items()}
X, LABELS = INPUTS["region_phpc"]
PROBS = INPUTS["entropy_guided_contrast"][1]
VECTORS, VIEWS = INPUTS["supcon"], INPUTS["ntxent"]
REDUCED = [name for name in MODULES if "reduction" in CHANGED[name]]
# Seen in tests of their own: they change no value, need another argument, or raise.
ELSEWHERE = {
    "samples_per_class",
    "detach_weights",
    "detach_keys",
    "check_labels",
    "backend",
    "learnable",
    "gather",
    "check_finite",
}


def call(name, **options):
    torch.manual_seed(0)
    return build(name, **options)(*INPUTS[name])


def build(name, **options):
    return LOSSES[name].build(**options)


def function(name, **options):
    torch.manual_seed(0)
    return FAST[name](*INPUTS[name], **{**LOSSES[name].required, **options})


def test_every_public_loss_is_tested():
    public = {name for name in hpcloss.__all__ if name.endswith("Loss")}
    assert {module.__name__ for module in MODULES.values()} == public
    assert set(MODULES) == set(NAMES) == {name[: -len("_loss")] for name in hpcloss.__all__ if name.endswith("_loss")}
    named = re.findall(r"^\| \[?`(\w+Loss)`", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert public <= set(named) and all(hasattr(hpcloss, name) for name in named)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_has_the_defaults_of_the_function(name):
    own, oracle = (inspect.signature(loss).parameters for loss in (FAST[name], ORACLE[name]))
    shared = {argument: oracle[argument].default for argument in own.keys() & oracle.keys()}
    assert "temperature" in shared and {argument: own[argument].default for argument in shared} == shared


@pytest.mark.parametrize("name", MODULES)
def test_every_hyper_parameter_is_tested(name):
    """A new argument needs its changed value above, the same default in module and function, and its documentation."""
    parameters = inspect.signature(MODULES[name].__init__).parameters
    arguments = set(parameters) - {"self"}
    assert arguments == set(CHANGED[name]) | (ELSEWHERE & arguments)
    own = inspect.signature(FAST[name]).parameters
    for argument in arguments - {"learnable"}:
        assert own[argument].default == parameters[argument].default, argument
    words = MODULES[name].__doc__ + (hpcloss.RegionPHPCLoss.__doc__ if name == "region_supcon" else "")
    assert all(argument in words for argument in arguments - {"return_stats"})


@pytest.mark.parametrize("name", MODULES)
def test_defaults(name):
    assert torch.equal(call(name), function(name))


@pytest.mark.parametrize("name,argument", [(name, argument) for name in MODULES for argument in CHANGED[name]])
def test_module_is_function_for_every_hyper_parameter(name, argument):
    options = {argument: CHANGED[name][argument]}
    if argument == "max_regions":
        options["region_size"] = 4
    changed = call(name, **options)
    assert torch.equal(changed, function(name, **options))
    plain = call(name, **{key: value for key, value in options.items() if key != argument})
    assert changed.shape == plain.shape and not torch.isclose(changed, plain, rtol=1e-6)
    kept = options[argument]
    if argument == "ignore_index" and isinstance(kept, int):
        kept = (kept,)  # labels are kept as the loss takes them
    assert getattr(build(name, **options), argument) == kept


@pytest.mark.parametrize("name", REDUCED)
def test_reduction_none_and_attributes_changed_later(name):
    module = build(name)
    module.reduction = "none"
    values = module(*INPUTS[name])
    assert values.dim() > 0 and torch.equal(values, function(name, reduction="none"))
    module.temperature = 0.9
    assert torch.equal(module(*INPUTS[name]), function(name, reduction="none", temperature=0.9))


@pytest.mark.parametrize("name", ["region_phpc", "region_supcon"])
def test_sampling_checking_and_statistics_reach_the_function(name):
    sampled = {"num_classes": 4, "samples_per_class": 2}
    assert torch.equal(call(name, **sampled), function(name, **sampled))
    assert not torch.isclose(call(name, **sampled), call(name))
    with pytest.raises(ValueError, match="got 3"):
        call(name, num_classes=3, check_labels=True)
    loss, stats = MODULES[name]()(*INPUTS[name], return_stats=True)
    expected, expected_stats = function(name, return_stats=True)
    assert torch.equal(loss, expected) and stats == expected_stats


def test_detach_weights_changes_the_gradient_alone():
    grads = []
    for detach in (True, False):
        x = X.clone().requires_grad_()
        loss = hpcloss.RegionPHPCLoss(detach_weights=detach)(x, LABELS)
        assert torch.equal(loss, function("region_phpc"))
        loss.backward()
        expected = X.clone().requires_grad_()
        FAST["region_phpc"](expected, LABELS, detach_weights=detach).backward()
        assert torch.equal(x.grad, expected.grad)
        grads.append(x.grad)
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("name", MODULES)
def test_backend_reaches_the_function(name):
    for backend in ("dense", "blockwise"):
        assert torch.equal(call(name, backend=backend), function(name, backend=backend))
    with pytest.raises(NotImplementedError, match="triton"):
        call(name, backend="triton")


def test_keys_negatives_and_groups_reach_the_function():
    x, y = VECTORS
    keys, key_labels = rows(30, 4, seed=5), choice([0, 1, 2], 30, seed=5)
    assert torch.equal(hpcloss.SupConLoss()(x, y, keys, key_labels), FAST["supcon"](x, y, keys, key_labels))
    assert torch.equal(hpcloss.InfoNCELoss()(*VIEWS, keys), FAST["infonce"](*VIEWS, keys))
    assert torch.equal(hpcloss.IHPCLoss()(*VIEWS, y), FAST["ihpc"](*VIEWS, y))
    assert not torch.isclose(hpcloss.IHPCLoss()(*VIEWS, y), FAST["ihpc"](*VIEWS))


# -------------------------------------------------------------------------------------------------------- published


def test_published_region_phpc():
    published = hpcloss.RegionPHPCLoss.published()
    assert (published.hardness, published.discount) == (0.0, 0.1)
    means = {"hardness": 0.0, "reduction": "region"}  # as the authors average
    assert torch.equal(published(X, LABELS), FAST["region_phpc"](X, LABELS, discount=0.1, **means))
    options = {"region_size": 4, "temperature": 0.3, "reduction": "class", "background": None}
    changed = hpcloss.RegionPHPCLoss.published(0.5, **options)
    assert torch.equal(changed(X, LABELS), FAST["region_phpc"](X, LABELS, hardness=0.0, discount=0.5, **options))
    assert not torch.isclose(published(X, LABELS), hpcloss.RegionPHPCLoss(**means)(X, LABELS), rtol=1e-6)
    for beta in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="beta must be a finite number of at least 0, got"):
            hpcloss.RegionPHPCLoss.published(beta)
    assert hpcloss.RegionPHPCLoss.published(hardness=2.0).hardness == 2.0
    with pytest.raises(ValueError, match="denominator must be 'own' with discount=0.1, got 'all'"):
        hpcloss.RegionPHPCLoss.published(denominator="all")
    assert type(published) is hpcloss.RegionPHPCLoss and "discount=0.1" in repr(published)


def test_published_ihpc():
    published = hpcloss.IHPCLoss.published()
    assert published.beta == 0.1 and torch.equal(published(*VIEWS), FAST["ihpc"](*VIEWS, beta=0.1))
    changed = hpcloss.IHPCLoss.published(0.6, temperature=0.2, reduction="sum")
    assert torch.equal(changed(*VIEWS), FAST["ihpc"](*VIEWS, beta=0.6, temperature=0.2, reduction="sum"))
    assert not torch.isclose(published(*VIEWS), hpcloss.IHPCLoss(hardness=0.0)(*VIEWS), rtol=1e-6)
    for beta in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"beta must be in \[0, 1\), got"):
            hpcloss.IHPCLoss.published(beta)
    assert "beta=0.1" in repr(published)


# ------------------------------------------------------------------------------------------------------ constructors


@pytest.mark.parametrize("name,options,message", [
    *((name, {"temperature": value}, f"temperature must be positive, got {value}")
      for name in MODULES for value in (0, -0.1, float("nan"), float("inf"))),
    *((name, {"temperature": torch.ones(2)}, r"temperature must be one number, got a tensor of shape \(2,\)")
      for name in MODULES),
    *((name, {"reduction": "average"}, "reduction must be one of 'mean'.*got 'average'") for name in REDUCED),
    *((name, {"reduction": "region"}, "reduction must be one of") for name in ("supcon", "ntxent", "infonce", "ihpc")),
    *((name, {"reduction": "class"}, "reduction must be one of")
      for name in ("ntxent", "infonce", "ihpc", "hard_negative_nce")),
    *(("hard_negative_nce", {"beta": value}, f"beta must be a finite number of at least 0, got {value}")
      for value in (-0.1, float("inf"), float("nan"))),
    *(("hard_negative_nce", {"tau_plus": value}, rf"tau_plus must be in \[0, 1\), got {value}")
      for value in (-0.1, 1.0, float("nan"))),
    *((name, {"hardness": value}, f"hardness must be a finite number, got {value}")
      for name in ("region_phpc", "ihpc") for value in (float("inf"), float("nan"))),
    ("supcon", {"form": "both"}, "form must be one of 'out', 'in', got 'both'"),
    *((name, options, message) for name in ("region_phpc", "region_supcon") for options, message in (
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"max_regions": 0}, "max_regions must be at least 1, got 0"),
        ({"samples_per_class": 0, "num_classes": 2}, "samples_per_class must be at least 1, got 0"),
        ({"samples_per_class": 4}, "num_classes must be given with samples_per_class=4, got None"),
        ({"region_size": 0}, "region_size must be at least 1 on every axis, got 0"),
        ({"region_size": (4, 0)}, r"region_size must be at least 1 on every axis, got \(4, 0\)"),
        ({"ignore_index": (0, 255)}, r"background must not be in ignore_index \(0, 255\), got 0"),
        ({"background": 255}, r"background must not be in ignore_index \(.*255\), got 255"),
    )),
    ("region_phpc", {"denominator": "both"}, "denominator must be one of 'own', 'all', 'negatives', got 'both'"),
    ("region_phpc", {"local_size": 0}, "local_size must be at least 1 on every axis, got 0"),
    ("region_phpc", {"local_size": 3}, "local_size must divide region_size 16 on every axis, got 3"),
    ("region_phpc", {"region_size": (8, 6), "local_size": 4}, "local_size must divide region_size"),
    ("region_phpc", {"region_size": 8, "local_size": (4, 3)}, "local_size must divide region_size"),
    ("region_phpc", {"region_size": 4, "local_size": 8}, "local_size must divide region_size"),
    ("region_phpc", {"region_size": None, "local_size": 4}, "region_size must be given with local_size=4, got None"),
])  # fmt: skip
def test_bad_hyper_parameters_raise_at_construction(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)
    with pytest.raises(ValueError, match=message):
        function(name, **options)


# ------------------------------------------------------------------------------------------------- the default dtype


def under(dtype, function):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(5)
        return function()
    finally:
        torch.set_default_dtype(before)


def same(found, expected):
    """Tensors, or structures of them, of the same dtypes and bits."""
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        found, expected = list(found.items()), list(expected.items())
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_the_default_dtype_changes_no_bit(name, inputs, dtype):
    """Of values, gradients, samples and statistics; memory banks and learnt temperatures are float32."""
    first, *rest = (x.to(inputs) if x.is_floating_point() else x for x in INPUTS[name])
    stats = {"return_stats": True} if name.startswith("region") else {}

    def step():
        results = []
        for options in ({}, LOSSES[name].sampled):
            module = build(name, **options)
            for _ in range(2):
                x = first.clone().requires_grad_()
                result = module(x, *rest, **stats)
                value = result[0] if stats else result
                results += [result, torch.autograd.grad(value, x), module.state_dict()]
        return results

    assert same(under(dtype, step), under(torch.float32, step))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float32, torch.float64])
def test_the_default_dtype_changes_no_bit_of_what_goes_with_the_losses(inputs, dtype):
    x, labels, probs = X.to(inputs), LABELS, PROBS.to(inputs)
    vectors, classes = x.movedim(1, -1).reshape(-1, 4), labels.reshape(-1)

    def step():
        queue, bank = hpcloss.EmbeddingQueue(4, 5, 4), hpcloss.PrototypeBank(4, 4, 0.9, 2)
        results = []
        for _ in range(2):
            queue.enqueue(x, labels, samples_per_class=2)
            queue.enqueue_means(x, labels)
            bank.update(vectors, classes)
            results += [queue.state_dict(), bank.state_dict()]
            results.append(hpcloss.pixel_contrast_loss(x, labels, None, queue, num_classes=4, samples_per_class=2))
            results.append(hpcloss.prototype_assignment_loss(x, labels, bank.prototypes))
        pairs = torch.zeros(96, dtype=torch.int64), torch.full((96,), 96), torch.arange(96)
        return [
            *results,
            hpcloss.layer_prototypes(x, labels, labels, 4, 4, probs),
            hpcloss.sinkhorn(x.flatten(2).transpose(1, 2)),
            hpcloss.sample_anchors(labels, 3, num_classes=4, weights=probs[:, 0]),
            hpcloss.sample_anchors(labels, 3, num_classes=4, scores=probs[:, 0]),
            hpcloss.sample_anchors(labels, 3, num_classes=4),
            hpcloss.sample_positives(*pairs, 3),
        ]

    assert same(under(dtype, step), under(torch.float32, step))


# ----------------------------------------------------------------------------------------- what any module must do


def make(name):
    """Each module away from its defaults."""
    extra = {"learnable": True} if name == "infonce" else {}
    return build(name, temperature=0.25, **({"reduction": "sum"} if name in REDUCED else {}), **extra)


@pytest.mark.parametrize("name", MODULES)
def test_repr_names_every_hyper_parameter(name):
    text = repr(make(name))
    assert text.startswith(MODULES[name].__name__) and "0.25" in text
    assert name not in REDUCED or "reduction='sum'" in text
    for argument in set(inspect.signature(MODULES[name].__init__).parameters) - {"self"}:
        assert f"{argument}=" in text


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(name, clone):
    module = make(name)
    value = module(*INPUTS[name])
    other = clone(module)
    assert repr(other) == repr(module) and other.state_dict().keys() == module.state_dict().keys()
    assert torch.equal(other(*INPUTS[name]), module(*INPUTS[name]))
    assert value.isfinite()


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_round_trip(name):
    module, other = make(name), make(name)
    module(*INPUTS[name])
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(module(*INPUTS[name]), other(*INPUTS[name]))
    assert set(module.state_dict()) == ({"log_scale"} if name == "infonce" else set())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own compiler
@pytest.mark.parametrize("name", MODULES)
def test_the_function_compiles_without_a_graph_break(name, monkeypatch):
    """With the check of its options, which a module has behind it. Compiled code takes the tiles."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: function_of(name, *inputs), fullgraph=True, backend="eager")
    torch.manual_seed(0)
    value = compiled(*INPUTS[name])
    torch.manual_seed(0)
    monkeypatch.setattr(pytorch, "choose", lambda *_: "blockwise")
    assert torch.equal(value, function_of(name, *INPUTS[name]))


def function_of(name, *inputs):
    return FAST[name](*inputs, **LOSSES[name].required)


@pytest.mark.parametrize("name", MODULES)
def test_a_temperature_can_be_learnt(name):
    temperature = nn.Parameter(torch.tensor(0.25))
    module = build(name, temperature=temperature)
    assert list(module.parameters())[0] is temperature
    loss = module(*INPUTS[name])
    torch.testing.assert_close(loss.detach(), function(name, temperature=0.25), rtol=1e-6, atol=1e-7)
    loss.backward()
    assert temperature.grad.abs() > 0
    assert torch.equal(copy.deepcopy(module)(*INPUTS[name]), loss)


def test_learnable_temperature_of_infonce():
    module = hpcloss.InfoNCELoss(0.07, learnable=True)
    assert module.log_scale.exp().item() == pytest.approx(1 / 0.07) and len(list(module.parameters())) == 1
    torch.testing.assert_close(module(*VIEWS), FAST["infonce"](*VIEWS, temperature=0.07), rtol=1e-5, atol=1e-6)
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    before = module(*VIEWS)
    before.backward()
    optimiser.step()
    assert module(*VIEWS) < before
    assert not list(hpcloss.InfoNCELoss(0.07).parameters()) and hpcloss.InfoNCELoss(0.07).temperature == 0.07
    assert hpcloss.InfoNCELoss(torch.tensor(0.5), learnable=True).log_scale.exp().item() == pytest.approx(2.0)
    assert module.temperature.item() == pytest.approx(1 / module.log_scale.exp().item())  # not the starting value


@pytest.mark.parametrize("value", [0.2, torch.tensor(0.2), nn.Parameter(torch.tensor(0.2))])
def test_a_learnable_temperature_that_is_set_later(value):
    """It takes effect, as an attribute of any loss does, and is learnt on from there."""
    module = hpcloss.InfoNCELoss(0.07, learnable=True)
    parameter = module.log_scale
    module.temperature = value
    assert module.log_scale is parameter and parameter.requires_grad and "temperature" not in vars(module)
    loss = module(*VIEWS)
    torch.testing.assert_close(loss, FAST["infonce"](*VIEWS, temperature=0.2), rtol=1e-6, atol=1e-7)
    loss.backward()
    assert parameter.grad.abs() > 0
    assert copy.deepcopy(module).log_scale.exp().item() == pytest.approx(5.0)
    plain = hpcloss.InfoNCELoss(0.07)
    plain.temperature = 0.2
    torch.testing.assert_close(plain(*VIEWS), loss.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, torch.tensor(-0.2), "0.2", True, None])
def test_a_learnable_temperature_that_means_nothing(value):
    module = hpcloss.InfoNCELoss(0.07, learnable=True)
    with pytest.raises((TypeError, ValueError), match="temperature"):
        module.temperature = value
    assert module.log_scale.exp().item() == pytest.approx(1 / 0.07)


def test_modules_are_plain():
    """No state but the memory bank, no parameter but a learnt temperature, no hidden mode."""
    for name, module in MODULES.items():
        assert issubclass(module, nn.Module)
        assert not list(build(name).parameters()) and not list(build(name).buffers())
        assert torch.equal(build(name).eval()(*INPUTS[name]), build(name).train()(*INPUTS[name]))
        assert build(name).double().half().cpu()(*INPUTS[name]).dtype == torch.float64


def test_functions_and_modules_are_both_public():
    for name, module in MODULES.items():
        assert getattr(hpcloss, f"{name}_loss") is getattr(functional, f"{name}_loss") is FAST[name]
        assert module.__name__ in hpcloss.__all__ and f"{name}_loss" in hpcloss.__all__


@pytest.mark.parametrize("name", MODULES)
def test_tensors_of_monai(name):
    """MetaTensor is what its loaders hand over; its methods take other arguments, and every result of it is one."""
    meta = pytest.importorskip("monai.data").MetaTensor
    plain = [value.clone() if torch.is_tensor(value) else value for value in INPUTS[name]]
    wrapped = [meta(value) if torch.is_tensor(value) else value for value in plain]
    for inputs in (plain, wrapped):
        inputs[0].requires_grad_()
    torch.manual_seed(0)
    expected = build(name)(*plain)
    torch.manual_seed(0)
    value = build(name)(*wrapped)
    assert type(value) is torch.Tensor and torch.equal(value, expected)
    expected.backward()
    value.backward()
    assert torch.equal(wrapped[0].grad.as_subclass(torch.Tensor), plain[0].grad)


def test_a_learnt_temperature_is_read_and_scaled():
    loss = hpcloss.InfoNCELoss(0.2, learnable=True)
    assert loss.temperature.item() == pytest.approx(0.2) and loss.temperature.requires_grad
    loss.temperature *= 0.5
    assert loss.temperature.item() == pytest.approx(0.1)
    with pytest.raises(AttributeError, match="nothing"):
        loss.nothing  # noqa: B018
