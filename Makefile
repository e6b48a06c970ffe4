# Every target works alone in a clean clone and is safe to repeat. `constraints.txt` pins what is installed here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
PIP := $(BIN)/python $(INSTALL)
# Two workers, one thread each: losses are tested one call at a time, and two cores are what a small machine has.
# A test that hangs says where, and fails alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout-method thread
WHEEL := .venv-wheel
# CUDA 13.0 as PyPI has it: its code runs on every driver for CUDA 13.
NVCC := .venv-nvcc
NVCC_PACKAGES := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
# Triton and CUDA are for Linux alone. There auditwheel puts the C library's version into the wheel's tag.
ifeq ($(shell uname),Linux)
KERNELS := $(PYTEST)
CUDA := HPCLOSS_CUDA=1 CUDA_HOME=$(CURDIR)/$(NVCC)/nvidia/cu13
REPAIR := auditwheel repair --wheel-dir dist dist/*-linux_*.whl && rm dist/*-linux_*.whl
wheel: $(NVCC)/installed
else
KERNELS := echo NOT RUN without Triton: pytest
REPAIR := true
endif
# Triton as torch 2.11 brings it, and the oldest one that is supported. Their interpreters want an older NumPy.
TRITON_OF_TORCH_2_11 := 3.6.0
OLDEST_TRITON := 3.4.0
NUMPY_OF_OLDER_TRITON := 2.3.5
OF_TRITON := $(addprefix tests/compiled/test_,launch_path.py budgets*.py offline.py ptx.py gpu_run*.py)
# Of the interpreter's tests those that reach every kernel, rule and mask; dtypes, shapes and options are for the newest.
IN_THE_INTERPRETER := tests/kernels -k "losses or recipes or edges or both or of_plans or segment_mean or spans"
OF_THE_WHEEL := tests/losses/test_modules.py tests/losses/test_reference.py tests/plan/test_native.py \
	-k "not cuda and not sanitizers"
# One test of each kind. The kernels' are in Triton's interpreter, which wants a process of its own.
QUICK := tests/repository/test_layers.py tests/losses/test_every_loss.py \
	"tests/plan/test_partition.py::test_intervals[native]" "tests/plan/test_partition.py::test_intervals[torch]" \
	"tests/compat/test_compat.py::test_formula[lightly]"
QUICK_KERNELS := tests/kernels/test_every_loss.py

.PHONY: demo quick test test-all wheel parity bench check format docs docs-serve clean

demo: $(VENV)/installed-demo
	$(BIN)/python -m examples.three_stage --data builtin --out demo --resume

# The loop while writing code: layers, every loss on the tiles and on the kernels, a plan, a class of compat. Under 60 s.
quick: $(VENV)/installed-quick
	@began=$$(date +%s); log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	$(KERNELS) -q $(QUICK_KERNELS) > "$$log" 2>&1 & kernels=$$!; \
	$(PYTEST) -q $(QUICK); others=$$?; \
	wait $$kernels; kernels=$$?; cat "$$log"; \
	echo "make quick: $$(($$(date +%s) - began)) s"; \
	exit $$((others ? others : kernels))

# The second run is that of the GPU kernels, which a machine without a GPU has in Triton's interpreter.
test: $(VENV)/installed
	$(PYTEST) tests --ignore tests/kernels -n 2 --timeout 400
	$(KERNELS) tests/kernels -n 2 --timeout 400

# Also every shipped tile shape on every GPU target, every loss launched and its PTX interpreted for more of them, and every
# planted mistake; and the tests of kernels on older versions of Triton.
test-all: test test-triton-$(TRITON_OF_TORCH_2_11) test-triton-$(OLDEST_TRITON)
	$(PYTEST) tests --ignore tests/kernels -n 2 -m slow --timeout 5400
	$(BIN)/python -m tests.tools.mutations
	$(BIN)/python -m tests.tools.ptx_mutations --of-a-kind 2

# `make test-triton-3.6.0`: the kernels on this version of Triton. Launched, compiled within their budgets, executed from
# their PTX, and in Triton's interpreter; and the acceptance run, dry and on the stand-in for a driver.
test-triton-%: .venv-triton-%/installed
	PYTHONPATH=$(CURDIR)/$(<D) $(BIN)/python -c "import triton; assert triton.__version__ == '$*', triton.__file__"
	PYTHONPATH=$(CURDIR)/$(<D) $(PYTEST) $(OF_TRITON) -n 2 --timeout 400
	PYTHONPATH=$(CURDIR)/$(<D) $(PYTEST) $(IN_THE_INTERPRETER) -n 2 --timeout 400

# What a release uploads, installed beside torch alone, and tests of it. `pytest` does not see the sources; `python -m`
# would, and so would tests that are imported from the root of the repository.
OUTSIDE := --override-ini pythonpath= --import-mode importlib --timeout 400
wheel: $(VENV)/installed-dev
	rm -rf dist $(WHEEL)
	$(CUDA) $(BIN)/python -m build
	PATH="$(CURDIR)/$(BIN):$$PATH"; $(REPAIR)
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python $(INSTALL) torch
	PATH= $(WHEEL)/bin/python -m pip install --quiet --disable-pip-version-check --no-index --find-links dist hpcloss
	$(WHEEL)/bin/python $(INSTALL) pytest pytest-timeout pytest-xdist hypothesis numpy
	$(WHEEL)/bin/python -I -c "import hpcloss; print(hpcloss.__file__); print(hpcloss.info())"
	$(CUDA) PATH= $(WHEEL)/bin/pytest $(OUTSIDE) tests/tools/wheel.py
	OMP_NUM_THREADS=1 $(WHEEL)/bin/pytest $(OUTSIDE) -n 2 $(OF_THE_WHEEL)

# 10,000 random configurations over all losses, hostile values, long runs, threads, workers, kills.
stress: $(VENV)/installed
	$(PYTEST) tests/tools/stress.py tests/repository/test_stress.py -n 2 --timeout 1200

# hpcloss.compat against the libraries themselves, which get an environment of their own.
parity: $(PEERS)/installed
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest tests/tools/parity_with_peers.py

# Every row (without `-m ""` the quick ones), then the tables and figures made from them. Wants an idle machine.
bench: $(PEERS)/installed
	$(PEERS)/bin/python -m pytest benchmarks --benchmark-only -m "" --results benchmarks/results/cpu.json
	$(PEERS)/bin/python -m benchmarks.plot

SCHEMA := $(BIN)/check-jsonschema --builtin-schema
check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/validate-pyproject pyproject.toml
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/loss.yml
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(BIN)/actionlint -shellcheck= -pyflakes= -ignore 'label "gpu" is unknown' .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, into build/site. Every link that leads nowhere and every name without a docstring is an error.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) $(PEERS) $(WHEEL) $(NVCC) .venv-triton-* build dist demo *.egg-info hpcloss/libhpcloss.* .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# torch first and alone: nothing that comes after may choose another build of it.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

# The package, and what a target needs beside it. Each builds the native library again where its sources changed.
$(VENV)/installed-quick: $(VENV)/torch setup.py pyproject.toml $(wildcard csrc/*)
	$(PIP) -e ".[test]"
	touch $@

$(VENV)/installed-demo: $(VENV)/torch setup.py pyproject.toml $(wildcard csrc/*)
	$(PIP) -e ".[examples]"
	touch $@

$(VENV)/installed-dev: $(VENV)/torch setup.py pyproject.toml $(wildcard csrc/*)
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/installed-docs: $(VENV)/torch setup.py pyproject.toml
	$(PIP) -e ".[docs]"
	touch $@

# nnU-Net without its transformers' timm, which needs a torchvision made for this very torch; before it what it imports.
$(VENV)/installed: $(VENV)/torch setup.py pyproject.toml $(wildcard csrc/*)
	$(PIP) -e ".[test,examples]" simpleitk scikit-image seaborn blosc2 connected-components-3d einops
	$(PIP) --no-deps nnunetv2 dynamic-network-architectures batchgenerators batchgeneratorsv2 acvl-utils
	touch $(VENV)/installed-quick $(VENV)/installed-demo $@

# The libraries without their dependencies: those would choose another build of torch.
$(PEERS)/installed: constraints.txt setup.py pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(INSTALL) torch
	$(PEERS)/bin/python $(INSTALL) -e . pytest pytest-benchmark matplotlib scipy scikit-learn tqdm
	$(PEERS)/bin/python $(INSTALL) --no-deps pytorch-metric-learning lightly info-nce-pytorch monai
	touch $@

# Nothing but Triton and its NumPy, for PYTHONPATH: the rest is that of the environment.
.PRECIOUS: .venv-triton-%/installed
.venv-triton-%/installed: | $(VENV)/installed
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) \
		triton==$* numpy==$(NUMPY_OF_OLDER_TRITON)
	touch $@

# Nothing but the compiler and its libraries, for CUDA_HOME. nvcc looks for libraries in lib64.
$(NVCC)/installed:
	rm -rf $(@D)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) $(NVCC_PACKAGES)
	ln -sfn lib $(@D)/nvidia/cu13/lib64
	touch $@
