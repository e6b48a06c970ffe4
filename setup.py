"""The native library: built where there is a C++ compiler, its CUDA half where there is nvcc.

The package works without either, and building needs setuptools alone. HPCLOSS_CUDA=0: without the CUDA half; 1: with
it, or the installation fails; auto, the default: with it where it can be built.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CCompilerError

HERE = Path(__file__).parent
WINDOWS, LINUX = sys.platform == "win32", sys.platform.startswith("linux")
LIBRARY = "libhpcloss" + (".dll" if WINDOWS else ".dylib" if sys.platform == "darwin" else ".so")
REPORT = "libhpcloss.txt"

# No fast math and no fused multiply-add, whatever CFLAGS say: results are those of the Python code, bit for bit.
GNU_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread", "-fno-fast-math", "-ffp-contract=off"]
# So that loops become vectors, where a pragma says so. No result changes, and no OpenMP comes.
GNU_FLAGS += ["-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno"]
FAST_MATH = ("-ffast-math", "-funsafe-math-optimizations", "-Ofast")
CXX_FLAGS = ["/std:c++17", "/O2", "/EHsc"] if WINDOWS else GNU_FLAGS
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "/MD" if WINDOWS else "-fPIC,-fvisibility=hidden"]
# Those with machine code of their own. It also runs on later ones of the same generation, as 86's on 89. PTX of the
# first is for what lies between and has none, PTX of the last for the generations to come.
COMPUTE_CAPABILITIES = (75, 80, 86, 90, 100, 120)


def sources(pattern):
    return sorted(path.relative_to(HERE).as_posix() for path in (HERE / "csrc").glob(pattern))


class BuildError(Exception):
    """Why a part was not built, with the end of what the compiler printed."""

    def __init__(self, reason, output=""):
        super().__init__("\n".join([str(reason), *output.strip().splitlines()[-20:]]))


def show(text):
    """Print it, whatever stdout can encode: compilers speak the user's language."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def run(*command):
    """What the command prints."""
    print(*command, flush=True)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    show(done.stdout)
    if done.returncode:
        raise BuildError(f"{command[0]} failed with exit status {done.returncode}", done.stdout)
    return done.stdout


@contextlib.contextmanager
def compiler_output():
    """Errors in the block hold what the compilers print that setuptools runs: straight to descriptors 1 and 2."""
    sys.stdout.flush()
    ours = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        try:
            yield
        except (BaseError, CCompilerError, OSError) as error:
            log.seek(0)
            raise BuildError(error, log.read().decode(errors="replace")) from error
        finally:
            sys.stdout.flush()
            os.dup2(ours[0], 1), os.dup2(ours[1], 2), os.close(ours[0]), os.close(ours[1])
            log.seek(0)
            show(log.read().decode(errors="replace"))


def find_nvcc():
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", "")]))
    if nvcc is None:
        raise BuildError("no nvcc found (CUDA_HOME, CUDA_PATH, PATH)")
    return nvcc


def nvcc_targets(nvcc):
    """The compute capabilities that it knows, and its flags for their code."""
    known = run(nvcc, "--list-gpu-arch").split()
    chosen = [capability for capability in COMPUTE_CAPABILITIES if f"compute_{capability}" in known]
    if not chosen:
        raise BuildError(f"{nvcc} knows none of the compute capabilities {COMPUTE_CAPABILITIES}")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen]
    flags += [f"-gencode=arch=compute_{number},code=compute_{number}" for number in (chosen[0], chosen[-1])]
    return chosen, flags


