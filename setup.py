"""Package metadata. The version is the one of `hpcloss/__init__.py`; importing the package needs torch alone."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "hpcloss/__init__.py").read_text(), re.MULTILINE).group(1)

EXAMPLES = ["monai", "lightning>=2.6", "nibabel", "nilearn", "scipy", "matplotlib", "tensorboard"]
TEST = ["triton; platform_system == 'Linux'", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "numpy"]
DEV = ["ruff", "mypy"]

setup(
    name="hpcloss",
    version=VERSION,
    description="Exact contrastive losses for dense prediction in O(N D) memory",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["hpcloss", "hpcloss.*"]),
    package_data={"hpcloss": ["py.typed", "DESIGN.md"]},
    install_requires=["torch>=2.6"],
    extras_require={"examples": EXAMPLES, "test": TEST, "dev": DEV},
)
