"""The contrast in plain PyTorch, and the native library watched: for tests of what computes rows in fp32."""

from collections import Counter

import torch

from hpcloss.backends import library
from hpcloss.plan.partition import partition, two_by_two
from hpcloss.primitives.contrast import contrast
from hpcloss.primitives.scale import Scale
from tests.tools.cases import choice, rows
from tests.tools.plans import PLANS, Plan, allowed, as_rows, inputs

FORMS = [
    {"denominator": "all"},
    {"denominator": "all", "hardness": 1.5, "multiplicity": 3},
    {"denominator": "all", "hardness": -2.0, "detach_weights": False},
    {"denominator": "negatives"},
    {"denominator": "negatives", "hardness": -1.5, "multiplicity": 2},
    {"denominator": "negatives", "hardness": 1.5, "detach_weights": False, "multiplicity": 4},
    {"denominator": "own"},
    {"denominator": "own", "hardness": 1.5, "multiplicity": 2},
    {"denominator": "own", "hardness": -3.0, "detach_weights": False},
    {"denominator": "own", "discount": 0.3},
    {"denominator": "own", "discount": 0.3, "hardness": 1.0, "detach_weights": False},
]
PAIR = {"denominator": "pair"}
UPSTREAMS = 4  # gradients that come in, for the gradient of the scale
PAIRED = ("one to one", "paired", "paired, some without", "one image")  # plans with one positive at most
FUNCTIONS = (
    "add_transpose", "contrast", "lse", "lse_both_slopes", "lse_columns", "lse_slopes", "pack", "unpack",
)  # fmt: skip


SCALES = (3.0, 0.5, -2.0, 90.0)
DENSE = ("dense", "dense, slopes made again", "dense, without the library")  # how the dense backend runs


def serves(schedule, plan):
    """Whether the schedule has the library compute the plan: where there is a pair."""
    at = plan.pairs.intervals
    regions = [(a1 - a0) * (k1 - k0) for a0, a1, k0, k1 in zip(*(bound.tolist() for bound in at[3:]), strict=True)]
    return schedule != "dense, without the library" and any(regions)


def equal_regions(other_keys):
    """Regions of one shape, one behind the other: the library takes them in one call."""
    pairs = partition(choice([0, 1, 1, 2], 48), torch.arange(48) // 8, 6)
    if not other_keys:
        return Plan(pairs, None)
    return Plan(pairs.replace(self_pos=torch.full_like(pairs.intervals.self_pos, -1)), 48)


EVERY_PLAN = PLANS | {
    "equal regions": lambda: equal_regions(False),
    "equal regions, other keys": lambda: equal_regions(True),
    "one image": lambda: Plan(two_by_two(1, torch.device("cpu")), None),  # two views of it, and no negative
}


class Calls(Counter):
    """How often each function of floats of the library was called; `arguments` of each call by name."""

    def __init__(self):
        super().__init__()
        self.arguments = {name: [] for name in FUNCTIONS}


def watched(monkeypatch):
    """The calls of the library's functions of floats from now on."""
    calls = Calls()

    def watch(name):
        function = getattr(library, name)

        def call(*arguments):
            calls[name] += 1
            calls.arguments[name].append(arguments)
            return function(*arguments)

        monkeypatch.setattr(library, name, call)

    for name in FUNCTIONS:
        watch(name)
    return calls


def plain_contrast(
    anchors, keys, plan, scale, denominator, hardness=0.0, discount=0.0, detach_weights=True, multiplicity=1
):
    """Losses and which are counted, from the equations of `contrast`. A pair is against all, with its one positive."""
    positives, negatives = allowed(plan, "positives"), allowed(plan, "negatives")
    counted = positives.any(1) & (negatives.any(1) | (denominator in ("all", "pair")))
    own, others = positives[counted], negatives[counted]
    similarity = anchors[counted] @ (anchors if keys is None else keys).T
    logits = scale * similarity
    against = torch.where(others | own if denominator in ("all", "pair") else others, logits, -torch.inf)
    lse = torch.logsumexp(against, 1, keepdim=True) + torch.tensor(multiplicity).to(logits).log()
    exponent = -hardness * similarity
    weights = torch.softmax(torch.where(own, exponent.detach() if detach_weights else exponent, -torch.inf), 1)
    if denominator == "own":
        lse = torch.logaddexp(logits - discount * similarity, lse)
    losses = logits.new_zeros(len(counted))
    return losses.index_put((counted,), (weights * (lse - logits)).sum(1)), counted


def fast_contrast(backend):
    """`contrast` of a backend, as `plain_contrast`."""

    def call(anchors, keys, plan, scale, **form):
        sides = as_rows(anchors, backend), as_rows(keys, backend)
        return contrast(sides[0], plan.pairs, scale=Scale(scale), keys=sides[1], **form)

    return call


def losses_and_gradients(call, plan, form, value, dtype, same_upstream=False):
    """Losses, which are counted, and the gradients of anchors, keys and scale for inputs that fp32 holds.

    The scale's are of several upstream gradients: a single sum over all rows may cancel, and its error mean nothing.
    """
    leaves = [None if x is None else x.detach().float().to(dtype).requires_grad_() for x in inputs(plan)]
    scale, sides = torch.tensor(value).to(dtype).requires_grad_(), [x for x in leaves if x is not None]
    losses, counted = call(*leaves, plan, scale, **form)
    upstream = rows(UPSTREAMS, *losses.shape, seed=99).float().to(dtype)
    if same_upstream:
        upstream = upstream[:, :1].expand_as(upstream)
    found = [torch.autograd.grad(losses, [*sides, scale], one, retain_graph=True) for one in upstream]
    return losses.detach(), counted, (*found[0][:-1], torch.stack([grads[-1] for grads in found]))
