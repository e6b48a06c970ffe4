"""Every row by name, in groups: each group runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import MANY, SINGLE, D, infonce, region_phpc, supcon
from benchmarks.gpu.known import Known
from benchmarks.gpu.machine import size
from benchmarks.gpu.rows.losses import (
    as_good_as_small,
    eager_phpc,
    eager_supcon,
    less_than_whole,
    loss_row,
    small_row,
    whole_step_row,
)
from benchmarks.gpu.rows.parts import pack_row, plan_rows, primitive_row, sample_rows
from benchmarks.gpu.rows.peers import block_loop_row, peer_row
from benchmarks.gpu.rows.steps import graph_row, kernels_row, launches_row, no_sync_row
from benchmarks.gpu.timing import ceilings

Row = Callable[[Known], dict[str, Any]]
CEILINGS = "ceilings"


def groups() -> dict[str, dict[str, Row]]:
    """The most important first: what does not fit into the time is left out at the end."""
    ladder = size((1024, 2048, 4096, 8192, 16384, 32768), (64,))
    maps = size((8, 256, 256, 16), (2, 4, 8, 4))
    dense = dict(zip(("batch", "height", "width"), size((1, 256, 256), (1, 8, 8))))

    def row(function: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> Row:
        return lambda known: function(known, *arguments, **options)

    loss = partial(row, loss_row)
    bars = {
        CEILINGS: lambda known: ceilings(),
        f"supcon {MANY}": loss(supcon, n=MANY, share=0.55),
        "hpc dense": loss(region_phpc, **dense, share=0.45),
        "hpc dense, 80 % background": loss(region_phpc, **dense, background=0.8, more=less_than_whole),
        "region phpc": loss(region_phpc, **dict(zip(("batch", "height", "width", "region"), maps)), background=0.2,
                            share=0.35),
        "hpc dense, whole map": loss(region_phpc, **dict(dense, **size({"height": 512, "width": 512}, {"width": 12})),
                                     more=as_good_as_small),
        "pack, channels first": row(pack_row, False),
        "pack, channels last": row(pack_row, True),
        **{f"small supcon {n}": row(small_row, supcon, eager_supcon, n=n)
           for n in size((16, 64, 256, 512, 1024), (64,))},
        **{f"small region map {s}x{s}": row(small_row, region_phpc, eager_phpc, batch=1, height=s, width=s)
           for s in size((16, 32), (8,))},
        "pair_lse negatives": row(primitive_row, "pair_lse", "negatives"),
        "pair_lse others": row(primitive_row, "pair_lse", "others"),
        "pair_mean own": row(primitive_row, "pair_mean", "own"),
        "pair_mean logit": row(primitive_row, "pair_mean", "logit"),
        "kernels of the bars": row(kernels_row),
    }  # fmt: skip
    steps = {
        "launches, step": row(launches_row, "step", None, 30),
        "launches, step with num_classes": row(launches_row, "step", 5, 25),
        "launches, plan and pack": row(launches_row, "plan", None, 8),
        "launches, plan and pack with num_classes": row(launches_row, "plan", 5, 8),
        "graph of a step": row(graph_row),
        "no host sync": row(no_sync_row),
        "whole step, supcon": row(whole_step_row, supcon, n=MANY),
        "whole step, hpc": row(whole_step_row, region_phpc, **dense),
        "partition": row(plan_rows, None),
        "partition, num_classes": row(plan_rows, 5),
        "partition and sample, uniform": row(sample_rows, "uniform", 0.15),
        "partition and sample, weighted": row(sample_rows, "weighted", 0.4),
    }  # fmt: skip
    sizes = {
        **{f"supcon {n}": loss(supcon, n=n) for n in (*ladder, *size((262144,), ())) if n != MANY},
        **{f"infonce {n}": loss(infonce, n=n) for n in (*ladder, *size((65536,), ()))},
        "supcon, D = 64": loss(supcon, n=MANY, dim=D // 2),
        "supcon, D = 256": loss(supcon, n=MANY, dim=D * 2),
        "supcon, bf16 un-normalised": loss(supcon, n=MANY, dtype=torch.bfloat16, normalize=False),
        "supcon, learnable temperature": loss(supcon, n=MANY, learnable=True),
        "supcon, fp32 highest": loss(supcon, n=MANY, dtype=SINGLE),
        "supcon, fp32 high": loss(supcon, n=MANY, dtype=SINGLE, precision="high"),
        "hpc dense, bf16": loss(region_phpc, **dense, dtype=torch.bfloat16),
        "kernels of the sizes": row(kernels_row),
    }  # fmt: skip
    competitors = {
        "block loop": row(block_loop_row, *maps),
        **{f"eager supcon {n}": row(peer_row, "eager", n) for n in (*ladder, *size((65536,), ()))},
        **{f"linear_cross_entropy {n}": row(peer_row, "linear_cross_entropy", n) for n in ladder},
        **{f"compiled supcon {n}": row(peer_row, "compiled", n) for n in ladder},
    }  # fmt: skip
    return {"bars": bars, "steps": steps, "sizes": sizes, "competitors": competitors}
