"""The native library: what compilers say about its sources, what `setup.py` makes of them, and what it does without."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import setup as recipe  # of this repository

ROOT = Path(recipe.__file__).parent
# What the library may need at run time: the C library, by any of its names.
C_LIBRARY = re.compile(r"(libc|libm|libpthread|libdl|librt|ld-linux[-\w]*)\.so\.\d+")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
BUILD_VARIABLES = ("HPCLOSS_CUDA", "CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}

try:
    NVCC = recipe.find_nvcc()
except recipe.BuildError:
    NVCC = None

needs_gnu = pytest.mark.skipif(
    not (recipe.LINUX and shutil.which("g++") and shutil.which("readelf")), reason="needs g++ and binutils on Linux"
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def call(*command, cwd=ROOT, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def build(project, what="wheel", **environment):
    """The wheel or sdist that the project's build backend makes with what is installed."""
    out = project / "dist"
    shutil.rmtree(out, ignore_errors=True)
    done = call(sys.executable, "-c", BUILD, f"build_{what}", out, cwd=project, **environment)
    assert done.returncode == 0, done.stdout
    return out / done.stdout.splitlines()[-1]


def report(wheel):
    return zipfile.ZipFile(wheel).read("hpcloss/libhpcloss.txt").decode()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    project = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in ("hpcloss", "csrc"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "hpcloss" / recipe.LIBRARY).touch()  # of an installation in place, which does not belong into an sdist
    return build(project, "sdist")


@pytest.fixture(scope="module")
def released(sdist, tmp_path_factory):
    """The sources as a user gets them."""
    folder = tmp_path_factory.mktemp("released")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return next(folder.iterdir())


@pytest.fixture
def tiny(released, tmp_path):
    """The same with a library of one function, which compiles at once."""
    project = tmp_path / "tiny"
    shutil.copytree(released, project, ignore=shutil.ignore_patterns("csrc", "build", "dist"))
    (project / "csrc").mkdir()
    (project / "csrc/one.cpp").write_text('extern "C" int hpcloss_one() { return 1; }\n')
    (project / "csrc/one.cu").write_text("__global__ void nothing() {}\n")
    return project


@pytest.fixture
def fake_cuda(tmp_path):
    """A CUDA_HOME whose nvcc does what the shell script says."""

    def make(script):
        nvcc = tmp_path / "cuda/bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text("#!/bin/sh\n" + script)
        nvcc.chmod(0o755)
        return {"CUDA_HOME": str(tmp_path / "cuda")}

    return make


def test_modules_of_an_earlier_build_are_gone(tiny):
    """`pip install .` again after an update must not install what the update removed."""
    gone = tiny / "hpcloss/gone.py"
    gone.write_text("")
    assert "hpcloss/gone.py" in zipfile.ZipFile(build(tiny, **NO_COMPILER)).namelist()
    gone.unlink()
    assert any((tiny / "build").rglob("gone.py"))
    names = zipfile.ZipFile(build(tiny, **NO_COMPILER)).namelist()
    assert "hpcloss/gone.py" not in names and "hpcloss/__init__.py" in names


# ---- Sources ----


@needs_gnu
@pytest.mark.parametrize("source", recipe.sources("*.cpp"))
def test_cxx_warns_of_nothing(source, tmp_path):
    """Also for one target, as the sanitizers want it."""
    warnings = ["-Wall", "-Wextra", "-Wshadow", "-Werror"]
    for added in ([], ["-O1", "-DHPCLOSS_ONE_TARGET"]):
        done = call("g++", *recipe.GNU_FLAGS, *added, *warnings, "-fPIC", "-c", source, "-o", tmp_path / "object.o")
        assert done.returncode == 0, done.stdout


FUSED = """
#include <cstdio>
#include <cstdlib>
#include "vectors.h"
HPCLOSS_CLONES double remainder_of(double a, double b, double product) { return a * b - product; }
int main(int, char** given) {
  const double a = std::atof(given[1]);
  volatile double product = a * a;
  std::printf("%.17g", remainder_of(a, a, product));
}
"""


