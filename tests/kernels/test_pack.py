"""Packing by Triton kernels: values, Jacobian, layouts, and what a dead row must never let through."""

import itertools
import math

import pytest
import torch

from hpcloss.operators import NORM_EPS, load
from hpcloss.primitives.rows import pack
from tests.tools import tf32
from tests.tools.cases import rows
from tests.tools.kernels import DEVICE, DTYPES, needs_kernels

pytestmark = needs_kernels

NAN, INF = float("nan"), float("inf")


def by_axes(x, *order):
    """The same map, laid out in memory with its axes in this order, outermost first."""
    return x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.dim())])


def last(x):
    return by_axes(x, 0, *range(2, x.dim()), 1)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": last,
    "channels first of all": lambda x: by_axes(x, 1, 0, *range(2, x.dim())),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "channels sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "channels last and sliced": lambda x: last(torch.cat([x, x], 1))[:, x.shape[1] :],
    "every other channel": lambda x: last(torch.stack([x, x], 2).flatten(1, 2))[:, ::2],
    "every other pixel": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2) * (x.dim() - 2))[(..., *(slice(1, -2),) * (x.dim() - 2))],
    "reversed axes": lambda x: by_axes(x, *reversed(range(x.dim()))),
}
SHAPES = [(3, 4, 5), (2, 4, 3, 5), (2, 16, 3, 5), (2, 3, 2, 3, 4), (2, 3, 2, 3, 2, 2), (12, 6), (1, 1, 1, 1)]


def exact(features, order, live, normalize):
    """The rows in float64, and the norms by which they were divided."""
    pixels = features.double().movedim(1, -1).reshape(-1, features.shape[1])[order.long()]
    alive = (torch.arange(order.numel(), device=order.device) < live)[:, None]
    pixels = torch.where(alive, pixels, 0.0)
    norm = torch.where(alive, torch.linalg.vector_norm(pixels.detach(), dim=1, keepdim=True), 0.0)
    if not normalize:
        return pixels, alive.double()
    short = norm <= NORM_EPS
    safe = torch.where(short, 1.0, pixels)
    safe = safe / torch.linalg.vector_norm(safe, dim=1, keepdim=True)
    return torch.where(short, 0.0, safe), torch.where(short, 0.0, 1 / norm)


def half_step(dtype):
    """Half of the distance of neighbouring numbers: of themselves, and below the smallest normal one."""
    limits = torch.finfo(dtype)
    return limits.eps / 2, limits.smallest_normal * limits.eps / 2


def check(features, order, live, normalize, permutation=False, upstream=None, slack=1e-6):
    """Rows and gradient against float64, entry by entry: what rounding the results costs, and `slack`."""
    features = features.detach().requires_grad_()
    before, order_before = features.detach().clone(), order.clone()
    packed = pack(
        features, order, torch.tensor([live], device=DEVICE), normalize=normalize, permutation=permutation,
        backend="triton",
    )  # fmt: skip
    expected, inverse_norm = exact(features, order, live, normalize)
    assert packed.data.is_contiguous() and packed.data.dtype == load("triton").rows_dtype(features, normalize)
    relative, absolute = half_step(packed.data.dtype)
    torch.testing.assert_close(packed.data.double(), expected.detach(), rtol=relative + slack, atol=absolute)
    assert (packed.data[live:] == 0).all()
    if upstream is None:
        upstream = rows(*expected.shape, seed=3, dtype=torch.float32).to(DEVICE)
    (grad,) = torch.autograd.grad(packed.companion, features, upstream)
    (wanted,) = torch.autograd.grad(expected, features, upstream.double())
    assert grad.dtype == features.dtype and grad.stride() == torch.empty_like(features).stride()
    assert torch.equal(features.detach(), before) and torch.equal(order, order_before)
    # The gradient is a difference of two parts as large as the upstream gradient over the norm.
    allowed = torch.zeros(features.numel() // features.shape[1], dtype=torch.float64, device=DEVICE)
    share = half_step(features.dtype)[0] + slack + (2 * relative if normalize else 0)
    size = upstream.double().norm(dim=1) * inverse_norm[:, 0] * share
    allowed = allowed.index_add(0, order[:live].long(), size[:live])[:, None]
    error = (grad.double() - wanted).movedim(1, -1).reshape(-1, features.shape[1]).abs()
    assert (error <= allowed + half_step(features.dtype)[1]).all(), (error - allowed).max()
    untouched = (allowed == 0).view(features.shape[0], 1, *features.shape[2:]).expand_as(grad)
    assert (grad[untouched] == 0).all()
    return packed.data, grad


def shapes_and_layouts(dtypes, on_gpu):
    """Every shape and layout in every way: normalised, permutation, dtype. On a GPU in one of the ways, by turns: each
    of all these makes kernels of its own."""
    ways = list(itertools.product((True, False), (True, False), dtypes))
    some = itertools.product(enumerate(SHAPES), enumerate(LAYOUTS))
    return [
        (shape, layout, *way)
        for (at, shape), (turn, layout) in some
        for way in ([ways[(at + turn) % len(ways)]] if on_gpu else ways)
    ]


def test_each_two_choices_meet_on_a_gpu():
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    everything, some = (shapes_and_layouts(dtypes, on_gpu) for on_gpu in (False, True))
    assert len(some) == len(SHAPES) * len(LAYOUTS) == len(everything) / 12
    for first, second in itertools.combinations(range(5), 2):
        assert {(case[first], case[second]) for case in some} == {(case[first], case[second]) for case in everything}


@pytest.mark.parametrize(
    "shape, layout, normalize, permutation, dtype", shapes_and_layouts(DTYPES, DEVICE.type == "cuda")
)
def test_rows_and_gradients(shape, layout, normalize, permutation, dtype):
    features = LAYOUTS[layout](rows(*shape, dtype=dtype)).to(DEVICE)
    count = features.numel() // shape[1]
    order = torch.randperm(count).to(DEVICE)
    check(features, order.int() if permutation else order, max(count - 2, 1), normalize, permutation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 31, 257])
