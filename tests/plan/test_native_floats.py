"""The library's functions of floats at their C interface: arguments that are refused, and intervals of any kind.

The sanitizers run these as well: what reads or writes beyond an array shows there.
"""

import ctypes
import itertools

import pytest
import torch

from hpcloss.backends import library
from hpcloss.plan import native
from tests.tools.cases import rows

pytestmark = pytest.mark.skipif(bool(native.why_not("cpu")), reason=native.why_not("cpu"))

N, M = 6, 5
NULL, SIZE, TYPE, PIXEL, MEMORY = 1, 2, 3, 5, 7
FAR = (-(2**63), -1, 0, 3, 2**63 - 1)  # bounds of intervals before, in and behind the keys


def raw(name, *arguments):
    """The error code of a function of the library. It copies what it is told of its arguments."""
    return getattr(library._library(), f"hpcloss_{name}")(*arguments)


def pointers(*tensors):
    return [tensor.data_ptr() for tensor in tensors]


class Arguments:
    """Arrays for N rows of M keys, in one region, and right arguments of each function by name."""

    def __init__(self, dtype=torch.int64, positives=(1, 3), own=0, first_key=0):
        self.logits, self.more = rows(N, M, dtype=torch.float32), rows(N, M, seed=1, dtype=torch.float32)
        self.bounds = [torch.full((N,), value, dtype=dtype) for value in (*positives, own)]
        self.of_rows = [torch.zeros(N) for _ in range(4)]
        self.of_keys = [torch.zeros(M) for _ in range(2)]
        self.counted, self.square = torch.zeros(N, dtype=torch.bool), torch.zeros(N, N)
        self.order, self.one = torch.arange(N).to(dtype), torch.ones(1)
        self.options = library.contrast_options("own", False, 0.0, 0.0, 0.0)
        self.kind = native.TYPES[dtype]
        self.rows = library.Rows(N, N, M, first_key, *pointers(*self.bounds), self.kind)
        of_vectors = library._map(torch.Size([N, M]), (M, 1, 1))
        self.map = type(of_vectors).from_buffer_copy(of_vectors)  # the library keeps its own
        self.packed, self.both = torch.zeros(N, M), torch.zeros(N, N)

    def of(self, name):
        logits, at, (one, *_) = self.logits.data_ptr(), ctypes.addressof(self.rows), pointers(self.one)
        a, b, c, d = pointers(*self.of_rows)
        of_keys, packed = pointers(*self.of_keys), self.packed.data_ptr()
        order, fields = self.order.data_ptr(), ctypes.addressof(self.map)
        return {
            "contrast": [
                logits, N, N, M, self.rows.first_key, *pointers(*self.bounds), self.kind,
                ctypes.addressof(self.options), 1, a, self.counted.data_ptr(), b, 1,
            ],
            "add_transpose": [self.square.data_ptr(), N, a, self.both.data_ptr(), 1],
            "lse": [logits, at, 1, one, 1, a, 1],
            "lse_slopes": [logits, at, 1, one, 1, a, b, 1],
            "lse_columns": [logits, at, 3, of_keys[0]],
            "lse_both_slopes": [logits, at, 3, a, b, *of_keys, 1],
            "pack": [self.more.data_ptr(), fields, order, self.kind, N, N, 1, packed, a, 1],
            "unpack": [self.more.data_ptr(), packed, a, fields, order, self.kind, N, 1, logits, 1],
        }[name]  # fmt: skip


