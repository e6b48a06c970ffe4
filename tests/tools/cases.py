"""Inputs that the tests share; each odd one with its reason."""

import ctypes
import functools
import hashlib
import math
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from hpcloss.plan import native
from hpcloss.plan.partition import Pairs
from tests.tools.numerics import assert_exact

ROOT = Path(__file__).resolve().parents[2]

# Gradients that cancel in exact arithmetic (one class, one pair) leave rounding of numbers of order 1 / temperature.
NOISE = 1e-12


def rows(*shape, seed=0, dtype=torch.float64):
    """Random rows, made in the tested dtype: their rounding is nobody's error."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def choice(values, *shape, seed=0):
    return torch.tensor(values)[integers(len(values), *shape, seed=seed)]


def tensors_of(plan):
    """All tensors of a `Pairs` or of a `ClassRows`."""
    return [plan.order, *plan.intervals] if isinstance(plan, Pairs) else [plan.order, plan.offsets, plan.outside]


def runs(*lengths):
    """Labels 0, 1, 2, ... in runs of these lengths."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


# [B, D, *S]
MAPS = {
    "1-D": (2, 3, 13),
    "2-D": (2, 5, 7, 6),  # 7 x 6 leaves remainder cells for most region sizes
    "3-D": (2, 4, 3, 4, 5),
    "one pixel": (1, 4, 1, 1),
    "two pixels": (1, 4, 1, 2),
    "one channel": (1, 1, 5, 5),  # similarities are -1 and 1 only
    "prime": (3, 7, 1, 31),
}


def _one_pair(shape, seed):
    labels = torch.zeros(math.prod(shape), dtype=torch.int64)
    labels[-2:] = 3
    return labels.view(shape)


LABELS = {
    "mixed": lambda shape, seed: integers(4, *shape, seed=seed),
    "ignored": lambda shape, seed: choice([0, 1, 2, -100, -1, 255], *shape, seed=seed),
    "any ids": lambda shape, seed: choice([0, -7, 10**12, 254, -(2**62)], *shape, seed=seed),
    "no positives": lambda shape, seed: 300 + torch.arange(math.prod(shape)).view(shape),
    "no negatives": lambda shape, seed: torch.full(shape, 2),
    "background only": lambda shape, seed: torch.zeros(shape, dtype=torch.int64),
    "all ignored": lambda shape, seed: torch.full(shape, 255),
    "one pair": _one_pair,  # one class with two pixels, everything else background
    "halves": lambda shape, seed: 1 + (torch.arange(math.prod(shape)) * 2 // math.prod(shape)).view(shape),
}


def draw_region_options(seed, shape):
    """A random point of the option grid of the region loss, for a map of this shape."""
    rng = random.Random(seed)
    dims = len(shape) - 2
    size = rng.choice([None, 1, 2, 4, 6, 100, tuple(rng.choice([2, 4, 6]) for _ in range(dims))])
    options = {
        "region_size": size,
        "temperature": rng.choice([0.01, 0.07, 0.1, 0.5, 1.0, 100.0]),
        "hardness": rng.choice([0.0, 0.3, 1.0, 8.0, 60.0, -1.0, -20.0]),  # PCCS: hardness -1 / 0.05
        "denominator": rng.choice(["own", "own", "all", "negatives"]),
        "background": rng.choice([0, 0, None, 2, 77]),
        "ignore_index": rng.choice([(-100, -1, 255), (), 3, (1, -1)]),
        "per_image": rng.random() < 0.4,
        "detach_weights": rng.random() < 0.5,
        "normalize": rng.random() < 0.7,
        "reduction": rng.choice(["mean", "class", "region", "sum", "none"]),
    }
    if options["denominator"] == "own":
        options["discount"] = rng.choice([0.0, 0.1, 0.9, 3.0])
    if size is not None and size != 100 and rng.random() < 0.4:
        sizes = (size,) * dims if isinstance(size, int) else size
        local = tuple(rng.choice([part for part in range(1, whole + 1) if whole % part == 0]) for whole in sizes)
        options["local_size"] = local if rng.random() < 0.7 or isinstance(size, tuple) else 1
    return options


def value_and_grads(loss, *inputs, seed=7):
    """The value of `loss(*inputs)` and the gradient of each input under a random upstream gradient."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return value.detach(), torch.autograd.grad(value, inputs, upstream.to(value.dtype))


def assert_same(loss, other, *inputs, noise=NOISE):
    """Two functions of the same float64 inputs have the same value and the same gradients."""
    (actual, actual_grads), (expected, expected_grads) = value_and_grads(loss, *inputs), value_and_grads(other, *inputs)
    assert_exact(actual, expected, floor=noise)
    for actual_grad, expected_grad in zip(actual_grads, expected_grads, strict=True):
        assert_exact(actual_grad, expected_grad, floor=noise)


def implementations(name):
    """Fixture body, for what several implementations must do alike: the native library, which must be there; its CUDA
    sources, run on the CPU; or the PyTorch implementation."""
    if name == "native":
        if reason := native.why_not("cpu"):
            pytest.skip(f"no native library: {reason}")
        yield name
        return
    with pytest.MonkeyPatch.context() as patch:
        if name == "torch":
            patch.setattr(native, "serves", lambda tensor: False)
        else:
            library = cuda_on_cpu()

            def call(function, device, arguments, workspace=None):
                library.hpcloss_emulator_seed(ctypes.c_ulonglong(random.getrandbits(64)))
                native._call_cuda(library, function, device, arguments, workspace, 0)

            patch.setattr(native, "_call", call)
            patch.setattr(native, "serves", lambda tensor: tensor.device.type == "cpu")
        yield name


@functools.cache
def cuda_on_cpu():
    """The CUDA sources, compiled for the CPU with a header that runs their threads one after another."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    header = ROOT / "tests/tools/cuda_on_cpu.h"
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in [header, *sorted((ROOT / "csrc").iterdir())]))
    library = Path(tempfile.gettempdir()) / f"hpcloss-cuda-on-cpu-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
        flags += ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
        subprocess.run(["g++", *flags, "-x", "c++", "-include", header, *sources, "-o", made], check=True)
        made.rename(library)  # whole or not at all: test processes share it
    return native._typed(ctypes.CDLL(str(library)))