@pytest.mark.parametrize("channels", [1, 7, 64, 100, 512])
def test_any_number_of_channels_and_rows(channels, count, dtype):
    """[1, D, N] reads along the pixels, [N, D] along the channels; both fill the last block of rows in part."""
    for features in (rows(1, channels, count, dtype=dtype), rows(count, channels, dtype=dtype)):
        check(features.to(DEVICE), torch.randperm(count, dtype=torch.int32).to(DEVICE), count, True, permutation=True)


@pytest.mark.parametrize("live", [0, 1, 33, 299, 300])
def test_live_rows_end_anywhere(live):
    order = torch.randperm(300).repeat_interleave(2).to(DEVICE)[::2]
    for permutation in (True, False):
        check(rows(3, 40, 100, dtype=torch.float32).to(DEVICE), order, live, True, permutation)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("first", [0, 4])
def test_a_part_of_the_pixels_and_repeated_dead_rows(first, normalize):
    """A sample names some pixels; its dead tail names pixel 0 again and again, which may be alive or not."""
    features = rows(2, 4, 3, 5, dtype=torch.float32).to(DEVICE)
    order = torch.tensor([7, first, 29, *[0] * 60], device=DEVICE)
    _, grad = check(features, order, 3, normalize)
    assert grad.movedim(1, -1).reshape(-1, 4).abs().sum(1).count_nonzero() == 3


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_the_gradient_of_rows_may_lie_anywhere(layout):
    features = LAYOUTS[layout](rows(2, 12, 3, 5, dtype=torch.float32)).to(DEVICE)
    order = torch.randperm(30).to(DEVICE)
    upstream = rows(30, 12, seed=3, dtype=torch.float32).to(DEVICE)
    anywhere = [
        upstream[:1, :1].expand(30, 12), upstream[:1].expand(30, 12), upstream[:, :1].expand(30, 12),
        upstream.T.contiguous().T, torch.cat([upstream, upstream], 1)[:, 12:], upstream.repeat_interleave(2, 0)[::2],
    ]  # fmt: skip
    for grad in anywhere:
        check(features, order, 28, True, permutation=True, upstream=grad)


@pytest.mark.parametrize("shape", [(3, 1, 2, 5), (1, 4, 1, 5), (1, 4, 2, 1)])
def test_an_expanded_leaf(shape):
    """One number in many places: its gradient is dense."""
    wide = [3, 4, 2, 5]
    features = rows(*shape, dtype=torch.float32).to(DEVICE).expand(wide)
    order = torch.randperm(30).to(DEVICE)
    for permutation in (True, False):
        check(features, order, 28, True, permutation)


