"""`import hpcloss` needs torch alone."""

import subprocess
import sys
import time
from pathlib import Path

import hpcloss

OTHERS = ["triton", "numpy", "scipy", "matplotlib", "lightning", "monai", "nibabel", "nilearn", "tensorboard"]
ONE_LINER = (
    "import hpcloss, torch; f=torch.randn(2,32,64,64,requires_grad=True); "
    "l=hpcloss.RegionPHPCLoss()(f, torch.randint(0,4,(2,64,64))); l.backward(); print(l, f.grad.abs().sum())"
)


def run(script):
    # The package under test is that of this process; its folder leads the path.
    path = f"import sys; sys.path.insert(0, {str(Path(hpcloss.__file__).parents[1])!r})"
    return subprocess.run([sys.executable, "-c", f"{path}\n{script}"], capture_output=True, text=True, timeout=120)


def test_one_liner_with_everything_else_blocked():
    blocked = f"sys.modules.update(dict.fromkeys({OTHERS}))"
    checks = "\nassert l.isfinite() and l > 0 and f.grad.isfinite().all() and f.grad.abs().sum() > 0"
    checks += "\nassert hpcloss.__file__ == " + repr(hpcloss.__file__)
    result = run(blocked + "\n" + ONE_LINER + checks)
    assert result.returncode == 0, result.stderr
    assert "nan" not in result.stdout and "inf" not in result.stdout and "grad_fn" in result.stdout


def test_import_loads_nothing_else_and_prints_nothing():
    result = run(f"""
import torch
before = set(sys.modules)
import hpcloss
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not loaded & set({OTHERS}), loaded
assert not torch.cuda.is_initialized()
""")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and result.stderr == ""


def test_the_self_check_with_everything_else_blocked():
    """It names its rows, finds no error, and ends in time: 10 s of one core, six times as much on a busy machine."""
    start = time.monotonic()
    result = run(f"""
sys.modules.update(dict.fromkeys({OTHERS + ["pytest"]}))
import runpy
sys.argv = ["hpcloss", "--device", "cpu"]
runpy.run_module("hpcloss", run_name="__main__", alter_sys=True)
""")
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - start < 60
    assert "backend triton: not available, Triton is not installed" in result.stdout
    assert result.stdout.count(" ok ") == 10 and result.stdout.endswith("10 of 10 checks passed.\n")


def test_the_oracle_alone_with_everything_else_blocked():
    result = run(f"""
sys.modules.update(dict.fromkeys({OTHERS}))
import torch
from hpcloss import reference
print(reference.ntxent_loss(torch.eye(4).double(), torch.eye(4).double()).item())
""")
    assert result.returncode == 0 and float(result.stdout) > 0, result.stderr
