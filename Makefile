# Every target works alone in a clean clone and is safe to repeat. `constraints.txt` pins what is installed here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two workers, one thread each: losses are tested one call at a time, and two cores are what a small machine has.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-all bench check format clean

demo: $(VENV)/installed
	$(BIN)/python -m examples.three_stage --data builtin --out demo --resume

# The second run is that of the GPU kernels, on the CPU in Triton's interpreter.
test: $(VENV)/installed
	$(PYTEST) tests -n 2
	TRITON_INTERPRET=1 $(PYTEST) tests/test_kernels*.py -n 2

# Also every shipped tile shape on every GPU target, and every planted kernel mutation.
test-all: test
	$(PYTEST) tests -n 2 -m slow
	$(BIN)/python tests/mutations.py

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist demo *.egg-info hpcloss/libhpcloss.* .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# torch first and alone: nothing that comes after may choose another build of it.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/installed: $(VENV)/torch setup.py $(wildcard csrc/*)
	$(PIP) -e ".[test,dev,examples]"
	touch $@