def test_norms_far_from_one():
    features = torch.zeros(8, 512)
    features[0, [0, 2]] = torch.tensor([-3e30, -4e30])  # the square overflows fp32
    features[1, [0, 2]] = torch.tensor([3e-9, 4e-9])  # the square is below 1e-17
    features[2, [0, 2]] = torch.tensor([3e-30, 4e-30])  # no direction, nor has the zero row 3
    features[4, 2] = -1.1e-12
    features[5] = 0.9e-12 / 512**0.5  # no direction
    features[6] = 2.0**49.9  # the largest row whose squares are taken as they are
    features[7] = 3e38  # longer than the largest number, and the inverse of its norm below the smallest normal one
    for layout in (features, features.T.contiguous().T):
        layout, upstream = layout.to(DEVICE), torch.ones(8, 512, device=DEVICE)
        # slack: the interpreter adds 512 equal squares one after the other
        data, grad = check(layout, torch.arange(8, device=DEVICE), 8, True, upstream=upstream, slack=4e-6)
        assert (data[[2, 3, 5]] == 0).all() and (grad[[2, 3, 5]] == 0).all()
        assert ((data[[0, 1, 4, 6, 7]].double().norm(dim=1) - 1).abs() < 4e-6).all()
        assert (grad[[0, 1, 6]] != 0).any(1).all()


def test_half_precision_norms():
    """fp16 squares overflow at 256 and vanish below 2e-4."""
    features = torch.tensor([[3e4, 4e4], [3e-6, 4e-6], [6e-8, 0.0], [6e-8, 6e-8]], dtype=torch.float16, device=DEVICE)
    upstream = torch.tensor([[1e4, 0.0], [1e-2, 0.0], [1e-4, 1e-4], [1e-4, 0.0]], device=DEVICE)
    check(features, torch.arange(4, device=DEVICE), 4, True, upstream=upstream)


