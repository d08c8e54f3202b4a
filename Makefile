# Every target creates .venv and installs what it needs, from tested versions, when that is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench faults clean

demo: $(VENV)/installed
	$(BIN)/sd-hyena demo --out_dir demo-out --overwrite

# Each worker computes on one thread: tests are many and small. JOBS=0 runs them one after the other.
JOBS ?= 2
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# BENCH=--full adds forward and backward at 2048 px.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/cpu_suite.py $(BENCH)

# FAULTS="hyena --seed 1 --no-page" runs one part; none of it all, and writes docs/faults.md.
faults: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m faults $(FAULTS)

# torch first and on its own, so that a CPU build found by pip's own configuration satisfies what follows.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-out
