# Every target works alone in a clean clone and is safe to repeat. `constraints.txt` pins what is installed here.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two workers, one thread each: losses are tested one call at a time, and two cores are what a small machine has.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-all bench check format clean

demo: $(VENV)/examples
	$(BIN)/python -m examples.three_stage --data builtin --out demo --resume

# The second run is that of the GPU kernels, on the CPU in Triton's interpreter.
test: $(VENV)/examples $(VENV)/dev
	$(PYTEST) tests -n 2
	TRITON_INTERPRET=1 $(PYTEST) tests/test_kernels*.py -n 2

# Also every shipped tile shape on every GPU target, and every planted kernel mutation.
test-all: test
	$(PYTEST) tests -n 2 -m slow
	$(BIN)/python tests/mutations.py

bench: $(VENV)/dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# torch first and alone: nothing that comes after may choose another build of it.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/dev: $(VENV)/torch setup.py
	$(PIP) -e ".[test,dev]"
	touch $@

$(VENV)/examples: $(VENV)/torch setup.py
	$(PIP) -e ".[examples]"
	touch $@