def test_gradients_below_the_smallest_half_are_computed_in_fp32():
    """As of a mean over many rows, of pixels short enough that the product is no small number."""
    features = (rows(8, 16) * 1e-4).half().to(DEVICE)
    upstream = rows(8, 16, seed=3, dtype=torch.float32).to(DEVICE) * 1e-6
    _, grad = check(features, torch.arange(8, device=DEVICE), 8, True, upstream=upstream)
    assert (grad != 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("poison", [NAN, INF])
def test_dead_rows_let_nothing_through(poison, normalize, layout):
    dead = torch.arange(40) % 3 == 1
    features = torch.where(dead.view(2, 1, 20), poison, rows(2, 4, 20, dtype=torch.float32))
    clean = torch.nan_to_num(features, nan=1.0, posinf=1.0)
    order = torch.cat([torch.arange(40)[~dead], torch.arange(40)[dead]])
    live, upstream = int((~dead).sum()), rows(40, 4, seed=3, dtype=torch.float32)
    upstream[live:] = poison  # and whatever arrives there stays
    for permutation in (True, False):
        results = []
        for x in (features, clean):
            x = LAYOUTS[layout](x).to(DEVICE).requires_grad_()
            packed = pack(
                x, order.to(DEVICE), torch.tensor(live, device=DEVICE), normalize=normalize, permutation=permutation,
                backend="triton",
            )  # fmt: skip
            (grad,) = torch.autograd.grad(packed.companion, x, upstream.to(DEVICE))
            results.append((packed.data, grad))
        (data, grad), (clean_data, clean_grad) = results
        assert torch.equal(data, clean_data) and (data[live:] == 0).all() and (data[:live] != 0).all()
        assert torch.equal(grad, clean_grad)
        assert ((grad != 0).cpu() == ~dead.view(2, 1, 20)).all()


@pytest.mark.parametrize("permutation", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_live_rows_do_not_hide_a_nan(poison, normalize, permutation):
    features = rows(3, 4, dtype=torch.float32)
    features[1, 2] = poison
    features = features.to(DEVICE).requires_grad_()
    packed = pack(
        features, torch.arange(3, device=DEVICE), normalize=normalize, permutation=permutation, backend="triton"
    )
    assert not packed.data[1].isfinite().all() and packed.data[[0, 2]].isfinite().all()
    assert packed.data[1].isnan().any() or not normalize
    (grad,) = torch.autograd.grad(packed.companion.sum(), features)
    assert grad[[0, 2]].isfinite().all() and grad[1].isnan().any() == normalize


def test_offsets_beyond_two_to_the_31st(tmp_path):
    """A view of a map so large that its second image begins there; the file has no blocks but those written."""
    start = 2**31 + 8
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2 * (start + 64))
    base = torch.from_file(str(path), shared=False, size=start + 64, dtype=torch.float16)
    if DEVICE.type == "cuda":
        base = torch.zeros_like(base, device=DEVICE)
    content = rows(2, 4, 5, dtype=torch.float16).to(DEVICE)
    for strides in ((start, 5, 1), (start, 1, 4), (1, 2, 2**29 - 1), (1, 2**29, 8)):
        features = base.as_strided(content.shape, strides)
        features.copy_(content)
        packed = pack(features, torch.arange(10, device=DEVICE), normalize=False, backend="triton")
        assert torch.equal(packed.data.float(), content.float().movedim(1, -1).reshape(10, 4))


def test_one_kernel_serves_every_size():
    """The constants of a launch depend on the kind of layout alone: nothing is compiled anew for N, H or W."""
    layout_of = load("triton.rows")._layout
    for layout in ("contiguous", "channels last", "cropped"):
        for channels in (64, 100, 7):
            shapes = [(2, channels, 3, 5), (4, channels, 8, 16), (3, channels, 7, 9)]
            maps = [LAYOUTS[layout](torch.empty(shape)) for shape in shapes]
            constants = [layout_of(x.shape, x.stride())[1] for x in maps]
            assert constants[0] == constants[1] == constants[2]
            assert constants[0]["C"] == (layout == "channels last")
            expected = math.gcd(channels, 16) if layout == "channels last" else 0
            assert constants[0]["TOGETHER"] == expected  # 16-byte accesses where channels lie together


def test_packing_runs_where_the_rest_runs():
    """The whole path: an operator that fits its fake, and the names that the backend has to have."""
    features = rows(2, 4, 3, 5, dtype=torch.float32).to(DEVICE)
    order, live = torch.randperm(30).to(DEVICE), torch.tensor([28], device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.hpcloss.pack, (features, order, live, True, "triton"), test_utils=checks)
    data, inverse_norm = torch.ops.hpcloss.pack(features, order, live, True, "triton")
    grad = torch.ones_like(data)
    for layout in LAYOUTS:
        stride = list(torch.empty_like(LAYOUTS[layout](features)).stride())
        arguments = (grad, data, inverse_norm, order, True, [2, 4, 3, 5], stride, torch.float32, True, "triton")
        torch.library.opcheck(torch.ops.hpcloss.pack_backward, arguments, test_utils=checks)


def test_rows_of_tf32_are_the_nearest(monkeypatch):
    """Bit for bit, so that a matrix unit cuts nothing off; infinities stay, and so does NaN, whatever its bits."""
    from hpcloss.backends.triton import configs

    monkeypatch.setattr(configs, "precision", lambda rows: "tf32")
    bits = torch.tensor(
        [0x3F800000, 0x3F801000, 0x3F800FFF, 0x3F803000, 0x00000FFF, 0x00001001, 0x7F7FE000, 0x007FF000]
    )
    bits = torch.cat([bits, torch.randint(0x7F7FE000, (4000,))])
    features = torch.cat([bits, bits | 1 << 31]).to(torch.int32).view(torch.float32).view(-1, 4).to(DEVICE)
    order = torch.arange(len(features), dtype=torch.int32, device=DEVICE)
    data = pack(features, order, normalize=False, backend="triton").data
    assert torch.equal(data.double().cpu(), tf32.rounded(features.cpu()))
    assert (data.view(torch.int32) & 0x1FFF == 0).all() and not torch.equal(data, features)
    ends = torch.tensor([0x7F800000, -0x800000, 0x7FFFFFFF, 0x7FC00000, -1, -0x400000], dtype=torch.int32)
    ends = ends.view(torch.float32).view(1, -1).to(DEVICE)
    data = pack(ends, order[:1], normalize=False, backend="triton").data
    assert torch.equal(data.isnan(), ends.isnan()) and torch.equal(data[:, :2], ends[:, :2])
    unit = rows(50, 7, dtype=torch.float32).to(DEVICE)
    data = pack(unit, order[:50], normalize=True, backend="triton").data
    assert (data.view(torch.int32) & 0x1FFF == 0).all()
    exact = torch.nn.functional.normalize(unit.double(), dim=1)
    torch.testing.assert_close(data.double(), exact, rtol=2.0**-11 + 1e-6, atol=0)


def test_rows_of_exact_products_keep_all_bits():
    """The default: fp32 products of fp32 rows."""
    unit = rows(50, 7, dtype=torch.float32).to(DEVICE)
    data = pack(unit, torch.arange(50, dtype=torch.int32, device=DEVICE), normalize=True, backend="triton").data
    assert (data.view(torch.int32) & 0x1FFF != 0).any()