# By position in the C header: a value that is refused, and the error.
WRONG = {
    "contrast": {
        0: (None, NULL), 1: (-1, SIZE), 2: (0, SIZE), 3: (-1, SIZE), 4: (-1, SIZE), 5: (None, NULL), 6: (None, NULL),
        7: (None, NULL), 8: (0, TYPE), 9: (None, NULL), 11: (None, NULL), 12: (None, NULL), 13: (None, 0),
    },
    "add_transpose": {0: (None, NULL), 1: (-1, SIZE), 2: (None, NULL), 3: (None, NULL)},
    "lse": {0: (None, NULL), 1: (None, NULL), 2: (4, TYPE), 3: (None, NULL), 4: (0, SIZE), 5: (None, NULL)},
    "lse_slopes": {
        0: (None, NULL), 1: (None, NULL), 2: (-1, TYPE), 3: (None, NULL), 4: (0, SIZE), 5: (None, NULL),
        6: (None, NULL),
    },
    "lse_columns": {0: (None, NULL), 1: (None, NULL), 2: (4, TYPE), 3: (None, NULL)},
    "lse_both_slopes": {
        0: (None, NULL), 1: (None, NULL), 2: (4, TYPE), 3: (None, NULL), 4: (None, NULL), 5: (None, NULL),
        6: (None, NULL),
    },
    "pack": {
        0: (None, NULL), 1: (None, NULL), 2: (None, NULL), 3: (0, TYPE), 4: (-1, SIZE), 5: (-3, 0), 7: (None, NULL),
        8: (None, NULL),
    },
    "unpack": {
        0: (None, NULL), 1: (None, NULL), 2: (None, NULL), 3: (None, NULL), 4: (None, NULL), 5: (0, TYPE),
        6: (-1, SIZE), 8: (None, NULL),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_every_argument_is_checked(name):
    made = Arguments()
    assert raw(name, *made.of(name)) == 0
    for position, (value, code) in WRONG[name].items():
        arguments = made.of(name)
        arguments[position] = value
        assert raw(name, *arguments) == code, position


def test_the_fields_of_structures_are_checked():
    for field, value, code in (("rows", -1, SIZE), ("rows_of_region", 0, SIZE), ("keys", -1, SIZE),
                               ("first_key", -1, SIZE), ("pos_start", None, NULL), ("pos_end", None, NULL),
                               ("self_pos", None, NULL), ("index_type", 0, TYPE)):  # fmt: skip
        for name in ("lse", "lse_slopes", "lse_columns", "lse_both_slopes"):
            made = Arguments()
            setattr(made.rows, field, value)
            assert raw(name, *made.of(name)) == code, (field, name)
    for field, value in (("images", -1), ("pixels", 0), ("channels", 0)):
        for name in ("pack", "unpack"):
            made = Arguments()
            setattr(made.map, field, value)
            assert raw(name, *made.of(name)) == SIZE, (field, name)
    for form in (-1, 4):
        made = Arguments()
        made.options = library.ContrastOptions(form, 0, 0.0, 0.0, 0.0)
        assert raw("contrast", *made.of("contrast")) == TYPE


def test_pixels_beyond_the_map():
    for value, dtype in itertools.product((-1, N, 2**31 - 1), (torch.int32, torch.int64)):
        for name in ("pack", "unpack"):
            made = Arguments(dtype)
            made.order[3] = value
            assert raw(name, *made.of(name)) == PIXEL


def test_more_memory_than_there_is():
    made = Arguments()
    arguments = made.of("contrast")
    arguments[1:4] = 1, 1, 2**60
    assert raw("contrast", *arguments) == MEMORY
    made.rows.rows, made.rows.keys = 1, 2**60
    assert raw("lse_slopes", *made.of("lse_slopes")) == MEMORY


def test_nothing_needs_no_arrays():
    """No rows, and rows without keys."""
    options = ctypes.addressof(library.contrast_options("all", False, 0.0, 0.0, 0.0))
    for keys in (0, M):
        arguments = None, 0, 1, keys, 0, None, None, None, 2, options, 1, None, None, None, 1
        assert raw("contrast", *arguments) == 0
    assert raw("add_transpose", None, 0, None, None, 1) == 0
    nothing = library.Rows(0, 1, M, 0, None, None, None, 2)
    at = ctypes.addressof(nothing)
    assert raw("lse", None, at, 1, None, 1, None, 1) == raw("lse_slopes", None, at, 1, None, 1, None, None, 1) == 0
    assert raw("lse_columns", None, at, 3, None) == raw("lse_both_slopes", None, at, 3, None, None, None, None, 1) == 0
    made = Arguments()
    made.of_rows[0].fill_(7.0)
    arguments = made.of("contrast")
    arguments[0], arguments[3] = None, 0
    assert raw("contrast", *arguments) == 0 and not made.counted.any() and (made.of_rows[0] == 0).all()
    made.rows.keys = 0
    lse = made.of("lse")
    lse[0] = None
    assert raw("lse", *lse) == 0 and (made.of_rows[0] == -float("inf")).all()


@pytest.mark.parametrize("form", library.FORMS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_intervals_of_any_kind(form, dtype):
    """Crossed, outside, and with the anchor anywhere: the library counts keys that are there, and writes no others."""
    bounds = [max(min(value, torch.iinfo(dtype).max), torch.iinfo(dtype).min) for value in FAR]
    for start, end, own, first_key in itertools.product(bounds, bounds, bounds, (0, 2)):
        made = Arguments(dtype, (start, end), own, first_key)
        made.options = library.contrast_options(form, True, -0.7, 0.2, 1.0)
        logits = made.logits.clone()
        assert raw("contrast", *made.of("contrast")) == 0
        key = range(first_key, first_key + M)
        positives = [start <= j < end and j != own for j in key]
        negatives = [not start <= j < max(start, end) and j != own for j in key]
        counted = any(positives) and (form in ("all", "pair") or any(negatives))
        assert made.counted.tolist() == [counted] * N, (start, end, own, first_key)
        assert counted or (made.logits == 0).all()
        assert all(made.logits[:, place].eq(0).all() for place, j in enumerate(key) if j == own)
        made.logits.copy_(logits)
        for rule, name in enumerate(library.RULES):
            met = {"positives": positives, "negatives": negatives, "every": [True] * M}.get(
                name, [j != own for j in key]
            )
            arguments = made.of("lse")
            arguments[2] = rule
            assert raw("lse", *arguments) == 0
            expected = logits[:, torch.tensor(met)].mul(0.6931471805599453).logsumexp(1) / 0.6931471805599453
            torch.testing.assert_close(made.of_rows[0], expected)
