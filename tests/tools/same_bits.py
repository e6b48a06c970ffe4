"""Whether a change that must not touch numbers has not: values and gradients of many configurations, bit for bit.

    python -m tests.tools.same_bits --record before.json        # in a checkout of the commit before
    python -m tests.tools.same_bits --compare before.json       # in the changed one

The configurations are those of `tests/tools/stress.py` in fp32 and float64, and some with several tiles. One thread, as
sums over threads would depend on their number. Recorded are digests, so a difference is named and not measured.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch

from hpcloss import functional
from tests.tools import stress

DRAWN = [seed for seed in range(400) if stress.DTYPES[seed // len(stress.NAMES) % 4] in (torch.float32, torch.float64)]


def digest(tensors):
    """A digest of dtypes, shapes and bits; NaN is a bit pattern like any other."""
    state = hashlib.sha256()
    for x in tensors:
        state.update(f"{x.dtype}{tuple(x.shape)}".encode())
        state.update(x.detach().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def large():
    """Losses of more rows than a tile has, by name: their function and inputs."""
    generator = torch.Generator().manual_seed(0)
    map2d, map3d = torch.randn(2, 16, 40, 36, generator=generator), torch.randn(1, 8, 12, 14, 10, generator=generator)
    labels2d = torch.randint(0, 4, (2, 40, 36), generator=generator)
    labels3d = torch.randint(0, 3, (1, 12, 14, 10), generator=generator)
    rows, more = torch.randn(1300, 24, generator=generator), torch.randn(1300, 24, generator=generator)
    ids = torch.randint(0, 9, (1300,), generator=generator)
    f = functional
    for size in (None, 16):
        for denominator in ("own", "all", "negatives"):
            for hardness in (0.0, 1.0):
                options = {"region_size": size, "denominator": denominator, "hardness": hardness, "num_classes": 4}
                yield f"region {options}", lambda x, o=options: f.region_phpc_loss(x, labels2d, **o), [map2d]
    yield "region of a volume", lambda x: f.region_phpc_loss(x, labels3d, 6, detach_weights=False), [map3d]
    yield "two granularities", lambda x: f.region_phpc_loss(x, labels2d, 16, local_size=8), [map2d]
    yield "region supcon", lambda x: f.region_supcon_loss(x, labels2d, reduction="region"), [map2d]
    yield "supcon", lambda x: f.supcon_loss(x, ids), [rows]
    yield "supcon, in", lambda x: f.supcon_loss(x, ids, form="in"), [rows]
    yield "supcon, keys", lambda x, k: f.supcon_loss(x, ids, k, ids), [rows, more]
    yield "ntxent", f.ntxent_loss, [rows, more]
    yield "infonce", f.infonce_loss, [rows, more]
    yield "infonce, symmetric", lambda a, b: f.infonce_loss(a, b, symmetric=True), [rows, more]
    yield "ihpc", f.ihpc_loss, [rows, more]
    yield "hard negatives", f.hard_negative_nce_loss, [rows, more]
    yield "pixel", lambda x: f.pixel_contrast_loss(x, labels2d, num_classes=4, samples_per_class=None), [map2d]
    yield "local", lambda x: f.local_contrast_loss(x, labels2d, num_classes=4, samples_per_class=None), [map2d]
    yield "prototypes", lambda x: f.prototype_contrast_loss(x, ids), [rows]
    yield "two branches", lambda a, b: f.multiscale_contrast_loss(a, b, labels2d, num_classes=4), [map2d, map2d + 1]


def measured():
    """Digest of value and gradients of every configuration, by name."""
    torch.set_num_threads(1)
    found = {}
    for seed in DRAWN:
        case = stress.draw(seed)
        found[str(seed)] = digest(stress.run(case.fast, case.inputs, case.constants))
    for name, loss, inputs in large():
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(0)
            found[f"{name} {dtype}"] = digest(stress.run(loss, [x.to(dtype) for x in inputs], []))
    return found


def main():
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--record", type=Path)
    how.add_argument("--compare", type=Path)
    options = parser.parse_args()
    found = measured()
    if options.record:
        options.record.write_text(json.dumps(found, indent=1))
        print(f"{len(found)} configurations recorded")
        return
    before = json.loads(options.compare.read_text())
    unlike = [name for name in before if found.get(name) != before[name]]
    print(f"{len(before)} configurations, {len(unlike)} differ" + "".join(f"\n  {name}" for name in unlike))
    sys.exit(bool(unlike))


if __name__ == "__main__":
    main()
