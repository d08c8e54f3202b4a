# Every target creates .venv and installs what it needs, from tested versions, when that is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo ui test nightly test-ui test-comfy lint bench faults constraints lowest clean

demo: $(VENV)/installed
	$(BIN)/sd-hyena demo --out_dir demo-out --overwrite

ui: $(VENV)/installed
	$(BIN)/sd-hyena ui -m demo

# In Debian's Chromium, which root can install; without it, tests that need a browser are skipped and say why.
test-ui: $(VENV)/installed
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -q -y chromium; \
	else echo "Chromium is missing, and only root can install it (apt-get install chromium): no browser is tested"; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ui -rs

# Each worker computes on one thread: tests are many and small. JOBS=0 runs them one after the other. What needs a browser
# is test-ui's.
JOBS ?= 2
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --ignore tests/ui

# Slow twins of other tests too: more kernels and grids, every command in docs, whole suites.
nightly: export SD_HYENA_NIGHTLY = 1
nightly: test

# The host adapter in a real ComfyUI: make test-comfy COMFYUI_DIR=PATH; SD_HYENA_FULL_SIZE=1 adds a whole SD1.5 UNet.
test-comfy: $(VENV)/installed
	$(BIN)/pip install --quiet einops==0.8.2 scipy==1.17.1 torchsde==0.2.6
	COMFYUI_DIR="$(COMFYUI_DIR)" $(BIN)/python -m pytest -rsP tests/hosts

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

# Every file is compared with its hash in constraints.txt, but torch: its builds (CPU, CUDA) differ by machine, and which
# one it is is for pip's own configuration to say. What torch brings for a GPU has no hashes either.
TORCH := torch==2.13.0
$(VENV)/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement constraints.txt
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

UV := $(VENV)-uv/bin/uv
$(UV):
	$(PYTHON) -m venv $(VENV)-uv
	$(VENV)-uv/bin/pip install --quiet uv==0.13.9

# Renews constraints.txt: for changed bounds, or with UPGRADE=--upgrade for the newest versions within them.
constraints: $(UV)
	echo "torch; python_version < '0'" > $(VENV)-uv/without-torch.txt
	$(UV) pip compile --quiet --universal --generate-hashes --no-annotate $(UPGRADE) --python-version 3.11 \
		--extra dev --override $(VENV)-uv/without-torch.txt --custom-compile-command 'make constraints' \
		--output-file constraints.txt pyproject.toml constraints.in

# The tests with the lowest versions that pyproject.toml admits; torch is the package index's.
lowest: $(UV)
	$(PYTHON) -m venv $(VENV)-lowest
	$(UV) pip compile --quiet --resolution lowest-direct --python-version 3.11 \
		--output-file $(VENV)-lowest/versions.txt pyproject.toml
	$(UV) pip install --quiet --python $(VENV)-lowest --requirement $(VENV)-lowest/versions.txt --editable '.[dev]'
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n $(JOBS) --dist worksteal

clean:
	rm -rf $(VENV) $(VENV)-uv $(VENV)-lowest demo-out