@needs_gnu
def test_the_widest_vectors_of_the_processor_are_taken(tmp_path):
    """Whoever made it. AVX2 comes with fused multiply-add: there `a * b - round(a * b)` is what was rounded away."""
    info = Path("/proc/cpuinfo")
    if not info.exists() or not {"avx2", "fma", "bmi2"} <= set(info.read_text().split()):
        pytest.skip("the processor has no AVX2")
    if int(call("g++", "-dumpversion").stdout.partition(".")[0]) < 12:
        pytest.skip("for older compilers than GCC 12 the clones have no fused multiply-add")
    (tmp_path / "fused.cpp").write_text(FUSED)
    flags = [*recipe.GNU_FLAGS, "-ffp-contract=fast", "-I", ROOT / "csrc"]
    done = call("g++", *flags, tmp_path / "fused.cpp", "-o", tmp_path / "fused")
    assert done.returncode == 0, done.stdout
    assert float(call(tmp_path / "fused", str(1 + 2**-30)).stdout) == 2**-60


@needs_gnu
@needs_nvcc
@pytest.mark.parametrize("source", recipe.sources("*.cu"))
def test_nvcc_warns_of_nothing_and_nothing_spills(source, tmp_path):
    """For every compute capability."""
    capabilities, code = recipe.nvcc_targets(NVCC)
    warnings = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v"]
    done = call(NVCC, "-c", source, *recipe.NVCC_FLAGS, *code, *warnings, "--threads=2", "-o", tmp_path / "object.o")
    assert done.returncode == 0, done.stdout
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout)
    kernels = set(re.findall(r"\b(\w+_kernel)\(", (ROOT / source).read_text()))
    # Each for both types of index.
    assert len(spilled) >= 2 * len(kernels) * len(capabilities), done.stdout
    assert not spilled or set(spilled) == {("0", "0")}, done.stdout


# ---- What is built ----


def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()} <= names
    assert {"hpcloss/DESIGN.md", "hpcloss/py.typed", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if "libhpcloss" in name]


