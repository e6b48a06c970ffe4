"""The acceptance run on one GPU: `python -m benchmarks.gpu --out DIR` (see `__main__.py`).

It needs torch, triton and pytest, and no installation. One supervisor, which never touches the device, starts a child
process for each group of rows and for each other stage, and kills it with all its processes at its time limit.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The environment variable that says where the rows run, and what it may say; the stand-ins with a compute capability.
MACHINE = "HPCLOSS_MACHINE"
GPU, INTERPRETER, STAND_IN, PREPARE = "gpu", "interpreter", "stand-in", "prepare"