class BuildModules(build_py):
    """Without what an earlier build left in its folder: modules that are gone since would be installed again."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(os.path.join(self.build_lib, "hpcloss"), ignore_errors=True)
        super().run()


class BuildLibrary(build_ext):
    """hpcloss/libhpcloss, and libhpcloss.txt beside it: what was built, or why not. It is no Python extension."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def get_export_symbols(self, ext):
        return []  # the sources name them; setuptools' own is PyInit_*

    def get_libraries(self, ext):
        return ext.libraries  # without Python's

    def run(self):
        # Fast math at link time would switch off subnormal numbers for the whole process that loads the library.
        for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS"):
            flags = [flag for flag in os.environ.get(name, "").split() if flag not in FAST_MATH]
            os.environ[name] = " ".join(flags)
        super().run()

    def build_extension(self, ext):
        wanted = os.environ.get("HPCLOSS_CUDA") or "auto"
        if wanted not in ("0", "1", "auto"):
            raise SystemExit(f"HPCLOSS_CUDA={wanted} is none of 0, 1, auto")
        self.force = True  # what is built depends on the environment, not on the sources alone
        package = Path(self.build_lib, "hpcloss")
        package.mkdir(parents=True, exist_ok=True)
        package.joinpath(LIBRARY).unlink(missing_ok=True)  # of an earlier build
        try:
            version = self.compiler_version()  # first: the CUDA half takes longest
            try:
                if wanted == "0":
                    raise BuildError("HPCLOSS_CUDA=0")
                cuda = self.compile_cuda(ext)
                self.compile_and_link(ext)
            except BuildError as error:
                cuda = f"not built: {error}"
                ext.extra_objects, ext.libraries, ext.library_dirs = [], [], []
                self.compile_and_link(ext)
            cxx = f"built with {version}"
        except BuildError as error:
            cxx, cuda = f"not built: {error}", "not built: it needs the C++ half"
        report = "".join(f"{part}: {told.strip()}\n" for part, told in (("C++", cxx), ("CUDA", cuda)))
        if wanted == "1" and "not built" in cuda:
            raise SystemExit(f"HPCLOSS_CUDA=1, but the CUDA half of the native library cannot be built here.\n{report}")
        self.warn(f"The native library of hpcloss:\n{report}")
        package.joinpath(REPORT).write_text(report, encoding="utf-8")

    def compile_cuda(self, ext):
        nvcc = find_nvcc()
        capabilities, code_flags = nvcc_targets(nvcc)
        objects = Path(self.build_temp, "cuda")
        shutil.rmtree(objects, ignore_errors=True)
        objects.mkdir(parents=True)
        flags = [*NVCC_FLAGS, *code_flags, "--threads=0"]  # as many as there are cores
        run(nvcc, "-c", *sources("*.cu"), *flags, f"--output-directory={objects}")
        ext.extra_objects = [str(path) for path in objects.iterdir()]
        ext.libraries = ["cudart_static", *([] if WINDOWS else ["rt", "pthread", "dl"])]
        # nvcc knows where these are, which differs between distributions.
        ext.library_dirs = re.findall(r'"(?:-L|/LIBPATH:)(.+?)"', run(nvcc, "--dryrun", "-c", sources("*.cu")[0]))
        release = re.search(r"release ([\d.]+)", run(nvcc, "--version")).group(1)
        return f"nvcc {release}, {' '.join(f'sm_{number}' for number in capabilities)}"

    def compiler_version(self):
        gnu = getattr(self.compiler, "compiler_cxx", None)
        return run(*gnu, "--version").splitlines()[0] if gnu else self.compiler.compiler_type

    def compile_and_link(self, ext):
        if LINUX:
            # Only what hpcloss.h declares is exported: not what the headers of C++ and the static libraries bring.
            exports = Path(self.build_temp, "exports")
            exports.parent.mkdir(parents=True, exist_ok=True)
            exports.write_text("{ global: hpcloss_*; local: *; };\n")
            ext.extra_link_args = ["-pthread", "-static-libgcc", "-Wl,-z,defs"]
            ext.extra_link_args += ["-Xlinker", f"--version-script={exports}"]
            archive = run(*self.compiler.compiler_cxx, "-print-file-name=libstdc++.a").strip()
            if os.path.isabs(archive):  # else it is not installed
                ext.extra_link_args.append("-static-libstdc++")
        with compiler_output():
            super().build_extension(ext)

    def copies(self):
        """The place of each file in the source tree, for installations that use that."""
        package = self.get_finalized_command("build_py").get_package_dir("hpcloss")
        built = os.path.join(self.build_lib, "hpcloss")
        return {os.path.join(built, name): os.path.join(package, name) for name in (LIBRARY, REPORT)}

    def copy_extensions_to_source(self):
        for built, copy in self.copies().items():
            Path(copy).unlink(missing_ok=True)  # and not overwritten: a process may have it loaded
            if os.path.exists(built):
                shutil.copy(built, copy)

    def get_outputs(self):
        return [built for built in self.copies() if os.path.exists(built)]

    def get_output_mapping(self):
        return {built: copy for built, copy in self.copies().items() if self.inplace and os.path.exists(built)}


class Wheel(bdist_wheel):
    """For every Python 3, as the library knows nothing of Python; and for every platform if it was not built."""

    def get_tag(self):
        self.root_is_pure = len(self.get_finalized_command("build_ext").get_outputs()) < 2
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "hpcloss.libhpcloss",
                sources("*.cpp"),
                depends=sources("*.h") + sources("*.cu"),
                extra_compile_args=CXX_FLAGS,
                language="c++",
            )
        ],
        cmdclass={"build_py": BuildModules, "build_ext": BuildLibrary, "bdist_wheel": Wheel},
    )
