"""AMD devices: the kernels are refused with their reason, unless the environment asks to try them.

Each test is a process whose torch says that it was built for ROCm. That the kernels compile is in test_offline.py.
"""

import os
import subprocess
import sys

from tests.tools.kernels import compile_or_skip

compile_or_skip()

ROCM = """
import warnings
from types import SimpleNamespace

import torch

torch.version.hip = "6.4"
torch.cuda.get_device_capability = lambda index=None: (9, 4)
from hpcloss import backends
from hpcloss.backends.triton import configs, probe

x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16, shape=(2, 8), numel=lambda: 16)
"""


def said(program, **environment):
    """What a program prints."""
    environment = {name: value for name, value in os.environ.items() if name != "HPCLOSS_ROCM"} | environment
    result = subprocess.run([sys.executable, "-c", ROCM + program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_auto_takes_the_tiles_and_says_why_once():
    out = said("""
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print([backends.resolve("auto", x) for _ in range(3)], len(told), told[0].message)
""")
    assert out.startswith("['pytorch', 'pytorch', 'pytorch'] 1 ")
    assert "AMD" in out and "HPCLOSS_ROCM=1" in out


def test_an_explicit_request_is_refused():
    out = said("""
warnings.simplefilter("ignore")
try:
    backends.resolve("triton", x)
except NotImplementedError as error:
    print(error)
""")
    assert "backend 'triton' cannot run this call" in out and "AMD" in out and "HPCLOSS_ROCM=1" in out


def test_the_environment_asks_to_try():
    """Whatever else is missing here, it is no longer the device."""
    assert "HPCLOSS_ROCM" not in said("print(probe.why_not('cuda', 0))", HPCLOSS_ROCM="1")
    assert "HPCLOSS_ROCM" in said("print(probe.why_not('cuda', 0))", HPCLOSS_ROCM="0")


def test_its_number_is_no_compute_capability():
    """Shapes of Hopper would not fit into 64 KB; and fp32 products are exact."""
    out = said("""
torch.set_float32_matmul_precision("high")
print(configs.part(configs.capability(x.device)), configs.precision(torch.zeros(2, 8)))
""")
    assert out == "amd ieee"