def check_library(wheel, cuda):
    """Tag and contents of the wheel; what its library exports and needs."""
    assert re.fullmatch(r"hpcloss-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    archive = zipfile.ZipFile(wheel)
    assert {"hpcloss/libhpcloss.so", "hpcloss/py.typed", "hpcloss/DESIGN.md"} <= set(archive.namelist())
    library = archive.extract("hpcloss/libhpcloss.so", wheel.parent)

    declared = re.findall(r"^HPCLOSS_API [^;]*?(hpcloss_\w+)\(", (ROOT / "csrc/hpcloss.h").read_text(), re.MULTILINE)
    assert len(declared) == len(set(declared)) > 5
    exported = re.findall(r" ([A-Za-z]) (\S+)$", call("nm", "-D", "--defined-only", library).stdout, re.MULTILINE)
    assert sorted(exported) == sorted(("T", name) for name in declared if cuda or "_cuda_" not in name)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", call("readelf", "-d", library).stdout)
    assert needed and all(C_LIBRARY.fullmatch(name) for name in needed), needed


@needs_gnu
def test_wheel_from_the_sdist(released):
    wheel = build(released, HPCLOSS_CUDA="0")
    check_library(wheel, cuda=False)
    assert re.fullmatch(r"C\+\+: built with .+\nCUDA: not built: HPCLOSS_CUDA=0\n", report(wheel))


@needs_gnu
@needs_nvcc
@pytest.mark.slow
def test_wheel_with_cuda(released):
    wheel = build(released, HPCLOSS_CUDA="1")
    check_library(wheel, cuda=True)
    assert re.fullmatch(r"C\+\+: built with .+\nCUDA: nvcc [\d.]+(,| sm_\d+)+\n", report(wheel))


# ---- What is not ----


@needs_gnu
def test_without_a_compiler(tiny):
    wheel = build(tiny, **NO_COMPILER)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert report(wheel).startswith("C++: not built: /bin/false failed")


@needs_gnu
def test_sources_that_do_not_compile(tiny):
    (tiny / "csrc/one.cpp").write_text("int missing = semicolon\n")
    wheel = build(tiny, HPCLOSS_CUDA="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "‘semicolon’" in report(wheel) or "'semicolon'" in report(wheel)


@needs_gnu
def test_a_failed_build_leaves_no_older_library(tiny):
    library = tiny / "hpcloss" / recipe.LIBRARY
    for environment, built in (({"HPCLOSS_CUDA": "0"}, True), (NO_COMPILER, False)):
        done = call(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tiny, **environment)
        assert done.returncode == 0, done.stdout
        assert library.exists() == built
        assert ("C++: built" in (tiny / "hpcloss" / recipe.REPORT).read_text()) == built


@needs_gnu
def test_nvcc_that_fails(tiny, fake_cuda):
    broken = fake_cuda("echo broken on purpose; exit 1\n")
    wheel = build(tiny, **broken)
    assert "-py3-none-linux_" in wheel.name
    assert re.fullmatch(r"C\+\+: built with .+\nCUDA: not built: .+/nvcc failed.+\nbroken on purpose\n", report(wheel))

    done = call(sys.executable, "setup.py", "build", cwd=tiny, HPCLOSS_CUDA="1", **broken)
    assert done.returncode != 0
    assert "HPCLOSS_CUDA=1, but the CUDA half" in done.stdout and "\nbroken on purpose\n" in done.stdout


@needs_gnu
def test_cuda_is_refused_without_a_compiler(tiny):
    done = call(sys.executable, "setup.py", "build", cwd=tiny, HPCLOSS_CUDA="1", **NO_COMPILER)
    assert done.returncode != 0
    assert "HPCLOSS_CUDA=1, but the CUDA half" in done.stdout and "/bin/false failed" in done.stdout


def test_values_of_the_switch(tiny):
    done = call(sys.executable, "setup.py", "build", cwd=tiny, HPCLOSS_CUDA="maybe")
    assert done.returncode != 0 and "HPCLOSS_CUDA=maybe is none of 0, 1, auto" in done.stdout


@needs_gnu
def test_compute_capabilities_that_nvcc_does_not_know(fake_cuda, monkeypatch):
    for name, value in fake_cuda("echo compute_37 compute_80 compute_90\n").items():
        monkeypatch.setenv(name, value)
    known, flags = recipe.nvcc_targets(recipe.find_nvcc())
    assert known == [80, 90]
    codes = ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90"]
    codes += ["arch=compute_80,code=compute_80", "arch=compute_90,code=compute_90"]
    assert flags == [f"-gencode={code}" for code in codes]


@needs_gnu
def test_fast_math_of_the_environment_stays_outside(tiny):
    """Linked with it, a library switches off subnormal numbers for the process that loads it."""
    for name in ("CXXFLAGS", "LDFLAGS"):
        wheel = build(tiny, HPCLOSS_CUDA="0", **{name: "-ffast-math -Ofast -g"})
        library = zipfile.ZipFile(wheel).extract("hpcloss/libhpcloss.so", tiny)
        script = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); sys.exit(not 1e-310 * 0.5 > 0)"
        assert call(sys.executable, "-c", script, library).returncode == 0, name


@needs_gnu
def test_compilers_may_say_what_cannot_be_printed(tiny, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nprintf 'Cr\\351ation \\342\\202\\254\\n' >&2\nexec g++ \"$@\"\n")
    compiler.chmod(0o755)
    wheel = build(tiny, HPCLOSS_CUDA="0", CXX=str(compiler), PYTHONIOENCODING="ascii")
    assert "C++: built with" in report(wheel)
